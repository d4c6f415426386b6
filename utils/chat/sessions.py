"""Between page or endpoint and the scheduler: growing replies, conversations cut to fit, limits."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from utils.console import UserError
from utils.datasets.encoding import encode, encode_prompt, encode_text
from utils.datasets.records import Record
from utils.inference.answerers import BASE, resolve
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams, bounded
from utils.inference.scheduler import Request, Scheduler, Ticket

MOST_CHARACTERS = 20_000  # of one question: more would keep the tokenizer busy, rather than the model
MOST_TURNS = 200  # of one conversation
PROMPT_TOKENS = 4096  # for models that name no window
DROPPED = 4  # old turns are dropped this many at a time, so that the next prompts keep the same opening
WAKE = 1.0  # seconds between looks at the queue


class TooLong(UserError):
    """A question of `size` tokens where only `room` fit."""

    def __init__(self, size: int, room: int):
        super().__init__(f"the question is too long: {size} tokens, there is room for {room}; shorten it")
        self.size, self.room = size, room


@dataclasses.dataclass(frozen=True)
class ChatReply:
    """An answer so far: its text, tokens and seconds since it began; how many old turns did not fit.

    `finish` is "" while it grows, then "stop" or "length"; `ahead`: how many requests wait before it.
    """

    text: str
    tokens: int
    seconds: float
    dropped: int
    finish: str
    prompt_tokens: int = 0
    ahead: int = 0
    waits: bool = False

    @property
    def done(self) -> bool:
        """True if the answer is complete."""
        return bool(self.finish)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Asking:
    """A submitted request: its ticket, and its replies."""

    def __init__(self, scheduler: Scheduler, request: Request, dropped: int, changed: Any):
        self.scheduler, self.request, self.dropped = scheduler, request, dropped
        self.began: float | None = None
        self.ending = scheduler.engine.ending(request.name, request.template, request.stops)
        self.ticket: Ticket = scheduler.submit(request, changed)

    def reply(self) -> ChatReply:
        """The reply so far. Raises UserError if it failed."""
        ticket = self.ticket
        finish, error, answer = ticket.finish, ticket.error, list(ticket.answer)
        if error:
            raise UserError(error)
        waits = not ticket.running
        if self.began is None and not waits:
            self.began = time.monotonic()
        text = self.ending.text(answer) if finish else self.ending.so_far(answer)
        return ChatReply(
            text,
            len(answer) - len(self.request.begun) if finish else ticket.steps,
            time.monotonic() - self.began if self.began else 0.0,
            self.dropped,
            finish,
            len(self.request.prompt),
            self.scheduler.ahead(ticket) if waits else 0,
            waits,
        )

    def cancel(self) -> None:
        """Cancel the request."""
        self.scheduler.cancel(self.ticket)


class ChatService:
    """Answers questions of many sessions."""

    def __init__(self, engine: Engine, longest_answer: int):
        self.engine, self.longest_answer = engine, longest_answer
        self.scheduler = Scheduler(engine)

    def settings(self, **values: Any) -> SamplingParams:
        """Settings by name. Raises UserError, naming the setting and its bounds, if one is out of bounds."""
        return bounded(values, self.longest_answer)

    def ask(
        self,
        name: str,
        record: Record | None = None,
        settings: SamplingParams | None = None,
        template: str = "",
        prompt: list[int] | None = None,
        begun: str = "",
        changed: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Asking:
        """Queue a record with its history, or the ids of a `prompt`, to be answered as `name`.

        `begun`: the beginning of the answer to a record, to be continued. `changed` is called when there is news. Raises
        UserError if the question is empty or too long, or the queue is full.
        """
        settings = settings or SamplingParams()
        if prompt is not None:
            if self.engine.limit(prompt, settings) < 1:
                raise TooLong(len(prompt), (self.engine.window or 0) - 1)
            request = Request(name, prompt, settings, None, **options)
            return Asking(self.scheduler, request, 0, changed)
        assert record is not None
        ids, dropped = self.fit(name, record, settings, template)
        known = self.begun_ids(name, record, template, begun) if begun else ()
        if known and self.engine.limit([*ids, *known], settings) < 1:
            raise TooLong(len(ids) + len(known), (self.engine.window or 0) - 1)
        return Asking(self.scheduler, Request(name, ids, settings, template, begun=known, **options), dropped, changed)

    def begun_ids(self, name: str, record: Record, template: str, begun: str) -> tuple[int, ...]:
        """The ids of an answer's beginning, as when question and answer are encoded as one text."""
        tokenizer, prompter = self.engine.tokenizers[name], self.engine.prompter(name, template)
        alone: Any = {key: value for key, value in record.items() if key not in ("history", "learn")} | {"output": begun}
        try:
            whole = encode([alone], prompter, tokenizer, cutoff_len=2**31, train_on_inputs=False)[-1].input_ids
        except UserError:  # it contains an end token's text
            whole = []
        question = encode_prompt(alone | {"output": ""}, prompter, tokenizer)
        ends = self.engine.ending(name, template).ends
        if whole[: len(question)] != question:  # a token straddles their boundary, or thoughts are written differently
            return tuple(tokenizer(begun, add_special_tokens=False)["input_ids"])
        return tuple(whole[len(question) :][:-1] if whole[-1] in ends else whole[len(question) :])

    def ids_of(self, name: str, text: str) -> list[int]:
        """The ids of a prompt given as text, as training and batch runs encode it."""
        if len(text) > MOST_CHARACTERS * 10:
            raise UserError(f"the prompt is too long; at most {MOST_CHARACTERS * 10:,} characters")
        return encode_text(text, self.engine.tokenizers[name])

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter, which can answer from now on. Raises UserError if it cannot, or the name is taken."""

        def job() -> None:
            if name in (one.name for one in self.engine.answerers):
                raise UserError(f"{name}: already loaded; unload it first, or choose another name")
            _, (one,) = resolve(self.engine.base_model, [str(folder)], "")
            self.engine.add(dataclasses.replace(one, name=name))
            self.scheduler.forward.admit(name)

        self.scheduler.call(job)

    def unload(self, name: str) -> None:
        """Unload an adapter once the answers it is giving are complete."""
        if name == BASE:
            raise UserError(f"{BASE}: is not an adapter and cannot be unloaded")

        def job() -> None:
            self.engine.remove(name)
            self.scheduler.forget(name)

        self.scheduler.call(job, name)

    def reply(
        self, name: str, record: Record, settings: SamplingParams, template: str = "", **options: Any
    ) -> Generator[ChatReply]:
        """Answer a record; yields a reply whenever it has grown. Closing the iterator ends the computation."""
        for replies in self.replies([name], record, settings, template, **options):
            yield replies[name]

    def replies(
        self, names: Sequence[str], record: Record, settings: SamplingParams, template: str = "", **options: Any
    ) -> Generator[dict[str, ChatReply]]:
        """Answer one record as several answerers in parallel; yields all replies whenever one has grown."""
        news = threading.Event()
        asked: dict[str, Asking] = {}
        try:
            for name in names:
                asked[name] = self.ask(name, record, settings, template, changed=news.set, **options)
            while True:
                replies = {name: asking.reply() for name, asking in asked.items()}
                yield replies
                if all(reply.done for reply in replies.values()):
                    return
                news.wait(WAKE)
                news.clear()
        finally:
            for asking in asked.values():
                asking.cancel()

    def fit(self, name: str, record: Record, settings: SamplingParams, template: str = "") -> tuple[list[int], int]:
        """The ids of a record, and how many of its oldest turns were dropped to leave room for the answer.

        Raises UserError if even the question alone is too long, or if it is empty.
        """
        history = list(record.get("history") or [])
        asked = f"{record['instruction']}{record.get('input') or ''}"
        if not record["instruction"].strip():
            raise UserError("the question is empty; write one")
        check_characters(record)
        if len(asked) > MOST_CHARACTERS or len(history) > MOST_TURNS:
            raise UserError(f"the question is too long; at most {MOST_CHARACTERS} characters and {MOST_TURNS} earlier turns")
        window = self.engine.window or PROMPT_TOKENS
        most = window - min(settings.max_new_tokens, window // 2)
        for dropped in sorted({*range(0, len(history), DROPPED), len(history)}):
            ids = self.engine.encode(name, record | {"history": history[dropped:]}, template)
            if len(ids) <= most:
                return ids, dropped
        raise TooLong(len(ids), most)


def check_characters(record: Record) -> None:
    """Raises UserError if a text contains a lone surrogate, which terminals may send and JSON can escape."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("the question contains part of a character (not valid UTF-8); write it again") from None
