"""OpenAI's protocol: models, chat completions and completions, streamed or not, and loading adapters while running.

No path in a request is ever opened: models and templates are named, and so are the adapters in the one folder to load from.
"""

import asyncio
import contextlib
import hmac
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from utils.chat.called_tools import Called, CallReader
from utils.chat.protocol import (
    NAMES,
    Chat,
    Completion,
    Form,
    Refused,
    event,
    flag_of,
    read,
    record_of,
    refusal,
    stops_of,
    text_of,
    tools_of,
    usage_of,
    wants_usage,
)
from utils.chat.sessions import Asking, ChatReply, ChatService
from utils.console import UserError
from utils.datasets.templates import check_name
from utils.inference.answerers import BASE
from utils.inference.sampling_params import KINDS, SamplingParams

ANSWER_SECONDS = 3600.0  # until an answer must be complete
WAKE = 1.0  # seconds between signs of life to waiting clients, and checks for disconnected ones


class Endpoint:
    """The routes of the protocol. `defaults`: the script's settings; `key` "" lets everyone in."""

    def __init__(self, service: ChatService, defaults: SamplingParams, key: str = "", adapters_dir: str = ""):
        self.service, self.defaults, self.key, self.adapters_dir = service, defaults, key, adapters_dir
        self.started = int(time.time())

    def routes(self, alone: bool = False) -> list[Route]:
        """Routes for a Starlette or FastAPI app; `alone`: there is no page, so that any other path is an error here."""
        posts = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
        }
        routes = [Route(path, self.guarded(function), methods=["POST"]) for path, function in posts.items()]
        routes.append(Route("/health", self.health, methods=["GET"]))
        routes.append(Route("/v1/models", self.guarded(self.models), methods=["GET"]))
        routes.append(Route("/v1/models/{name}", self.guarded(self.model), methods=["GET"]))
        anything = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        rest = "/{path:path}" if alone else "/v1/{path:path}"
        return [*routes, Route(rest, self.guarded(self.nothing), methods=anything)]

    def guarded(self, function: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """`function` for clients with the key, with errors in the protocol's form."""

        async def call(request: Request) -> Response:
            try:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
                    raise Refused(401, "wrong or missing API key; send it as Authorization: Bearer KEY", "invalid_api_key")
                return await function(request)
            except (Refused, UserError) as error:
                refused = refusal(error)
                return JSONResponse(refused.body(), refused.status)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                traceback.print_exc()
                return JSONResponse(Refused(500, "internal error; see the server's output", "internal").body(), 500)

        return call

    async def health(self, request: Request) -> Response:
        """Shows that the server is up, nothing else; needs no key."""
        return JSONResponse({"status": "ok"})

    async def nothing(self, request: Request) -> Response:
        """Any other route. Raises Refused."""
        raise Refused(404, f"{request.method} {request.url.path}: no such route", "not_found")

    async def models(self, request: Request) -> Response:
        """The base and every adapter."""
        return JSONResponse({"object": "list", "data": [self.shown(one.name) for one in self.service.engine.answerers]})

    async def model(self, request: Request) -> Response:
        """One of them, by name."""
        return JSONResponse(self.shown(self.known(request.path_params, "name")))

    def shown(self, name: str) -> dict[str, Any]:
        """A model as the protocol lists it."""
        base = self.service.engine.base_model.rstrip("/").split("/")[-1]
        origin = {"root": base, "parent": None} if name == BASE else {"root": name, "parent": BASE}
        return {"id": name, "object": "model", "created": self.started, "owned_by": "dreamergpt"} | origin

    async def chat(self, request: Request) -> Response:
        """An answer to messages, rendered with the adapter's training template; it may call tools."""
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
        """The continuation of a prompt, which is a text or token ids."""
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
        """Submit the request; returns the complete answer, or the stream of its parts."""
        stream, usage = flag_of(body, "stream"), wants_usage(body)
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
        """A request's settings. A temperature means sampling, from all tokens unless the request says otherwise."""
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

    def known(self, body: dict[str, Any], field: str = "model") -> str:
        """The answerer that a request names in a field."""
        name, names = text_of(body, field), [one.name for one in self.service.engine.answerers]
        if not name:
            raise Refused(400, f"{field}: missing; name one that /v1/models lists", "invalid_request", field)
        if name not in names:
            raise Refused(404, f"{field} {name[:80]}: not loaded; there are {', '.join(names)}", "model_not_found", field)
        return name

    async def load(self, request: Request) -> Response:
        """Load an adapter from the folder that allows it (--adapters_dir)."""
        body = await read(request, {"lora_name", "lora_path"})
        name = text_of(body, "lora_name")
        if not re.fullmatch(r"[\w.-]{1,100}", name):
            raise Refused(400, "lora_name: give up to 100 letters, digits, '.', '_' and '-'", "invalid_value", "lora_name")
        folder = Path(self.adapters_dir)
        if not self.adapters_dir:
            raise Refused(400, "adapters cannot be loaded: the server was started without --adapters_dir", "not_supported")
        there = {path.name: path for path in folder.iterdir() if path.is_dir()}
        wanted = next((path for path in there.values() if text_of(body, "lora_path") in (path.name, str(path))), None)
        wanted = wanted or (there.get(name) if not body.get("lora_path") else None)
        if wanted is None:
            message = f"lora_path: not an adapter of {folder}; there are {', '.join(sorted(there))}"
            raise Refused(404, message, "not_found", "lora_path")
        await asyncio.to_thread(self.service.load, name, wanted)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Unload an adapter, once its running answers are complete."""
        body = await read(request, {"lora_name"})
        name = self.known(body, "lora_name")
        await asyncio.to_thread(self.service.unload, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def growing(asking: Asking, news: asyncio.Event) -> AsyncIterator[ChatReply]:
    """The replies of a request, whenever there is news, and once a second. Raises Refused if it takes too long."""
    until = time.monotonic() + ANSWER_SECONDS
    while True:
        reply = asking.reply()
        yield reply
        if reply.done:
            return
        if time.monotonic() > until:
            raise Refused(504, f"no complete answer after {ANSWER_SECONDS:.0f} seconds", "timeout")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(news.wait(), WAKE)
        news.clear()


async def streamed(asking: Asking, news: asyncio.Event, form: Form, usage: bool) -> AsyncIterator[str]:
    """Server-sent events; while there is nothing new, a comment once a second shows that the server is alive."""
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
