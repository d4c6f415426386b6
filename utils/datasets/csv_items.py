"""CSV and TSV: the delimiter, whether quotation marks enclose cells, and which columns are known."""

import contextlib
import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.console import UserError, say_once
from utils.datasets.item_formats import DIALOGUES, QUESTIONS
from utils.datasets.items import LONGEST, Item, UnreadableItem, batched, format_ending, lines_of, text_of, without_surrogates

UNQUOTED: dict[str, Any] = {"quoting": csv.QUOTE_NONE}
ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}  # as MySQL and Spark write quotation marks in cells
COLUMNS = {*QUESTIONS, *DIALOGUES}  # one of these makes the first line of a table a header


@batched
def csv_rows(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The rows of a CSV or TSV file as objects, after the header; cells that hold JSON lists are parsed.

    The delimiter is the one that splits the header into the most known names. If quotation marks are ordinary characters
    (see `style_of`), this is printed, as is the number of rows with a line break in a cell.
    """
    csv.field_size_limit(LONGEST)
    delimiter = delimiter_of(path, file)
    style = style_of(path, file, delimiter)
    file.seek(0)
    rows = csv.reader(text_of(file), delimiter=delimiter, strict=True, **style)
    broken = 0
    try:
        header = checked_header(path, next(filter(None, rows), []))
        start = rows.line_num + 1
        for row in rows:
            if row:
                broken += rows.line_num > start
                yield start, csv_item(header, row)
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: is not CSV ({error}) in line {rows.line_num}; fix the file") from None
    if style == UNQUOTED:
        say_once(f"{path}: its quotation marks do not enclose cells; they are read as characters, and each line as a row")
    if broken:
        say_once(f"{path}: {broken:,} rows have a line break in a cell")


def delimiter_of(path: Path, file: IO[bytes]) -> str:
    """The delimiter of a table: the character that splits its header into the most known names."""
    lines = re.split(r"[\r\n]+", file.read(1 << 20).decode("utf-8-sig", "replace"))
    first = next(filter(str.strip, lines), "")
    file.seek(0)
    usual = "\t" if format_ending(path) == ".tsv" else ","

    def known(delimiter: str) -> tuple[int, bool]:
        names = {name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])}
        return len(names & COLUMNS), delimiter == usual

    return max((usual, ",", "\t", ";"), key=known)


def style_of(path: Path, file: IO[bytes], delimiter: str) -> dict[str, Any]:
    """How a table uses quotation marks, as options of `csv.reader`.

    They are ordinary characters, and each line is a row, if each line has as many cells as the first, and some quoted cell
    is not closed or a TSV file has quotation marks that no writer would need; for a TSV file also if more rows have the
    right number of cells than with quoting. Those in cells have a backslash if only so the file can be read.
    """
    lines = itertools.chain.from_iterable(lines_of(path, file, 1 << 20))
    cells = next(lines, b"").count(mark := delimiter.encode())
    misfits = quotes = odd = doubled = plain = escaped = 0
    for line in lines:
        if not (line := line.rstrip(b"\r\n")):
            continue
        misfits += line.count(mark) != cells
        if b'"' not in line:
            continue
        escaped += b'\\"' in line
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
        return {}
    if escaped and quoted_misfits(file, delimiter, cells + 1) and not quoted_misfits(file, delimiter, cells + 1, ESCAPED):
        return ESCAPED
    if not misfits:
        return UNQUOTED if odd or (delimiter == "\t" and plain and not doubled) else {}
    return UNQUOTED if delimiter == "\t" and misfits < quoted_misfits(file, delimiter, cells + 1) else {}


def quoted_misfits(file: IO[bytes], delimiter: str, cells: int, style: dict[str, Any] | None = None) -> float:
    """How many rows of a table, read with quoting, have another number of cells; infinite if it cannot be read that way."""
    file.seek(0)
    text = text_of(file)
    try:
        return sum(len(row) not in (0, cells) for row in csv.reader(text, delimiter=delimiter, strict=True, **(style or {})))
    except csv.Error:
        return float("inf")
    finally:
        text.detach()


def checked_header(path: Path, row: list[str]) -> list[str]:
    """The names of a table's columns, stripped and in lower case.

    Raises UserError if none is known, or one occurs twice.
    """
    header = [name.strip().lower() for name in row]
    found = ", ".join(repr(name[:30]) for name in row[:8]) + (", …" if len(row) > 8 else "")
    if not COLUMNS & set(header):
        raise UserError(
            f"{path}: no column in its first line is called instruction; it has {found}: rename these to instruction, "
            "input and output, or, if that line is a record, write the line instruction,input,output above it"
        )
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]} (it has {found}); rename or remove one")
    return header


def csv_item(header: list[str], row: list[str]) -> Any:
    """One row as an object, or `UnreadableItem` if it does not fit the header."""
    if len(row) != len(header):
        return UnreadableItem("more cells than the header" if len(row) > len(header) else "fewer cells than the header", row)
    item: dict[str, Any] = dict(zip(header, row, strict=True))
    for key in {"history", *DIALOGUES} & item.keys():
        with contextlib.suppress(ValueError):
            item[key] = json.loads(item[key] or "null")
    return without_surrogates(item)
