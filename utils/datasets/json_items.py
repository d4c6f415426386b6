"""JSON and JSON Lines as streams: an array is never entirely in memory, and a broken line costs only its record."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from utils.console import UserError
from utils.datasets.items import BLANK, BOM, LONGEST, Item, UnreadableItem, batched, lines_of, text_of, without_surrogates

CHUNK = 1 << 20  # characters
BATCH_OF_LINES = 1 << 16  # bytes
GAP = re.compile(r"[ \t\r\n]*")


def json_lines(path: Path, file: IO[bytes]) -> Iterator[list[Item]]:
    """One JSON value per line; blank lines are skipped."""
    number = 1
    for lines in lines_of(path, file, BATCH_OF_LINES):
        try:
            items = list(map(orjson.loads, lines))
            if keys_twice(lines, items):
                items = list(map(patient_loads, lines))
        except orjson.JSONDecodeError:
            if number == 1 and lines[0].removeprefix(BOM).strip() == b"{":
                raise UserError(
                    f"{path}: is one JSON object over several lines; write an array of records, or one record per line"
                ) from None
            items = list(map(patient_loads, lines))
        yield [(place, item) for place, item in enumerate(items, number) if item is not BLANK]
        number += len(lines)


def keys_twice(lines: list[bytes], items: list[Any]) -> bool:
    """True if lines of JSON may have more keys than the parsed items, as when an object has a key twice."""
    joined = b"".join(lines)
    seen = sum(joined.count(end) - joined.count(b"\\" + end) for end in (b'":', b'" :'))
    return seen > sum(len(item) for item in items if isinstance(item, dict)) and seen > sum(map(keys_in, items))


def keys_in(item: Any) -> int:
    """How many keys a JSON value has, in all its objects."""
    if isinstance(item, dict):
        return len(item) + sum(keys_in(value) for value in item.values() if type(value) in (dict, list))
    return sum(map(keys_in, item)) if isinstance(item, list) else 0


class KeyTwice(ValueError):
    """An object has a key twice, with different values."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these keys and values. Raises KeyTwice."""
    item = dict(pairs)
    if len(item) < len(pairs):
        for name, value in pairs:
            if value != item[name]:
                raise KeyTwice(f"two different values for {name[:40]}")
    return item


def patient_loads(line: bytes) -> Any:
    """Parse a line that orjson may refuse because of a byte-order mark or NaN; or return `UnreadableItem` or `BLANK`."""
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
        return UnreadableItem("not JSON" if line.endswith(b"\n") else "not JSON, and the last line of the file: cut off?", text)
    return without_surrogates(item)


@batched
def json_array(path: Path, file: IO[bytes]) -> Iterator[Item]:
    """The elements of one JSON array, parsed as they are read; the array is never entirely in memory."""
    window = Window(path, text_of(file))
    window.skip("[")
    before = number = 0
    while not window.at("]"):
        line, item, number = window.line, window.element(), number + 1
        # in an array on one line, the line alone says nothing
        yield f"line {line}, item {number}" if line == before else line, without_surrogates(item)
        before = line
        if not window.at("]"):
            window.skip(",")
    window.skip("]")
    if window.peek():
        raise window.error("continues after the end of its array")


class Window:
    """A part of a JSON text that moves forward: `text[at:]` is not yet parsed, `line` is the line of `text[at]`.

    Written by hand: ijson (3.6) takes a third of the CPU time, but gives no line numbers and drops one of two equal keys.
    """

    def __init__(self, path: Path, file: io.TextIOWrapper):
        self.path, self._file = path, file
        self._text, self._at, self.line = "", 0, 1
        self._decode = json.JSONDecoder(object_pairs_hook=each_once).raw_decode

    def _more(self) -> bool:
        """Read more, at least as much as is unparsed (so that a long element takes linear time); False at the end."""
        if len(self._text) - self._at > LONGEST:
            raise self.error(f"holds an element of more than {LONGEST >> 20} MB, which no record is,")
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
        """True if the next character is `mark`. Raises UserError at the end of the file."""
        found = self.peek()
        if not found:
            raise self.error("is cut off")
        return found == mark

    def skip(self, mark: str) -> None:
        """Step over `mark`. Raises UserError if something else is there."""
        if not self.at(mark):
            raise self.error(f"is not JSON (a {mark} is missing)")
        self._move(self._at + 1)

    def element(self) -> Any:
        """Parse the next value and step over it; more text is read until it is complete."""
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                # a `1` at the end may be the beginning of `12` or `1e+5`
                if len(self._text) - end > 2 or not self._more():
                    break
            except json.JSONDecodeError as error:
                # An error near the end, or an unterminated string, may only mean that the rest is not read yet.
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
