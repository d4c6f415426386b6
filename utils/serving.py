"""Many people at once on one engine: answers that grow side by side, conversations that are cut to fit, limits."""

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from utils.console import UserError
from utils.decoding import Settings, Step
from utils.generation import Engine, is_out_of_memory

MOST_CHARACTERS = 20_000  # of one question: more would keep the tokenizer busy, not the model
MOST_TURNS = 200  # of one conversation
PROMPT_TOKENS = 4096  # for models that name no window of their own
AT_ONCE = 24  # answers that grow side by side, where memory suffices
BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (0, 200),
    "num_beams": (1, 8),
    "max_new_tokens": (1, 2048),
    "repetition_penalty": (1, 2),
    "no_repeat_ngram_size": (0, 20),
    "seed": (0, 2**31 - 1),
}


class TooLong(UserError):
    """A question of `size` tokens that has room for `room`."""

    def __init__(self, size: int, room: int):
        super().__init__(f"the question is too long: {size} tokens, there is room for {room}; shorten it")
        self.size, self.room = size, room


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer so far: its text, tokens and seconds; how many old turns did not fit; whether it is whole."""

    text: str
    tokens: int
    seconds: float
    dropped: int
    done: bool

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Service:
    """Answers questions of many sessions. One thread computes, a token for each in turn, in the order of asking."""

    def __init__(self, engine: Engine, longest_answer: int):
        self.engine = engine
        self.bounds = BOUNDS | {"max_new_tokens": (1, longest_answer)}
        self.at_once = max(1, min(AT_ONCE, engine.room // (engine.window or PROMPT_TOKENS)))
        self._thread = ThreadPoolExecutor(1, "answers")

    def settings(self, **values: Any) -> Settings:
        """Settings by name. Raises UserError, naming the setting and its bounds, where one is out of these."""
        for name, (least, most) in self.bounds.items():
            value = values.get(name, least)
            if not isinstance(value, (int, float)) or not least <= value <= most:
                raise UserError(f"{name} {value}: out of bounds; give {least:g} to {most:g}")
        whole = {field.name for field in dataclasses.fields(Settings) if field.type is int}
        typed: dict[str, Any] = {name: int(value) if name in whole else value for name, value in values.items()}
        return Settings(**typed)

    def reply(self, name: str, record: dict[str, Any], settings: Settings, template: str = "") -> Generator[Reply]:
        """Answer a record (its history before it) as the answerer `name`; one Reply a token.

        Closing the iterator ends the computation. Raises UserError where the question is empty or too long, or
        memory does not suffice.
        """
        ids, dropped = self.fit(name, record, settings, template)
        ending = self.engine.ending(name, template)
        steps = self.engine.answer(name, [ids], settings, template)
        began, answer, tokens = time.monotonic(), [], 0
        try:
            while (step := self._thread.submit(self._step, name, steps).result()) is not None:
                tokens += step.rows
                answer = (step.finished or step.running).get(0, [])
                done = bool(step.finished)
                text = ending.text(answer) if done else ending.so_far(answer)
                yield Reply(text, len(answer) if done else tokens, time.monotonic() - began, dropped, done)
        finally:
            steps.close()

    def replies(
        self, names: Sequence[str], record: dict[str, Any], settings: Settings, template: str = ""
    ) -> Generator[dict[str, Reply]]:
        """Answer one record as several answerers side by side; all their replies, after each round of tokens."""
        running = {name: self.reply(name, record, settings, template) for name in names}
        shown: dict[str, Reply] = {}
        try:
            while running:
                for name in list(running):
                    reply = next(running[name], None)
                    if reply is None:
                        del running[name]
                    else:
                        shown[name] = reply
                yield dict(shown)
        finally:
            for replies in running.values():
                replies.close()

    def _step(self, name: str, steps: Iterator[Step]) -> Step | None:
        """One token, computed as `name`."""
        self.engine.use(name)
        try:
            return next(steps, None)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise UserError("out of memory; ask again later, with fewer beams or a shorter conversation") from None
            raise

    def fit(self, name: str, record: dict[str, Any], settings: Settings, template: str = "") -> tuple[list[int], int]:
        """The ids of a record, without its oldest turns where all would not leave room for the answer; how many those are.

        Raises UserError where even the question alone is too long, or where there is none.
        """
        history = list(record.get("history") or [])
        asked = f"{record['instruction']}{record.get('input') or ''}"
        if not record["instruction"].strip():
            raise UserError("the question is empty; write one")
        if len(asked) > MOST_CHARACTERS or len(history) > MOST_TURNS:
            raise UserError(f"the question is too long; at most {MOST_CHARACTERS} characters and {MOST_TURNS} earlier turns")
        window = self.engine.window or PROMPT_TOKENS
        most = window - min(settings.max_new_tokens, window // 2)
        for dropped in range(len(history) + 1):
            ids = self.engine.encode(name, record | {"history": history[dropped:]}, template)
            if len(ids) <= most:
                return ids, dropped
        raise TooLong(len(ids), most)
