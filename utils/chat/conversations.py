"""A conversation on the chat page: its turns, how it is shown, and how it is converted to a record, a file, or browser data."""

import dataclasses
import json
import uuid
from typing import Any, NamedTuple, cast

from utils.chat.markdown import answer_as_markdown, question_as_markdown
from utils.console import UserError
from utils.datasets.item_formats import InvalidRecord, as_record
from utils.datasets.records import Record, validate
from utils.datasets.templates import split_thinking

WHOLE, CUT, STOPPED = "stop", "length", "stopped"  # how an answer ended; "" while it grows
ENDS = (WHOLE, CUT, STOPPED, "")
NAME = 24  # characters of a first question that name its conversation
LARGEST = 1_000_000  # characters of a conversation that a browser sends
Message = dict[str, Any]


class Turn(NamedTuple):
    """A question, its answer so far, how that ended, and who gave it: `model`, `template` and settings by name."""

    question: str
    answer: str = ""
    finish: str = ""
    by: dict[str, Any] = {}  # noqa: RUF012 (a named tuple's default, never changed)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns (the last answer may be unfinished, or ""), and a `system` text if there is one."""

    turns: tuple[Turn, ...] = ()
    system: str = ""

    def asked(self, question: str) -> "Conversation":
        """With one more, open question; an unanswered turn is dropped, and a growing answer counts as stopped."""
        before = [turn for turn in self.stopped().turns if turn.answer]
        return dataclasses.replace(self, turns=(*before, Turn(question)))

    def stopped(self) -> "Conversation":
        """With any growing answer marked as stopped."""
        turns = (turn._replace(finish=STOPPED) if turn.answer and not turn.finish else turn for turn in self.turns)
        return dataclasses.replace(self, turns=tuple(turns))

    def asked_again(self, place: int, changed: str = "") -> "Conversation":
        """Up to a turn's question (-1: the last), unchanged or `changed`, left open."""
        return self.until(place).asked(changed or self.turns[place].question)

    def answered(self, answer: str, finish: str = WHOLE, by: dict[str, Any] | None = None) -> "Conversation":
        """With `answer` to the last question."""
        last = self.turns[-1]._replace(answer=answer, finish=finish, by=by or {})
        return dataclasses.replace(self, turns=(*self.turns[:-1], last))

    def until(self, place: int) -> "Conversation":
        """Its first `place` turns."""
        return dataclasses.replace(self, turns=self.turns[:place])

    def messages(self, notes: list[str], thought: str, growing: str = "") -> list[Message]:
        """As a chat shows it: thoughts folded, `notes` (one per turn) below answers, `growing` while there is no text yet."""
        shown: list[Message] = []
        for turn, note in zip(self.turns, notes, strict=True):
            shown.append({"role": "user", "content": question_as_markdown(turn.question)})
            thoughts, reply = split_thinking(turn.answer)
            if thoughts:
                metadata = {"title": thought, "status": "done" if reply or turn.finish else "pending"}
                shown.append({"role": "assistant", "content": answer_as_markdown(thoughts), "metadata": metadata})
            if reply or turn.finish:
                below = f'\n\n<small class="by">{note}</small>' if note else ""
                shown.append({"role": "assistant", "content": answer_as_markdown(reply) + below})
        if growing and self.turns and not (self.turns[-1].answer or self.turns[-1].finish):
            shown.append({"role": "assistant", "content": growing})
        return shown

    def turn_of(self, message: int) -> int:
        """The turn to which the message with this number in `messages` belongs."""
        owners: list[int] = []
        for message_shown in self.messages([""] * len(self.turns), "-"):
            owners.append((owners[-1] if owners else -1) + (message_shown["role"] == "user"))
        return owners[min(message, len(owners) - 1)]

    def record(self) -> Record:
        """As a record: the last turn, with those before it as its history."""
        *history, last = self.turns
        record: Record = {"instruction": last.question, "input": "", "output": last.answer}
        if history:
            record["history"] = [[turn.question, turn.answer] for turn in history]
        if self.system:
            record["system"] = self.system
        return record

    def to_file(self, unfinished: bool = False) -> str:
        """A JSON array of one record, ready for finetune.py; "" if nothing has been answered.

        Answers that were stopped or cut are included, but to be learned only if `unfinished` ones are wanted. `answers`
        says who gave each.
        """
        answered = tuple(turn for turn in self.turns if turn.answer)
        if not answered:
            return ""
        record = dataclasses.replace(self, turns=answered).record()
        learn = [unfinished or turn.finish == WHOLE for turn in answered]
        if not all(learn):
            record["learn"] = learn
        answers = [turn.by | {"finish": turn.finish or STOPPED} for turn in answered]
        return json.dumps([record | {"answers": answers}], ensure_ascii=False, indent=1) + "\n"


@dataclasses.dataclass
class Talk:
    """A visitor's state on the page: the conversation with its name, and how often it was changed other than by a growing
    answer, which keeps growing only while that number is unchanged.

    `begun`: the wanted answer continues the existing one; `vary`: it must not be the likeliest one again. `thumbs`: which
    answers were liked, or disliked.
    """

    conversation: Conversation = Conversation()
    changes: int = 0
    wanted: int = -1  # the number of changes when an answer was last requested
    begun: bool = False
    vary: bool = False
    thumbs: dict[int, bool] = dataclasses.field(default_factory=dict)
    name: str = ""
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def change(self, conversation: Conversation, begun: bool = False, vary: bool = False) -> None:
        """Replace the conversation; an answer growing in the previous one stops."""
        kept = [one == other for one, other in zip(self.conversation.turns, conversation.turns, strict=False)]
        self.thumbs = {place: liked for place, liked in self.thumbs.items() if any(kept[place : place + 1])}
        self.conversation, self.changes, self.begun, self.vary = conversation, self.changes + 1, begun, vary

    def begin(self, conversation: Conversation = Conversation(), id: str = "", name: str = "") -> None:
        """Switch to another conversation."""
        self.change(conversation)
        self.id, self.name = id or uuid.uuid4().hex, name

    def title(self) -> str:
        """Its name, or the beginning of its first question."""
        first = self.conversation.turns[0].question.split("\n")[0] if self.conversation.turns else ""
        return self.name or (first[:NAME] + "…" if len(first) > NAME else first)

    def to_browser(self) -> str:
        """The conversation as JSON for the browser to keep; it forgets one without turns."""
        turns = [list(turn) for turn in self.conversation.turns]
        kept = {"id": self.id, "title": self.title(), "name": self.name, "system": self.conversation.system, "turns": turns}
        return json.dumps(kept, ensure_ascii=False)

    def from_browser(self, text: str) -> None:
        """Restore a conversation that a browser kept. Raises ValueError if it is not one."""
        kept = json.loads(text) if len(text) <= LARGEST else None
        fields = ("id", "name", "system")
        if not isinstance(kept, dict) or not all(isinstance(kept.get(field), str) for field in fields):
            raise ValueError("not a conversation")
        turns = [Turn(*turn) for turn in kept.get("turns") or [] if isinstance(turn, list) and len(turn) == len(Turn._fields)]
        for turn in turns:
            if not all(isinstance(part, str) for part in turn[:3]) or turn.finish not in ENDS or not isinstance(turn.by, dict):
                raise ValueError("not a turn")
        self.begin(Conversation(tuple(turns), kept["system"]).stopped(), kept["id"][:64], kept["name"][:200])


def from_file(text: str) -> Conversation:
    """The first record of a file, in any format of records, as a conversation; an input is joined to its question.

    Raises ValueError, with the reason, if there is no record.
    """
    try:
        value = first_value(text.removeprefix("\ufeff"))
        first = value[0] if isinstance(value, list) and value else value
        if not isinstance(first, dict):
            raise ValueError(str(first)[:40])
        record = validate(as_record(first), need_output=False)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"JSON: {error}") from None
    except InvalidRecord as error:
        raise ValueError(str(error)) from None
    question = "\n\n".join(part for part in (record["instruction"], record["input"]) if part)
    pairs = [*record.get("history", []), (question, record["output"])]
    givers = first.get("answers")
    if not (isinstance(givers, list) and len(givers) == len(pairs) and all(isinstance(one, dict) for one in givers)):
        givers = [{}] * len(pairs)
    turns = []
    for (asked, answer), giver in zip(pairs, givers, strict=True):
        finish = giver.get("finish") if giver.get("finish") in ENDS else WHOLE
        turns.append(Turn(asked, answer, finish if answer else "", {key: giver[key] for key in giver if key != "finish"}))
    return Conversation(tuple(turns), record.get("system", ""))


def asked_after(history: Any, question: str) -> Record:
    """A record of a question after earlier turns: pairs of texts, or messages with role and content.

    Raises UserError if they are neither.
    """
    try:
        if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
            return cast(Record, as_record({"messages": [*history, {"role": "user", "content": question}]}))
        checked = validate({"instruction": "x", "output": "", "history": history}, need_output=False)
        return {"instruction": question, "history": checked.get("history", [])}
    except InvalidRecord as error:
        raise UserError(f"history: {error}; give pairs of question and answer, or messages with role and content") from None


def first_value(text: str) -> Any:
    """The value of a JSON file, or of the first line of JSON Lines. Raises JSONDecodeError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return json.loads(text.strip().partition("\n")[0])
