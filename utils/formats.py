"""Files of items in any usual format, streamed in constant memory: JSON, JSON Lines, CSV, Parquet, or these gzipped."""

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from utils.console import UserError
from utils.files import check_plain

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")
BOM = b"\xef\xbb\xbf"
OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}
CHUNK = 1 << 20  # characters
BATCH = 32  # items, of which each may be as long as a book
BATCH_OF_LINES = 1 << 16  # bytes
GAP = re.compile(r"[ \t\r\n]*")


@dataclasses.dataclass(frozen=True)
class Broken:
    """Stands for an item that could not be read: why, and what there is of it."""

    cause: str
    rest: Any


BLANK = Broken("blank", None)


Item = tuple[int | str, Any]  # where it stands (see `place_of`), and what it is


def read_items(path: str | Path) -> Iterator[Item]:
    """The items of `read_batches`, one by one."""
    for batch in read_batches(path):
        yield from batch


def read_batches(path: str | Path) -> Iterator[list[Item]]:
    """Yield the items of a file, some hundred at a time, each with its line, or its row in a Parquet file, from 1.

    The format is recognised by the file's first bytes (JSON Lines in a file called .json, a gzipped file that is
    not called .gz), only CSV and TSV by their names. A line that cannot be read is yielded as `Broken`.
    Raises UserError where the file is missing, no plain file, empty, cut off, or of no such format.
    """
    path = Path(path)
    with opened(path) as file:
        yield from reader(path, file)(path, file)


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items, `BATCH` at a time."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, BATCH)):
        yield batch


def batched(read: Callable[..., Iterator[Item]]) -> Callable[..., Iterator[list[Item]]]:
    """Make a reader of items one of batches."""
    return functools.wraps(read)(lambda path, file: in_batches(read(path, file)))


def place_of(path: str | Path, number: int | str) -> str:
    """How a user finds an item again: file and line (Parquet: row), or file and a text that says where in it."""
    if isinstance(number, str):
        return f"{path}, {number}"
    return f"{path}, {'row' if '.parquet' in Path(path).suffixes else 'line'} {number}"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed where it is gzipped.

    Raises UserError where that cannot be done, also for what fails while the block reads.
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


def reader(path: Path, file: IO[bytes]) -> Any:
    """The function that reads a file of this format; the file is left at its beginning."""
    head = file.read(4096)
    file.seek(0)
    first = head.removeprefix(BOM).lstrip()[:1]
    endings = {ending.lower() for ending in path.suffixes}
    for mark, name in OTHER_ENCODINGS.items():
        if head.startswith(mark):
            raise UserError(f"{path}: is {name}; convert it to UTF-8")
    if not head:
        raise UserError(f"{path}: is empty; fetch or write it again")
    if head.startswith(b"PAR1"):
        return parquet_rows
    if endings & {".csv", ".tsv"}:
        return csv_rows
    if first == b"[":
        return json_array
    if first in (b"{", b'"', b"") or endings & {".jsonl", ".ndjson"}:
        return json_lines
    raise UserError(f"{path}: is neither JSON, JSON Lines, CSV (by its name) nor Parquet; check that it is the right file")


def json_lines(path: Path, file: IO[bytes]) -> Iterator[list[Item]]:
    """One JSON value a line; blank lines are passed over."""
    number = 1
    while lines := file.readlines(BATCH_OF_LINES):
        try:
            items = list(map(orjson.loads, lines))
        except orjson.JSONDecodeError:
            if number == 1 and lines[0].removeprefix(BOM).strip() == b"{":
                raise UserError(
                    f"{path}: is one JSON object over several lines; write an array of records, or one record a line"
                ) from None
            items = list(map(patient_loads, lines))
        yield [(place, item) for place, item in enumerate(items, number) if item is not BLANK]
        number += len(lines)


def patient_loads(line: bytes) -> Any:
    """Parse a line that orjson may refuse, for a byte-order mark or NaN in it; else it is `Broken`, or `BLANK`."""
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(line)
    if not line.strip():
        return BLANK
    text = line.decode("utf-8-sig", "backslashreplace").strip()
    try:
        item = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Broken("not UTF-8", text)
    except RecursionError:
        return Broken("nested too deeply", text)
    except ValueError:
        return Broken("not JSON" if line.endswith(b"\n") else "not JSON, and the file ends in it: cut off?", text)
    return without_surrogates(item)


def without_surrogates(item: Any) -> Any:
    """The item, or `Broken` where a text in it is no Unicode (half of a surrogate pair, or bytes that are not UTF-8)."""
    try:
        orjson.dumps(item)
    except TypeError:  # orjson refuses some other things too: 65-bit integers, deep nesting
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            stray_byte = "\udc80" <= error.object[error.start] <= "\udcff"
            return Broken("not UTF-8" if stray_byte else "a lone surrogate", item)
        except RecursionError:
            return Broken("nested too deeply", None)
    return item


def text_of(file: IO[bytes]) -> io.TextIOWrapper:
    """A file's text without byte-order mark; a byte that is not UTF-8 becomes a surrogate, and costs only its record."""
    return io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")


@batched
def json_array(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The elements of one JSON array, parsed as they are read; the array is never held whole."""
    window = Window(path, text_of(file))
    window.skip("[")
    before = number = 0
    while not window.at("]"):
        line, item, number = window.line, window.element(), number + 1
        # the line alone tells nothing in an array on one line
        yield f"line {line}, item {number}" if line == before else line, without_surrogates(item)
        before = line
        if not window.at("]"):
            window.skip(",")
    window.skip("]")
    if window.peek():
        raise window.error("goes on after the end of its array")


class Window:
    """A part of a JSON text that moves forward: `text[at:]` is not yet parsed, `line` is the line of `text[at]`."""

    def __init__(self, path: Path, file: io.TextIOWrapper):
        self.path, self._file = path, file
        self._text, self._at, self.line = "", 0, 1
        self._decode = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        """Read on, at least as much as is waiting (so that a long element costs linear time); False at the end."""
        more = self._file.read(max(CHUNK, len(self._text) - self._at))
        if more:
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _move(self, at: int) -> None:
        self.line += self._text.count("\n", self._at, at)
        self._at = at

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            self._move(GAP.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def at(self, mark: str) -> bool:
        """True where the next character is `mark`. Raises UserError at the end of the file."""
        found = self.peek()
        if not found:
            raise self.error("is cut off")
        return found == mark

    def skip(self, mark: str) -> None:
        """Step over `mark`. Raises UserError where something else stands there."""
        if not self.at(mark):
            raise self.error(f"is not JSON (a {mark} is missing)")
        self._move(self._at + 1)

    def element(self) -> Any:
        """Parse the next value and step over it; further text is read until it is whole."""
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                # `1` at the end may be the beginning of `12` or `1e+5`
                if len(self._text) - end > 2 or not self._more():
                    break
            except json.JSONDecodeError as error:
                # An error close to the end, or a string without one, may only mean that the rest is not read yet.
                open_string = error.msg.startswith("Unterminated string")
                if (open_string or error.pos > len(self._text) - 16) and self._more():
                    continue
                self._move(error.pos)
                cut = open_string or not self.peek()
                raise self.error("is cut off" if cut else f"is not JSON ({error.msg})") from None
            except (RecursionError, ValueError):
                raise self.error("holds something nested too deeply, or a number too long, to be read") from None
        self._move(end)
        return value

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what} in line {self.line}; mend the file, or fetch it again")


@batched
def csv_rows(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The rows of a CSV file (TSV by its name) as objects, after the header; cells that hold JSON lists are parsed."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    rows = csv.reader(text_of(file), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if "instruction" not in header and not set(header) & {"messages", "conversations"}:
            raise UserError(f"{path}: no column of its first line is called instruction; add the line instruction,input,output")
        start = rows.line_num + 1
        for row in rows:
            if row:
                yield start, csv_item(header, row)
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: is not CSV ({error}) in line {rows.line_num}; mend the file") from None


def csv_item(header: list[str], row: list[str]) -> Any:
    """One row as an object, `Broken` where it does not fit the header."""
    if len(row) != len(header):
        return Broken("more cells than the header" if len(row) > len(header) else "fewer cells than the header", row)
    item: dict[str, Any] = dict(zip(header, row, strict=True))
    for key in {"history", "messages", "conversations"} & item.keys():
        with contextlib.suppress(ValueError):
            item[key] = json.loads(item[key] or "null")
    return without_surrogates(item)


@batched
def parquet_rows(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The rows of a Parquet file as objects, some hundred at a time."""
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        if isinstance(file, gzip.GzipFile):  # Parquet is read from its end, which gzip cannot do
            unzipped = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unzipped)
            file = unzipped
        try:
            table = pyarrow.parquet.ParquetFile(file)
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for item in batch.to_pylist():
                    number += 1
                    yield number, item
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cut off or damaged (Parquet: {error}); fetch it again") from None
