"""The record format: what a record is, the dialogue formats that are turned into it, reading and writing files of records.

A record is `{"instruction": str, "input": str, "output": str}`, with `"history": [[question, answer], …]` where there
were earlier turns, `"system": str` where a text takes the place of the template's preamble, and the texts `category`
and `reference` where the file has them.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from utils.console import UserError, say
from utils.files import replacing
from utils.formats import Broken, Item, place_of, read_batches

FIELDS = ("instruction", "input", "output")
KEPT = ("category", "reference")
ROLES = {"human": "user", "user": "user", "system": "system"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"
)
LONGEST = 1_000_000  # characters of a record: several times what any model's window holds, and seconds of a tokenizer's time
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

    def add(self, what: str, cause: str, path: str | Path, number: int | str, item: Any) -> None:
        """Count an item that was `what` ("dropped" or "mended") because of `cause`."""
        if self.strict:
            raise UserError(f"{place_of(path, number)}: {cause}; mend the file, or leave --strict out to have it {what}")
        if (what, cause) in self._found:
            self._found[what, cause][0] += 1
        else:
            self._found[what, cause] = [1, shown(path, number, item)]

    def report(self, path: str | Path) -> None:
        """Say what was dropped and mended, a line a cause. Raises UserError where nothing was kept."""
        for (what, cause), (count, first) in self._found.items():
            say(f"{path}: {count:,} {what}, {self.kept:,} kept: {cause}; first: {first}")
        if not self.kept:
            dropped = [f"{cause}: {count:,}" for (what, cause), (count, _) in self._found.items() if what == "dropped"]
            causes = ", ".join(dropped) or "it holds none"
            raise UserError(f"{path}: no record in it can be used ({causes}); see data/README.md for the record format")


class Mended(NamedTuple):
    """What a converter returns for an item that it had to put right, and what was wrong."""

    raw: dict
    cause: str


def read_records(path: str | Path, need_output: bool = True, strict: bool = False) -> Iterator[dict]:
    """Stream the records of one file; at its end say which items were dropped, and why.

    The format is recognised (`utils.formats`), and in it alpaca records with or without history and system,
    ShareGPT (`conversations`), OpenAI (`messages`), and plain texts, which are prompts. With `need_output` False
    an empty or missing output is allowed, as prompts have none. With `strict` a bad record is an error.
    Raises UserError where the file cannot be read, and, at its end, where it held no record that can be used.
    """
    batches = (
        [(line, {"instruction": item} if isinstance(item, str) else item) for line, item in b] for b in read_batches(path)
    )
    for batch in clean(path, batches, as_record, Tally(strict), need_output):
        for _, record in batch:
            yield record


def clean(
    path: str | Path,
    batches: Iterable[list[Item]],
    convert: Callable[[Any], dict | Mended],
    tally: Tally,
    need_output: bool = True,
    is_new: Callable[[dict], bool] | None = None,
) -> Iterator[list[tuple[Any, dict]]]:
    """Yield the good items of each batch with their records, made by `convert` (which may raise Dirty); count the rest.

    Items should be objects. Where `is_new` is given, records that it denies are dropped as duplicates. At the end
    what was dropped and mended is said. Raises UserError where no record was left.
    """
    for batch in batches:
        records = None if is_new else all_good(batch, convert, need_output)
        if records is None:
            kept = list(one_by_one(path, batch, convert, tally, need_output, is_new))
        else:
            kept = [(item, record) for (_, item), record in zip(batch, records, strict=True)]
        tally.kept += len(kept)
        yield kept
    tally.report(path)


def all_good(batch: list[Item], convert: Callable[[Any], dict | Mended], need_output: bool) -> list[dict] | None:
    """The records of a batch in which nothing is dirty and no record has more than the three fields; else None.

    It says of a batch what `one_by_one` would, in a third of the time, as its loops are not Python's.
    """
    if {type(item) for _, item in batch} != {dict}:
        return None
    try:
        raws = [convert(item) for _, item in batch]
        fields: Any = [[raw[name] for raw in raws] for name in FIELDS]  # type: ignore[call-overload]
    except (Dirty, KeyError, TypeError):  # TypeError: it was `Mended`
        return None
    instructions, inputs, outputs = fields
    if {len(raw) for raw in raws} != {3} or {*map(type, instructions), *map(type, inputs), *map(type, outputs)} != {str}:
        return None
    needed = instructions + outputs if need_output else instructions
    joined = "".join(instructions + inputs + outputs)
    if len(joined) > LONGEST or not all(needed) or any(map(str.isspace, needed)) or "\r" in joined or "\ufeff" in joined:
        return None
    return [{"instruction": a, "input": b, "output": c} for a, b, c in zip(instructions, inputs, outputs, strict=True)]


def one_by_one(
    path: str | Path,
    batch: list[Item],
    convert: Callable[[Any], dict | Mended],
    tally: Tally,
    need_output: bool,
    is_new: Callable[[dict], bool] | None,
) -> Iterator[tuple[Any, dict]]:
    """The good items of a batch with their records; the others are counted."""
    for number, item in batch:
        cause = ""
        try:
            if type(item) is not dict:
                raise Dirty(item.cause if isinstance(item, Broken) else f"{KINDS.get(type(item), 'null')}, not an object")
            raw = convert(item)
            if isinstance(raw, Mended):
                raw, cause = raw
            record = checked(raw, need_output)
            if mend(record):
                checked(record, need_output)
                cause = cause or "CRLF or byte-order mark within a text, made LF or removed"
        except Dirty as dirt:
            tally.add("dropped", str(dirt), path, number, item)
            continue
        if is_new and not is_new(record):
            tally.add("dropped", "the same as an earlier record", path, number, item)
            continue
        if cause:
            tally.add("mended", cause, path, number, item)
        yield item, record


def shown(path: str | Path, number: int | str, item: Any, width: int = 80) -> str:
    """Place and beginning of an item, safe to print."""
    try:
        text = json.dumps(item.rest if isinstance(item, Broken) else item, ensure_ascii=False, default=str)
    except RecursionError:
        text = "(nested too deeply to be shown)"
    return f"{place_of(path, number)}: {printable(text[:width])}{'…' if len(text) > width else ''}"


def printable(text: str) -> str:
    """A text of a file's as it may be printed: control characters and lone surrogates are escaped."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def as_record(item: dict) -> dict:
    """Recognise the format of one item and give it the fields of a record, not yet checked. Raises Dirty."""
    if item.get("instruction") is None:
        if item.get("conversations") is not None:
            return item | dialogue(sharegpt_turns(item["conversations"]), item.get("system"))
        if item.get("messages") is not None:
            return item | dialogue(openai_turns(item["messages"]), item.get("system"))
    return item


def checked(raw: dict, need_output: bool = True) -> dict:
    """A record with the known fields of `raw` in their order.

    Raises Dirty where one is missing, empty or no text, or where all together are longer than `LONGEST`.
    """
    instruction, given, output = raw.get("instruction"), raw.get("input"), raw.get("output")
    if given is None:
        given = ""
    if output is None and not need_output:
        output = ""
    if not (type(instruction) is type(given) is type(output) is str):
        raise Dirty(no_text({"instruction": instruction, "input": given, "output": output}))
    if not instruction or instruction.isspace():
        raise Dirty("instruction is empty")
    if need_output and (not output or output.isspace()):
        raise Dirty("output is empty")
    record: dict[str, Any] = {"instruction": instruction, "input": given, "output": output}
    if raw.get("history"):
        record["history"] = checked_history(raw["history"])
    if raw.get("system"):
        if type(raw["system"]) is not str:
            raise Dirty(no_text({"system": raw["system"]}))
        record["system"] = raw["system"]
    for key in KEPT:
        if type(raw.get(key)) is str:
            record[key] = raw[key]
    if sum(map(characters, record.values())) > LONGEST:
        raise Dirty(f"more than {LONGEST:,} characters")
    return record


def characters(texts: Any) -> int:
    """How many a text has, or the texts in a list."""
    return sum(map(characters, texts)) if isinstance(texts, list) else len(texts)


def no_text(fields: dict[str, Any]) -> str:
    """Which field is no text, and what it is instead."""
    key, value = next((key, value) for key, value in fields.items() if type(value) is not str)
    return f"{key} is missing" if value is None else f"{key} is {KINDS.get(type(value), 'no text')}"


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
    clean_record = {key: mended(value) for key, value in record.items()}
    dirty = clean_record != record
    record.update(clean_record)
    return dirty


def mended(text: Any) -> Any:
    """A text, or the texts in a list, made clean."""
    if isinstance(text, list):
        return [mended(part) for part in text]
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")


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
    with writers([path]) as (writer,):
        for record in records:
            writer.write([record])
    return writer.count


@contextlib.contextmanager
def writers(paths: Sequence[str | Path]) -> Iterator[list["RecordWriter"]]:
    """Yield a writer for each path; all files are there when the block ends, none where it ends with an error."""
    with contextlib.ExitStack() as stack:
        asides = [stack.enter_context(replacing(path)) for path in paths]
        files = [stack.enter_context(open(aside, "wb", buffering=1 << 20)) for aside in asides]
        opened = [RecordWriter(file) for file in files]
        yield opened
        for writer in opened:
            writer.end()


class RecordWriter:
    """Writes records into an open binary file, byte for byte as `json.dump(…, ensure_ascii=False, indent=1)` would."""

    def __init__(self, file: Any):
        self._file = file
        self.count = 0

    def write(self, records: Sequence[dict]) -> list[int]:
        """Add records; returns the bytes that each takes."""
        texts = [encoded(record) for record in records]
        if texts:
            self._file.write(b",\n " + b" },\n ".join(texts) + b" }")
        self.count += len(texts)
        return [len(text) + 5 for text in texts]

    def copy(self, source: Any, size: int, count: int) -> None:
        """Add `count` records that another writer has written as the next `size` bytes of `source`."""
        self.count += count
        while size:
            size -= self._file.write(source.read(min(size, 1 << 20)))

    def end(self) -> None:
        """Make it one array: close it, and put its bracket in place of the first comma."""
        self._file.write(b"\n]\n" if self.count else b"[]\n")
        if self.count:
            self._file.seek(0)
            self._file.write(b"[")


def encoded(record: dict) -> bytes:
    """One record as it stands in an array of indent 1, without the space and brace at its end."""
    if "history" in record:
        return json.dumps(record, ensure_ascii=False, indent=1).replace("\n", "\n ").removesuffix(" }").encode()
    return orjson.dumps(record, option=orjson.OPT_INDENT_2)[:-1]  # texts alone come out the same, in a tenth of the time
