"""What the chat page does: the functions behind the buttons of its conversation. They know the page's components only
by name.

A visitor's state (the talk) is passed in with each call; nothing is kept here.
"""

import dataclasses
import json
import time
from collections.abc import Iterator

import gradio as gr

from utils.chat.conversations import LARGEST, WHOLE, Conversation, Talk, Turn, from_file
from utils.chat.display import Display, Pace, put
from utils.chat.feedback import Feedback
from utils.chat.labels import Labels
from utils.chat.markdown import from_markdown
from utils.chat.sessions import ChatService
from utils.console import UserError

KEPT = 2.0  # seconds between two copies of a growing answer sent to the browser to keep
SEEN = 0.3  # seconds after which the browser has taken an update
SHOWN_TOKENS = 4096  # at most this many are listed


class Handlers(Display):
    """The functions of the page; `feedback` (None: not wanted) takes thumbs and votes."""

    def __init__(self, service: ChatService, labels: Labels, feedback: Feedback | None = None):
        super().__init__(service, labels)
        self.feedback = feedback

    # the conversation: a question is added to it, and if that succeeds, an answer is requested

    def ask(self, talk, question, system, name, adapter, template, **knobs) -> tuple:
        """Add a question; it is also returned, since its box is cleared only if it is still there."""
        asked = dataclasses.replace(talk.conversation, system=system).asked(question)
        talk.name = name.strip()[:200]
        wanted, messages, kept = self.take(talk, asked, adapter, template, **knobs)
        return wanted, messages, kept, put(question if isinstance(wanted, int) else "")

    def again(self, talk, system, adapter, template, **knobs) -> tuple:
        """Ask the last question again."""
        if not talk.conversation.turns:
            return gr.skip(), put([]), gr.skip()
        return self.take_again(talk, -1, "", system, adapter, template, **knobs)

    def retry(self, event: gr.RetryData, *, talk, system, adapter, template, **knobs) -> tuple:
        """Ask a question of the conversation again; what came after it is removed."""
        place = talk.conversation.turn_of(event.index)
        return self.take_again(talk, place, "", system, adapter, template, **knobs)

    def edit(self, event: gr.EditData, *, talk, system, adapter, template, **knobs) -> tuple:
        """Ask an edited question; what came after it is removed. It is put into the box if it cannot be answered."""
        changed, place = from_markdown(event.value), talk.conversation.turn_of(event.index)
        wanted, messages, kept = self.take_again(talk, place, changed, system, adapter, template, **knobs)
        return wanted, messages, kept, gr.skip() if isinstance(wanted, int) else put(changed)

    def take_again(self, talk: Talk, place: int, changed: str, system, adapter, template, **knobs) -> tuple:
        """Add a question again. If the same model gave its likeliest answer before, sample, or it would give the same."""
        turn = talk.conversation.turns[place]
        same = changed in ("", turn.question) and turn.by.get("model") == adapter and not knobs["do_sample"]
        vary = same and knobs["num_beams"] == 1 and not turn.by.get("settings", {}).get("do_sample", True)
        asked = dataclasses.replace(talk.conversation, system=system).asked_again(place, changed)
        return self.take(talk, asked, adapter, template, vary=vary, **knobs)

    def take(self, talk: Talk, conversation: Conversation, adapter, template, vary=False, **knobs) -> tuple:
        """Request an answer to the last question of `conversation`; returns its number, the messages, what the browser keeps.

        If it cannot be answered, the page is left unchanged.
        """
        try:
            self.service.fit(self.known(adapter), conversation.record(), self.settings(**knobs), template)
        except UserError as error:
            self.warn(self.reason(error))
            return gr.skip(), self.messages(talk), gr.skip()
        talk.change(conversation, vary=vary)
        if vary:
            self.tell(self.labels.varied)
        talk.wanted = talk.changes
        return talk.changes, self.messages(talk), put(talk.to_browser())

    def go_on(self, talk) -> tuple:
        """Continue the last answer if it was stopped or cut."""
        if not talk.conversation.turns or talk.conversation.turns[-1].finish == WHOLE:
            self.tell(self.labels.nothing_to_continue)
            return gr.skip(), self.messages(talk), gr.skip()
        talk.change(talk.conversation.stopped(), begun=bool(talk.conversation.turns[-1].answer))
        talk.wanted = talk.changes
        return talk.changes, self.messages(talk), put(talk.to_browser())

    def grow(self, talk, adapter, template, **knobs) -> Iterator[tuple]:
        """Grow the answer to the last question until the conversation is changed; yields the messages, the status, and what
        the browser keeps."""
        changes, drawn, kept = talk.changes, Pace(), Pace(KEPT)
        conversation, last = talk.conversation, talk.conversation.turns[-1]
        begun = last.answer if talk.begun else ""
        try:
            settings = self.settings(**knobs | (self.drawing(knobs) if talk.vary else {}))
            by = self.giver(adapter, template, settings, last.by if begun else {})
            record = dataclasses.replace(conversation, turns=(*conversation.turns[:-1], Turn(last.question))).record()
            options = self.way(talk, knobs) | {"begun": begun}
            for reply in self.service.reply(adapter, record, settings, template, **options):
                if talk.changes != changes:  # show the current state once more at the end
                    yield self.messages(talk), gr.skip(), gr.skip()
                    return
                self.tell_dropped(reply)
                facts = by | {"tokens": reply.tokens, "speed": round(reply.speed, 1)}
                talk.conversation = conversation.answered(reply.text or begun, reply.finish, facts)
                if drawn.is_due(reply.done):
                    keep = put(talk.to_browser()) if kept.is_due(reply.done) else gr.skip()
                    growing = self.text(reply, settings)
                    yield self.messages(talk, growing), put(self.status(adapter, reply)), keep
        except UserError as error:
            self.warn(self.reason(error))

    def stop(self, talk) -> tuple:
        """Stop the answer being generated, and mark it as stopped."""
        if talk.conversation.turns and not talk.conversation.turns[-1].finish:
            talk.change(talk.conversation.stopped())
        return self.messages(talk), put(talk.to_browser())

    def undo(self, talk) -> tuple:
        """Put the last question back into its box."""
        if not talk.conversation.turns:
            return put([]), gr.skip(), gr.skip()
        question = talk.conversation.turns[-1].question
        talk.change(talk.conversation.until(-1))
        return self.messages(talk), put(talk.to_browser()), put(question)

    def clear(self, talk) -> tuple:
        """Forget the conversation, also in the browser."""
        talk.change(Conversation())
        kept = talk.to_browser()
        talk.begin()
        return put([]), put(kept), put(""), put("")

    def begin(self, talk, name) -> tuple:
        """Start a new conversation; the others and the system text are kept."""
        self.rename(talk, name)
        kept = talk.to_browser()
        talk.begin()
        return put([]), put(kept), put("")

    # what is kept in the browser, and in files

    def resume(self, talk, list_kept, kept) -> tuple:
        """Show a conversation that the browser kept, the list of all, and the models that can answer now."""
        if kept:
            try:
                talk.from_browser(kept)
            except (ValueError, TypeError, RecursionError):
                self.warn(self.labels.not_a_conversation.format(reason="JSON"))
        names = [(self.shown(name), name) for name in self.answerers]
        return (
            self.messages(talk),
            put(talk.conversation.system),
            put(talk.name),
            self.listed(talk, list_kept),
            gr.update(choices=names),
        )

    def reopen(self, talk, reopened) -> tuple:
        """Show another conversation kept by the browser."""
        messages, system, name, *_ = self.resume(talk, "[]", reopened)
        return messages, system, name

    def listed(self, talk, list_kept) -> dict:
        """The names of the conversations that the browser keeps, with this one selected."""
        try:
            choices = [(str(title) or "—", str(id)) for title, id in json.loads(list_kept or "[]")][:100]
        except (ValueError, TypeError):
            choices = []
        value = talk.id if talk.id in (id for _, id in choices) else None
        return gr.update(choices=choices, value=value)

    def rename(self, talk, name) -> dict:
        """Name the conversation, unless it is empty."""
        talk.name = name.strip()[:200] if talk.conversation.turns else ""
        return put(talk.to_browser())

    def save(self, talk, unfinished) -> str:
        """The conversation as a file's text, which the browser saves."""
        text = talk.conversation.to_file(unfinished)
        if not text:
            self.warn(self.labels.no_conversation)
        return text

    def load(self, talk, file) -> tuple:
        """Load the conversation in a file's text, which the browser read."""
        try:
            if len(file or "") > LARGEST:
                raise ValueError(f"> {LARGEST}")
            if file:
                talk.begin(from_file(file))
        except ValueError as error:
            self.warn(self.labels.not_a_conversation.format(reason=error))
        return self.messages(talk), put(talk.to_browser()), put(talk.conversation.system)

    def like(self, event: gr.LikeData, *, talk) -> Iterator[dict]:
        """Record what a visitor thinks of an answer; the thumbs show what is recorded."""
        index = event.index if isinstance(event.index, int) else event.index[0]
        place = talk.conversation.turn_of(index)
        turn = talk.conversation.turns[place]
        record = dict(talk.conversation.until(place + 1).record())
        liked = event.liked if isinstance(event.liked, bool) else None
        assert self.feedback is not None
        try:
            path = self.feedback.thumb(f"{talk.id}-{place}", record, turn.by, liked)
        except UserError as error:
            self.warn(self.labels.not_noted.format(reason=error))
            yield gr.update(feedback_value=[""] * len(talk.conversation.turns))  # else the browser sees no change
            time.sleep(SEEN)
        else:
            self.tell(self.labels.noted.format(path=path.name))
            talk.thumbs = {key: value for key, value in (talk.thumbs | {place: liked}).items() if value is not None}
        yield gr.update(feedback_value=self.thumbs(talk))

    def tokens(self, talk, question, system, adapter, template, **knobs) -> tuple:
        """The prompt for the question in the box, or for the last one: as text, as tokens, and their number."""
        conversation = dataclasses.replace(talk.conversation, system=system)
        if question.strip() or not conversation.turns:
            conversation = conversation.asked(question)
        else:
            conversation = conversation.asked_again(-1)
        try:
            ids, dropped = self.service.fit(self.known(adapter), conversation.record(), self.settings(**knobs), template)
        except UserError as error:
            self.warn(self.reason(error))
            return gr.skip(), gr.skip(), gr.skip()
        decode = self.service.engine.tokenizers[adapter].decode
        pieces = "\n".join(f"{id}\t{decode([id])!r}" for id in ids[:SHOWN_TOKENS])
        window = self.service.engine.window
        count = self.labels.counted.format(count=len(ids), window=window or "∞")
        count += " · " + self.labels.dropped.format(count=dropped) if dropped else ""
        return put(decode(ids)), put(pieces), put(count)
