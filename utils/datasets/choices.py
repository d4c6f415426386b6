"""Choice records: a question, its choices, and the right one, in the formats in which such sets are published."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.console import UserError
from utils.datasets.file_formats import read_as
from utils.datasets.item_formats import InvalidRecord
from utils.datasets.prompts import prompt_files
from utils.datasets.raw_sets import CHOICES

LETTERS = "ABCDEFGHIJ"
QUESTIONS = ("instruction", "question")  # column names of tables are read in lower case
ANSWERS = ("answer", "label")
MARK = re.compile(r"\s*(?:[(（]([A-JＡ-Ｊ])[)）]|([A-JＡ-Ｊ])\s*[.．、:：)）])\s*")


class Choice(NamedTuple):
    """A question with its `choices`; `right` are the indices of the right ones (usually one).

    `category` is its subject, `topic` the subject's name in a prompt, `groups` what the subject belongs to.
    """

    question: str
    choices: tuple[str, ...]
    right: tuple[int, ...]
    category: str = ""
    topic: str = ""
    groups: tuple[str, ...] = ()

    @property
    def letters(self) -> str:
        """The letters of its choices, `ABCD` for four."""
        return LETTERS[: len(self.choices)]


def read_choices(paths: Sequence[str], option: str = "--choices") -> list[Choice]:
    """The questions of files and folders, in order; those without a subject get their file's name as `category`.

    What is dropped is printed by file and cause, with the count and where it first occurs.
    Raises UserError if a file cannot be read, or has no usable question.
    """
    found = [one for file in prompt_files(paths) for one in read_file(file)]
    if not found:
        raise UserError(f"{option} {','.join(paths)}: holds no questions; see data/README.md for the form of choice records")
    return found


def read_file(path: Path) -> Iterator[Choice]:
    """The questions of one file. Raises UserError like `read_choices`."""
    for one in read_as(path, lambda item: [as_choice(item)], "question"):
        yield one if one.category else one._replace(category=path.name.partition(".")[0])


def is_choice(item: Any) -> bool:
    """True for an item with choices, in any of the known forms."""
    return isinstance(item, dict) and (any(isinstance(item.get(name), list) for name in CHOICES) or len(columns(item)) > 1)


def lettered(item: dict[str, Any]) -> list[str]:
    """The names of an item's fields that are a letter, in either case, and hold something."""
    return [name for name, value in item.items() if name.upper() in set(LETTERS) and value not in (None, "")]


def columns(item: dict[str, Any]) -> dict[str, Any]:
    """The choices of an item with a field for each, by letter."""
    return {name.upper(): item[name] for name in lettered(item)}


def as_choice(item: Any) -> Choice:
    """One item as a question. Raises InvalidRecord, which says what is wrong with it.

    Besides our own records it knows one column per choice (CMMLU, C-Eval), `options` with a `label` and a `passage`
    (AGIEval), and `choices` with the index of the right one as `answer` (MMLU).
    """
    if not is_choice(item):
        raise InvalidRecord("it has no choices")
    question = next((item[name] for name in QUESTIONS if isinstance(item.get(name), str)), "")
    extra = [item[name] for name in ("input",) if isinstance(item.get(name), str) and item[name].strip()]
    passage = [item["passage"]] if isinstance(item.get("passage"), str) else []
    question = "\n".join([*passage, question, *extra]).strip()
    if not question:
        raise InvalidRecord("the question is missing")
    choices = listed(item)
    given = next((item[name] for name in ANSWERS if item.get(name) not in (None, "", [])), None)
    texts = {name: item[name].strip() for name in ("category", "topic") if isinstance(item.get(name), str)}
    groups = item.get("groups") or ()
    if not (isinstance(groups, (list, tuple)) and all(isinstance(group, str) for group in groups)):
        raise InvalidRecord("groups is not a list of texts")
    return Choice(question, choices, right_places(given, len(choices)), **texts, groups=tuple(groups))


def listed(item: dict[str, Any]) -> tuple[str, ...]:
    """The choices of an item, without letters before them."""
    given = next((item[name] for name in CHOICES if isinstance(item.get(name), list)), None)
    if given is None:
        texts = columns(item)
        if twice := [letter for letter in texts if {letter, letter.lower()} <= set(lettered(item))]:
            raise InvalidRecord(f"choice {twice[0]} stands there twice, as {twice[0]} and {twice[0].lower()}")
        if "".join(sorted(texts)) != LETTERS[: len(texts)]:
            raise InvalidRecord("a choice is missing")
        given = [str(texts[letter]) for letter in sorted(texts)]
    if not all(isinstance(text, (str, int, float)) and str(text).strip() and text == text for text in given):  # NaN is not
        raise InvalidRecord("a choice is empty or not a text")
    choices = [str(text).strip() for text in given]
    marks = [MARK.match(text) for text in choices]
    if all(
        mark and unicodedata.normalize("NFKC", mark[1] or mark[2]) == letter
        for mark, letter in zip(marks, LETTERS, strict=False)
    ):
        choices = [text[mark.end() :] for text, mark in zip(choices, marks, strict=True) if mark]
    if not 2 <= len(choices) <= len(LETTERS):
        raise InvalidRecord(f"{len(choices)} choices, not 2 to {len(LETTERS)}")
    if not all(choices):
        raise InvalidRecord("a choice is empty or not a text")
    if len(set(choices)) < len(choices):
        raise InvalidRecord("a choice occurs twice")
    return tuple(choices)


def right_places(given: Any, count: int) -> tuple[int, ...]:
    """The indices of the right ones among `count` choices, given as letters (`B`, `BD`, `["B", "D"]`) or a number from 0."""
    if (isinstance(given, int) and not isinstance(given, bool)) or (isinstance(given, float) and given.is_integer()):
        places = [int(given)]
    elif isinstance(given, str) or (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        letters = re.sub(r"[\s,、;.()]", "", unicodedata.normalize("NFKC", "".join(given))).upper()
        places = [LETTERS.find(letter) for letter in letters]
    else:
        places = []
    if not places:
        raise InvalidRecord("the right choice is missing")
    if any(not 0 <= place < count for place in places) or len(set(places)) < len(places):
        raise InvalidRecord("the right choice is not among the choices")
    return tuple(sorted(places))


def as_record(one: Choice) -> dict[str, Any]:
    """A question as a choice record."""
    record = {"instruction": one.question, "choices": list(one.choices), "answer": "".join(one.letters[p] for p in one.right)}
    texts = {"category": one.category, "topic": one.topic, "groups": list(one.groups)}
    return record | {name: value for name, value in texts.items() if value}
