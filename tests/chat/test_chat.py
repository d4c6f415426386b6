"""What serves the chat page, without a browser: its API, its address, its password, files, and turns for everyone."""

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browsing import answer_of, served
from gradio_client import Client
from scripting import ROOT, free_port

import generate
from utils.chat import server
from utils.chat.feedback import usable
from utils.console import UserError
from utils.inference.sampling_params import SamplingParams

pytest_plugins = ["browsing"]  # fixtures


def test_the_api_has_names_and_a_documented_signature(url, service):
    client = Client(url, verbose=False)
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == {"/answer", "/answerers"}
    named = [parameter["parameter_name"] for parameter in described["/answer"]["parameters"]]
    assert named[:5] == ["instruction", "input", "history", "adapter", "template"]
    assert "max_new_tokens" in named
    assert "history: earlier turns" in described["/answer"]["description"]
    record = {"instruction": "你是谁？", "history": [["你好", "你好！"]]}
    job = client.submit("你是谁？", history=record["history"], adapter="f1", max_new_tokens=9, api_name="/answer")
    parts = list(job)
    assert parts[-1] == answer_of(service, "f1", record, 9)
    assert len(parts) > 1 and all(parts[-1].startswith(part) for part in parts)
    assert [one["name"] for one in client.predict(api_name="/answerers")] == ["base", "f1", "f2"]
    for wrong in (
        {"adapter": "none"},
        {"max_new_tokens": 10**6},
        {"temperature": -1},
        {"num_beams": 1000},
        {"history": [["x"]]},
    ):
        with pytest.raises(Exception, match=next(iter(wrong))):
            client.predict("你好", **wrong, api_name="/answer")
    with pytest.raises(Exception, match="empty"):
        client.predict(" ", api_name="/answer")
    with pytest.raises(UserError, match="part of a character"):  # which no client sends, but a terminal may
        next(service.reply("f1", {"instruction": "\ud800"}, SamplingParams()))


def test_cancelling_an_api_call_ends_the_computation(url, engine):
    client = Client(url, verbose=False)
    job = client.submit("讲故事", max_new_tokens=2048, api_name="/answer")
    next(job)
    job.cancel()
    time.sleep(1.5)
    before = engine.computed
    time.sleep(1)
    assert engine.computed == before


@pytest.mark.parametrize("path", ["/etc/passwd", __file__, "../../etc/passwd"])
def test_no_file_is_read_through_the_page(url, path):
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/stream/"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}{route}{path}")
        assert refused.value.code in (403, 404, 405)


def test_no_file_is_taken_by_the_page(url):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n' + b"a" * 5000 + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{url}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413


def test_the_address_is_obeyed(capsys, service):
    """Pitfall 15: 127.0.0.1 by default, and nothing else; elsewhere without a password is warned about."""
    with served(service) as page:
        port = page.server_port
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
        with pytest.raises(UserError, match="--server_port"):
            server.start(service, SamplingParams(), "zh", server.Address("127.0.0.1", port, None, False))
    assert "warning" not in capsys.readouterr().out
    with served(service, address=server.Address("0.0.0.0", None, None, False)) as page:
        socket.create_connection(("127.0.0.2", page.server_port)).close()
    assert "warning" in capsys.readouterr().out
    server.launch_options(server.Address("0.0.0.0", None, ("me", "secret"), False))
    assert "warning" not in capsys.readouterr().out


def test_a_password_may_hold_a_colon():
    assert generate.login("me:a:b") == ("me", "a:b") and generate.login("") is None
    for wrong in ("me", "me:", ":secret"):
        with pytest.raises(UserError, match="user:password"):
            generate.login(wrong)


def test_a_password_is_asked_for(service):
    with served(service, address=server.Address("127.0.0.1", None, ("me", "secret"), False)) as page:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{page.local_url}gradio_api/info")
        assert refused.value.code == 401
        with pytest.raises(Exception, match="Could not login"):
            Client(page.local_url, auth=("me", "wrong"), verbose=False)
        client = Client(page.local_url, auth=("me", "secret"), verbose=False)
        assert client.predict("你好", max_new_tokens=3, api_name="/answer")


@pytest.mark.cli
@pytest.mark.slow
def test_the_script_shows_the_page_until_it_is_stopped(folder):
    port = str(free_port())
    line = ["--lora_weights", f"{folder / 'f1'},{folder / 'f2'}", "--server_port", port, "--auth", "me:secret"]
    line = [sys.executable, str(ROOT / "generate.py"), *line, "--lang", "en", "--max_new_tokens", "7"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as running:
        assert any(f"http://127.0.0.1:{port}" in printed for printed in running.stdout)
        client = Client(f"http://127.0.0.1:{port}/", auth=("me", "secret"), verbose=False)
        assert client.predict("Hello", max_new_tokens=7, api_name="/answer")
        with pytest.raises(Exception, match="max_new_tokens"):
            client.predict("Hello", max_new_tokens=8, api_name="/answer")
        running.terminate()  # not SIGINT, which a program that was started in the background ignores
        running.stdout.read()
    assert running.returncode in (0, 128 + signal.SIGTERM)


def test_feedback_goes_only_where_it_can_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("feedback").write_text("")
    with pytest.raises(UserError, match="is not a folder; give another --feedback_dir"):
        usable(str(tmp_path / "feedback"))
    assert usable("feedback") == "" and "votes and thumbs are not taken" in capsys.readouterr().out
    assert usable("other") == "other"


def test_one_who_asks_much_does_not_keep_others_waiting(service):
    """Answers grow in turn, a token each: a short one overtakes a long one that began before it."""
    order = []

    def run(name, tokens):
        for _ in service.reply("f1", {"instruction": name}, SamplingParams(num_beams=1, max_new_tokens=tokens)):
            pass
        order.append(name)

    threads = [threading.Thread(target=run, args=task) for task in (("long", 400), ("short", 5))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert order == ["short", "long"]
