"""OpenAI's protocol: models, chat completions and completions, whole or streamed, and adapters loaded while running.

No path of a request is ever opened: models and templates are named, and so are the adapters of the one folder to load from.
"""

import asyncio
import contextlib
import hmac
import json
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from utils.chat.called_tools import Called, CallReader
from utils.chat.sessions import Asking, ChatReply, ChatService, TooLong
from utils.console import UserError
from utils.datasets.item_formats import InvalidRecord
from utils.datasets.records import Record, validate
from utils.datasets.templates import check_name
from utils.datasets.tool_calls import as_record_with_tools
from utils.inference.answerers import BASE
from utils.inference.sampling_params import KINDS, SamplingParams
from utils.inference.scheduler import QueueFull

LARGEST_BODY = 2**20  # bytes
BODY_SECONDS = 30.0  # until a request must be there
ANSWER_SECONDS = 3600.0  # until an answer must be
WAKE = 1.0  # seconds after which those who wait are told so, and those who hung up are noticed
MOST_STOPS = 16
MOST_TOOLS = 128
NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}  # of the protocol, and here
COMMON = {"model", "stream", "stream_options", "stop", "user", "template", *NAMES, *KINDS} - {"max_new_tokens"}
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # fields that are not supported, and the values that ask for nothing
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
    "store": (False, True),
    "metadata": ({},),
}


class Refused(Exception):
    """An error of the protocol's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """As the protocol writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: Exception) -> Refused:
    """What a user's error is in the protocol."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, QueueFull):
        return Refused(429, str(error), "queue_full")
    if isinstance(error, TooLong):
        return Refused(400, str(error), "context_length_exceeded", "messages")
    return Refused(400, str(error), "invalid_request")


class Endpoint:
    """The routes of the protocol. `defaults`: the script's settings; `key` "" lets everyone in."""

    def __init__(self, service: ChatService, defaults: SamplingParams, key: str = "", adapters_dir: str = ""):
        self.service, self.defaults, self.key, self.adapters_dir = service, defaults, key, adapters_dir
        self.started = int(time.time())

    def routes(self, alone: bool = False) -> list[Route]:
        """For an app of Starlette or FastAPI; `alone`: there is no page beside, so that any other path is an error here."""
        posts = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
        }
        routes = [Route(path, self.guarded(function), methods=["POST"]) for path, function in posts.items()]
        routes.append(Route("/health", self.health, methods=["GET"]))
        routes.append(Route("/v1/models", self.guarded(self.models), methods=["GET"]))
        anything = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        rest = "/{path:path}" if alone else "/v1/{path:path}"
        return [*routes, Route(rest, self.guarded(self.nothing), methods=anything)]

    def guarded(self, function: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """`function` for those who have the key, its errors in the protocol's form."""

        async def call(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
                    raise Refused(401, "a wrong API key, or none; send it as Authorization: Bearer KEY", "invalid_api_key")
                return await function(request)
            except (Refused, UserError) as error:
                refused = refusal(error)
                return JSONResponse(refused.body(), refused.status)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                traceback.print_exc()
                return JSONResponse(Refused(500, "internal error; the server's own output has it", "internal").body(), 500)

        return call

    async def health(self, request: Request) -> Response:
        """That the server answers; tells nothing else, and needs no key."""
        return JSONResponse({"status": "ok"})

    async def nothing(self, request: Request) -> Response:
        """What is not there."""
        raise Refused(404, f"{request.method} {request.url.path}: no such route", "not_found")

    async def models(self, request: Request) -> Response:
        """The base and every adapter."""
        base = self.service.engine.base_model.rstrip("/").split("/")[-1]
        found = [
            {"id": one.name, "object": "model", "created": self.started, "owned_by": "dreamergpt"}
            | ({"root": base, "parent": None} if one.name == BASE else {"root": one.name, "parent": BASE})
            for one in self.service.engine.answerers
        ]
        return JSONResponse({"object": "list", "data": found})

    async def chat(self, request: Request) -> Response:
        """An answer to messages, asked with the template that the adapter was trained with; it may call tools."""
        body = await read(request, {"messages", "tools"})
        name, template = self.known(body), text_of(body, "template")
        check_name(template)
        tools = tools_of(body)
        reader = None
        if tools:
            try:
                reader = CallReader(self.service.engine, name, template, [tool["function"]["name"] for tool in tools])
            except UserError as error:
                raise Refused(400, str(error), "unsupported_parameter", "tools") from None
        record = record_of(body, tools, self.service.engine.prompter(name, template).carries)
        return await self.answered(request, body, name, Chat(name, reader), record=record, template=template)

    async def complete(self, request: Request) -> Response:
        """What follows a prompt, which is a text or token ids."""
        body = await read(request, {"prompt"})
        name, prompt = self.known(body), body.get("prompt")
        prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)) else prompt
        rows = self.service.engine.model.get_input_embeddings().weight.shape[0]
        if isinstance(prompt, str) and prompt:
            ids = await asyncio.to_thread(self.service.ids_of, name, prompt)
        elif isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < rows for i in prompt):
            ids = prompt
        else:
            raise Refused(400, "prompt: give one text, or a list of the model's token ids", "invalid_request", "prompt")
        return await self.answered(request, body, name, Completion(name), prompt=ids)

    async def answered(self, request: Request, body: dict[str, Any], name: str, form: "Form", **asked: Any) -> Response:
        """Have it computed; the whole answer, or the stream of its parts."""
        stream, usage = flag_of(body, "stream"), flag_of(body.get("stream_options") or {}, "include_usage")
        asker = text_of(body, "user") or (request.client.host if request.client else None)
        exact = body.get("seed") is not None
        options: dict[str, Any] = {"asker": asker, "exact": exact, "stops": stops_of(body)}
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def changed() -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(news.set)

        settings = self.settings(body)
        asking = await asyncio.to_thread(self.service.ask, name, settings=settings, changed=changed, **asked, **options)
        if stream:
            parts = streamed(asking, news, form, usage)
            return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        try:
            async for reply in growing(asking, news):
                if reply.done:
                    return JSONResponse(form.whole(reply))
                if await request.is_disconnected():
                    raise ClientDisconnect
            raise AssertionError("an answer without an end")
        finally:
            asking.cancel()

    def settings(self, body: dict[str, Any]) -> SamplingParams:
        """A request's settings. Who gives a temperature wants to sample, and from all tokens unless told otherwise."""
        given = {NAMES.get(key, key): body[key] for key in (*NAMES, *KINDS) if body.get(key) is not None}
        values = {key: getattr(self.defaults, key) for key in KINDS} | {"num_beams": 1}
        if "temperature" in given and "do_sample" not in given:
            values |= {"do_sample": bool(given["temperature"]), "top_p": 1.0, "top_k": 0}
        if "max_new_tokens" not in given:
            values["max_new_tokens"] = min(512, self.service.longest_answer)
        shown = {here: name for name, here in NAMES.items() if body.get(name) is not None}
        try:
            return self.service.settings(**values | given)
        except UserError as error:
            name = str(error).split()[0]
            message = str(error).replace(name, shown.get(name, name), 1)
            raise Refused(400, message, "invalid_value", shown.get(name, name)) from None

    def known(self, body: dict[str, Any]) -> str:
        """The answerer that a request names."""
        name, names = text_of(body, "model"), [one.name for one in self.service.engine.answerers]
        if not name:
            raise Refused(400, "model: missing; name one that /v1/models lists", "invalid_request", "model")
        if name not in names:
            raise Refused(404, f"model {name[:80]}: not loaded; there are {', '.join(names)}", "model_not_found", "model")
        return name

    async def load(self, request: Request) -> Response:
        """Load an adapter of the folder that they may be loaded from."""
        body = await read(request, {"lora_name", "lora_path"})
        name = text_of(body, "lora_name")
        folder = Path(self.adapters_dir)
        if not self.adapters_dir:
            raise Refused(400, "adapters cannot be loaded: the server was started without --adapters_dir", "not_supported")
        there = {path.name: path for path in folder.iterdir() if path.is_dir()}
        wanted = next((path for path in there.values() if text_of(body, "lora_path") in (path.name, str(path))), None)
        wanted = wanted or (there.get(name) if not body.get("lora_path") else None)
        if not name or wanted is None:
            raise Refused(404, f"lora_path: not an adapter of {folder}; there are {', '.join(sorted(there))}", "not_found")
        await asyncio.to_thread(self.service.load, name, wanted)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Unload an adapter, once the answers that it gives are whole."""
        body = await read(request, {"lora_name"})
        name = self.known({"model": body.get("lora_name")})
        await asyncio.to_thread(self.service.unload, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


class Form:
    """How an answer of one kind is written."""

    kind, chunk, prefix = "", "", ""

    def __init__(self, model: str):
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def read(self, reply: ChatReply) -> Called:
        """What of an answer so far is text, and, once it is whole, which tools it calls."""
        return Called(reply.text, [])

    def choice(self, called: Called) -> dict[str, Any]:
        """A whole answer."""
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
    """Of chat completions; the `reader` finds the calls in answers to those who gave tools."""

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
    """Of completions."""

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


async def growing(asking: Asking, news: asyncio.Event) -> AsyncIterator[ChatReply]:
    """The replies of a request, whenever there is news, and once a second. Raises Refused if it takes too long."""
    until = time.monotonic() + ANSWER_SECONDS
    while True:
        reply = asking.reply()
        yield reply
        if reply.done:
            return
        if time.monotonic() > until:
            raise Refused(504, f"no whole answer after {ANSWER_SECONDS:.0f} seconds", "timeout")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(news.wait(), WAKE)
        news.clear()


async def streamed(asking: Asking, news: asyncio.Event, form: Form, usage: bool) -> AsyncIterator[str]:
    """Server-sent events; while nothing is written yet, a comment once a second shows that the server is there."""
    sent, first = "", True
    try:
        async for reply in growing(asking, news):
            called = form.read(reply)
            if first or reply.done or len(called.text) > len(sent):
                text = called.text[len(sent) :] if called.text.startswith(sent) else ""
                sent += text
                yield event(form.part(Called(text, called.calls), first, reply.finish))
                first = False
            else:
                yield ": waiting\n\n"
        if usage:
            yield event(form.head | {"object": form.chunk, "choices": [], "usage": usage_of(reply)})
    except (Refused, UserError) as error:
        yield event(refusal(error).body())
    finally:
        asking.cancel()
    yield "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def read(request: Request, fields: set[str]) -> dict[str, Any]:
    """The body of a request, whose fields are known or ask for nothing. Raises Refused."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise Refused(413, f"the request is larger than {LARGEST_BODY:,} bytes", "request_too_large")
    except TimeoutError:
        raise Refused(408, f"the request was not there after {BODY_SECONDS:.0f} seconds", "timeout") from None
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # half a character (a lone surrogate) can be escaped in JSON
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Refused(400, "the request is not a JSON object", "invalid_json")
    for name, value in values.items():
        if name not in COMMON | fields and value is not None and value not in WITHOUT_EFFECT.get(name, ()):
            raise Refused(400, f"{name[:80]}: not supported here", "unsupported_parameter", name[:80])
    return values


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools that an answer may call. Raises Refused if they are none, or more is asked of them than is done here."""
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
    """The messages of a request as a record; `carries`: what of tools the template has a place for. Raises Refused."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: missing, or not a list of messages", "invalid_request", "messages")
    try:
        item = {"messages": messages} | ({"tools": tools} if tools else {})
        record = validate(as_record_with_tools(item, carries), need_output=False)
    except InvalidRecord as dirt:
        raise Refused(400, f"messages: {dirt}", "invalid_request", "messages") from None
    if record["output"] or (record.get("messages") or [{}])[-1].get("role") == "assistant":
        raise Refused(400, "messages: the last one must be the user's, or a tool's result", "invalid_request", "messages")
    return record


def text_of(body: dict[str, Any], name: str) -> str:
    """A field that is a text, or absent."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(400, f"{name}: not a text", "invalid_type", name)
    return value or ""


def flag_of(body: Any, name: str) -> bool:
    """A field that is true, false, or absent."""
    value = body.get(name) if isinstance(body, dict) else body
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
