"""Cut Firefly 1.1M into parts that each hold every kind in proportion, in the record format.

    python data/firefly/prepare.py --raw downloads/firefly-train-1.1M.jsonl

Out come firefly-train-0.json to firefly-train-4.json; each kind's records, in their order, are cut into runs of equal length.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import operator
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import option, run
from utils.console import progress, say
from utils.preparing import PrepareOptions, cleaned, find_raw, output_files, recognise
from utils.records import Dirty, RecordWriter, dialogue, writers

FILES = ("firefly-train-1.1M",)
Kinds = collections.Counter[str]
ENTRY = struct.Struct("<II")  # number of the kind, bytes of the record


@dataclasses.dataclass
class Options(PrepareOptions):
    parts: int = option(5, "how many files to cut the set into", least=1, most=100)


def main(options: Options) -> None:
    raw = find_raw(options.raw, FILES)[0]
    convert = {"firefly": single, "firefly dialogue": turns}[recognise(raw, "Firefly")]
    names = [f"firefly-train-{part}.json" for part in range(options.parts)]
    with output_files(options, "firefly", names, [raw]) as outputs, spool(outputs[0].parent) as (text, index):
        kinds = write_spool(cleaned(raw, convert, options), text, index)
        written = deal_out(kinds, text, index, outputs)
    print_totals(kinds, written, outputs)


def single(item: dict) -> dict:
    """A record of `kind`, `input`, `target`. Raises Dirty where there is no kind to share out by."""
    if type(item.get("kind")) is not str:
        raise Dirty("kind is missing" if item.get("kind") is None else "kind is no text")
    return {"instruction": item.get("input"), "output": item.get("target")}


def turns(item: dict) -> dict:
    """A record of `category` and `conversation`, a list of `{"human", "assistant"}`. Raises Dirty."""
    if type(item.get("category")) is not str:
        raise Dirty("category is missing" if item.get("category") is None else "category is no text")
    rounds = item.get("conversation")
    if not isinstance(rounds, list) or not all(isinstance(round, dict) for round in rounds):
        raise Dirty("conversation is not a list of rounds")
    pairs = [(("user", round.get("human")), ("assistant", round.get("assistant"))) for round in rounds]
    return dialogue([turn for pair in pairs for turn in pair])


@contextlib.contextmanager
def spool(folder: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Two files without names in `folder`, for the records and for kind and size of each; they go when the block ends."""
    with tempfile.TemporaryFile(dir=folder, buffering=1 << 20) as text, tempfile.TemporaryFile(dir=folder) as index:
        yield text, index


def write_spool(pairs: Iterator[tuple[dict, dict]], text: IO[bytes], index: IO[bytes]) -> Kinds:
    """Write the records one after the other, as they will stand in the parts. Returns how many there are of each kind.

    A kind's records can be dealt out only when their number is known; parsing 1.1 GB again would take longer than copying it.
    """
    writer = RecordWriter(text)
    kinds: Kinds = collections.Counter()
    numbers: dict[str, int] = {}
    for item, record in pairs:
        kind = item["kind"] if "kind" in item else item["category"]
        kinds[kind] += 1
        index.write(ENTRY.pack(numbers.setdefault(kind, len(numbers)), writer.write(record)))
    return kinds


def deal_out(kinds: Kinds, text: IO[bytes], index: IO[bytes], outputs: list[Path]) -> list[Kinds]:
    """Copy the records to the parts. Returns how many of each kind were written to each, and checks that these add up."""
    written: list[Kinds] = [collections.Counter() for _ in outputs]
    entries = progress(parts_of(kinds, index, len(outputs)), desc="parts", unit=" records", total=kinds.total(), miniters=1000)
    text.seek(0)
    with writers(outputs) as parts:
        for part, run in itertools.groupby(entries, key=operator.itemgetter(0)):
            count = length = 0
            for _, kind, size in run:
                count, length = count + 1, length + size
                written[part][kind] += 1
            parts[part].copy(text, length, count)
        if sum(written, collections.Counter()) != kinds:
            raise RuntimeError(f"dealt out {written}, but there were {kinds}")
    return written


def parts_of(kinds: Kinds, index: IO[bytes], parts: int) -> Iterator[tuple[int, str, int]]:
    """Part, kind and bytes of each record: the n records of a kind become runs of ceil(n / parts)."""
    names = list(kinds)
    runs = [math.ceil(count / parts) for count in kinds.values()]
    seen = [0] * len(kinds)
    index.seek(0)
    while entries := index.read(ENTRY.size * 4096):
        for number, size in ENTRY.iter_unpack(entries):
            yield seen[number] // runs[number], names[number], size
            seen[number] += 1


def print_totals(kinds: Kinds, written: list[Kinds], outputs: list[Path]) -> None:
    """Say how many records of each kind there are, in all and in each part."""
    width = max(map(len, kinds))
    for kind, count in kinds.most_common():
        say(f"{kind:<{width}} {count:>10,} = {' + '.join(f'{part[kind]:,}' for part in written)}")
    for output, part in zip(outputs, written, strict=True):
        say(f"{output}: {part.total():,} records of {len(part)} kinds")
    say(f"{kinds.total():,} records of {len(kinds)} kinds; the parts' totals are verified to add up to these")


if __name__ == "__main__":
    run(main, Options)
