"""Many visitors of the page for many turns, and many prompts in one run: no error, nothing mixed up, memory flat."""

import html
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from gradio_client import Client
from scripting import ROOT, free_port

from utils.inference.sampling_params import SHOWN, STARTS

pytestmark = pytest.mark.slow

SESSIONS = {True: (50, 10), False: (10, 5)}
PROMPTS = {True: 20_000, False: 1_000}
GROWTH = 1.1  # of the resident memory, from the first fifth of the work to its end; measured: 1.04 to 1.08, and 1.01
TOKENS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base with a window for long conversations, and two adapters."""
    folder = tmp_path_factory.mktemp("load")
    tiny.llama(folder / "base", max_position_embeddings=4096)
    for seed, name in enumerate(("f1", "f2")):
        tiny.adapter(folder / "base", folder / name, seed, scale=0.1)
    return folder


def resident(process: int) -> int:
    """The MiB of memory that a process has."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) >> 10


def command(*words: object) -> subprocess.Popen:
    """generate.py, started as a user starts it."""
    line = [sys.executable, str(ROOT / "generate.py"), *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Visitor:
    """One who talks on the page, in a session of their own; the server keeps the talk.

    Calls what the send button calls, and then what the page calls when a question has been taken.
    """

    def __init__(self, url: str, number: int):
        self.client, self.number = Client(url, verbose=False, httpx_kwargs={"timeout": 300}), number
        sends = {part["id"] for part in self.client.config["components"] if part["props"].get("elem_id") == "send"}
        self.take = self.call_on(lambda part, event: part in sends)
        wanted = self.client.config["dependencies"][self.take]["outputs"][0]  # by which it calls for an answer
        self.grow = self.call_on(lambda part, event: (part, event) == (wanted, "change"))

    def call_on(self, wanted: Callable[[int, str], bool]) -> int:
        """The number of the page's function that an event calls."""
        calls = self.client.config["dependencies"]
        number = next(call["id"] for call in calls if any(wanted(*target) for target in call["targets"]))
        self.client.endpoints[number].is_valid = True  # it is the page's alone; the client library would not call it
        return number

    def question(self, turn: int) -> str:
        """What this visitor asks at a turn."""
        return f"<{self.number}:{turn}>"

    def ask(self, turn: int) -> list[tuple[str, str]]:
        """Ask once more; returns all messages on the page, as role and text."""
        values = {"max_new_tokens": TOKENS, "num_beams": 1, "do_sample": False}
        knobs = [values.get(name, STARTS[name]) for name in SHOWN]
        adapter = ("f1", "f2")[self.number % 2]
        self.client.predict(self.question(turn), "", "", adapter, "", *knobs, fn_index=self.take)  # no system, no name
        shown, *_ = self.client.predict(adapter, "", *knobs, fn_index=self.grow)
        return [(message["role"], text_of(message["content"])) for message in shown["value"]]


def text_of(content: str | list[dict]) -> str:
    """The text of a message, which a chat holds in parts, as a browser shows it, without the note of who gave it."""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return html.unescape(re.sub(r'<small class="by">.*</small>', "", text))


def test_sessions_side_by_side(models, full):
    """Each visitor's page has their own questions and no other's, and the answers that they would get alone."""
    count, turns = SESSIONS[full]
    port = free_port()
    server = command("--lora_weights", f"{models / 'f1'},{models / 'f2'}", "--server_port", port)
    try:
        url = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        threading.Thread(target=server.stdout.read, daemon=True).start()
        with ThreadPoolExecutor(count) as pool:
            visitors = list(pool.map(lambda number: Visitor(url, number), range(count)))
            memory = []
            for turn in range(turns):
                pages = list(pool.map(lambda visitor, turn=turn: visitor.ask(turn), visitors))
                memory.append(resident(server.pid))
                for visitor, page in zip(visitors, pages, strict=True):
                    asked = [text for role, text in page if role == "user"]
                    assert asked == [visitor.question(earlier) for earlier in range(turn + 1)]
        for visitor, page in list(zip(visitors, pages, strict=True))[:: max(1, count // 5)]:
            assert unspaced(page) == unspaced(alone(visitor, turns))
        print(f"page: {count} sessions of {turns} turns, {memory[turns // 5 - 1]} MiB after a fifth, {memory[-1]} at the end")
        assert memory[-1] <= memory[turns // 5 - 1] * GROWTH, memory
    finally:
        server.kill()
        server.wait()


def unspaced(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Messages without white space: the page takes the indentation off that all lines of an answer have."""
    return [(role, "".join(text.split())) for role, text in messages]


def alone(visitor: Visitor, turns: int) -> list[tuple[str, str]]:
    """The same conversation through the API, which is told what went before with each question."""
    history: list[list[str]] = []
    for turn in range(turns):
        question, adapter = visitor.question(turn), ("f1", "f2")[visitor.number % 2]
        answer = visitor.client.predict(question, "", history, adapter, max_new_tokens=TOKENS, api_name="/answer")
        history.append([question, answer])
    return [message for asked, answer in history for message in (("user", asked), ("assistant", answer)) if message[1]]


def test_many_prompts(models, tmp_path, full):
    """Every prompt has its answer, in its place; the memory does not grow with the answers."""
    count = PROMPTS[full]
    prompts = [f"Question {number}: {'why ' * (number % 9)}?" for number in range(count)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts), "utf-8")
    journal, result = tmp_path / ".answers.json.journal", tmp_path / "answers.json"
    words = ("--lora_weights", models / "f1", "--is_ui", "False", "--test_input_path", tmp_path / "prompts.json")
    running = command(*words, "--output_path", result, "--max_new_tokens", TOKENS, "--num_beams", 1)
    memory = []
    while running.poll() is None:
        done = answers_in(journal)
        if done >= count // 5:
            memory.append(resident(running.pid))
        threading.Event().wait(0.1)
    said = running.stdout.read()
    assert running.returncode == 0, said
    found = json.loads(result.read_text("utf-8"))
    assert [record["instruction"] for record in found] == prompts
    print(f"batch: {count} prompts, {memory[0]} MiB after a fifth, {memory[-1]} at the end, {max(memory)} at most")
    assert memory[-1] <= memory[0] * GROWTH, memory


def answers_in(journal: Path) -> int:
    """How many answers a journal holds."""
    return journal.read_bytes().count(b'"output"') if journal.exists() else 0
