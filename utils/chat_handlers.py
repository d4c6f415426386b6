"""What the chat page does: the functions behind its buttons and its API. Of the page's components they know the names only.

What belongs to one visitor (the talk) comes in with each call; nothing is kept here.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from utils import lineage
from utils.answerers import BASE, Answerer
from utils.chat_labels import Labels
from utils.console import UserError
from utils.conversations import Conversation, Talk, from_file, from_markdown
from utils.decoding import Settings
from utils.serving import Reply, Service, TooLong

LARGEST_FILE = 1_000_000  # characters of a conversation that is loaded
REDRAWN = 0.05  # seconds between two drawings of a growing answer: a fast model would drown the browser


def put(value: str) -> dict:
    """What shows `value` in a component that other calls skip or change.

    A bare value would do, but for each that follows a skip gradio (6.31) keeps one more component as long as the session.
    """
    return gr.update(value=value)


class Pace:
    """Tells whether it is time to draw again."""

    def __init__(self) -> None:
        self.last = 0.0

    def is_due(self, done: bool) -> bool:
        """True if the last time was long enough ago, or all is `done`."""
        now = time.monotonic()
        due = done or now - self.last >= REDRAWN
        self.last = now if due else self.last
        return due


class Handlers:
    """The functions of the page, over a service, in one language."""

    def __init__(self, service: Service, labels: Labels):
        self.service, self.labels = service, labels
        self.answerers = {one.name: one for one in service.engine.answerers}

    # the conversation: a question is taken into it, and where that went well, an answer is wanted

    def ask(self, talk, question, adapter, template, **knobs) -> tuple:
        """Take the question out of its box."""
        return self.take(talk, talk.conversation.asked(question), "", adapter, template, **knobs)

    def again(self, talk, question, adapter, template, **knobs) -> tuple:
        """Take the last question anew."""
        if not talk.conversation.turns:
            return gr.skip(), [], question
        return self.take(talk, talk.conversation.asked_again(-1), question, adapter, template, **knobs)

    def retry(self, event: gr.RetryData, *, talk, question, adapter, template, **knobs) -> tuple:
        """Take a question of the conversation anew; what came after it goes."""
        earlier = talk.conversation.asked_again(talk.conversation.turn_of(event.index))
        return self.take(talk, earlier, question, adapter, template, **knobs)

    def edit(self, event: gr.EditData, *, talk, question, adapter, template, **knobs) -> tuple:
        """Take a question that was changed; what came after it goes."""
        earlier = talk.conversation.asked_again(talk.conversation.turn_of(event.index), from_markdown(event.value))
        return self.take(talk, earlier, question, adapter, template, **knobs)

    def take(self, talk: Talk, conversation: Conversation, box: str, adapter, template, **knobs) -> tuple:
        """Have an answer wanted to the last question of `conversation`; returns its number, the messages, the question box.

        Where there can be no answer, the page stays as it is, with the question in its box.
        """
        try:
            self.service.fit(adapter, conversation.record(), self.settings(**knobs), template)
        except UserError as error:
            gr.Warning(self.reason(error))
            return gr.skip(), talk.conversation.messages(), conversation.turns[-1][0]
        talk.change(conversation)
        return talk.changes, conversation.messages(), box

    def grow(self, talk, adapter, template, **knobs) -> Iterator[tuple]:
        """Grow the answer to the last question, until the conversation is changed; yields its messages, and the status."""
        changes, conversation, pace = talk.changes, talk.conversation, Pace()
        yield conversation.messages(), gr.skip()
        try:
            settings = self.settings(**knobs)
            for reply in self.service.reply(adapter, conversation.record(), settings, template):
                if talk.changes != changes:
                    return
                self.tell_dropped(reply)
                talk.conversation = conversation.answered(reply.text)
                if pace.is_due(reply.done):
                    shown = conversation.answered(self.text(reply, settings))
                    yield shown.messages(), put(self.status(adapter, reply))
        except UserError as error:
            gr.Warning(self.reason(error))

    def undo(self, talk, question) -> tuple:
        """Take the last question back into its box."""
        if not talk.conversation.turns:
            return [], question
        question = talk.conversation.turns[-1][0]
        talk.change(talk.conversation.until(-1))
        return talk.conversation.messages(), question

    def clear(self, talk) -> list:
        """An empty conversation."""
        talk.change(Conversation())
        return []

    def save(self, talk) -> str:
        """The conversation as a file's text, which the browser saves."""
        text = talk.conversation.to_file()
        if not text:
            gr.Warning(self.labels.no_conversation)
        return text

    def load(self, talk, file) -> list:
        """The conversation in a file's text, which the browser read."""
        try:
            if len(file or "") > LARGEST_FILE:
                raise ValueError(f"> {LARGEST_FILE}")
            if file:
                talk.change(from_file(file))
        except ValueError as error:
            gr.Warning(self.labels.not_a_conversation.format(reason=error))
        return talk.conversation.messages()

    # several side by side, and single tasks

    def compare(self, compared_question, answerers, template, **knobs) -> Iterator[list]:
        """One question to several answerers; yields the text of each column, and the status."""
        columns = [""] * len(self.answerers)
        yield [*map(put, columns), gr.skip()]
        if not answerers:
            gr.Warning(self.labels.none_chosen)
            return
        record, pace = {"instruction": compared_question, "input": ""}, Pace()
        try:
            settings = self.settings(**knobs)
            for replies in self.service.replies(answerers, record, settings, template):
                if pace.is_due(all(reply.done for reply in replies.values())):
                    for place, name in enumerate(self.answerers):
                        if name in replies:
                            columns[place] = self.text(replies[name], settings)
                    yield [*map(put, columns), put(self.compared(replies))]
        except UserError as error:
            gr.Warning(self.reason(error))

    def choose(self, answerers) -> list:
        """Show the columns of those who are asked."""
        shown = [gr.update(visible=name in answerers) for name in self.answerers]
        return shown if len(shown) > 1 else shown[0]

    def task(self, instruction, input, adapter, template, **knobs) -> Iterator[tuple]:
        """Answer an instruction with its input; yields the answer and the status."""
        yield "", gr.skip()
        record, pace = {"instruction": instruction, "input": input}, Pace()
        try:
            settings = self.settings(**knobs)
            for reply in self.service.reply(adapter, record, settings, template):
                if pace.is_due(reply.done):
                    yield self.text(reply, settings), put(self.status(adapter, reply))
        except UserError as error:
            gr.Warning(self.reason(error))

    # the API

    def api_answer(
        self,
        instruction: str,
        input: str = "",
        history: list[list[str]] | None = None,
        adapter: str = "",
        template: str = "",
        max_new_tokens: int = 512,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 0.1,
        top_p: float = 0.75,
        top_k: int = 40,
        repetition_penalty: float = 1.0,
        seed: int = 42,
    ) -> Iterator[str]:
        """Answer an instruction; the text so far is sent after each token, the whole answer last.

        history: earlier turns as [[question, answer], …]. adapter: a name that /answerers gives ("": the page's
        first choice). template: a name in templates/ ("": the one trained with).
        """
        knobs = {
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        pairs = history or []
        if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
            raise gr.Error("history: not a list of pairs of texts", print_exception=False)
        record = {"instruction": instruction, "input": input, "history": pairs}
        try:
            for reply in self.service.reply(self.known(adapter), record, self.service.settings(**knobs), template):
                yield reply.text
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def api_answerers(self) -> list[dict]:
        """Who can answer: name, template, and the chain of training steps of each; the last is the page's first choice."""
        return [{"name": name, "template": one.template, "chain": steps_of(one)} for name, one in self.answerers.items()]

    def known(self, name: str) -> str:
        """An answerer's name; "" is the last one's. Raises UserError for any other."""
        if name and name not in self.answerers:
            raise UserError(f"adapter {name}: not loaded; choose one of {', '.join(self.answerers)}")
        return name or list(self.answerers)[-1]

    # what is said

    def show_adapter(self, adapter) -> dict:
        """The status line for another answerer."""
        return put(self.status(adapter))

    def settings(self, **knobs: Any) -> Settings:
        """The panel's settings; what is drawn by chance differs from answer to answer."""
        return self.service.settings(**knobs, seed=random.randrange(2**31))

    def status(self, name: str, reply: Reply | None = None) -> str:
        """Base, answerer and its chain, device and type, and the speed of the last answer."""
        labels = self.labels
        speed = labels.speed.format(tokens=reply.tokens, speed=reply.speed) if reply else labels.no_speed
        if reply and reply.dropped:
            speed += " · " + labels.dropped.format(count=reply.dropped)
        steps = steps_of(self.answerers[name])
        chain = f" ({' → '.join(steps)})" if len(steps) > 1 else ""
        adapter, place = self.shown(name) + chain, self.service.engine.placement
        return labels.status.format(base=self.base, adapter=adapter, place=place, speed=speed)

    def compared(self, replies: dict[str, Reply]) -> str:
        """Base, device and type, and the tokens and speed of several answers."""
        answers = (f"{self.shown(name)} {reply.tokens} ({reply.speed:.1f}/s)" for name, reply in replies.items())
        return " · ".join((f"**{self.base}**", str(self.service.engine.placement), *answers))

    @property
    def base(self) -> str:
        """The base model's name, without its folder."""
        return self.service.engine.base_model.rstrip("/").split("/")[-1]

    def shown(self, name: str) -> str:
        """An answerer's name on the page."""
        return self.labels.base if name == BASE else name

    def text(self, reply: Reply, settings: Settings) -> str:
        """An answer's text; while there is none yet, what stands in its place."""
        if reply.text or reply.done:
            return reply.text
        return self.labels.waiting.format(tokens=reply.tokens) if settings.num_beams > 1 else "…"

    def tell_dropped(self, reply: Reply) -> None:
        """Say once, at an answer's first token, that old turns were left out."""
        if reply.dropped and reply.tokens == 1:
            gr.Info(self.labels.dropped.format(count=reply.dropped))

    def reason(self, error: UserError) -> str:
        """An error in the page's language, where it is one that visitors make."""
        if isinstance(error, TooLong):
            return self.labels.too_long.format(size=error.size, room=error.room)
        return self.labels.refused.format(reason=error)


def steps_of(answerer: Answerer) -> list[str]:
    """The names of the training steps that lead to an adapter, by its lineage; for the base, none."""
    if answerer.folder is None or answerer.lineage is None:
        return []
    return [Path(step["options"].get("output_dir", "—")).name for step in lineage.chain(answerer.folder)]
