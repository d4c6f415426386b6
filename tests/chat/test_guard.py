"""Page and endpoint asked by real clients in the ways of OWASP's list: cross-site, rebound names, uploads, paths, slowness."""

import asyncio
import http.client
import json
import socket

import pytest
from scripting import warm

from utils.chat import server
from utils.chat.address import Address
from utils.chat.guard import Guard
from utils.inference.answerers import BASE
from utils.inference.sampling_params import SamplingParams

pytest_plugins = ["browsing"]  # fixtures
warm("gradio")


@pytest.fixture(name="port", scope="module")
def fixture_port(service):
    """Where the page is, with the endpoint beside it, for this machine alone."""
    address = Address("127.0.0.1", None, None, False).taken()
    page = server.start(service, SamplingParams(), "zh", address)
    yield address.port
    page.close()


def ask(port, method="GET", path="/", body=None, **headers):
    """Status and body of a request, with these headers."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    client.request(method, path, body, headers)
    answer = client.getresponse()
    return answer.status, answer.read()


ASKED = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2}).encode()


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/load_lora_adapter", "/gradio_api/queue/join", "/gradio_api/upload"]
)
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"])
def test_page_of_another_site_may_not_ask(port, path, origin):
    """As a form or a script sends it without asking first: a simple request, of text/plain."""
    status, body = ask(port, "POST", path, ASKED, Origin=origin, Content_Type="text/plain")
    assert status == 403
    assert b"are not allowed here" in body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "0.0.0.0"])
def test_other_name_that_leads_to_this_machine_is_refused(port, host):
    for path in ("/", "/v1/models", "/config", "/gradio_api/info"):
        assert ask(port, path=path, Host=host)[0] == 403


def test_a_page_of_another_site_may_ask_with_a_key_and_not_with_a_password_that_browsers_add():
    guard = Guard(None, Address("127.0.0.1", 7860, None, False, "key"))
    given = [(b"host", b"127.0.0.1:7860"), (b"origin", b"https://evil.example")]
    problems = {word: guard.problem({"headers": [*given, (b"authorization", word)]}) for word in (b"Bearer key", b"Basic key")}
    assert problems[b"Bearer key"] == "" and "not allowed here" in problems[b"Basic key"]


def test_whether_others_can_reach_an_address_decides_which_names_and_pages_are_its_own():
    local, shared, opened = (Address(*one) for one in (("127.0.0.1", 7860, None, False), ("127.0.0.1", 7860, None, True),
                                                       ("0.0.0.0", 7860, None, False)))  # fmt: skip
    assert [Address(name, None, None, False).is_open for name in ("::1", "localhost", "::", "gpu")] == [
        False,
        False,
        True,
        True,
    ]
    assert (local.is_open, shared.is_open, opened.is_open) == (False, True, True)
    foreign, forwarded = ("not a name of this machine", "not allowed here"), {"x-forwarded-host": "Me.example"}
    for address, headers, problem in (
        (local, {"host": "me.example"}, foreign[0]),
        (local, {"host": "LOCALHOST:7860", "origin": "http://localhost:7860"}, ""),
        (local, {"host": "[::1]:7860", "origin": "http://me.example"}, foreign[1]),
        (shared, {"host": "me.example", "origin": "http://other.example"}, ""),
        (opened, {"host": "me.example"}, ""),
        (opened, {"host": "me.example", "origin": "http://other.example"}, foreign[1]),
        (opened, {"host": "gpu:7860", "origin": "https://me.example"} | forwarded, ""),
        (opened, {"host": "gpu:7860", "origin": "https://other.example"} | forwarded, foreign[1]),
    ):
        found = Guard(None, address).problem({"headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
        assert problem in found and bool(problem) == bool(found), (address, headers)


def test_a_foreign_page_opens_no_channel_either():
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "headers": [(b"host", b"evil.example")]}
    asyncio.run(Guard(None, Address("127.0.0.1", 7860, None, False))(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_programs_and_the_page_itself_are_answered(port):
    assert ask(port)[0] == ask(port, path="/health")[0] == ask(port, path="/v1/models")[0] == 200
    assert ask(port, path="/v1/models", Host=f"localhost:{port}")[0] == 200
    own = {"Origin": f"http://127.0.0.1:{port}", "Content_Type": "application/json"}
    assert ask(port, "POST", "/v1/chat/completions", ASKED, **own)[0] == 200
    assert ask(port, "POST", "/gradio_api/run/answerers", b'{"data": []}', **own)[0] == 404, "past the queue"


def test_files_are_neither_taken_nor_given(port):
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.html"\r\n\r\n<script>1</script>\r\n--x--\r\n'
    assert ask(port, "POST", "/gradio_api/upload", upload, Content_Type="multipart/form-data; boundary=x")[0] >= 400
    for path in ("/etc/passwd", "//etc/passwd", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"):
        for route in ("/gradio_api/file=", "/file=", "/v1", "/static", "/assets", "/gradio_api/file"):
            status, body = ask(port, path=route + path)
            assert b"root:" not in body, (route, path, status)


def test_slow_clients_do_not_keep_others_waiting(port):
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for number, one in enumerate(slow):
        whole = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
        one.sendall(whole if number % 2 else whole[:40])
    try:
        assert ask(port, path="/v1/models")[0] == 200
        assert ask(port, "POST", "/v1/chat/completions", ASKED)[0] == 200
    finally:
        for one in slow:
            one.close()
