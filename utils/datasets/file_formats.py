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

from utils.console import UserError, say_once
from utils.datasets.item_formats import DIALOGUES, QUESTIONS
from utils.datasets.text_encoding import as_utf8
from utils.files import check_plain

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz")
BOM = b"\xef\xbb\xbf"
NAMED = {
    b"version https://git-lfs": "is a pointer of git-lfs, not the data; run git lfs pull where it comes from",
    b"PK\x03\x04": "is a zip archive or an Excel file; unpack it, or save the table as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an Excel or Word file; save the table as CSV (UTF-8)",
    b"<": "is a web page or XML, not data; the download needs a log-in or another address",
    b"%PDF": "is a PDF; write its text as records",
    b"7z\xbc\xaf": "is a 7z archive; unpack it",
    b"Rar!": "is a RAR archive; unpack it",
    b"BZh": "is compressed by bzip2; unpack it (bunzip2)",
    b"\xfd7zXZ": "is compressed by xz; unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it (unzstd)",
    b"SQLite format 3": "is a database of SQLite; write its table as CSV",
}
CHUNK = 1 << 20  # characters
BATCH = 32  # items, of which each may be as long as a book
BATCH_OF_LINES = 1 << 16  # bytes
ARROW_FILE, ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
COLUMNS = {*QUESTIONS, *DIALOGUES}  # one of these makes the first line of a table a header
GAP = re.compile(r"[ \t\r\n]*")


@dataclasses.dataclass(frozen=True)
class UnreadableItem:
    """Stands for an item that could not be read: why, and what there is of it."""

    cause: str
    rest: Any


BLANK = UnreadableItem("blank", None)


Item = tuple[int | str, Any]  # where it stands (see `place_of`), and what it is


def read_items(path: str | Path) -> Iterator[Item]:
    """The items of `read_batches`, one by one."""
    for batch in read_batches(path):
        yield from batch


def read_batches(path: str | Path) -> Iterator[list[Item]]:
    """Yield the items of a file, some hundred at a time, each with its line, or its row in a Parquet file, from 1.

    The format is recognised by the file's first bytes (JSON Lines in a file called .json, a gzipped file that is
    not called .gz), only CSV and TSV by their names. A line that cannot be read is yielded as `UnreadableItem`.
    Raises UserError if the file is missing, no plain file, empty, cut off, or of no such format.
    """
    path = Path(path)
    with opened(path) as file:
        refuse_other_formats(path, file)
        is_table = file.read(6).startswith((b"PAR1", ARROW_FILE, ARROW_STREAM))
        file.seek(0)
        text = file if is_table else as_utf8(path, file)
        yield from reader(path, text)(path, text)


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

    Raises UserError if that cannot be done, also for what fails while the block reads.
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


def format_ending(path: Path) -> str:
    """The ending that names a file's format: the last but .gz, in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def refuse_other_formats(path: Path, file: IO[bytes]) -> None:
    """Raises UserError for a file that is recognized and cannot be read, with what to do; leaves it at its beginning."""
    head = file.read(4096)
    file.seek(0)
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
    """True if the first line of a file is a whole list, and another line follows; leaves the file at its beginning."""
    line, more = file.readline(CHUNK), file.readline(CHUNK)
    file.seek(0)
    with contextlib.suppress(orjson.JSONDecodeError):
        return more.lstrip().startswith(b"[") and isinstance(orjson.loads(line.removeprefix(BOM)), list)
    return False


def json_lines(path: Path, file: IO[bytes]) -> Iterator[list[Item]]:
    """One JSON value a line; blank lines are passed over."""
    number = 1
    while lines := file.readlines(BATCH_OF_LINES):
        try:
            items = list(map(orjson.loads, lines))
            if keys_twice(lines, items):
                items = list(map(patient_loads, lines))
        except orjson.JSONDecodeError:
            if number == 1 and lines[0].removeprefix(BOM).strip() == b"{":
                raise UserError(
                    f"{path}: is one JSON object over several lines; write an array of records, or one record a line"
                ) from None
            items = list(map(patient_loads, lines))
        yield [(place, item) for place, item in enumerate(items, number) if item is not BLANK]
        number += len(lines)


def keys_twice(lines: list[bytes], items: list[Any]) -> bool:
    """True if lines of JSON may have more keys than what was made of them, as where a key stands twice in an object."""
    joined = b"".join(lines)
    seen = sum(joined.count(end) - joined.count(b"\\" + end) for end in (b'":', b'" :'))
    return seen > sum(len(item) for item in items if isinstance(item, dict)) and seen > sum(map(keys_in, items))


def keys_in(item: Any) -> int:
    """How many keys a value of JSON has, in all its objects."""
    if isinstance(item, dict):
        return len(item) + sum(keys_in(value) for value in item.values() if type(value) in (dict, list))
    return sum(map(keys_in, item)) if isinstance(item, list) else 0


class KeyTwice(ValueError):
    """A key that stands in an object twice, with different values."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text. Raises KeyTwice."""
    item = dict(pairs)
    if len(item) < len(pairs):
        for name, value in pairs:
            if value != item[name]:
                raise KeyTwice(f"two different values for {name[:40]}")
    return item


def patient_loads(line: bytes) -> Any:
    """Parse a line that orjson may refuse, for a byte-order mark or NaN in it; else it is `UnreadableItem`, or `BLANK`."""
    if not line.strip():
        return BLANK
    text = line.decode("utf-8-sig", "backslashreplace").strip()
    try:
        item = json.loads(line.decode("utf-8-sig").rstrip().removesuffix(","), object_pairs_hook=each_once)
    except KeyTwice as error:
        return UnreadableItem(str(error), text)
    except UnicodeDecodeError:
        return UnreadableItem("not UTF-8", text)
    except RecursionError:
        return UnreadableItem("nested too deeply", text)
    except ValueError:
        return UnreadableItem("not JSON" if line.endswith(b"\n") else "not JSON, and the file ends in it: cut off?", text)
    return without_surrogates(item)


def without_surrogates(item: Any) -> Any:
    """The item, or `UnreadableItem` if a text in it is not Unicode (half of a surrogate pair, or not UTF-8)."""
    if isinstance(item, UnreadableItem):
        return item
    try:
        orjson.dumps(item)
    except TypeError:  # orjson refuses some other things too: 65-bit integers, deep nesting
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            stray_byte = "\udc80" <= error.object[error.start] <= "\udcff"
            return UnreadableItem("not UTF-8" if stray_byte else "a lone surrogate", item)
        except RecursionError:
            return UnreadableItem("nested too deeply", None)
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
    """A part of a JSON text that moves forward: `text[at:]` is not yet parsed, `line` is the line of `text[at]`.

    By hand: ijson (3.6) takes a third of the processor time, but tells no line, and of a key that stands twice it drops one.
    """

    def __init__(self, path: Path, file: io.TextIOWrapper):
        self.path, self._file = path, file
        self._text, self._at, self.line = "", 0, 1
        self._decode = json.JSONDecoder(object_pairs_hook=each_once).raw_decode

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
        """Step over `mark`. Raises UserError if something else stands there."""
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
            except KeyTwice as error:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                value = UnreadableItem(str(error), value)
                break
            except (RecursionError, ValueError):
                raise self.error("holds something nested too deeply, or a number too long, to be read") from None
        self._move(end)
        return value

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what} in line {self.line}; fix the file, or fetch it again")


@batched
def csv_rows(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The rows of a CSV or TSV file as objects, after the header; cells that hold JSON lists are parsed.

    What separates the cells is what the header has most of its known names by. Where quotes around cells are only
    characters (see `is_unquoted`), this is printed, as is the number of rows with a line break in a cell.
    """
    csv.field_size_limit(1 << 30)
    delimiter = delimiter_of(path, file)
    unquoted = is_unquoted(file, delimiter)
    file.seek(0)
    rows = csv.reader(
        text_of(file), delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL
    )
    broken = 0
    try:
        header = checked_header(path, next(rows, []))
        start = rows.line_num + 1
        for row in rows:
            if row:
                broken += rows.line_num > start
                yield start, csv_item(header, row)
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: is not CSV ({error}) in line {rows.line_num}; fix the file") from None
    if unquoted:
        say_once(f"{path}: its quotation marks are not around cells; read as characters, with each line as a row")
    if broken:
        say_once(f"{path}: {broken:,} rows have a line break in a cell")


def delimiter_of(path: Path, file: IO[bytes]) -> str:
    """What separates the cells of a table: the character that gives the header the most names that are known."""
    first = file.readline(1 << 20).decode("utf-8-sig", "replace")
    file.seek(0)
    usual = "\t" if format_ending(path) == ".tsv" else ","

    def known(delimiter: str) -> tuple[int, bool]:
        names = {name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])}
        return len(names & COLUMNS), delimiter == usual

    return max((usual, ",", "\t", ";"), key=known)


def is_unquoted(file: IO[bytes], delimiter: str) -> bool:
    """True if the lines of a table are its rows, and a quotation mark at a cell's beginning is only a character.

    So it is where each line has as many cells as the first, and some quoted cell is not closed, or a TSV file's cells have
    quotation marks that a writer would not have needed; in a TSV file also where more rows fit so than with quoting.
    """
    cells = file.readline().count(mark := delimiter.encode())
    misfits = quotes = odd = doubled = plain = 0
    for line in file:
        if not (line := line.rstrip(b"\r\n")):
            continue
        misfits += line.count(mark) != cells
        if b'"' not in line:
            continue
        for cell in line.split(mark):
            if cell[:1] == b'"':
                quotes += 1
                inner = cell[1:-1] if len(cell) > 1 and cell.endswith(b'"') else b'"'
                odd += b'"' in inner.replace(b'""', b"")
                doubled += b'""' in inner
            else:
                odd += b'"' in cell
                plain += bool(cell)
    if not quotes:
        return False
    if not misfits:
        return bool(odd) or (delimiter == "\t" and bool(plain) and not doubled)
    return delimiter == "\t" and misfits < quoted_misfits(file, delimiter, cells + 1)


def quoted_misfits(file: IO[bytes], delimiter: str, cells: int) -> float:
    """How many rows of a table, read with quoting, do not have so many cells; infinite where it cannot be read so."""
    file.seek(0)
    text = text_of(file)
    try:
        return sum(len(row) not in (0, cells) for row in csv.reader(text, delimiter=delimiter, strict=True))
    except csv.Error:
        return float("inf")
    finally:
        text.detach()


def checked_header(path: Path, row: list[str]) -> list[str]:
    """The names of a table's columns, without blanks around them and in lower case.

    Raises UserError if none is known, or one stands there twice.
    """
    header = [name.strip().lower() for name in row]
    found = ", ".join(repr(name[:30]) for name in row[:8]) + (", …" if len(row) > 8 else "")
    if not COLUMNS & set(header):
        raise UserError(
            f"{path}: no column of its first line is called instruction; it has {found}: rename these to instruction, "
            "input and output, or, if that line is a record, write the line instruction,input,output above it"
        )
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]} (it has {found}); rename or remove one")
    return header


def csv_item(header: list[str], row: list[str]) -> Any:
    """One row as an object, `UnreadableItem` where it does not fit the header."""
    if len(row) != len(header):
        return UnreadableItem("more cells than the header" if len(row) > len(header) else "fewer cells than the header", row)
    item: dict[str, Any] = dict(zip(header, row, strict=True))
    for key in {"history", *DIALOGUES} & item.keys():
        with contextlib.suppress(ValueError):
            item[key] = json.loads(item[key] or "null")
    return without_surrogates(item)


@batched
def arrow_rows(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The rows of an Arrow file or stream (as `save_to_disk` of datasets writes it) as objects."""
    import pyarrow

    try:
        is_stream = file.read(4) == ARROW_STREAM
        file.seek(0)
        table = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
        batches = map(table.get_batch, range(table.num_record_batches)) if hasattr(table, "get_batch") else table
        number = 0
        for batch in batches:
            for start in range(0, len(batch), 256):
                for item in batch.slice(start, 256).to_pylist():
                    number += 1
                    yield f"row {number}", item
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cut off or damaged (Arrow: {error}); fetch it again") from None


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
