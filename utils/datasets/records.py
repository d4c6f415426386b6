"""The record format: what a record is, and reading files of records (dropped and fixed ones are counted).

A record is `{"instruction": str, "input": str, "output": str}`, with `"history": [[question, answer], …]` if there were
earlier turns, `"system": str` if a text replaces the template's preamble, the texts `category` and `reference` if the file
has them, and `"learn": [bool, …]`, one for each answer (the history's, then the output), if some answers are only to be
read, not learned. If a chat template supports tools, a record may have `"tools"`, as OpenAI defines them, and, if they are
called, the whole dialogue as `"messages"`, of which the fields above are the last question and its answer.
"""

import collections
import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict, cast

from utils.console import UserError, say, say_once
from utils.datasets.file_formats import read_batches
from utils.datasets.item_formats import (
    ALPACA,
    DIALOGUES,
    FIELDS,
    KEPT,
    MATERIALS,
    QUESTIONS,
    InvalidRecord,
    as_record,
    is_label,
    is_set,
    parsed,
)
from utils.datasets.items import Item, UnreadableItem, place_of
from utils.datasets.raw_sets import has_choices, prepared_by
from utils.datasets.text_faults import (
    BROKEN_LATEX,
    FAULTS,
    cleaned,
    faults_in,
    has_broken_latex,
    is_clean,
    with_backslashes,
    with_fixed,
)
from utils.datasets.tool_calls import as_record_with_tools

LONGEST = 1_000_000  # characters of a record: several times any model's window, and seconds of tokenizing
HOLDERS = ("train", "data")  # names of the records to learn beside others in one object
ASKED = {*QUESTIONS, *MATERIALS, *DIALOGUES, "text"}  # fields of items that hold a question, not records
KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}


class Record(TypedDict, total=False):
    """A question and its answer, as above; a prompt has no `output`, and a result has its thoughts in `reasoning`."""

    instruction: Required[str]
    input: str
    output: str
    history: list[list[str]]
    system: str
    category: str
    reference: str
    learn: list[bool]
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    reasoning: str


class Tally:
    """Counts what was wrong with the records of a file, by cause, and keeps where each cause first occurred.

    With `strict` the first one is an error instead: UserError with place and cause. `fixes` names the faults in texts
    (see `utils.datasets.text_faults`) to fix; the others are left, and counted.
    """

    def __init__(self, strict: bool = False, fixes: Collection[str] = ()):
        self.strict = strict
        self.fixes = {*FAULTS, "latex"} if "all" in fixes else set(fixes)
        self.kept = 0
        self._found: dict[tuple[str, str], list] = {}
        self._left: dict[str, list] = {}
        self._unused: collections.Counter[str] = collections.Counter()
        self._read_as: collections.Counter[str] = collections.Counter()

    def add(self, what: str, cause: str, path: str | Path, number: int | str, item: Any) -> None:
        """Count an item that was `what` ("dropped" or "repaired") because of `cause`."""
        if self.strict:
            raise UserError(f"{place_of(path, number)}: {cause}; fix the file, or leave --strict out to have it {what}")
        if (what, cause) in self._found:
            self._found[what, cause][0] += 1
        else:
            self._found[what, cause] = [1, shown(path, number, item)]

    def leave(self, fault: str, path: str | Path, number: int | str, item: Any) -> None:
        """Count an item whose texts have a fault that is left unchanged."""
        self._left.setdefault(fault, [0, shown(path, number, item)])[0] += 1

    def note(self, raw: dict) -> None:
        """Count fields of a raw record that were read under other names, and those that were not read."""
        self._unused.update(raw.get("unused", ()))
        self._read_as.update([raw["read_as"]] if "read_as" in raw else ())

    def report(self, path: str | Path) -> None:
        """Print what was dropped and fixed, one line per cause, and unused fields. Raises UserError if nothing was kept."""
        for renaming, count in self._read_as.items():
            say(f"{path}: {count:,} records: {renaming}")
        if self._unused:
            names = [f"{printable(name[:40])} ({count:,})" for name, count in self._unused.most_common(12)]
            more = f", and {len(self._unused) - 12} more" if len(self._unused) > 12 else ""
            say(f"{path}: unused fields, with the number of records that have them: {', '.join(names)}{more}")
        for (what, cause), (count, first) in self._found.items():
            say(f"{path}: {count:,} {what}, {self.kept:,} kept: {cause}; first: {first}")
        for fault, (count, first) in self._left.items():
            way = f"data/clean.py --fix_texts {fault} {'fixes' if FAULTS[fault].fixed else 'drops'} them"
            say(f"{path}: {count:,} kept unchanged, with {FAULTS[fault].what}; {way}; first: {first}")
        if not self.kept:
            dropped = [f"{cause}: {count:,}" for (what, cause), (count, _) in self._found.items() if what == "dropped"]
            causes = ", ".join(dropped) or "it holds none"
            raise UserError(f"{path}: no record in it can be used ({causes}); see data/README.md for the record format")


class Repaired(NamedTuple):
    """What a converter returns for an item that it repaired, and what was wrong."""

    raw: dict
    cause: str


def read_records(
    path: str | Path,
    need_output: bool = True,
    strict: bool = False,
    fixes: Collection[str] = (),
    carries: Collection[str] = (),
) -> Iterator[Record]:
    """Stream the records of one file; at its end print which items were dropped, and why.

    The file format is recognized (`utils.datasets.file_formats`), and in it alpaca records with or without history and
    system, ShareGPT (`conversations`), OpenAI (`messages`), and plain texts, which are prompts. With `need_output` False
    an empty or missing output is allowed, as for prompts. With `strict` a bad record is an error. `fixes`: see `Tally`.
    `carries`: which of "tools" and "calls" their template supports; without "calls", dialogues with tool calls are dropped.
    Raises UserError if the file cannot be read or, at its end, had no usable record.
    """
    batches = ([one for place, item in batch for one in unwrapped(path, place, item)] for batch in read_batches(path))
    convert = functools.partial(prepared_record, carries=carries)
    for batch in clean(path, checked_first(path, batches, need_output), convert, Tally(strict, fixes), need_output):
        for _, record in batch:
            yield record


def unwrapped(path: str | Path, place: int | str, item: Any) -> list[Item]:
    """Turn a text into a prompt, a list of turns into a dialogue, and an item that holds records into these."""
    if isinstance(item, str):
        return [(place, {"instruction": item})]
    held = held_in(path, item) if isinstance(item, dict) and not ASKED & item.keys() else item
    if not is_list_of_objects(held):
        return [(place, item)]
    if all({"role", "from"} & turn.keys() for turn in held):
        return [(place, {"messages": held})]
    return [(place, one) for one in held]


def held_in(path: str | Path, item: dict) -> Any:
    """The list that an object without a question holds: its only one, or that of a split for training. What is beside it is
    not read, which is printed."""
    lists = [name for name, value in item.items() if is_list_of_objects(value)]
    chosen = lists[0] if len(lists) == 1 else next((name for name in lists if name in HOLDERS), "")
    if not chosen:
        return item
    left = [printable(name[:40]) for name, value in item.items() if name != chosen and is_set(value)]
    if left:
        say_once(f"{path}: the records in {printable(chosen[:40])} are read, not what is beside them: {', '.join(left[:8])}")
    return item[chosen]


def is_list_of_objects(value: Any) -> bool:
    """True for a list that holds objects only, and at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def checked_first(path: str | Path, batches: Iterable[list[Item]], need_output: bool) -> Iterator[list[Item]]:
    """The batches. Raises UserError if most items of the first are those of a raw set that must be prepared first or, in a
    file to learn from, questions with choices."""
    for number, batch in enumerate(batches):
        if number == 0:
            scripts = [script for _, item in batch if isinstance(item, dict) and (script := prepared_by(item))]
            if len(scripts) > len(batch) / 2:
                script = max(scripts, key=scripts.count)
                raise UserError(
                    f"{path}: is a raw downloaded set; first run python {script} --raw {path}, then give the files it writes"
                )
            if need_output and sum(isinstance(item, dict) and has_choices(item) for _, item in batch) > len(batch) / 2:
                raise UserError(
                    f"{path}: holds multiple-choice questions, whose choices would not be read; judge.py --choices asks "
                    "them; to train on them, write question and choices into instruction, the answer into output"
                )
        yield batch


def prepared_record(item: dict, carries: Collection[str] = ()) -> dict:
    """The raw record of an item. Raises InvalidRecord if it is an item of a raw downloaded set."""
    if script := prepared_by(item):
        raise InvalidRecord(f"an item of a raw downloaded set, for {script}")
    if not carries or item.keys() <= ALPACA:
        return as_record(item)
    return as_record_with_tools(item, carries)


def clean(
    path: str | Path,
    batches: Iterable[list[Item]],
    convert: Callable[[Any], dict | Repaired],
    tally: Tally,
    need_output: bool = True,
    is_new: Callable[[Record], bool] | None = None,
) -> Iterator[list[tuple[Any, Record]]]:
    """Yield the good items of each batch with their records, made by `convert` (which may raise InvalidRecord); count the rest.

    Items should be objects. Records for which `is_new` (if given) returns False are dropped as duplicates. At the end
    what was dropped and repaired is printed. Raises UserError if no record is left.
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


def all_good(batch: list[Item], convert: Callable[[Any], dict | Repaired], need_output: bool) -> list[Record] | None:
    """The records of a batch in which nothing is wrong and no record has more than the three fields; else None.

    The result is that of `one_by_one`, in a third of the time, since its loops are not in Python.
    """
    if {type(item) for _, item in batch} != {dict}:
        return None
    try:
        raws = [convert(item) for _, item in batch]
        fields: Any = [[raw[name] for raw in raws] for name in FIELDS]  # type: ignore[call-overload]
    except (InvalidRecord, KeyError, TypeError):  # TypeError: it is `Repaired`
        return None
    instructions, inputs, outputs = fields
    if {len(raw) for raw in raws} != {3} or {*map(type, instructions), *map(type, inputs), *map(type, outputs)} != {str}:
        return None
    needed = instructions + outputs if need_output else instructions
    joined = "".join(instructions + inputs + outputs)
    if len(joined) > LONGEST or not all(needed) or any(map(str.isspace, needed)) or not is_clean(joined, inputs + outputs):
        return None
    return [{"instruction": a, "input": b, "output": c} for a, b, c in zip(instructions, inputs, outputs, strict=True)]


def one_by_one(
    path: str | Path,
    batch: list[Item],
    convert: Callable[[Any], dict | Repaired],
    tally: Tally,
    need_output: bool,
    is_new: Callable[[Record], bool] | None,
) -> Iterator[tuple[Any, Record]]:
    """The good items of a batch with their records; the others are counted."""
    for number, item in batch:
        cause = ""
        try:
            if type(item) is not dict:
                raise InvalidRecord(
                    item.cause if isinstance(item, UnreadableItem) else f"{KINDS.get(type(item), 'null')}, not an object"
                )
            raw = convert(item)
            if isinstance(raw, Repaired):
                raw, cause = raw
            record, causes, left = without_faults(validate(raw, need_output), tally.fixes, need_output)
        except InvalidRecord as error:
            tally.add("dropped", str(error), path, number, item)
            continue
        if is_new and not is_new(record):
            tally.add("dropped", "the same as an earlier record", path, number, item)
            continue
        for one in [cause] * bool(cause) or causes:
            tally.add("repaired", one, path, number, item)
        for fault in left:
            tally.leave(fault, path, number, item)
        tally.note(raw)
        yield item, record


def shown(path: str | Path, number: int | str, item: Any, width: int = 80) -> str:
    """Place and beginning of an item, safe to print."""
    try:
        text = json.dumps(item.rest if isinstance(item, UnreadableItem) else item, ensure_ascii=False, default=str)
    except RecursionError:
        text = "(nested too deeply to be shown)"
    return f"{place_of(path, number)}: {printable(text[:width])}{'…' if len(text) > width else ''}"


def printable(text: str) -> str:
    """A text from a file, safe to print: control characters and lone surrogates are escaped."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def validate(raw: dict, need_output: bool = True) -> Record:
    """A record with the known fields of `raw`, in order.

    Raises InvalidRecord if one is missing, empty or not a text, or if together they are longer than `LONGEST`.
    """
    instruction, given, output = raw.get("instruction"), raw.get("input"), raw.get("output")
    if given is None or given == []:
        given = ""
    if output is None and not need_output:
        output = ""
    if not (type(instruction) is type(given) is type(output) is str):
        raise InvalidRecord(no_text({"instruction": instruction, "input": given, "output": output}))
    if not instruction or instruction.isspace():
        raise InvalidRecord("instruction is empty")
    messages = raw.get("messages") or []
    if need_output and (not output or output.isspace()) and not (messages and messages[-1].get("tool_calls")):
        raise InvalidRecord("output is empty")
    record: dict[str, Any] = {"instruction": instruction, "input": given, "output": output}
    if history := parsed(raw.get("history")):
        record["history"] = checked_history(history)
    if raw.get("system"):
        if type(raw["system"]) is not str:
            raise InvalidRecord(no_text({"system": raw["system"]}))
        record["system"] = raw["system"]
    record |= {key: str(raw[key]) for key in KEPT if is_label(raw.get(key))}
    record |= {key: raw[key] for key in ("tools", "messages") if raw.get(key)}
    if sum(map(characters, record.values())) > LONGEST:
        raise InvalidRecord(f"more than {LONGEST:,} characters")
    if raw.get("learn"):
        if need_output and not any(raw["learn"]):
            raise InvalidRecord("no answer in it is to be learned")
        record["learn"] = raw["learn"]
    return cast(Record, record)


def characters(texts: Any) -> int:
    """How many characters a text has, or the texts in a list or an object."""
    if isinstance(texts, dict):
        return sum(map(characters, texts.values()))
    return sum(map(characters, texts)) if isinstance(texts, list) else len(texts) if isinstance(texts, str) else 1


def no_text(fields: dict[str, Any]) -> str:
    """Which field is not text, and what it is instead."""
    key, value = next((key, value) for key, value in fields.items() if type(value) is not str)
    return f"{key} is missing" if value is None else f"{key} is {KINDS.get(type(value), 'not a text')}"


def checked_history(history: Any) -> list[list[str]]:
    """Earlier turns as lists of two texts. Raises InvalidRecord."""
    if not isinstance(history, (list, tuple)):
        raise InvalidRecord("history is not a list")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(text) is str for text in pair)):
            raise InvalidRecord("history is not a list of pairs of texts")
        if not all(text.strip() for text in pair):
            raise InvalidRecord("history holds an empty turn")
    return [list(pair) for pair in history]


def without_faults(record: Any, fixes: Collection[str], need_output: bool) -> tuple[Record, list[str], list[str]]:
    """The record to keep, what was fixed in its texts, and the names of the faults left in them.

    Raises InvalidRecord if it is unusable: control characters replaced LaTeX's backslashes (in a record to be learned,
    unless "latex" is among the `fixes`), a fault that cannot be fixed is among them, or fixing leaves a text empty.
    """
    causes = []
    if has_broken_latex(record):
        if "latex" in fixes:
            record = with_backslashes(record)
            causes.append("LaTeX backslashes restored where there were control characters")
        elif need_output:
            raise InvalidRecord(BROKEN_LATEX)
    record, cause = cleaned(record)
    causes += [cause] if cause else []
    left = faults_in(record)
    for name in set(fixes) & set(left):
        if not FAULTS[name].fixed:
            raise InvalidRecord(FAULTS[name].what)
        record = with_fixed(record, name)
        causes.append(f"{FAULTS[name].what}, fixed")
    return validate(record, need_output) if causes else record, causes, [name for name in left if name not in fixes]
