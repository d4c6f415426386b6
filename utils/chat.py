"""The chat page's server: where it listens, who may see it, what it limits."""

import dataclasses
import ipaddress
import os
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: the page calls nobody

from gradio import Blocks, themes
from starlette.middleware import Middleware

from utils.chat_labels import LANGUAGES
from utils.chat_page import FONTS, STYLE, build
from utils.console import UserError, say
from utils.decoding import Settings
from utils.generation import Engine
from utils.serving import Service

WAITING = 64  # requests in the queue; more are refused
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; base-uri 'self'"  # as gradio needs
SESSIONS = 200  # whose conversations are kept at once


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the page listens (port None: the first free one from 7860), who may see it (user and password; None: everyone),
    and whether it is linked outside."""

    name: str
    port: int | None
    auth: tuple[str, str] | None
    share: bool


def serve(engine: Engine, settings: Settings, lang: str, address: Address) -> None:
    """Show the page until the program is stopped. Raises UserError where the address cannot be had."""
    start(Service(engine, settings.max_new_tokens), settings, lang, address).block_thread()


def start(service: Service, settings: Settings, lang: str, address: Address) -> Blocks:
    """Show the page, and return while it is there."""
    options = launch_options(address)
    page = build(service, settings, LANGUAGES[lang])
    page.queue(max_size=WAITING)
    try:
        page.launch(**options, prevent_thread_lock=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--server_name {address.name} --server_port {address.port}: {error}; choose another") from None
    return page


def launch_options(address: Address) -> dict[str, Any]:
    """What gradio's `launch` is called with; says where the page is open to others."""
    if not address.auth and (address.share or not is_local(address.name)):
        say("warning: everyone who can reach this address can use the page; --auth user:password asks for a password")
    return {
        "server_name": address.name,
        "server_port": address.port,
        "share": address.share,
        "auth": address.auth,
        "state_session_capacity": SESSIONS,
        "max_file_size": 1,  # byte: the page takes no files, a conversation is loaded as text
        "footer_links": ["api"],
        "theme": themes.Default(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"]),
        "css": STYLE,
        "ssr_mode": False,
        "app_kwargs": {"middleware": [Middleware(NothingFromElsewhere)]},
    }


class NothingFromElsewhere:
    """Forbids browsers to load anything from other servers: a picture that an answer names would tell these who reads it.

    Plain ASGI, since what wraps whole responses would hold growing answers back.
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


def is_local(name: str) -> bool:
    """True for an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
