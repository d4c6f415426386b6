"""What the page says: models, settings, answers and errors, in the language of its labels."""

import random
import time
from pathlib import Path
from typing import Any

import gradio as gr

from utils import lineage
from utils.chat.conversations import Talk, Turn
from utils.chat.labels import Labels
from utils.chat.sessions import MOST_CHARACTERS, ChatReply, ChatService, TooLong
from utils.console import UserError
from utils.inference.answerers import BASE, ChatModel
from utils.inference.sampling_params import CONTROLS, SHOWN, SamplingParams

REDRAWN = 0.05  # seconds between updates of a growing answer: a fast model would overload the browser
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


class Display:
    """What the page says about a service, in one language."""

    def __init__(self, service: ChatService, labels: Labels):
        self.service, self.labels = service, labels

    @property
    def answerers(self) -> dict[str, ChatModel]:
        """The models that can answer at the moment, by name."""
        return {one.name: one for one in self.service.engine.answerers}

    def known(self, name: str) -> str:
        """An answerer's name; "" means the last one. Raises UserError for unknown names."""
        if name and name not in self.answerers:
            raise UserError(f"adapter {name}: not loaded; choose one of {', '.join(self.answerers)}")
        return name or list(self.answerers)[-1]

    def tell(self, text: str) -> None:
        """Show a message for some seconds."""
        gr.Info(text)

    def warn(self, text: str) -> None:
        """Show for some seconds why something was not done."""
        gr.Warning(text)

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
        works = [key for key in SHOWN if not CONTROLS[key].only or getattr(settings, CONTROLS[key].only)]
        values = {key: getattr(settings, key) for key in works}
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
        shown = conversation.messages([self.note(turn) for turn in conversation.turns], self.labels.thoughts, growing)
        return gr.update(value=shown, feedback_value=self.thumbs(talk))

    def thumbs(self, talk: Talk) -> list[str | None]:
        """The thumb that is lit at each answer, if any."""
        names = {place: "Like" if liked else "Dislike" for place, liked in talk.thumbs.items()}
        return [names.get(place) for place in range(len(talk.conversation.turns))]

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
        """Tell once, at an answer's first token, that old turns were left out."""
        if reply.dropped and reply.tokens == 1:
            self.tell(self.labels.dropped.format(count=reply.dropped))

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
