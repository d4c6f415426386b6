"""A real HTTP server on this machine that speaks the chat API, and misbehaves where a test wants it to."""

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Behave = Callable[[int, dict[str, Any]], "str | dict[str, Any]"]


class Server:
    """Answers each request with what `behave(number, body)` returns, the number counted from 0.

    A text is the answer's content. An object describes another response: `status`, `headers`, `body` (bytes),
    `content`, `finish`, `usage`, `sleep` (seconds before it), `cut` (bytes sent of what was promised).
    """

    def __init__(self, behave: Behave):
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.models: list[str | dict[str, Any]] = ["m"]
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                cards = [one if isinstance(one, dict) else {"id": one} for one in server.models]
                data = [{"object": "model", "created": 1, "owned_by": "x"} | card for card in cards]
                self.send({"body": json.dumps({"object": "list", "data": data}).encode()})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.times.append(time.monotonic())
                    server.keys.append(self.headers["Authorization"])
                response = behave(number, body)
                self.send({"content": response} if isinstance(response, str) else response)

            def send(self, response: dict[str, Any]) -> None:
                time.sleep(response.get("sleep", 0))
                data = response.get("body", completion(response))
                try:
                    self.send_response(response.get("status", 200))
                    for name, value in ({"Content-Type": "application/json"} | response.get("headers", {})).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: response.get("cut", len(data))])
                except (BrokenPipeError, ConnectionResetError):
                    pass
                if "cut" in response:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def completion(response: dict[str, Any]) -> bytes:
    """A whole response of the API."""
    message = {"role": "assistant", "content": response.get("content", "")}
    choice = {"index": 0, "message": message, "finish_reason": response.get("finish", "stop")}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    usage = response.get("usage", {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110})
    return json.dumps(body | ({"usage": usage} if usage else {}), ensure_ascii=False).encode()


def asked(body: dict[str, Any]) -> str:
    """What the last message of a request says."""
    return body["messages"][-1]["content"]


def shown(body: dict[str, Any]) -> list[tuple[int, float]]:
    """The systems that a judge is shown, each with the number that its answer names as its worth (`worth 8.5`)."""
    return [(int(number), float(worth)) for number, worth in re.findall(r"System(\d): .*?worth ([\d.]+)", asked(body), re.S)]


def fair(number: int, body: dict[str, Any]) -> str:
    """A judge that gives each answer what it is worth."""
    return "\n".join(f"System{system} {worth:g}分；System{system} 解释：第{system}个回答。" for system, worth in shown(body))


@pytest.fixture
def serve():
    """Starts servers, `serve(behave)`, and closes them in the end."""
    servers = []

    def start(behave):
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
