"""The tools that an answer calls, read from its text in the form in which its chat template writes calls."""

import json
import uuid
from collections.abc import Collection
from typing import Any, NamedTuple

from utils.console import UserError
from utils.datasets.chat_templates import ChatPrompter
from utils.inference.engine import Engine

OPENINGS = ("<tool_call>", "[TOOL_CALLS]", "")  # Hermes and Qwen; Mistral; Llama 3, whose whole answer is a call
CLOSING = "</tool_call>"
ARGUMENTS = ("arguments", "parameters")


class Called(NamedTuple):
    """An answer's text before it calls tools, and its calls in the form of OpenAI's protocol."""

    text: str
    calls: list[dict[str, Any]]


class CallReader:
    """Reads answers that may call the tools `names`. Raises UserError if the template does not support tools, or writes
    calls in an unknown form."""

    def __init__(self, engine: Engine, name: str, template: str, names: Collection[str]):
        prompter = engine.prompter(name, template)
        if "tools" not in prompter.carries or not isinstance(prompter, ChatPrompter):
            raise UserError(f"tools: the template of {name} ({prompter.name}) does not support tools; leave them out")
        written = engine.ending(name, template).text(prompter.sample_call())
        known = [opening for opening in OPENINGS if calls_in(written, opening)]
        if not known:
            raise UserError(f"tools: the chat template of {name} writes calls in an unknown form; leave them out")
        self.opening, self.names = known[0], names

    def read(self, text: str) -> Called:
        """Read a complete answer. If its call is incomplete, or (without an opening) names an unknown tool, it is only text."""
        start = text.find(self.opening)
        calls = calls_in(text[start:], self.opening) if start >= 0 else []
        if not calls or (not self.opening and any(call["name"] not in self.names for call in calls)):
            return Called(text, [])
        return Called(text[:start].rstrip(), [as_called(call) for call in calls])

    def so_far(self, text: str) -> str:
        """The part of an unfinished answer that is certainly text, not part of a call."""
        if not self.opening:
            return "" if not text.strip() or text.lstrip().startswith("{") else text
        before, opened, _ = text.partition(self.opening)
        held = next((size for size in range(len(self.opening) - 1, 0, -1) if before.endswith(self.opening[:size])), 0)
        return (before if opened else before[: len(before) - held]).rstrip()


def calls_in(text: str, opening: str) -> list[dict[str, Any]]:
    """The calls that a text consists of, each with `name` and `arguments`; none if it contains anything else."""
    calls: list[dict[str, Any]] = []
    rest = text.strip()
    while rest:
        if not rest.startswith(opening) and not (
            calls and opening == OPENINGS[1]
        ):  # Mistral's opening appears once for several calls
            return []
        try:
            rest = rest.removeprefix(opening).lstrip()
            value, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        calls += [call_of(one) for one in (value if isinstance(value, list) else [value])]
        rest = rest[end:].lstrip(" \n;,").removeprefix(CLOSING if opening == OPENINGS[0] else "").lstrip()
    return [] if any(not call for call in calls) else calls


def call_of(value: Any) -> dict[str, Any]:
    """One call; empty if `value` is not one."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return {}
    arguments: Any = next((value[key] for key in ARGUMENTS if key in value), {})
    if not isinstance(arguments, dict):
        return {}
    return {"name": value["name"], "arguments": arguments}


def as_called(call: dict[str, Any]) -> dict[str, Any]:
    """A call in the form of OpenAI's protocol: with an id, and the arguments as JSON."""
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
