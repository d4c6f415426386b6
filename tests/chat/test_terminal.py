"""A chat in a terminal, led through a pseudo-terminal as a person would."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from scripting import ROOT

from utils.chat import terminal
from utils.console import harmless
from utils.inference.answerers import resolve, with_base
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams
from utils.models.placement import place

pytest_plugins = ["browsing"]  # fixtures


class Person:
    """Types into a program, and reads what it shows."""

    def __init__(self, *line):
        self.own, theirs = pty.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen([sys.executable, ROOT / "generate.py", *line], **streams, start_new_session=True)
        os.close(theirs)

    def reads(self, prompt, typed=b""):
        """What is shown until the next `prompt`, after `typed`."""
        os.write(self.own, typed)
        return self.sees(lambda shown: shown.endswith(prompt.encode()))

    def sees(self, enough):
        """What is shown until it is `enough`."""
        shown, until = b"", time.monotonic() + 180
        while not enough(shown):
            assert time.monotonic() < until, shown.decode(errors="replace")
            if select.select([self.own], [], [], 1)[0]:
                shown += os.read(self.own, 65536)
        return shown.decode(errors="replace")


def test_each_question_comes_after_what_was_said_since_the_dialogue_began(folder, monkeypatch, capsys):
    base, answerers = resolve("", [str(folder / "f1")], "")
    engine, asked, before = Engine(base, with_base(answerers), place(False, False)), [], signal.getsignal(signal.SIGINT)
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda *given: (asked.append(given[:2]), encode(*given))[1])
    lines = ["一", " ", "二", "/clear", "三", "/model none", "/model base", "四", "/exit", "五"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    try:
        terminal.talk(engine, SamplingParams(num_beams=1, max_new_tokens=6))
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().out
    assert [name for name, _ in asked] == ["f1", "f1", "f1", "base"]
    assert [record["instruction"] for _, record in asked] == ["一", "二", "三", "四"]
    answers = [record["history"][-1][1] for _, record in (asked[1], asked[3])]
    assert [record["history"] for _, record in asked] == [[], [["一", answers[0]]], [], [["三", answers[1]]]]
    assert all(f"> {harmless(answer)} … (cut: --max_new_tokens)\n" in said for answer in answers)
    assert said.count("names are base, f1") == 1 and said.endswith("base> ")


@pytest.mark.slow
def test_questions_commands_and_keys(folder):
    person = Person("--lora_weights", str(folder / "f1"), "--is_ui", "terminal", "--num_beams", "1", "--max_new_tokens", "1500")
    assert "/clear" in person.reads("f1> ")
    whole = person.reads("f1> ", "你是谁？\n".encode())
    assert len(whole) > 40
    assert person.reads("f1> ", b"/clear\n").count("\n") == 1
    os.write(person.own, "你是谁？\n".encode())
    person.sees(lambda shown: len(shown.partition(b"\n")[2]) > 20)  # the question's echo, and the first words
    os.kill(person.process.pid, 2)  # as Ctrl-C does
    stopped = person.reads("f1> ")
    assert "stopped" in stopped and len(stopped) < len(whole)
    while not select.select([person.own], [], [], 2)[0]:  # readline misses what comes just before it waits: press again
        os.kill(person.process.pid, 2)  # too late: the chat goes on
    person.reads("f1> ")
    person.reads("f1> ", "你".encode()[:2] + b"\n")
    assert "names are base, f1" in person.reads("f1> ", b"/model nobody\n")
    person.reads("base> ", b"/model  base \n")
    os.write(person.own, "你是谁？\n".encode())
    person.sees(lambda shown: len(shown.partition(b"\n")[2]) > 20)
    os.write(person.own, b"/clear\n\x04")  # typed while the answer grows
    rest = person.sees(lambda shown: b"base> /clear" in shown and shown.endswith(b"base> \r\n"))
    assert rest.count("/clear") == 1 and "stopped" not in rest
    assert person.process.wait(60) == 0
    os.close(person.own)
