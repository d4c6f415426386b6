"""What the data/<set>/prepare.py scripts share: finding and recognizing raw files, cleaning, writing to $DATA_DIR."""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import os
import re
import sqlite3
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from utils.cli import option
from utils.console import UserError, progress, say
from utils.datasets.file_formats import opened, read_batches
from utils.datasets.items import Item, in_batches
from utils.datasets.json_items import patient_loads
from utils.datasets.raw_sets import FILES, SHAPES, shape_of
from utils.datasets.record_writer import write_records
from utils.datasets.records import Record, Repaired, Tally, clean, printable
from utils.datasets.sources import check_exists
from utils.datasets.text_faults import FIXES
from utils.files import check_folder, locked

Convert = Callable[[dict], dict | Repaired]


@dataclasses.dataclass
class PrepareOptions:
    """The options of every prepare.py."""

    raw: str = option(help="the downloaded file, or the folder that holds the downloaded files")
    output_dir: str | None = option(
        None, "where the prepared files go; default: this set's folder under $DATA_DIR (./datasets)"
    )
    strict: bool = option(False, "end with an error at the first bad record, instead of counting and dropping it")
    dedupe: bool = option(False, "drop records that are the same as an earlier one in their file")
    fix_texts: list[str] = option([], "fix what earlier processing broke in texts", choices=FIXES)


def find_raw(raw: str, name: str) -> list[Path]:
    """The raw file, or those files of the raw folder that have the names of the set's `FILES` (with any ending).

    Raises UserError if there is none, or one of them is there twice.
    """
    path, stems = Path(raw), FILES[name]
    check_exists(path)
    if not path.is_dir():
        return [path]
    files = [file for stem in stems for file in sorted(path.iterdir()) if stem_of(file) == stem and file.is_file()]
    if not files:
        raise UserError(
            f"{raw}: this folder holds none of the files {', '.join(stems)}; name the folder or file you downloaded"
        )
    found = list(map(stem_of, files))
    double = [file.name for file in files if found.count(stem_of(file)) > 1]
    if double:
        raise UserError(f"{raw}: holds {' and '.join(double)}, which are the same file twice; name one of them")
    left = [stem for stem in stems if stem not in found]
    if left:
        say(f"{raw}: missing, and left out: {', '.join(left)}")
    return files


def stem_of(path: Path) -> str:
    """A file's name without format endings (`firefly-train-1.1M.jsonl.gz`: `firefly-train-1.1M`)."""
    name = path.name
    while name.endswith((".json", ".jsonl", ".gz", ".tar", ".tgz", ".csv", ".parquet")):
        name = name.rpartition(".")[0]
    return name


def raw_batches(path: Path) -> Iterator[list[Item]]:
    """The items of a raw file of any format, or of the members of a tar archive, in batches."""
    return in_batches(archive_items(path)) if {".tar", ".tgz"} & set(path.suffixes) else read_batches(path)


def archive_items(path: Path) -> Iterator[Item]:
    """The JSON files in a tar archive (gzipped or not), in the archive's order, read as a stream."""
    with opened(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None and not Path(member.name).name.startswith("."):  # macOS adds ._ files
                        yield f"member {printable(member.name)}", patient_loads(content.read())
        except tarfile.TarError as error:
            raise UserError(f"{path}: cut off, damaged, or not a tar archive ({error}); fetch it again") from None


def recognize(path: Path, name: str) -> str:
    """The shape, among those of the set `name`, that a file's first hundred items have.

    Prints a notice if neither fields nor file name tell which set it belongs to.
    Raises UserError for a file of another set: what it has, what it lacks, and which set it looks like.
    """
    items = itertools.chain.from_iterable(raw_batches(path))
    first = [item for _, item in itertools.islice(items, 100) if isinstance(item, dict)]
    if not first:
        raise UserError(f"{path}: this is not {name}: its first items are not JSON objects; check that it is the right file")
    found = [best for best in map(shape_of, first) if best]
    fitting = [best for best in found if name in SHAPES[best].sets]
    if fitting:
        best = max(fitting, key=fitting.count)
        say_whose(path, name, [other for other in SHAPES[best].sets if other != name])
        return best
    has = SHAPES[found[0]].keys if found else frozenset(first[0])
    looks = f"this looks like {' or '.join(SHAPES[found[0]].sets)}, not {name}" if found else f"this is not {name}"
    wanted = max(
        (shape.keys for shape in SHAPES.values() if name in shape.sets), key=lambda keys: len(keys & has), default=frozenset()
    )
    lacks = f" and lacks {listed(wanted - has)}" if wanted - has else ""
    speaker = SHAPES[found[0]].speaker if found else ""
    turns = f" (a dialogue that begins with {speaker})" if speaker else ""
    raise UserError(f"{path}: {looks}: it has {listed(has)}{turns}{lacks}; check that it is the right file")


def say_whose(path: Path, name: str, others: Sequence[str]) -> None:
    """Print that a file is taken for one of the set `name` if `others` have the same fields and its name is unknown."""
    if others and stem_of(path) not in FILES[name]:
        owner = next((other for other in others if stem_of(path) in FILES[other]), None)
        doubt = f"it is named like a file of {owner}" if owner else "its name does not tell"
        say(f"{path}: taken for {name}, as asked; {' and '.join(others)} have the same fields, and {doubt}")


def refuse_json(path: Path, name: str) -> None:
    """Raise UserError if a file is JSON and so not of the set `name`, which is plain text."""
    with opened(path) as file:
        begins_as_json = file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
    if begins_as_json:
        recognize(path, name)


def listed(keys: Iterable[str], most: int = 6) -> str:
    """Names of keys for an error, no more than fit on a line."""
    names = sorted(printable(key[:30]) for key in keys)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "") if names else "no keys"


@contextlib.contextmanager
def output_files(
    options: PrepareOptions, folder: str, names: Sequence[str], raw: Sequence[Path], series: str = ""
) -> Iterator[list[Path]]:
    """Yield the paths of the files to write, while their folder is locked for this run.

    Files whose names match the regular expression `series` belong together. Files of an earlier run that will be replaced,
    or that stay in its series, are printed. What a killed run left half-written is removed first. After an error no new
    folder stays.
    Raises UserError if the folder is a file or in use, or if an output would replace a raw file.
    """
    target = Path(options.output_dir or Path(os.environ.get("DATA_DIR") or "datasets", folder))
    outputs = [target / name for name in names]
    for output, source in itertools.product(outputs, raw):
        if output.exists() and output.samefile(source):
            raise UserError(f"{output}: is the raw file itself; give another --output_dir, or move the raw file")
    check_folder(target)
    new = list(itertools.takewhile(lambda path: not os.path.exists(path), (target, *target.parents)))
    try:
        with locked(target):
            target.mkdir(exist_ok=True)
            for output in outputs:
                for left in target.glob(f".{glob.escape(output.name)}.*.part"):
                    left.unlink()
            say_what_was_there(target, names, series)
            yield outputs
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(target)  # for the error line: a full disk gives no name
        for parent in new:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def say_what_was_there(target: Path, names: Sequence[str], series: str) -> None:
    """Print the prepared files of an earlier run in the folder `target`: those to be replaced, and the rest of its series."""
    there = [name for name in names if (target / name).exists()]
    if there:
        say(f"{target}: files of an earlier run, replaced once the new ones are complete: {', '.join(there)}")
    rest = sorted(file.name for file in target.iterdir() if re.fullmatch(series, file.name) and file.name not in names)
    if rest:
        say(f"{target}: files of an earlier run that do not belong to the new ones: {', '.join(rest)}; delete them")


def cleaned(
    path: Path, convert: Convert, options: PrepareOptions, items: Iterable[Item] | None = None
) -> Iterator[list[tuple[Any, Record]]]:
    """Yield the items of a raw file (or only `items`) with their records, a batch at a time, as `records.clean` does."""
    batches = raw_batches(path) if items is None else in_batches(items)
    is_new = Seen().add if options.dedupe else None
    return clean(path, with_bar(batches, path.name), convert, Tally(options.strict, options.fix_texts), is_new=is_new)


def with_bar(batches: Iterable[list[Item]], name: str) -> Iterator[list[Item]]:
    """The batches, while a progress bar counts the records."""
    with progress(desc=name, unit=" records") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


class Seen:
    """Remembers records by their digests, in a database on disk, so that memory stays constant."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")  # a temporary file of SQLite's, deleted when this ends
        self._base.execute("PRAGMA cache_size = -65536")  # KiB
        self._base.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, record: Record) -> bool:
        """Remember a record; False if it was there before."""
        digest = hashlib.blake2b(orjson.dumps(record), digest_size=16).digest()
        try:
            return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1
        except sqlite3.OperationalError as error:
            raise UserError(f"--dedupe: {error}; free the temporary folder, or set TMPDIR to another") from None


def convert_each(name: str, folder: str, converters: Mapping[str, Convert], options: PrepareOptions) -> None:
    """Turn each raw file of the set `name` into one file of the same name, by the converter of its shape.

    All raw files are recognized before the first is written.
    """
    files = find_raw(options.raw, name)
    shapes = [recognize(file, name) for file in files]
    with output_files(options, folder, [f"{stem_of(file)}.json" for file in files], files) as outputs:
        for file, shape, output in zip(files, shapes, outputs, strict=True):
            records = (record for batch in cleaned(file, converters[shape], options) for _, record in batch)
            count = write_records(output, records)
            say(f"{output}: {count:,} records")
