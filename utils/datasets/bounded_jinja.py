"""Chat templates come with models: rendered in a sandbox in which none takes forever, or more memory than its texts need.

The sandbox of jinja2 keeps templates from running code; importing this module has transformers use the one made of it here.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import transformers.utils.chat_template_utils
from jinja2 import Template, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from utils.console import UserError

MOST_STEPS = 200_000  # of one rendering: turns of loops, calls and filters; one more for each thousand characters in them
MOST_LENGTH = 2_000_000  # characters, or items, of a value
MOST_COLUMNS = 10_000  # that a text is filled up to, or indented by
WIDE = re.compile(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{")  # widths in a text to format, also those that are given beside it
AS_TEXT = ("string", "tojson", "join", "pprint", "format", "escape", "e", "forceescape", "urlize", "xmlattr", "urlencode")


class TooMuch(UserError):
    """A template that would take too long, or too much memory: no record is at fault, so no record is left out for it."""


def too_much(what: str) -> TooMuch:
    """The error for a template that does this."""
    return TooMuch(f"the chat template {what}, as no conversation needs; use one from a source that you trust")


class Steps(threading.local):
    """How many steps are left to the rendering in this thread."""

    left = MOST_STEPS

    def take(self, length: int = 0) -> None:
        """One step with a value of this length. Raises TooMuch if it is too long, or there are no steps left."""
        self.turn(1 + length // 1000)
        if length > MOST_LENGTH:
            raise too_much(f"makes a text of more than {MOST_LENGTH:,} characters")

    def turn(self, count: int) -> None:
        """So many steps. Raises TooMuch if there are not so many left."""
        self.left -= count
        if self.left < 0:
            raise too_much(f"takes more than {MOST_STEPS:,} steps")


steps = Steps()


def weight(value: Any) -> int:
    """About how long a value is as a text, with all that is in it; what is in it several times counts as often."""
    total, rest = 0, [value]
    while rest and total <= MOST_LENGTH:
        one = rest.pop()
        total += len(one) if isinstance(one, str) else 1
        if isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set)):
            rest += one
    return total


def length_of(value: Any) -> int:
    """The length of a text, a list or a mapping; 0 of others."""
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def check_text_call(name: str, text: str, arguments: Iterable[Any]) -> None:
    """Raises TooMuch if a method or filter of this name would make too much of a text."""
    given = list(arguments)
    if any(isinstance(one, int) and one > MOST_COLUMNS for one in given) and name not in ("truncate", "replace", "split"):
        raise too_much(f"fills a text up to more than {MOST_COLUMNS:,} characters")
    if name in ("format", "format_map"):
        steps.take(sum(map(weight, given)))
        if WIDE.search(text):
            raise too_much("formats texts with widths")
    texts = [one for one in given if isinstance(one, str)]
    if name == "replace" and len(texts) > 1:
        steps.take(len(text) + text.count(texts[0]) * len(texts[1]))
    if name == "indent":
        steps.take(len(text) + (text.count("\n") + 1) * max((length_of(one) or one for one in given if one), default=4))
    if name == "join":
        items = given[0] if given else ()
        steps.take(weight(items) + length_of(items) * len(text))


def counted(values: Any, cost: int = 1) -> Any:
    """What a loop goes over; each of its turns takes `cost` steps."""
    if hasattr(values, "__len__"):
        steps.turn(len(values) * cost)
        return values
    return turned(values, cost)


def turned(values: Iterable[Any], cost: int) -> Iterator[Any]:
    """Values of which nobody knows how many there are; each takes `cost` steps."""
    for value in values:
        steps.turn(cost)
        yield value


def bounded(text: Any) -> Any:
    """A text of all that a block holds, if it is not too long."""
    steps.take(length_of(text))
    return text


def joined(values: list[Any]) -> str:
    """Values side by side, as by `~`."""
    steps.take(sum(map(weight, values)))
    return "".join(map(str, values))


def shown(value: Any) -> Any:
    """What is written into the text."""
    steps.take(length_of(value) if isinstance(value, str) else weight(value))
    return value


def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step, and what goes in and comes out of it."""

    @functools.wraps(function)  # with the marks by which jinja2 passes a context
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, (str, int, list, tuple, dict))]
        if name in AS_TEXT:
            steps.take(sum(map(weight, given)))
        if given and isinstance(given[0], (str, list, tuple)):
            first, rest = (given[0], given[1:]) if isinstance(given[0], str) else ("", given)
            if name == "join":
                first, rest = next((one for one in given[1:] if isinstance(one, str)), ""), given
            check_text_call(name, first, rest)
        result = function(*args, **kwargs)
        steps.take(length_of(result))
        return result

    return call


class BoundedTemplate(Template):
    """A template each of whose renderings has its own steps."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """The text; raises TooMuch."""
        steps.left = MOST_STEPS
        return super().render(*args, **kwargs)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, in which loops, calls and lengths are counted."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    template_class = BoundedTemplate

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"finalize": shown})
        del self.globals["lipsum"]
        self.filters = Filters(self.filters, counted=counted, bounded=bounded, joined=joined)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        steps.left = MOST_STEPS
        steps.take(len(source))
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            written = sum(len(part.data) for part in loop.find_all(nodes.TemplateData))
            loop.iter = filtered(loop.iter, "counted", nodes.Const(1 + written // 1000))
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = filtered(block.filter, "bounded")
        tree = Concatenations().visit(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """left * right and the like, if the result is not too long."""
        longest = max(length_of(left), length_of(right))
        if operator == "*" and longest:
            steps.take(longest * max((one for one in (left, right) if isinstance(one, int)), default=1))
        elif operator in ("*", "**"):
            bits = [one.bit_length() if isinstance(one, int) else 0 for one in (left, right)]
            if isinstance(right, int) and (bits[0] * right if operator == "**" else sum(bits)) > MOST_COLUMNS:
                raise too_much("computes with numbers of thousands of digits")
        elif operator == "%" and isinstance(left, str):
            check_text_call("format", left, ())
            steps.take(weight(right) + len(left))
        steps.take(length_of(left) + length_of(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a macro, a method or a function."""
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # jinja2 wraps format
        if isinstance(text, str):
            check_text_call(getattr(function, "__name__", ""), text, [*args, *kwargs.values()])
        if isinstance(function, LoopContext):  # its body, once more, on other values
            args = (counted(args[0]), *args[1:])
        result = super().call(context, function, *args, **kwargs)
        steps.take(length_of(result))
        return result


class Filters(dict[str, Callable[..., Any]]):
    """The filters of a sandbox, by name; each is watched."""

    def get(self, name: str, default: Any = None) -> Any:
        """The filter, or `default`."""
        return self[name] if name in self else default  # noqa: SIM401 (that would be this function)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        function = super().__getitem__(name)
        return function if function in (counted, bounded, joined) else watched(name, function)


class Concatenations(NodeTransformer):
    """Texts joined by `~` are joined by a filter that counts them."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` as `[a, b] | joined`."""
        self.generic_visit(node)
        return filtered(nodes.List(node.nodes, lineno=node.lineno), "joined")


def filtered(node: Any, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    """An expression, or what a block holds, with one more filter."""
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno if node else 1)


transformers.utils.chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
