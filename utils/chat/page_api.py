"""The page's own API, for programs that use gradio's client: `/answer` and `/answerers`."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from utils.chat.conversations import asked_after
from utils.chat.display import Display, steps_of
from utils.console import UserError
from utils.datasets.templates import check_name
from utils.inference.sampling_params import KINDS, STARTS


class PageApi:
    """The functions of the API, for the models that the page shows."""

    def __init__(self, display: Display):
        self.display, self.service = display, display.service

    def answer(self, request: gr.Request, instruction, input, history, adapter, template, **knobs) -> Iterator[str]:
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
            replies = self.service.reply(self.display.known(adapter), record, settings, template, asker=asker, exact=True)
            for reply in replies:
                yield reply.text
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def typed_answer(self) -> Callable[..., Iterator[str]]:
        """`answer` with a parameter for each setting, as gradio documents it."""
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

        @functools.wraps(self.answer)
        def answer(*args: Any) -> Iterator[str]:
            yield from self.answer(**dict(zip(kinds, args, strict=True)))

        answer.__signature__ = inspect.Signature(named, return_annotation=Iterator[str])  # type: ignore[attr-defined]
        answer.__annotations__ = kinds | {"return": Iterator[str]}
        return answer

    def answerers(self) -> list[dict]:
        """The models that can answer: name, template, and chain of training steps of each; the last is the page's default."""
        return [
            {"name": name, "template": one.template, "chain": steps_of(one)} for name, one in self.display.answerers.items()
        ]
