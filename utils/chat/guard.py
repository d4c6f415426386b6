"""Which requests page and endpoint accept: none from other sites' pages, none under a foreign host name."""

import json
from typing import Any
from urllib.parse import urlsplit

from utils.chat.address import Address, is_local


class Guard:
    """Refuses requests that a browser sends for another site's page and, if only this machine is served, foreign host names.

    A browser names the page that a request comes from (Origin), and the host it is sent to (Host). Other programs send no
    Origin. Clients with the key may come from anywhere. Against DNS rebinding (a foreign name resolved to 127.0.0.1),
    Host must be a name of this machine. It is plain ASGI, so that growing answers are not buffered.
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
            return f"Host {host!r} is not a name of this machine; use http://{self.address.name}:{self.address.port}"
        if origin and not self.address.share and not self.has_key(headers):
            here = {host.lower(), headers.get("x-forwarded-host", host).lower()}
            if urlsplit(origin).netloc.lower() not in here:
                return f"pages of {origin!r} are not allowed here; send the API key, or use this server's own page"
        return ""

    def has_key(self, headers: dict[str, str]) -> bool:
        """True for a request with anything like a key, which is checked later; browsers add none by themselves."""
        return bool(self.address.api_key) and headers.get("authorization", "").startswith("Bearer ")


def name_of(host: str) -> str:
    """The name in a Host header, without port and IPv6 brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
