"""Which requests page and endpoint take: none of other sites' pages, and none under another's name for this machine."""

import json
from typing import Any
from urllib.parse import urlsplit

from utils.chat.address import Address, is_local


class Guard:
    """Refuses what a browser sends for a page of another site, and, if only this machine is served, other names for it.

    A browser names the page that a request comes from (Origin), and where it sends it (Host). Other programs send no
    Origin. Someone who has the key may come from anywhere. Against rebinding (another's name that is made to lead to
    127.0.0.1), Host must be a name of this machine. Plain ASGI, so that growing answers are not held back.
    """

    def __init__(self, app: Any, address: Address):
        self.app, self.address = app, address

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with 403."""
        problem = self.problem(scope) if scope["type"] in ("http", "websocket") else ""
        if not problem:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        body = json.dumps({"error": {"message": problem, "type": "invalid_request_error", "param": None, "code": "forbidden"}})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})

    def problem(self, scope: Any) -> str:
        """Why a request is refused, "" if it is not."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if not self.address.is_open and not (is_local(name_of(host)) or name_of(host) == self.address.name):
            return f"Host {host!r} is not a name of this machine; ask at http://{self.address.name}:{self.address.port}"
        if origin and not self.address.share and not self.has_key(headers):
            here = {host.lower(), headers.get("x-forwarded-host", host).lower()}
            if urlsplit(origin).netloc.lower() not in here:
                return f"a page of {origin!r} may not ask here; send the API key, or ask from this server's own page"
        return ""

    def has_key(self, headers: dict[str, str]) -> bool:
        """True for a request with what looks like a key, which is compared later; a browser adds none by itself."""
        return bool(self.address.api_key) and headers.get("authorization", "").startswith("Bearer ")


def name_of(host: str) -> str:
    """The name in a Host header, without its port and the brackets of IPv6."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
