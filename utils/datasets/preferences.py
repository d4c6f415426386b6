"""Preference records in the formats in which they are published: pairs of answers, and answers labelled good or bad."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from utils.datasets.file_formats import read_as
from utils.datasets.item_formats import LABELS, InvalidRecord, as_record, dialogue, label_of, roles_and_texts
from utils.datasets.records import Record, validate

ANSWERS = ("chosen", "rejected")


class Pair(NamedTuple):
    """Two records of one question: one with the chosen answer, one with the rejected answer."""

    chosen: Record
    rejected: Record


class Judged(NamedTuple):
    """A record whose answer is labelled `good` or not."""

    record: Record
    good: bool


def is_pair(item: Any) -> bool:
    """True for an item with a chosen and a rejected answer."""
    return isinstance(item, dict) and all(name in item for name in ANSWERS)


def is_judged(item: Any) -> bool:
    """True for an item whose answer has a label, true or false."""
    return isinstance(item, dict) and not is_pair(item) and label_of(item) is not None


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of one file; at its end what was dropped is printed by cause, with the count and where it first occurs.

    Raises UserError if the file cannot be read, or holds no usable pair.
    """
    return read_as(path, lambda item: [as_pair(item)], "pair")


def read_judged(path: Path) -> Iterator[Judged]:
    """The labelled answers of one file (a pair counts as two); otherwise like `read_pairs`."""
    return read_as(path, as_judged, "labelled answer")


def as_judged(item: Any) -> list[Judged]:
    """One item as labelled answers: a record in any known form with its label, or the two answers of a pair.

    Raises InvalidRecord if it is neither.
    """
    if is_pair(item):
        pair = as_pair(item)
        return [Judged(pair.chosen, True), Judged(pair.rejected, False)]
    label = label_of(item) if isinstance(item, dict) else None
    if label is None:
        raise InvalidRecord("label is neither true nor false")
    return [Judged(validate(as_record({name: item[name] for name in item if name not in LABELS})), label)]


def as_pair(item: Any) -> Pair:
    """One item as a pair. Raises InvalidRecord if it is not one, or both answers are the same.

    `chosen` and `rejected` may be a text, a message or a list of messages, in our own records (`instruction`, `input`,
    `history`, `system`), LLaMA-Factory's (`conversations`), trl's (`prompt` as a text or messages, or no `prompt` if
    both lists begin with it) and UltraFeedback's (`prompt` beside lists that begin with it).
    """
    if not is_pair(item):
        raise InvalidRecord("chosen or rejected is missing")
    known = {name: item[name] for name in item if name not in ("tools", "messages")}  # only for other kinds of records
    pair = Pair(*(validate(known | answered(item, item[name], name)) for name in ANSWERS))
    if pair.chosen["output"].strip() == pair.rejected["output"].strip():
        raise InvalidRecord("both answers are the same")
    if {**pair.chosen, "output": ""} != {**pair.rejected, "output": ""}:
        raise InvalidRecord("the answers are to different questions")
    return pair


def answered(item: dict[str, Any], answer: Any, name: str) -> dict[str, Any]:
    """The fields of a record with the question of `item` and one of its answers."""
    turns = answer if isinstance(answer, list) else [answer] if isinstance(answer, dict) else None
    if turns is None and not isinstance(answer, str):
        raise InvalidRecord(f"{name} is not a text")
    if item.get("instruction") is not None:
        return {"output": last_text(turns, name) if turns is not None else answer}
    asked = question_of(item)
    if not asked and (turns is None or not any(role == "user" for role, _ in roles_and_texts(turns))):
        raise InvalidRecord("the question is missing")
    if turns is None:
        return dialogue([*asked, ("assistant", answer)], item.get("system"))
    given = roles_and_texts(turns)
    if len(given) == 1 or not any(role == "user" for role, _ in given):
        given = asked + given
    return dialogue(given, item.get("system"))


def question_of(item: dict[str, Any]) -> list[tuple[str, Any]]:
    """The turns before the answers, if they have a field of their own."""
    for name in ("conversations", "messages", "prompt"):
        value = item.get(name)
        if isinstance(value, str) and value:
            return [("user", value)]
        if isinstance(value, list) and value:
            turns = roles_and_texts(value)
            return turns[:-1] if turns[-1][0] == "assistant" and name == "messages" else turns
    return []


def last_text(turns: list[Any], name: str) -> str:
    """The text of the last of some messages, which must be the assistant's."""
    found = roles_and_texts(turns)
    if not found or found[-1][0] != "assistant":
        raise InvalidRecord(f"{name} does not end with an answer")
    return found[-1][1]
