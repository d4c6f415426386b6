"""The format of requests and answers in OpenAI's protocol: which fields are read, how answers and errors are written."""

import asyncio
import json
import time
import uuid
from collections.abc import Collection
from typing import Any

from starlette.requests import Request

from utils.chat.called_tools import Called, CallReader
from utils.chat.sessions import ChatReply, TooLong
from utils.datasets.item_formats import InvalidRecord
from utils.datasets.records import Record, validate
from utils.datasets.tool_calls import as_record_with_tools
from utils.inference.sampling_params import KINDS
from utils.inference.scheduler import QueueFull

LARGEST_BODY = 2**20  # bytes
BODY_SECONDS = 30.0  # until a request must have arrived
MOST_STOPS = 16
MOST_TOOLS = 128
NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}  # the protocol's names, and ours
COMMON = {"model", "stream", "stream_options", "stop", "user", "template", *NAMES, *KINDS} - {"max_new_tokens"}
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # unsupported fields, and their values that request nothing
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False, True),
    "metadata": ({},),
}


class Refused(Exception):
    """An error in the protocol's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: Exception) -> Refused:
    """A user's error in the protocol's form."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        return Refused(429, str(error), "queue_full")
    if isinstance(error, TooLong):
        return Refused(400, str(error), "context_length_exceeded", "messages")
    return Refused(400, str(error), "invalid_request")


class Form:
    """How one kind of answer is written."""

    kind, chunk, prefix = "", "", ""

    def __init__(self, model: str):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def read(self, reply: ChatReply) -> Called:
        """The text of an answer so far and, once it is complete, the tools it calls."""
        return Called(reply.text, [])

    def choice(self, called: Called) -> dict[str, Any]:
        """A complete answer."""
        raise NotImplementedError

    def delta(self, called: Called, first: bool) -> dict[str, Any]:
        """A part of one."""
        raise NotImplementedError

    def whole(self, reply: ChatReply) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        called = self.read(reply)
        choice = {"index": 0, "finish_reason": "tool_calls" if called.calls else reply.finish, "logprobs": None}
        return self.head | {"object": self.kind, "choices": [choice | self.choice(called)], "usage": usage_of(reply)}

    def part(self, called: Called, first: bool, finish: str) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, "finish_reason": "tool_calls" if called.calls else finish or None, "logprobs": None}
        return self.head | {"object": self.chunk, "choices": [choice | self.delta(called, first)]}


class Chat(Form):
    """Chat completions; `reader` finds the calls in answers to requests with tools."""

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, reader: CallReader | None = None):
        super().__init__(model)
        self.reader = reader

    def read(self, reply: ChatReply) -> Called:
        if self.reader is None:
            return super().read(reply)
        return self.reader.read(reply.text) if reply.done else Called(self.reader.so_far(reply.text), [])

    def choice(self, called: Called) -> dict[str, Any]:
        calls = {"tool_calls": called.calls} if called.calls else {}
        content = None if calls and not called.text else called.text
        return {"message": {"role": "assistant", "content": content, "refusal": None} | calls}

    def delta(self, called: Called, first: bool) -> dict[str, Any]:
        calls = {"tool_calls": [{"index": place} | call for place, call in enumerate(called.calls)]} if called.calls else {}
        content = {"content": called.text} if called.text or first else {}
        return {"delta": ({"role": "assistant"} if first else {}) | content | calls}


class Completion(Form):
    """Text completions."""

    kind = chunk = "text_completion"
    prefix = "cmpl"

    def choice(self, called: Called) -> dict[str, Any]:
        return {"text": called.text}

    def delta(self, called: Called, first: bool) -> dict[str, Any]:
        return {"text": called.text}


def usage_of(reply: ChatReply) -> dict[str, int]:
    """How many tokens were read and written."""
    total = reply.prompt_tokens + reply.tokens
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens, "total_tokens": total}


def event(body: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def read(request: Request, fields: set[str]) -> dict[str, Any]:
    """The body of a request, whose fields must be known or request nothing. Raises Refused."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise Refused(413, f"the request is larger than {LARGEST_BODY:,} bytes", "request_too_large")
    except TimeoutError:
        raise Refused(408, f"the request was incomplete after {BODY_SECONDS:.0f} seconds", "timeout") from None
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # JSON can escape a lone surrogate, which is not valid text
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Refused(400, "the request is not a JSON object", "invalid_json")
    for name, value in values.items():
        if name not in COMMON | fields and value is not None and not has_no_effect(name, value):
            raise Refused(400, f"{name[:80]}: not supported here", "unsupported_parameter", name[:80])
    return values


def has_no_effect(name: str, value: Any) -> bool:
    """True if an unsupported field has a value that requests nothing; 0 and 1 are not false and true."""
    return any(value == none and isinstance(value, bool) == isinstance(none, bool) for none in WITHOUT_EFFECT.get(name, ()))


def wants_usage(body: dict[str, Any]) -> bool:
    """Whether a stream ends with the numbers of tokens. Raises Refused."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise Refused(400, "stream_options: only include_usage is supported", "unsupported_parameter", "stream_options")
    return flag_of(options, "include_usage")


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools that an answer may call. Raises Refused if they are invalid, or require what is not supported."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise Refused(400, f"tools: give a list of up to {MOST_TOOLS}", "invalid_type", "tools")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Refused(400, "tools: each needs the type function, and a function with a name", "invalid_value", "tools")
        if function.get("strict"):
            raise Refused(400, "tools: strict is not supported here", "unsupported_parameter", "tools")
    return [] if choice == "none" else tools


def record_of(body: dict[str, Any], tools: list[dict[str, Any]], carries: Collection[str]) -> Record:
    """The messages of a request as a record; `carries`: which of "tools" and "calls" the template supports. Raises Refused."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: missing, or not a list of messages", "invalid_request", "messages")
    try:
        item = {"messages": messages} | ({"tools": tools} if tools else {})
        record = validate(as_record_with_tools(item, carries), need_output=False)
    except InvalidRecord as error:
        raise Refused(400, f"messages: {error}", "invalid_request", "messages") from None
    if record["output"] or (record.get("messages") or [{}])[-1].get("role") == "assistant":
        raise Refused(400, "messages: the last one must be the user's, or a tool's result", "invalid_request", "messages")
    return record


def text_of(body: dict[str, Any], name: str) -> str:
    """A field that is a text, or absent."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(400, f"{name}: not a text", "invalid_type", name)
    return value or ""


def flag_of(body: dict[str, Any], name: str) -> bool:
    """A field that is true, false, or absent."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name}: not true or false", "invalid_type", name)
    return bool(value)


def stops_of(body: dict[str, Any]) -> tuple[str, ...]:
    """The texts that end an answer."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) and 0 < len(text) <= 100 for text in stops):
        raise Refused(400, "stop: give a text, or a list of texts of up to 100 characters", "invalid_type", "stop")
    if len(stops) > MOST_STOPS:
        raise Refused(400, f"stop: more than {MOST_STOPS} texts", "invalid_value", "stop")
    return tuple(stops)
