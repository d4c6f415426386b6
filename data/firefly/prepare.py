"""Cut Firefly 1.1M into parts with all kinds in proportion, in the record format.

    python data/firefly/prepare.py --raw downloads/firefly-train-1.1M.jsonl

Out come firefly-train-0.json to firefly-train-4.json; each kind's records, in their order, are cut into runs of equal length.
"""

import array
import collections
import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import option, run
from utils.console import say
from utils.datasets.item_formats import InvalidRecord, dialogue
from utils.datasets.preparing import PrepareOptions, cleaned, find_raw, output_files, recognize
from utils.datasets.record_writer import RecordWriter, writers
from utils.datasets.records import Record, printable

if TYPE_CHECKING:
    import numpy as np

Kinds = collections.Counter[str]


@dataclasses.dataclass
class Options(PrepareOptions):
    parts: int = option(5, "how many files to cut the set into", least=1, most=100)


def main(options: Options) -> None:
    raw = find_raw(options.raw, "Firefly")[0]
    convert = {"firefly": single, "firefly dialogue": turns}[recognize(raw, "Firefly")]
    names = [f"firefly-train-{part}.json" for part in range(options.parts)]
    with (
        output_files(options, "firefly", names, [raw], r"firefly-train-\d+\.json") as outputs,
        spool(outputs[0].parent) as (text, index),
    ):
        kinds = write_spool(cleaned(raw, convert, options), text, index)
        written = deal_out(kinds, text, index, outputs)
    print_totals(kinds, written, outputs)


def single(item: dict) -> dict:
    """A record of `kind`, `input`, `target`. Raises InvalidRecord if there is no kind to divide by."""
    if type(item.get("kind")) is not str:
        raise InvalidRecord("kind is missing" if item.get("kind") is None else "kind is not text")
    return {"instruction": item.get("input"), "input": "", "output": item.get("target")}


def turns(item: dict) -> dict:
    """A record of `category` and `conversation`, a list of `{"human", "assistant"}`. Raises InvalidRecord."""
    if type(item.get("category")) is not str:
        raise InvalidRecord("category is missing" if item.get("category") is None else "category is not text")
    rounds = item.get("conversation")
    if not isinstance(rounds, list) or not all(isinstance(round, dict) for round in rounds):
        raise InvalidRecord("conversation is not a list of rounds")
    pairs = [(("user", round.get("human")), ("assistant", round.get("assistant"))) for round in rounds]
    return dialogue([turn for pair in pairs for turn in pair])


@contextlib.contextmanager
def spool(folder: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Two nameless files in `folder`: for the records, and for the number of the kind and the bytes of each (uint32)."""
    with tempfile.TemporaryFile(dir=folder, buffering=1 << 20) as text, tempfile.TemporaryFile(dir=folder) as index:
        yield text, index


def write_spool(batches: Iterator[list[tuple[dict, Record]]], text: IO[bytes], index: IO[bytes]) -> Kinds:
    """Write the records one after the other, as they will stand in the parts. Returns how many there are of each kind.

    A kind's records can be distributed only once their number is known; parsing 1.1 GB again would take longer than copying it.
    """
    writer = RecordWriter(text)
    kinds: Kinds = collections.Counter()
    numbers: dict[str, int] = {}
    for batch in batches:
        names = [item["kind"] if "kind" in item else item["category"] for item, _ in batch]
        sizes = writer.write([record for _, record in batch])
        kinds.update(names)
        kind_numbers = [numbers.setdefault(name, len(numbers)) for name in names]
        array.array("I", itertools.chain.from_iterable(zip(kind_numbers, sizes, strict=True))).tofile(index)
    return kinds


def deal_out(kinds: Kinds, text: IO[bytes], index: IO[bytes], outputs: list[Path]) -> "np.ndarray":
    """Copy the records to the parts. Returns how many were written, (parts, kinds), and checks that they add up."""
    import numpy as np

    totals = np.array(list(kinds.values()))
    runs, seen = -(-totals // len(outputs)), np.zeros_like(totals)
    written: np.ndarray = np.zeros((len(outputs), len(totals)), int)
    text.seek(0)
    index.seek(0)
    with writers(outputs) as parts:
        while entries := index.read(1 << 16):
            numbers, sizes = np.frombuffer(entries, np.uint32).reshape(-1, 2).T
            places = parts_of(numbers, runs, seen)
            np.add.at(written, (places, numbers), 1)
            for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places)) + 1):
                parts[places[run[0]]].copy(text, int(sizes[run].sum()), len(run))
        if (written.sum(0) != totals).any():
            raise RuntimeError(f"distributed {written}, but there were {totals}")
    return written


def parts_of(numbers: "np.ndarray", runs: "np.ndarray", seen: "np.ndarray") -> "np.ndarray":
    """The part of each record, by the number of its kind: the first `runs[kind]` go to part 0, the next to 1 and so on.

    numbers: (records,); runs and seen: (kinds,). `seen` counts those of each kind that came before, and is moved on.
    """
    import numpy as np

    parts: np.ndarray = np.empty(len(numbers), int)
    for kind in np.unique(numbers):
        of_kind = np.flatnonzero(numbers == kind)
        parts[of_kind] = (seen[kind] + np.arange(len(of_kind))) // runs[kind]
        seen[kind] += len(of_kind)
    return parts


def print_totals(kinds: Kinds, written: "np.ndarray", outputs: list[Path]) -> None:
    """Print how many records of each kind there are, in all and in each part."""
    names = [printable(kind) for kind in kinds]
    width = max(map(len, names))
    for kind, count, row in sorted(zip(names, kinds.values(), written.T, strict=True), key=lambda line: -line[1]):
        say(f"{kind:<{width}} {count:>10,} = {' + '.join(f'{part:,}' for part in row)}")
    for output, row in zip(outputs, written, strict=True):
        say(f"{output}: {row.sum():,} records of {(row > 0).sum()} kinds")
    say(f"{kinds.total():,} records of {len(kinds)} kinds; the parts' totals add up to these, as verified")


if __name__ == "__main__":
    run(main, Options)
