"""Write couplets in the record format: the first line is the instruction, the second the output.

    python data/couplets/prepare.py --raw downloads/couplet

Out come couplet-0.json (train), couplet-1.json (test) and couplet-all.json (both); of a TSV file only couplet-all.json.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import option, run
from utils.console import UserError, say
from utils.datasets.file_formats import opened
from utils.datasets.item_formats import InvalidRecord
from utils.datasets.items import Item, UnreadableItem
from utils.datasets.preparing import PrepareOptions, cleaned, output_files, refuse_json
from utils.datasets.record_writer import writers
from utils.datasets.sources import check_exists
from utils.datasets.text_encoding import as_utf8

HEADERS = {  # column names in files of couplets
    *(("上联", "下联"), ("上句", "下句"), ("上聯", "下聯"), ("出句", "对句"), ("first", "second"), ("in", "out")),
    *(("input", "output"), ("instruction", "output"), ("up", "down"), ("upper", "lower"), ("shanglian", "xialian")),
    *(("question", "answer"), ("text1", "text2"), ("source", "target"), ("src", "tgt"), ("left", "right"), ("text", "label")),
}


@dataclasses.dataclass
class Options(PrepareOptions):
    instruction: str | None = option(None, "a text such as 对下联 for the instruction; the first line is then the input")


def main(options: Options) -> None:
    parts, raw = find_parts(options.raw)
    for path in raw:
        refuse_json(path, "Couplets")
    names = [f"couplet-{number}.json" for number in range(len(parts))] if len(parts) > 1 else []
    names = [*names, "couplet-all.json"]
    with output_files(options, "couplets", names, raw, r"couplet-\w+\.json") as outputs, writers(outputs) as written:
        for number, (path, pairs) in enumerate(parts):
            for batch in cleaned(path, functools.partial(couplet, options), options, pairs):
                for writer in {written[number], written[-1]}:
                    writer.write([record for _, record in batch])
    for output, writer in zip(outputs, written, strict=True):
        say(f"{output}: {writer.count:,} records")


def find_parts(raw: str) -> tuple[list[tuple[Path, Iterator[Item]]], list[Path]]:
    """The parts of the set, each with a path for messages and its pairs of lines; and all files that they are read from.

    Raises UserError if a file is missing.
    """
    if {".tar", ".tgz"} & set(Path(raw).suffixes):
        raise UserError(f"{raw}: is an archive; unpack it (tar -xf {raw}), and name the folder that holds train and test")
    if Path(raw).name.removesuffix(".gz") in ("in.txt", "out.txt"):
        raise UserError(f"{raw}: holds one half of each couplet; name the folder that holds train and test")
    if Path(raw).is_file():
        return [(Path(raw), tsv_pairs(Path(raw)))], [Path(raw)]
    folder = Path(raw, "couplet") if Path(raw, "couplet").is_dir() else Path(raw)
    files = [plain_or_gzipped(folder / part / name) for part in ("train", "test") for name in ("in.txt", "out.txt")]
    return [(first, text_pairs(first, second)) for first, second in (files[:2], files[2:])], files


def plain_or_gzipped(path: Path) -> Path:
    """The file of that name, or of that name with .gz. Raises UserError if neither is there."""
    gzipped = path.with_name(f"{path.name}.gz")
    if gzipped.exists() and not path.exists():
        return gzipped
    check_exists(path)
    return path


def lines_of(path: Path) -> Iterator[str | None]:
    """The lines of a text file, None for one that is not UTF-8. Raises UserError if the file cannot be read."""
    with opened(path) as file:
        for line in as_utf8(path, file):
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:
                yield None


def text_pairs(first: Path, second: Path) -> Iterator[Item]:
    """Line by line of two files, the first and the second lines of couplets. Raises UserError if one file is shorter."""
    for number, (one, two) in enumerate(itertools.zip_longest(lines_of(first), lines_of(second), fillvalue=""), 1):
        if one is None or two is None:
            yield number, UnreadableItem("not UTF-8", one or two or "")
        elif bool(one) != bool(two) and (one + two).strip():
            shorter = second if one else first
            raise UserError(f"{shorter}: ends before line {number}, but the other file continues; fetch both again")
        elif one.strip() or two.strip():
            yield number, pair(number, one, two)


def tsv_pairs(path: Path) -> Iterator[Item]:
    """The pairs of a file with both lines of a couplet on each line, separated by a tab."""
    for number, line in enumerate(lines_of(path), 1):
        halves = line.split("\t") if line is not None else []
        if line is None or len(halves) != 2:
            yield number, UnreadableItem("not UTF-8" if line is None else "not two halves with a tab between them", line or "")
        else:
            yield number, pair(number, *halves)


def pair(number: int, first: str, second: str) -> dict | UnreadableItem:
    """Both halves without spaces. Raises InvalidRecord for a header in the first line."""
    first, second = ("".join(half.split()) for half in (first, second))
    if number == 1 and (first.lower(), second.lower()) in HEADERS:
        return UnreadableItem("a header, not a couplet", f"{first} {second}")
    return {"first": first, "second": second}


def couplet(options: Options, halves: dict) -> dict:
    """A record of two halves. Raises InvalidRecord if they differ in length, in characters."""
    first, second = halves["first"], halves["second"]
    if len(first) != len(second):
        raise InvalidRecord("halves of different length")
    if options.instruction:
        return {"instruction": options.instruction, "input": first, "output": second}
    return {"instruction": first, "input": "", "output": second}


if __name__ == "__main__":
    run(main, Options)
