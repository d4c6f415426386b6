"""The record format: what a record is, the dialogue formats that are turned into it, reading and writing files of records.

A record is `{"instruction": str, "input": str, "output": str}`, with `"history": [[question, answer], …]` where there
were earlier turns, `"system": str` where a text takes the place of the template's preamble, and the texts `category`
and `reference` where the file has them.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from utils.console import UserError, progress, say
from utils.files import replacing
from utils.formats import Broken, place_of, read_items
from utils.sources import sources

FIELDS = ("instruction", "input", "output")
KEPT = ("category", "reference")
ROLES = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"
)
KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}


class Dirty(Exception):
    """Why an item of a file makes no record."""


class Tally:
    """Counts what was wrong with the records of a file, by cause, and keeps where each cause was met first.

    With `strict` the first is an error instead: UserError with place and cause.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.kept = 0
        self._found: dict[tuple[str, str], list] = {}

    @property
    def dropped(self) -> int:
        """How many items made no record."""
        return sum(count for (what, _), (count, _) in self._found.items() if what == "dropped")

    @property
    def causes(self) -> dict[str, int]:
        """How many items were dropped for each cause."""
        return {cause: count for (what, cause), (count, _) in self._found.items() if what == "dropped"}

    def add(self, what: str, cause: str, place: Callable[[], str]) -> None:
        """Count one record that was `what` ("dropped" or "mended") because of `cause`; `place` says where it stands."""
        if self.strict:
            raise UserError(f"{place()}: {cause}; mend the record, or leave --strict out to have it {what}")
        if (what, cause) in self._found:
            self._found[what, cause][0] += 1
        else:
            self._found[what, cause] = [1, place()]

    def report(self, name: str | Path) -> None:
        """Say what was dropped and mended, a line a cause; nothing where all was well."""
        if self._found:
            say(f"{name}: {self.kept:,} records, {self.dropped:,} dropped")
        for (what, cause), (count, first) in self._found.items():
            say(f"  {count:,} {what}: {cause}; first: {first}")


def read_records(path: str | Path, need_output: bool = True, strict: bool = False) -> Iterator[dict]:
    """Stream the records of one file; at its end say which items were dropped, and why.

    The format is recognised (`utils.formats`), and in it alpaca records with or without history and system,
    ShareGPT (`conversations`), OpenAI (`messages`), and plain texts, which are prompts. With `need_output` False
    an empty or missing output is allowed, as prompts have none. With `strict` a bad record is an error.
    Raises UserError where the file cannot be read.
    """
    tally = Tally(strict)
    yield from clean(path, read_items(path), lambda item: [as_record(item)], tally, need_output)
    tally.report(path)


def clean(
    path: str | Path,
    items: Iterable[tuple[int, Any]],
    convert: Callable[[Any], Iterable[dict]],
    tally: Tally,
    need_output: bool = True,
) -> Iterator[dict]:
    """Turn the numbered items of `path` into records by `convert`, which may raise Dirty; check, count, drop the rest."""
    for number, item in items:
        try:
            if isinstance(item, Broken):
                raise Dirty(item.cause)
            for raw in convert(item):
                try:
                    record = checked(raw, need_output)
                except Dirty as dirt:
                    tally.add("dropped", str(dirt), lambda: shown(path, number, item))  # noqa: B023 (called at once)
                    continue
                if mend(record):
                    cause = "CRLF or byte-order mark within a text, made LF or removed"
                    tally.add("mended", cause, lambda: shown(path, number, item))  # noqa: B023
                tally.kept += 1
                yield record
        except Dirty as dirt:
            tally.add("dropped", str(dirt), lambda: shown(path, number, item))  # noqa: B023


def shown(path: str | Path, number: int, item: Any, width: int = 80) -> str:
    """Place and beginning of an item, safe to print."""
    text = item.text if isinstance(item, Broken) else json.dumps(item, ensure_ascii=False, default=str)
    begin = text[:width].encode("utf-8", "backslashreplace").decode()
    return f"{place_of(path, number)}: {begin}{'…' if len(text) > width else ''}"


def as_record(item: Any) -> dict:
    """Recognise the format of one item and give it the fields of a record, not yet checked. Raises Dirty."""
    if isinstance(item, str):
        return {"instruction": item}
    if not isinstance(item, dict):
        raise Dirty(f"{KINDS.get(type(item), 'null')}, not an object")
    if item.get("instruction") is None:
        if item.get("conversations") is not None:
            return item | dialogue(sharegpt_turns(item["conversations"]), item.get("system"))
        if item.get("messages") is not None:
            return item | dialogue(openai_turns(item["messages"]), item.get("system"))
    return item


def checked(raw: dict, need_output: bool = True) -> dict:
    """A record with the known fields of `raw` in their order. Raises Dirty where one is missing, empty or no text."""
    instruction, given, output = raw.get("instruction"), raw.get("input"), raw.get("output")
    given = "" if given is None else given
    output = "" if output is None and not need_output else output
    for name, text in (("instruction", instruction), ("input", given), ("output", output)):
        if type(text) is not str:
            raise Dirty(f"{name} is missing" if text is None else f"{name} is {KINDS.get(type(text), 'no text')}")
    if not instruction.strip():  # type: ignore[union-attr]
        raise Dirty("instruction is empty")
    if need_output and not output.strip():  # type: ignore[union-attr]
        raise Dirty("output is empty")
    record = {"instruction": instruction, "input": given, "output": output}
    if raw.get("history"):
        record["history"] = checked_history(raw["history"])
    if raw.get("system"):
        if type(raw["system"]) is not str:
            raise Dirty(f"system is {KINDS.get(type(raw['system']), 'no text')}")
        record["system"] = raw["system"]
    record.update((key, raw[key]) for key in KEPT if type(raw.get(key)) is str)
    return record


def checked_history(history: Any) -> list[list[str]]:
    """Earlier turns as lists of two texts. Raises Dirty."""
    if not isinstance(history, (list, tuple)):
        raise Dirty("history is not a list")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(text) is str for text in pair)):
            raise Dirty("history is not a list of pairs of texts")
        if not all(text.strip() for text in pair):
            raise Dirty("history holds an empty turn")
    return [list(pair) for pair in history]


def mend(record: dict) -> bool:
    """Make CRLF into LF and remove byte-order marks in all texts of a record, in place; True where there were any."""

    def needs(text: str) -> bool:
        return "\r" in text or "\ufeff" in text

    def mended(text: str) -> str:
        return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")

    dirty = [key for key, value in record.items() if type(value) is str and needs(value)]
    for key in dirty:
        record[key] = mended(record[key])
    turns = any(needs(text) for pair in record.get("history", ()) for text in pair)
    if turns:
        record["history"] = [[mended(text) for text in pair] for pair in record["history"]]
    return bool(dirty) or turns


def dialogue(turns: list[tuple[str, Any]], system: Any = None) -> dict:
    """A record of `(role, text)` turns, roles "user", "assistant" and, in the first turn only, "system".

    Without a last answer the output is missing, as in a prompt. Raises Dirty where the turns do not alternate.
    """
    if turns and turns[0][0] == "system":
        if system and system != turns[0][1]:
            raise Dirty("two system texts")
        system, turns = turns[0][1], turns[1:]
    if not turns:
        raise Dirty("a dialogue without turns")
    if any(role != ("user", "assistant")[index % 2] for index, (role, _) in enumerate(turns)):
        raise Dirty("a dialogue whose turns are out of order")
    texts = [text for _, text in turns]
    if len(texts) % 2:
        texts.append(None)
    pairs = [[texts[index], texts[index + 1]] for index in range(0, len(texts), 2)]
    record = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1], "history": pairs[:-1]}
    return record | ({"system": system} if system else {})


def sharegpt_turns(conversations: Any) -> list[tuple[str, Any]]:
    """Turns of ShareGPT: `[{"from": human|gpt|…, "value": text}, …]`. Raises Dirty."""
    return [(role_of(turn, "from"), turn.get("value")) for turn in turns_in(conversations)]


def openai_turns(messages: Any) -> list[tuple[str, Any]]:
    """Turns of OpenAI: `[{"role", "content": text or [{"type": "text", "text"}, …]}, …]`. Raises Dirty."""
    return [(role_of(turn, "role"), content_of(turn.get("content"))) for turn in turns_in(messages)]


def turns_in(turns: Any) -> list[dict]:
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns):
        raise Dirty("a dialogue that is not a list of turns")
    return list(turns)


def role_of(turn: dict, key: str) -> str:
    role = turn.get(key)
    name = ROLES.get(role.lower()) if isinstance(role, str) else None
    if name is None:
        raise Dirty(f"a dialogue with the unknown role {str(role)[:30]!r}")
    return name


def content_of(content: Any) -> Any:
    """The text of an OpenAI message, its parts joined. Raises Dirty where a part is an image or the like."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" and type(part.get("text")) is str for part in content):
        raise Dirty("a dialogue with parts that are not text")
    return "".join(part["text"] for part in content)


def write_records(path: str | Path, records: Iterable[dict]) -> int:
    """Write records as they come: one JSON array, UTF-8, indent 1, whole or not at all. Returns their number."""
    with replacing(path) as aside, open(aside, "wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)
        writer.end()
    return writer.count


class RecordWriter:
    """Writes records into an open binary file, byte for byte as `json.dump(…, ensure_ascii=False, indent=1)` would."""

    def __init__(self, file: Any):
        self._file = file
        self.count = 0

    def write(self, record: dict) -> None:
        self._file.write((b",\n " if self.count else b"[\n ") + encoded(record))
        self.count += 1

    def end(self) -> None:
        """Close the array (not the file)."""
        self._file.write(b"\n]\n" if self.count else b"[]\n")


def encoded(record: dict) -> bytes:
    """One record as JSON within an array of indent 1. orjson writes the texts, ten times as fast as json with an indent."""
    dumps = orjson.dumps
    lines = []
    for key, value in record.items():
        text = dumps(value) if type(value) is str else json.dumps(value, ensure_ascii=False, indent=1).encode()
        lines.append(b'\n  "%b": %b' % (key.encode(), text.replace(b"\n", b"\n  ")))
    return b"{" + b",".join(lines) + b"\n }"


def load_records(data_path: str, seed: int = 42, need_output: bool = True) -> list[dict]:
    """All records that `data_path` stands for, file after file; says what was dropped, and what a weight leaves.

    `data_path` is a file, the name of a data set on the Hugging Face hub (`owner/name`), or several of these parted
    by commas, each with a weight where `:0.5` follows: half of its records, drawn with `seed`, kept in their order
    (2: each twice; 1.5: each once, and half of them again).
    Raises UserError where a part cannot be read, or leaves no record.
    """
    records = []
    for position, source in enumerate(sources(data_path)):
        found = []
        for file in source.files:
            found += progress(read_records(file, need_output), unit=" records", desc=file.name, leave=False)
        if not found:
            raise UserError(f"{source.name}: holds no record that can be used; see data/README.md for the record format")
        picked = weighted(found, source.weight, random.Random(f"{seed} {position}"))
        if source.weight != 1:
            say(f"{source.name}: weight {source.weight:g} makes {len(picked):,} of {len(found):,} records")
        records += picked
    if not records:
        raise UserError(f"{data_path}: the weights leave no record; give larger ones")
    return records


def weighted(records: list[dict], weight: float, random: random.Random) -> list[dict]:
    """`weight` times the records (rounded to a whole number), in order; the part below one whole is drawn."""
    whole, wanted = int(weight), round(weight * len(records))
    drawn = sorted(random.sample(range(len(records)), wanted - whole * len(records)))
    return records * whole + [records[index] for index in drawn]


def data_files(data_path: str) -> list[Path]:
    """The local files that `data_path` stands for (a hub name: its downloaded files). Raises UserError as load_records."""
    return [file for source in sources(data_path) for file in source.files]
