"""What a terminal shows: characters that it lacks, bars, notices of one process, and no control characters."""

import io
import subprocess
import sys

import pytest
import torch
from scripting import ROOT

from utils import cli
from utils.console import harmless, is_out_of_memory, noting, progress, reason, say, wants_color


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "ascii"])
def test_a_terminal_that_lacks_a_character_shows_an_escape(tmp_path, encoding):
    (tmp_path / "run.yaml").write_text("😀: 1", "utf-8")
    done = subprocess.run(
        [sys.executable, "finetune.py", "--config", tmp_path / "run.yaml"],
        cwd=ROOT, capture_output=True, env={"PYTHONIOENCODING": encoding, "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2 and b"\\U0001f600: no such option" in done.stderr and b"Traceback" not in done.stderr


def test_of_several_processes_the_first_alone_is_heard(monkeypatch, capsys):
    for rank, said in (("0", "a notice\\x1b[1m\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with noting() as notes:
            say("a notice\x1b[1m")
        assert (capsys.readouterr().out, notes) == (said, ["a notice\x1b[1m"])
        assert progress([1]).disable == (rank == "1")


def test_bars_are_drawn_often_on_a_terminal_and_seldom_in_a_file(monkeypatch):
    for seen, seconds in ((True, 0.2), (False, 30)):
        monkeypatch.setattr("os.isatty", lambda _, seen=seen: seen)
        bar = progress([1])
        assert (bar.mininterval, bar.maxinterval) == (seconds, seconds)


def test_control_characters_are_shown_as_escapes():
    signs = [chr(number) for number in (*range(0xA1), 0x4E2D, 0xD800, 0xDFFF)]
    kept = [sign for sign in signs if harmless(sign) == sign]
    assert kept == ["\t", "\n", *map(chr, range(0x20, 0x7F)), "\xa0", "中"]
    assert [harmless(f"a{sign}b") for sign in ("\x1b", "\x9b", "\ud800")] == ["a\\x1bb", "a\\x9bb", "a\\ud800b"]


def test_what_is_typed_in_another_encoding_is_read_all_the_same(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xc4\xe3ok"), "utf-8"))
    cli.show_any_character()
    assert sys.stdin.read() == "\ufffd\ufffdok"


@pytest.mark.parametrize(
    ("error", "is_so", "said"),
    [
        (MemoryError(), True, "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), True, "CUDA out of memory. Tried"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), True, "CUDA error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True, "[enforce fail] Defau"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you"), True, "DefaultCPUAllocator"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), True, "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError(" \n shapes differ\nmore"), False, "shapes differ"),
        (ValueError("CUDA error: out of memory"), False, "CUDA error"),
    ],
)
def test_the_ways_to_say_that_memory_is_out_and_the_first_line_of_each(error, is_so, said):
    assert is_out_of_memory(error) is is_so and reason(error).startswith(said) and "\n" not in reason(error)


@pytest.mark.parametrize(
    ("terminal", "settings", "colors"),
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"NO_COLOR": ""}, True),
     (True, {"TERM": "dumb"}, False)],
)  # fmt: skip
def test_colors_are_for_terminals_that_show_them(monkeypatch, terminal, settings, colors):
    for name, value in ({"NO_COLOR": "", "TERM": "xterm"} | settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", type("Out", (io.StringIO,), {"isatty": lambda _: terminal})())
    assert wants_color() is colors


def test_notices_are_collected_by_each_who_listens_as_long_as_he_does():
    with noting() as outer:
        say("one")
        with noting() as inner:
            say("two")
        say("three")
    say("four")
    assert (outer, inner) == (["one", "two", "three"], ["two"])
