"""Files of items in the usual formats, streamed in constant memory: JSON, JSON Lines, CSV, Parquet, or these gzipped."""

import contextlib
import gzip
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson

from utils.console import UserError, say
from utils.datasets.csv_items import csv_rows
from utils.datasets.item_formats import InvalidRecord
from utils.datasets.items import BOM, Item, UnreadableItem, batched, format_ending, place_of
from utils.datasets.json_items import CHUNK, json_array, json_lines
from utils.datasets.text_encoding import as_utf8
from utils.files import check_plain

T = TypeVar("T")
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz")
NAMED = {
    b"version https://git-lfs": "is a git-lfs pointer, not the data; run git lfs pull in the repository it comes from",
    b"PK\x03\x04": "is a zip archive or an Excel file; unpack it, or save the table as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an Excel or Word file; save the table as CSV (UTF-8)",
    b"<": "is a web page or XML, not data; the download needs a login or another address",
    b"%PDF": "is a PDF; write its text as records",
    b"7z\xbc\xaf": "is a 7z archive; unpack it",
    b"Rar!": "is a RAR archive; unpack it",
    b"BZh": "is compressed with bzip2; unpack it (bunzip2)",
    b"\xfd7zXZ": "is compressed with xz; unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it (unzstd)",
    b"ORC": "is an ORC table; write it as Parquet or CSV",
    b"\x93NUMPY": "is a NumPy array; write its texts as records",
    b"\x80": "is a Python pickle, which may run code; write its records as JSON",
    b"SQLite format 3": "is an SQLite database; write its table as CSV",
}
LARGEST = 2 * 10**10  # bytes of a Parquet file that was gzipped
ROWS = 256  # of a table that become objects at once
ARROW_FILE, ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"


def read_items(path: str | Path) -> Iterator[Item]:
    """The items of `read_batches`, one by one."""
    for batch in read_batches(path):
        yield from batch


def read_batches(path: str | Path) -> Iterator[list[Item]]:
    """Yield the items of a file in batches, each item with its line, or its row in a table, counted from 1.

    The format is recognized by the file's first bytes (even JSON Lines named .json, or a gzipped file not named .gz);
    only CSV and TSV are recognized by their names. A line that cannot be read is yielded as `UnreadableItem`.
    Raises UserError if the file is missing, not a regular file, empty, cut off, or in another format.
    """
    path = Path(path)
    with opened(path) as file:
        refuse_other_formats(path, file)
        is_table = file.read(6).startswith((b"PAR1", ARROW_FILE, ARROW_STREAM))
        file.seek(0)
        text = file if is_table else as_utf8(path, file)
        yield from reader(path, text)(path, text)


def read_as(path: Path, convert: Callable[[Any], Iterable[T]], noun: str) -> Iterator[T]:
    """What `convert` makes of the items of one file (`noun`: what that is called); items for which it raises are dropped.

    At the end what was dropped is printed by cause, with the count and where it first occurs. Raises UserError if nothing
    is left.
    """
    dropped: Counter[str] = Counter()
    places: dict[str, str] = {}
    found = 0
    for number, item in read_items(path):
        try:
            if isinstance(item, UnreadableItem):
                raise InvalidRecord(item.cause)
            made = convert(item)
        except InvalidRecord as error:
            dropped[str(error)] += 1
            places.setdefault(str(error), place_of(path, number))
            continue
        found += 1
        yield from made
    for cause, count in dropped.most_common():
        say(f"{path}: {count} of {found + dropped.total()} {noun}s dropped: {cause} (the first: {places[cause]})")
    if not found:
        causes = ", ".join(f"{cause}: {count:,}" for cause, count in dropped.most_common()) or "it holds none"
        raise UserError(f"{path}: no {noun} in it can be used ({causes}); see data/README.md for their form")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed if it is gzipped.

    Raises UserError if opening it, or reading it within the block, fails.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a file in it")
    check_plain(path)
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if zipped:
                with gzip.open(raw) as file:
                    yield file  # type: ignore[misc]
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: cut off or damaged (gzip); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def refuse_other_formats(path: Path, file: IO[bytes]) -> None:
    """Raises UserError with advice for a file in a known unsupported format; leaves the file at its beginning."""
    head = file.read(4096)
    file.seek(0)
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: is a tar archive; unpack it (tar -xf), and name a file in it")
    for mark, advice in NAMED.items():
        if head.removeprefix(BOM).lstrip().startswith(mark) or head.startswith(mark):
            raise UserError(f"{path}: {advice}")


def reader(path: Path, file: IO[bytes]) -> Any:
    """The function that reads a file of this format; the file is left at its beginning."""
    head = file.peek(4096)[:4096]  # type: ignore[attr-defined]
    first = head.removeprefix(BOM).lstrip()[:1]
    endings = {ending.lower() for ending in path.suffixes}
    if not head:
        raise UserError(f"{path}: is empty; fetch or write it again")
    if head.startswith(b"PAR1"):
        return parquet_rows
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return arrow_rows
    if format_ending(path) in (".csv", ".tsv") and first not in (b"[", b"{"):
        return csv_rows
    if first == b"[":
        return json_lines if holds_lists(file) else json_array
    if first in (b"{", b'"', b"") or endings & {".jsonl", ".ndjson"}:
        return json_lines
    raise UserError(f"{path}: is neither JSON, JSON Lines, CSV (by its name) nor Parquet; check that it is the right file")


def holds_lists(file: IO[bytes]) -> bool:
    """True if the first line of a file is a complete list, and another list follows; leaves the file at its beginning."""
    line, more = file.readline(CHUNK), file.readline(CHUNK)
    file.seek(0)
    with contextlib.suppress(orjson.JSONDecodeError):
        return more.lstrip().startswith(b"[") and isinstance(orjson.loads(line.removeprefix(BOM)), list)
    return False


def rows_in(batches: Iterable[Any]) -> Iterator[Item]:
    """The rows of batches of a table, as objects, numbered from 1."""
    rows = (item for batch in batches for item in batch.to_pylist())
    for number, item in enumerate(rows, 1):
        yield f"row {number}", item


@batched
def arrow_rows(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The rows of an Arrow file or stream (as written by `save_to_disk` of datasets) as objects."""
    import pyarrow

    try:
        is_stream = file.read(4) == ARROW_STREAM
        file.seek(0)
        table = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        batches = map(table.get_batch, range(table.num_record_batches)) if hasattr(table, "get_batch") else table
        yield from rows_in(batch.slice(start, ROWS) for batch in batches for start in range(0, len(batch), ROWS))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cut off or damaged (Arrow: {error}); fetch it again") from None


@batched
def parquet_rows(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The rows of a Parquet file as objects."""
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        if isinstance(file, gzip.GzipFile):  # Parquet is read from the end, which gzip does not allow
            unzipped = stack.enter_context(tempfile.TemporaryFile())
            while chunk := file.read(1 << 20):
                if unzipped.write(chunk) and unzipped.tell() > LARGEST:
                    raise UserError(f"{path}: unpacks to more than {LARGEST / 1e9:.0f} GB; unpack it yourself (gunzip)")
            file = unzipped
        try:
            yield from rows_in(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=ROWS))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cut off or damaged (Parquet: {error}); fetch it again") from None
