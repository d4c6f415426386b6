"""The OpenAI-compatible protocol: where a model is served, how it is asked once, and what its errors mean."""

import dataclasses
import email.utils
import ipaddress
import os
import time
from typing import Any
from urllib.parse import urlsplit

import openai

from utils.console import UserError

OPENAI = "https://api.openai.com/v1"
Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Service:
    """Which model answers, where, and how it is asked; None leaves the server's default. `timeout`: seconds a request.

    Raises UserError where the address is none, or a key is needed and not there.
    """

    model: str
    api_base: str = ""
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    timeout: float = 600.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets or a port that are none
            whole = False
        if not whole:
            raise UserError(f"--api_base {self.url}: no address; write it like http://localhost:8000/v1")
        if not os.environ.get("OPENAI_API_KEY") and not self.is_local:
            raise UserError(f"OPENAI_API_KEY: not set, and {self.url} is not on this machine or network; export your key")

    @property
    def url(self) -> str:
        """The address of the API, up to its version."""
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
        """A client that sends each request once, so that every one is counted by who asks."""
        return openai.AsyncOpenAI(
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            base_url=self.url,
            timeout=self.timeout,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if self.is_local else None,
        )


class Unusable(Exception):
    """A response without an error status that holds no answer."""


async def complete(client: openai.AsyncOpenAI, model: str, messages: Messages, settings: dict[str, Any]) -> dict[str, Any]:
    """Ask once: `{"answer", "finish", "prompt_tokens", "completion_tokens"}`, the last two None where not told.

    `settings` are further fields of the request. Raises openai.APIError, or Unusable.
    """
    request: dict[str, Any] = {"model": model, "messages": messages} | settings
    try:
        response = await client.chat.completions.create(**request)
    except ValueError:
        raise Unusable("a response that is no JSON") from None
    try:
        choice = response.choices[0]
        answer, finish = choice.message.content or "", choice.finish_reason or ""
    except (AttributeError, TypeError, IndexError):
        raise Unusable("a response without an answer in it") from None
    if not isinstance(answer, str):
        raise Unusable("a response whose answer is no text")
    counts = {name: getattr(response.usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    answer = answer.encode("utf-8", "replace").decode()  # half a character, which JSON can name, could not be written
    return {"answer": answer, "finish": str(finish)} | {n: c if isinstance(c, int) else None for n, c in counts.items()}


def reason_of(error: Exception) -> str:
    """An error in a few words: the status, and what the server says."""
    if isinstance(error, openai.APITimeoutError):
        return "timed out"
    if isinstance(error, openai.APIConnectionError):
        return f"connection failed ({str(error.__cause__ or error).strip() or type(error.__cause__).__name__})"
    body = getattr(error, "body", None)
    told = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
    text = " ".join(str(told or getattr(error, "message", "") or error).split())[:300]
    return f"status {error.status_code}: {text}" if isinstance(error, openai.APIStatusError) else text


def may_pass(error: Exception) -> bool:
    """True for failures that another try may not meet: limits of rate, busy or broken servers, broken connections."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return True


def retry_after(error: Exception) -> float | None:
    """The seconds that a response asks to wait (RFC 9110, 10.2.3: seconds or a date), None where it asks for nothing."""
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
