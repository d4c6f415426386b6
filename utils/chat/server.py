"""The chat page's server: where it listens, who may see it, what it limits."""

import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: no telemetry

import uvicorn
from gradio import Blocks, themes
from starlette.applications import Starlette
from starlette.middleware import Middleware

from utils.chat.address import Address
from utils.chat.endpoint import Endpoint
from utils.chat.feedback import Feedback
from utils.chat.guard import Guard
from utils.chat.labels import LANGUAGES
from utils.chat.page import FONTS, build
from utils.chat.sessions import ChatService
from utils.console import UserError, say
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams

EVENTS = 512  # in gradio's queue: more than the waiting requests, which the scheduler limits
THREADS = 160  # gradio's: one for each growing or waiting answer
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; base-uri 'self'"  # as gradio needs
CODES = {"zh": "zh-CN", "en": "en"}
HERE = Path(__file__).parent
SESSIONS = 200  # that have their conversations kept at once


def serve(
    engine: Engine, settings: SamplingParams, lang: str, address: Address, adapters_dir: str = "", feedback_dir: str = ""
) -> None:
    """Serve the page until the program is stopped. Raises UserError if the address cannot be used."""
    service = ChatService(engine, settings.max_new_tokens)
    start(service, settings, lang, address, adapters_dir, feedback_dir).block_thread()


def start(
    service: ChatService, settings: SamplingParams, lang: str, address: Address, adapters_dir: str = "", feedback_dir: str = ""
) -> Blocks:
    """Start serving the page, with the endpoint beside it, and return. `feedback_dir` "": it takes no feedback."""
    address = address.taken()
    options = launch_options(address, lang)
    page = build(service, settings, LANGUAGES[lang], Feedback(feedback_dir) if feedback_dir else None)
    page.queue(max_size=EVENTS, api_open=False)
    try:
        page.launch(**options, prevent_thread_lock=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--server_name {address.name} --server_port {address.port}: {error}; choose another") from None
    if address.api_key or not address.is_open:
        page.app.router.routes[:0] = Endpoint(service, settings, address.api_key, adapters_dir).routes()
        say(f"OpenAI's protocol: {page.local_url}v1")
    else:
        say("the endpoint for other programs is off, since others can reach this address; --api_key KEY turns it on")
    return page


def serve_api(engine: Engine, settings: SamplingParams, address: Address, adapters_dir: str = "") -> None:
    """Serve other programs, without a page, until the program is stopped. Raises UserError if the address cannot be used."""
    address = address.taken()
    service = ChatService(engine, settings.max_new_tokens)
    routes = Endpoint(service, settings, address.api_key, adapters_dir).routes(alone=True)
    app = Starlette(routes=routes, middleware=[Middleware(Guard, address=address)])
    name = f"[{address.name}]" if ":" in address.name else address.name
    say(f"OpenAI's protocol: http://{name}:{address.port}/v1")
    try:
        uvicorn.run(
            app, host=address.name, port=address.port or 0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
    finally:
        service.scheduler.close()


def launch_options(address: Address, lang: str = "zh") -> dict[str, Any]:
    """The arguments for gradio's `launch`; warns if the page is open to others."""
    if not address.auth and address.is_open:
        say("warning: everyone who can reach this address can use the page; --auth user:password protects it")
    return {
        "server_name": address.name,
        "server_port": address.port,
        "share": address.share,
        "auth": address.auth,
        "state_session_capacity": SESSIONS,
        "max_threads": THREADS,
        "max_file_size": 1,  # byte: the page takes no files, a conversation is loaded as text
        "footer_links": ["api"],
        "theme": theme(),
        "css": (HERE / "page.css").read_text("utf-8"),
        "head": f"<script>{(HERE / 'page.js').read_text('utf-8')}</script>",
        "ssr_mode": False,
        "app_kwargs": {
            "middleware": [
                Middleware(Guard, address=address),
                Middleware(NothingFromElsewhere),
                Middleware(InLanguage, code=CODES[lang]),
            ]
        },
    }


def theme() -> themes.Base:
    """Gradio's default theme, in colors with a contrast of at least 4.5 to 1 (WCAG 2.2, level AA)."""
    base = themes.Default(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"])
    return base.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


class NothingFromElsewhere:
    """Forbids browsers to load anything from other servers: a remote image in an answer would leak the reader's address.

    It is plain ASGI, since middleware that wraps complete responses would buffer growing answers.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Add the header to a response."""

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, sending)


class InLanguage:
    """Puts gradio's own buttons into the page's language, whatever the browser's: gradio reads it from `navigator`.

    It does so before any script given to `launch` runs, hence the change to the page's HTML.
    """

    def __init__(self, app: Any, code: str):
        self.app = app
        languages = f"for (const [name, value] of [['language', '{code}'], ['languages', ['{code}']]])"
        script = f"{languages} Object.defineProperty(navigator, name, {{get: () => value}});"
        self.changes = ((b'lang="en"', f'lang="{code}"'.encode()), (b"<head>", f"<head><script>{script}</script>".encode()))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Change the page's HTML, and pass on everything else."""
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            return await self.app(scope, receive, send)
        headers = [header for header in scope["headers"] if header[0] != b"accept-encoding"]
        held: list[Any] = []

        async def sending(message: Any) -> None:
            held.append(message)
            if message["type"] == "http.response.start" or message.get("more_body"):
                return
            start, *parts = held
            body = b"".join(part.get("body", b"") for part in parts)
            for old, new in self.changes:
                body = body.replace(old, new, 1)
            kept = [header for header in start["headers"] if header[0] != b"content-length"]
            await send(start | {"headers": [*kept, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

        await self.app(scope | {"headers": headers}, receive, sending)
