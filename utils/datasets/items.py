"""Items read from files: each with its place, including those that cannot be read, in batches."""

import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson

from utils.console import UserError

BOM = b"\xef\xbb\xbf"
LONGEST = 1 << 24  # bytes of a line or an element, several times what a record may have; more is no data, or made to harm
T = TypeVar("T")
BATCH = 32  # items; each may be as long as a book
Item = tuple[int | str, Any]  # its place (see `place_of`) and its value


@dataclasses.dataclass(frozen=True)
class UnreadableItem:
    """Replaces an item that could not be read: why, and what is left of it."""

    cause: str
    rest: Any


BLANK = UnreadableItem("blank", None)


def in_batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """The items, `size` at a time."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def batched(read: Callable[..., Iterator[Item]]) -> Callable[..., Iterator[list[Item]]]:
    """Turn a reader of items into a reader of batches."""
    return functools.wraps(read)(lambda path, file: in_batches(read(path, file)))


def place_of(path: str | Path, number: int | str) -> str:
    """Where a user finds an item: file and line, or file and a text that says where in it."""
    return f"{path}, {number if isinstance(number, str) else f'line {number}'}"


def format_ending(path: Path) -> str:
    """The ending that names a file's format: the last but .gz, in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


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


def lines_of(path: Path, file: IO[bytes], size: int) -> Iterator[list[bytes]]:
    """The lines of a file, about `size` bytes of them at a time.

    Raises UserError for one that is too long to be held, as in a small file that is unpacked to an endless line.
    """
    parts: list[bytes] = []
    while chunk := file.read(size):
        cut = chunk.rfind(b"\n") + 1
        parts.append(chunk[:cut] if cut else chunk)
        if cut:
            yield io.BytesIO(b"".join(parts)).readlines()
            parts = [chunk[cut:]] if cut < len(chunk) else []
        elif sum(map(len, parts)) > LONGEST:
            raise UserError(f"{path}: has a line of more than {LONGEST >> 20} MB, which no record is; write one record a line")
    if parts:
        yield [b"".join(parts)]


def text_of(file: IO[bytes]) -> io.TextIOWrapper:
    """A file's text without byte-order mark; a byte that is not UTF-8 becomes a surrogate, so that only its record is lost."""
    return io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
