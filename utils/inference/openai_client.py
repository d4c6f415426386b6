"""A client of the OpenAI-compatible protocol: where a model is served, how to ask once, and what its errors mean."""

import asyncio
import dataclasses
import email.utils
import ipaddress
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

from utils.console import UserError

T = TypeVar("T")
OPENAI = "https://api.openai.com/v1"
Messages = list[dict[str, str]]
EXTENSIONS = ("top_k", "repetition_penalty")  # fields that OpenAI's own API does not have


@dataclasses.dataclass(frozen=True)
class ModelServer:
    """Which model answers, where, and with which settings; None means the server's default. `timeout`: seconds per request.

    `more`: further fields of each request. Raises UserError if the address is invalid, or a required key is missing.
    """

    model: str
    api_base: str = ""
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    timeout: float = 600.0
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            whole = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and len(self.url.split()) == 1
            )
        except ValueError:  # brackets or a port that are none
            whole = False
        if not whole:
            raise UserError(f"--api_base {self.url}: no address; write it like http://localhost:8000/v1")
        if not os.environ.get("OPENAI_API_KEY") and not self.is_local:
            raise UserError(f"OPENAI_API_KEY: not set, and {self.url} is not on this machine or network; export your key")

    @property
    def url(self) -> str:
        """The address of the API, including its version."""
        return self.api_base or os.environ.get("OPENAI_BASE_URL") or OPENAI

    @property
    def is_local(self) -> bool:
        """True for an address on this machine or in its private network, where no key and no proxy are needed."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_private
        except ValueError:
            return host == "localhost" or "." not in host or host.endswith((".local", ".localhost"))

    def connect(self) -> openai.AsyncOpenAI:
        """A client that sends each request only once, so that the caller can count them."""
        return openai.AsyncOpenAI(
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            base_url=self.url,
            timeout=self.timeout,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if self.is_local else None,
        )


class Unusable(Exception):
    """A response without an error status, but also without an answer."""


async def request_completion(
    client: openai.AsyncOpenAI, model: str, prompt: Messages | list[int], settings: dict[str, Any]
) -> dict[str, Any]:
    """Ask once: `{"answer", "finish", "prompt_tokens", "completion_tokens"}`, the last two None if unknown.

    Messages go to /chat/completions, token ids to /completions; `settings` are further fields of the request. Raises
    openai.APIError, or Unusable.
    """
    extra = {name: settings[name] for name in EXTENSIONS if name in settings}
    request: dict[str, Any] = {name: value for name, value in settings.items() if name not in extra}
    is_chat = isinstance(prompt[0], dict)
    request |= {"model": model, "extra_body": extra or None, "messages" if is_chat else "prompt": prompt}
    create: Any = client.chat.completions.create if is_chat else client.completions.create
    try:
        response = await create(**request)
    except ValueError:
        raise Unusable("a response that is not JSON") from None
    try:
        choice = response.choices[0]
        answer, finish = (choice.message.content if is_chat else choice.text) or "", choice.finish_reason or ""
    except (AttributeError, TypeError, IndexError):
        raise Unusable("a response without an answer in it") from None
    if not isinstance(answer, str):
        raise Unusable("a response whose answer is not text")
    counts = {name: getattr(response.usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    answer = answer.encode("utf-8", "replace").decode()  # replaces lone surrogates, which cannot be written
    return {"answer": answer, "finish": str(finish)} | {n: c if isinstance(c, int) else None for n, c in counts.items()}


def served_models(server: ModelServer) -> dict[str, str]:
    """The models that a server has, each with the name to ask for it by. Raises UserError if it does not list them.

    SGLang lists an adapter by its name alone, but at that name the base answers: it is asked for as BASE:ADAPTER.
    """

    async def names() -> dict[str, str]:
        async with server.connect() as client:
            found = [model async for model in client.models.list()]
        bases = {one.id: getattr(one, "parent", None) for one in found if one.owned_by == "sglang"}
        return {one.id: f"{bases[one.id]}:{one.id}" if bases.get(one.id) else one.id for one in found}

    try:
        return run_apart(names())
    except (openai.APIError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--api_base {server.url}: does not list its models ({reason_of(error)}); check the address") from None


def run_apart(job: Coroutine[Any, Any, T], stop: Callable[[], None] = lambda: None) -> T:
    """Run `job` to its end: in a thread of its own if this one already runs a loop, as in a notebook, where Ctrl-C calls
    `stop`."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, job)
        try:
            return running.result()
        except KeyboardInterrupt:
            stop()
            raise


def reason_of(error: Exception) -> str:
    """An error in a few words: the status, and what the server says."""
    if isinstance(error, openai.APITimeoutError):
        return "timed out"
    if isinstance(error, openai.APIConnectionError):
        return f"connection failed ({str(error.__cause__ or error).strip() or type(error.__cause__).__name__})"
    body = getattr(error, "body", None)
    message = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
    text = " ".join(str(message or getattr(error, "message", "") or error).split())[:300]
    return f"status {error.status_code}: {text}" if isinstance(error, openai.APIStatusError) else text


def may_pass(error: Exception) -> bool:
    """True for failures that may be temporary: rate limits, busy or broken servers, broken connections."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return True


def retry_after(error: Exception) -> float | None:
    """The seconds that a response asks to wait (RFC 9110, 10.2.3: seconds or a date), None if it does not."""
    headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError):
        return None
