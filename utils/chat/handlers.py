"""What the chat page does: the functions behind the buttons of its conversation, and its API. They know the page's
components only by name.

A visitor's state (the talk) is passed in with each call; nothing is kept here.
"""

import dataclasses
import functools
import inspect
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from utils import lineage
from utils.chat.conversations import LARGEST, WHOLE, Conversation, Talk, Turn, asked_after, from_file
from utils.chat.feedback import Feedback
from utils.chat.labels import Labels
from utils.chat.markdown import from_markdown
from utils.chat.sessions import MOST_CHARACTERS, ChatReply, ChatService, TooLong
from utils.console import UserError
from utils.datasets.templates import check_name
from utils.inference.answerers import BASE, ChatModel
from utils.inference.sampling_params import CONTROLS, KINDS, SHOWN, STARTS, SamplingParams

REDRAWN = 0.05  # seconds between updates of a growing answer: a fast model would overload the browser
KEPT = 2.0  # seconds between two copies of a growing answer sent to the browser to keep
SHOWN_TOKENS = 4096  # at most this many are listed
PRESET = ("do_sample", "temperature", "top_p", "top_k")  # what a preset may set
VARIED = {"temperature": 0.7, "top_p": 0.9, "top_k": 40}  # minimums when another answer than the likeliest is wanted


def put(value: Any) -> dict:
    """An update that shows `value` in a component.

    A bare value would do, but after each skip gradio (6.31) keeps one more component for the rest of the session.
    """
    return gr.update(value=value)


class Pace:
    """Tells whether something that is done every `seconds` is due."""

    def __init__(self, seconds: float = REDRAWN) -> None:
        self.seconds, self.last = seconds, 0.0

    def is_due(self, done: bool) -> bool:
        """True if the last time was long enough ago, or if everything is `done`."""
        now = time.monotonic()
        due = done or now - self.last >= self.seconds
        self.last = now if due else self.last
        return due


class Handlers:
    """The functions of the page, for a service, in one language; `feedback` (None: not wanted) takes thumbs and votes."""

    def __init__(self, service: ChatService, labels: Labels, feedback: Feedback | None = None):
        self.service, self.labels, self.feedback = service, labels, feedback

    @property
    def answerers(self) -> dict[str, ChatModel]:
        """The models that can answer at the moment, by name."""
        return {one.name: one for one in self.service.engine.answerers}

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
            gr.Warning(self.reason(error))
            return gr.skip(), self.messages(talk), gr.skip()
        talk.change(conversation, vary=vary)
        if vary:
            gr.Info(self.labels.varied)
        talk.wanted = talk.changes
        return talk.changes, self.messages(talk), put(talk.to_browser())

    def go_on(self, talk) -> tuple:
        """Continue the last answer if it was stopped or cut."""
        if not talk.conversation.turns or talk.conversation.turns[-1].finish == WHOLE:
            gr.Info(self.labels.nothing_to_continue)
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
            gr.Warning(self.reason(error))

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
                gr.Warning(self.labels.not_a_conversation.format(reason="JSON"))
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
            gr.Warning(self.labels.no_conversation)
        return text

    def load(self, talk, file) -> tuple:
        """Load the conversation in a file's text, which the browser read."""
        try:
            if len(file or "") > LARGEST:
                raise ValueError(f"> {LARGEST}")
            if file:
                talk.begin(from_file(file))
        except ValueError as error:
            gr.Warning(self.labels.not_a_conversation.format(reason=error))
        return self.messages(talk), put(talk.to_browser()), put(talk.conversation.system)

    def like(self, event: gr.LikeData, *, talk) -> None:
        """Record what a visitor thinks of an answer."""
        index = event.index if isinstance(event.index, int) else event.index[0]
        place = talk.conversation.turn_of(index)
        turn = talk.conversation.turns[place]
        record = {key: value for key, value in talk.conversation.until(place + 1 or None).record().items()}
        liked = event.liked if isinstance(event.liked, bool) else None
        assert self.feedback is not None
        path = self.feedback.thumb(f"{talk.id}-{place}", record, turn.by, liked)
        gr.Info(self.labels.noted.format(path=path.name))

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
            gr.Warning(self.reason(error))
            return gr.skip(), gr.skip(), gr.skip()
        decode = self.service.engine.tokenizers[adapter].decode
        pieces = "\n".join(f"{id}\t{decode([id])!r}" for id in ids[:SHOWN_TOKENS])
        window = self.service.engine.window
        count = self.labels.counted.format(count=len(ids), window=window or "∞")
        count += " · " + self.labels.dropped.format(count=dropped) if dropped else ""
        return put(decode(ids)), put(pieces), put(count)

    # the API

    def api_answer(self, request: gr.Request, instruction, input, history, adapter, template, **knobs) -> Iterator[str]:
        """Answer an instruction; the text so far is sent whenever it has grown, the complete answer last.

        history: earlier turns as [[question, answer], …] or messages with role and content. adapter: a name from
        /answerers ("": the page's default). template: a name in templates/ ("": the training template). The other
        parameters are options of generate.py.
        """
        try:
            for name, value in {"instruction": instruction, "input": input, "adapter": adapter, "template": template}.items():
                if not isinstance(value, str):
                    raise UserError(f"{name}: not a text")
            record = asked_after(history or [], instruction) | {"input": input}
            check_name(template)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        asker = request.client.host if request and request.client else None
        try:
            settings = self.service.settings(**knobs)
            replies = self.service.reply(self.known(adapter), record, settings, template, asker=asker, exact=True)
            for reply in replies:
                yield reply.text
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def api(self) -> Callable[..., Iterator[str]]:
        """`api_answer` with a parameter for each setting, as gradio documents it."""
        kinds = {
            "request": gr.Request,
            "instruction": str,
            "input": str,
            "history": list | None,
            "adapter": str,
            "template": str,
        }
        kinds |= KINDS
        defaults = {"input": "", "history": None, "adapter": "", "template": ""} | STARTS
        named = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=defaults.get(name, inspect.Parameter.empty),
                annotation=kind,
            )
            for name, kind in kinds.items()
        ]

        @functools.wraps(self.api_answer)
        def answer(*args: Any) -> Iterator[str]:
            yield from self.api_answer(**dict(zip(kinds, args, strict=True)))

        answer.__signature__ = inspect.Signature(named, return_annotation=Iterator[str])  # type: ignore[attr-defined]
        answer.__annotations__ = kinds | {"return": Iterator[str]}
        return answer

    def api_answerers(self) -> list[dict]:
        """The models that can answer: name, template, and chain of training steps of each; the last is the page's default."""
        return [{"name": name, "template": one.template, "chain": steps_of(one)} for name, one in self.answerers.items()]

    def known(self, name: str) -> str:
        """An answerer's name; "" means the last one. Raises UserError for unknown names."""
        if name and name not in self.answerers:
            raise UserError(f"adapter {name}: not loaded; choose one of {', '.join(self.answerers)}")
        return name or list(self.answerers)[-1]

    # what the page says

    def show_adapter(self, adapter) -> dict:
        """The status line for another answerer."""
        return put(self.status(adapter) if adapter in self.answerers else "")

    def show_effective(self, do_sample) -> list:
        """Which settings have an effect."""
        return [gr.update(interactive=bool(do_sample)) for name in SHOWN if CONTROLS[name].only]

    def preset(self, name) -> list:
        """Apply a preset; settings that it does not name stay."""
        chosen = self.labels.presets.get(name or "", {})
        return [put(chosen[key]) if key in chosen else gr.skip() for key in PRESET]

    def settings(self, **knobs: Any) -> SamplingParams:
        """The panel's settings; without a seed, sampling differs from answer to answer."""
        seed = knobs.get("seed")
        return self.service.settings(**knobs | {"seed": random.randrange(2**31) if seed is None or seed < 0 else seed})

    def drawing(self, knobs: dict[str, Any]) -> dict[str, Any]:
        """The settings to sample another answer than the likeliest."""
        return {"do_sample": True} | {name: max(knobs[name], least) for name, least in VARIED.items()}

    def giver(self, name: str, template: str, settings: SamplingParams, before: dict[str, Any]) -> dict[str, Any]:
        """Who gives an answer, with the settings that have an effect; `before`: who gave its beginning."""
        values = {
            key: getattr(settings, key)
            for key in SHOWN
            if getattr(settings, CONTROLS[key].only or key) or not CONTROLS[key].only
        }
        if not settings.do_sample:
            values = {key: value for key, value in values.items() if not CONTROLS[key].only}
        model = name if before.get("model") in (None, name) else f"{before['model']} + {name}"
        return {"model": model, "template": template or self.answerers[name].template, "settings": values}

    def note(self, turn: Turn) -> str:
        """The note below an answer: who gave it, how, and whether it is complete."""
        labels, by = self.labels, turn.by
        settings = by.get("settings") if isinstance(by.get("settings"), dict) else {}
        parts = [self.shown(str(by["model"]))] if by.get("model") else []
        if settings:
            beams = settings.get("num_beams", 1)
            how = labels.greedy if beams == 1 else f"{labels.control(CONTROLS['num_beams'].label)} {beams}"
            if settings.get("do_sample"):
                how = labels.sampled.format(
                    **{key: settings.get(key, "?") for key in ("temperature", "top_p", "top_k", "seed")}
                )
            parts.append(how)
        if isinstance(by.get("tokens"), int) and turn.finish:
            parts.append(labels.speed.format(tokens=by["tokens"], speed=float(by.get("speed") or 0)))
        parts += [labels.marks[turn.finish]] if turn.finish in labels.marks else []
        return " · ".join(parts).replace("<", "&lt;")

    def messages(self, talk: Talk, growing: str = "") -> dict:
        """The conversation as a chat shows it."""
        conversation = talk.conversation
        growing = growing or ("…" if talk.wanted == talk.changes else "")
        return put(conversation.messages([self.note(turn) for turn in conversation.turns], self.labels.thoughts, growing))

    def way(self, talk: Talk, knobs: dict[str, Any]) -> dict[str, Any]:
        """How the scheduler treats a visitor's request: taking turns with others', and exactly if there is a seed."""
        return {"asker": id(talk), "exact": bool(knobs["do_sample"] and (knobs["seed"] or 0) >= 0)}

    def status(self, name: str, reply: ChatReply | None = None) -> str:
        """Base, answerer and its chain, device and dtype, and the speed of the last answer."""
        labels = self.labels
        speed = labels.speed.format(tokens=reply.tokens, speed=reply.speed) if reply else labels.no_speed
        if reply and reply.dropped:
            speed += " · " + labels.dropped.format(count=reply.dropped)
        steps = steps_of(self.answerers[name])
        chain = f" ({' → '.join(steps)})" if len(steps) > 1 else ""
        adapter, place = self.shown(name) + chain, self.service.engine.placement
        return labels.status.format(base=self.base, adapter=adapter, place=place, speed=speed)

    @property
    def base(self) -> str:
        """The base model's name, without its folder."""
        return self.service.engine.base_model.rstrip("/").split("/")[-1]

    def shown(self, name: str) -> str:
        """An answerer's name on the page."""
        return self.labels.base if name == BASE else name

    def text(self, reply: ChatReply, settings: SamplingParams) -> str:
        """An answer's text; while there is none yet, a placeholder."""
        if reply.text or reply.done:
            return reply.text
        if reply.waits:
            return self.labels.queued.format(count=reply.ahead)
        if settings.num_beams > 1:
            return self.labels.waiting.format(tokens=reply.tokens)
        return self.labels.reading.format(tokens=reply.prompt_tokens, seconds=reply.seconds)

    def tell_dropped(self, reply: ChatReply) -> None:
        """Print once, at an answer's first token, that old turns were left out."""
        if reply.dropped and reply.tokens == 1:
            gr.Info(self.labels.dropped.format(count=reply.dropped))

    def reason(self, error: UserError) -> str:
        """An error in the page's language, if it is one that visitors make."""
        if isinstance(error, TooLong):
            return self.labels.too_long.format(size=error.size, room=error.room)
        if "characters" in str(error):
            return self.labels.too_many_characters.format(most=MOST_CHARACTERS)
        return self.labels.refused.format(reason=error)


def steps_of(answerer: ChatModel) -> list[str]:
    """The names of the training steps that led to an adapter, from its lineage; none for the base."""
    if answerer.folder is None or answerer.lineage is None:
        return []
    return [Path(step["options"].get("output_dir", "—")).name for step in lineage.chain(answerer.folder)]
