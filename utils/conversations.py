"""A conversation of the chat page: its turns, how it is shown, and how it becomes a record and a file."""

import dataclasses
import json
import re
from typing import Any

from utils.records import Dirty, as_record, checked

CODE = re.compile(r"^(`{3,})[^`\n]*$.*?(?:^ {0,3}\1[~`]*[ \t]*$|\Z)|(?<![`\\])`(?!`)[^`\n]+`(?!`)", re.S | re.M)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns of question and answer (the last one's may be unfinished, or ""), and a `system` text where one was loaded."""

    turns: tuple[tuple[str, str], ...] = ()
    system: str = ""

    def asked(self, question: str) -> "Conversation":
        """With one more question, open; a turn that was never answered goes."""
        return dataclasses.replace(self, turns=(*(turn for turn in self.turns if turn[1]), (question, "")))

    def asked_again(self, place: int, changed: str = "") -> "Conversation":
        """Up to the question of a turn (-1: the last), as it was or changed, open."""
        return self.until(place).asked(changed or self.turns[place][0])

    def answered(self, answer: str) -> "Conversation":
        """With `answer` to the last question."""
        return dataclasses.replace(self, turns=(*self.turns[:-1], (self.turns[-1][0], answer)))

    def until(self, place: int) -> "Conversation":
        """Its first `place` turns."""
        return dataclasses.replace(self, turns=self.turns[:place])

    def messages(self) -> list[dict[str, str]]:
        """As a chat shows it."""
        shown = []
        for question, answer in self.turns:
            shown.append({"role": "user", "content": as_markdown(question)})
            if answer:
                shown.append({"role": "assistant", "content": as_markdown(answer)})
        return shown

    def turn_of(self, message: int) -> int:
        """Which turn the message with this number, as `messages` counts them, belongs to."""
        owners = [place for place, (_, answer) in enumerate(self.turns) for _ in range(2 if answer else 1)]
        return owners[min(message, len(owners) - 1)]

    def record(self) -> dict[str, Any]:
        """In the record format: the last turn, with those before it as its history."""
        *history, (question, answer) = self.turns
        record: dict[str, Any] = {"instruction": question, "input": "", "output": answer}
        if history:
            record["history"] = [list(turn) for turn in history]
        if self.system:
            record["system"] = self.system
        return record

    def to_file(self) -> str:
        """A JSON array of one record, which finetune.py takes as it is; "" where nothing has been answered."""
        whole = tuple(turn for turn in self.turns if turn[1])
        if not whole:
            return ""
        return json.dumps([dataclasses.replace(self, turns=whole).record()], ensure_ascii=False, indent=1) + "\n"


@dataclasses.dataclass
class Talk:
    """What the page keeps of a visitor: the conversation, and how often it was changed otherwise than by a growing answer.

    An answer goes on growing only while that number stays as it was when it began.
    """

    conversation: Conversation = Conversation()
    changes: int = 0

    def change(self, conversation: Conversation) -> None:
        """Have another conversation, and no more of the answer that grew in the one before."""
        self.conversation, self.changes = conversation, self.changes + 1


def as_markdown(text: str) -> str:
    """A text for a view that renders Markdown: what looks like HTML, outside of code, is seen there as it is written."""
    return outside_code(text, r"<(?=[A-Za-z/!?])", "&lt;")


def from_markdown(text: str) -> str:
    """The text that `as_markdown` made this of."""
    return outside_code(text, r"&lt;(?=[A-Za-z/!?])", "<")


def outside_code(text: str, pattern: str, replacement: str) -> str:
    """Replace what matches `pattern` where a text of Markdown is neither a fenced block nor code within a line."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [re.sub(pattern, replacement, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, re.sub(pattern, replacement, text[end:])])


def from_file(text: str) -> Conversation:
    """The first record of a file, in any format of records, as a conversation; an input is joined to its question.

    Raises ValueError, with the reason, where there is no record.
    """
    try:
        value = first_value(text.removeprefix("\ufeff"))
        first = value[0] if isinstance(value, list) and value else value
        if not isinstance(first, dict):
            raise ValueError(str(first)[:40])
        record = checked(as_record(first), need_output=False)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"JSON: {error}") from None
    except Dirty as dirt:
        raise ValueError(str(dirt)) from None
    question = "\n\n".join(part for part in (record["instruction"], record["input"]) if part)
    turns = [*record.get("history", []), (question, record["output"])]
    return Conversation(tuple((one, other) for one, other in turns), record.get("system", ""))


def first_value(text: str) -> Any:
    """A file of JSON whole, or the first line of JSON Lines. Raises JSONDecodeError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if "Extra data" not in str(error):
            raise
        return json.loads(text.strip().partition("\n")[0])
