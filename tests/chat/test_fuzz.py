"""Requests that no client should send, to the endpoint over a tiny model: each gets an answer, or an error of the protocol's
form that says what is wrong."""

import json
import random

import httpx
import pytest
from test_endpoint import QUESTION, fixture_address  # noqa: F401  (a fixture)

from utils.chat.protocol import COMMON, WITHOUT_EFFECT

pytest_plugins = ["browsing"]
RAW = [  # bodies that are no requests at all, or hardly
    b"", b"null", b"[]", b'"text"', b"{", b"\xff\xfe\xfa", b'{"model": "\xff"}', "{}".encode("utf-16"), b"[" * 60_000,
    b'{"a":' * 900 + b"1" + b"}" * 900, b'{"model": "f1", "model": "nobody"}', b"9" * 5000,
    b'{"max_tokens": ' + b"9" * 4000 + b"}", b'{"model": "f1", "messages": "x", "temperature": 1e999}', b"\x00" * 100,
    b'{"model": NaN}',
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 3.7, 2**31, 2**63, 10**300, -(10**300), float("nan"), float("inf"), 1e-300, "", "f1", "base",
    "\x00", "\ud800", "𝕊" * 300, "../../etc/passwd", [], {}, [[]], [{}], [None], ["a", 1], [0, 1, 2], [10**30], ["x"] * 40,
    [["x"]], {"a": {"b": {}}}, {"role": "user", "content": "x"}, [{"role": "user", "content": "\ud800"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}],
    [{"role": "user", "content": "x"}] * 3, [{"role": "tool", "content": "x", "tool_call_id": 5}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}, {"role": "user", "content": "y"}],
    [{"role": "system", "content": {"x": 1}}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}, {"role": "user", "content": "y"}],
]  # fmt: skip
FIELDS = sorted({*COMMON, *WITHOUT_EFFECT, "messages", "prompt", "functions", "lora_name", "lora_path", "made_up"})
PATHS = ["/chat/completions", "/completions", "/load_lora_adapter", "/unload_lora_adapter"]


@pytest.fixture(name="ask")
def fixture_ask(address):
    """Send a body; the status of what comes back, which is checked to be of the protocol."""
    with httpx.Client(headers={"Authorization": "Bearer secret"}, timeout=120) as client:

        def ask(path, body, method="POST", **options):
            response = client.request(method, address + path, content=body, **options)
            told = f"{method} {path} {body[:300]!r}: {response.status_code} {response.text[:300]}"
            if response.status_code == 200:
                return 200
            assert response.status_code in (400, 401, 404, 413), told
            error = response.json()["error"]
            assert error["message"] and error["type"] == "invalid_request_error" and error["code"], told
            assert "Traceback" not in response.text and "internal" not in error["message"], told
            return response.status_code

        yield ask


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_request_is_refused(ask, path):
    for body in RAW:
        assert ask(path, body) in (400, 404), body[:80]
    assert ask(path, b'{"user": "' + b"x" * (3 << 20) + b'"}') == 413
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert ask(path, b"", method) == 404
    assert ask("/../../etc/passwd", b"{}") == 404


def test_any_value_in_any_field_is_answered_or_refused_by_name(ask):
    chance = random.Random(7)
    counts = {200: 0, 400: 0, 404: 0}
    for _ in range(500):
        path = chance.choice(PATHS[:2] * 4 + PATHS[2:])
        opening = {"messages": QUESTION} if "chat" in path else {"prompt": "你好"}
        body = {"model": "f1", "max_tokens": 2} | (opening if "lora" not in path else {})
        for _ in range(chance.choice((1, 1, 2, 3))):
            body[chance.choice(FIELDS)] = chance.choice(VALUES)
        if "num_beams" in body or body.get("max_tokens") is None:
            body["max_tokens"] = 2
        text = json.dumps(body)
        kind = chance.choice(
            ("application/json", "text/plain", "multipart/form-data; boundary=x", "", "application/json; charset=x")
        )
        counts[ask(path, text.encode(), headers={"Content-Type": kind})] += 1
    assert counts[200] > 20 and counts[400] > 200, counts


def test_half_characters_are_refused_wherever_they_stand(ask, address):
    for body in (
        b'{"model": "\\ud800", "messages": []}',
        b'{"\\ud800": 1}',
        b'{"model": "f1", "messages": [{"role": "\\udfff"}]}',
    ):
        assert ask("/chat/completions", body) in (400, 404)
    with httpx.Client() as client:
        assert client.get(address + "/models", headers={"Authorization": b"Bearer \xff\xfe"}).json()["error"]["code"]
