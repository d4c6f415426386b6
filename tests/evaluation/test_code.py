"""Code in answers: what is run, in what it is shut, and pass@k worked out by hand."""

import contextlib
import itertools
import json
import os
import random
import re
import socket
import statistics
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from utils.evaluation import code
from utils.evaluation.code import SANDBOX, outcome, pass_at
from utils.evaluation.programs import Task, program
from utils.evaluation.sandbox import REFUSED
from utils.files import write_json

ADD = Task("def add(a, b):\n", "add", "assert add(1, 2) == 3")


@pytest.mark.parametrize(("count", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (7, 1, 7)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(count, right, k):
    drawn = itertools.combinations([True] * right + [False] * (count - right), k)
    assert pass_at(k, count, right) == pytest.approx(statistics.fmean(map(any, drawn)))


ROOT = Task(
    "from typing import List\n\ndef at(xs, x):\n    return xs[0] + xs[1] * x\n\n"
    'def root(xs: List[int]):\n    """The root."""\n',
    "root",
    "assert at([2, 1], root([2, 1])) == 0",
)
WHOLE = "def root(xs: List[int]):\n    return -xs[0] / xs[1]"  # needs the import above it, and its test the function there


@pytest.mark.parametrize(
    "answer",
    [
        f"好的：\n```python\n{WHOLE}\n```\n完",
        f"先引入：\n```python\nimport math\n```\n再写：\n~~~ py\n{WHOLE}\n~~~",
        f"1. 如下：\n   ```Python3\n{textwrap.indent(WHOLE, '   ')}\n   ```".replace("\n", "\r\n"),
        WHOLE,
        "    return -xs[0] / xs[1]",
        "x = xs[0]\n    return -x / xs[1]",
        "```\n    return -xs[0] / xs[1]",
        f"先装：\n```bash\npip install x\n```\n再写：\n```python\n{WHOLE}\n```",
        f"思路：\n```\n两边相除。\n```\n```text\n-b/a\n```\n```{{.python}}\n{WHOLE}\n```\n用：\n```\nprint(root([2, 1]))\n```",
        f"```\nroot([2, 1])\n```\n```python\n{ROOT.prefix}\n```\n```py title='a'\n{WHOLE}\n```",
        f"```python\n{WHOLE.replace('-', '')}\n```\n更正：\n```python\n{WHOLE}\n```",
        "```sh\nls\n```\n```\n说明\n```\n```\n    return -xs[0] / xs[1]\n```",
        f"代码：\n\n{WHOLE}\n\n完毕",
        "```python\ndef root(xs):\n    return -one(xs) / xs[1]\n```\n辅助：\n```python\nfrom operator import neg\nN = 0\n"
        "def one(xs):\n    return other(xs)\nprint(input())\n```\n```python\ndef other(xs):\n    return neg(-xs[N])\n```",
    ],
)
def test_right_code_passes_however_it_is_given(answer):
    assert outcome(program(answer, ROOT)) == ""


@pytest.mark.parametrize(
    "answer",
    [
        "```sh\nls\n```\n```\n加\n```\n```python\ndef add(a, b): return a + b\n```\n```python\n>>> add(1, 2)\n3\n```",
        "```python\nadd(1, 2)\n```\n```python\ndef add(a, b): return plus(a, b)\n```\n```python\nplus = int.__add__\n```",
        "如下：\ndef add(a, b):\n    return a + b\n[DONE]",
        "add = lambda a, b: a + b",
    ],
)
def test_a_problem_that_names_no_function_is_answered_by_what_its_tests_call(answer):
    assert outcome(program(answer, Task("", "", ADD.tests))) == ""


def test_the_beginning_of_the_problem_does_not_stand_in_for_an_answer():
    assert "AssertionError" in outcome(program("def root(xs): return 1", ROOT)) and outcome(program("", ROOT))
    assert outcome("x = bytearray(700 << 20)") == "", "there is room for so much"
    assert outcome(program("```python\nx = 1\n```", Task("", "", "assert x == 1"))) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("assert False", "AssertionError"),
        ("def", "SyntaxError"),
        ("import os; os._exit(3)", "status 3"),
        ("import os; os._exit(97)", "status 1"),
        ("import os; os._exit(0)", "ended before its tests did"),
        ("raise SystemExit(0)\nassert False", "ended before its tests did"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 25))", "File too large"),
        ("for n in range(99): open(f'{n}', 'wb').write(bytes(1 << 20))", "No space left on device"),
        ("for n in range(9999): open(f'{n}', 'w').close()", "No space left on device"),
        ("while True: print('x' * 100000)", "File too large"),
        ("import sys\nwhile True: sys.stderr.write('x' * 100000)", "xxx"),
    ],
)
def test_wrong_and_greedy_code_fails_with_its_reason(text, why):
    assert why in outcome(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('/etc/passwd').read()",
        "open('{mine}').read()",
        "open('{mine}', 'w')",
        "os.truncate('{mine}', 0)",
        "os.chmod('{mine}', 0)",
        "os.link('{mine}', 'link')",
        "os.symlink('{mine}', 'link'); open('link', 'w')",
        "open('/proc/self/environ').read()",
        "os.kill(os.getppid(), 0)\nos.kill(-1, 9)",
        "open(os.path.join(os.path.dirname(os.__file__), 'mine'), 'w')",
        "socket.create_connection(('127.0.0.1', 9), 5)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "socket.socket(socket.AF_UNIX).connect('{listening}')",
        "os.setuid(0)",
        "os.chroot('/tmp')",
        "os.environ['SECRET']",
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise PermissionError",  # CLONE_NEWUSER
        "[os.fork() or time.sleep(9) for _ in range(99)]",
    ],
)
def test_what_is_outside_cannot_be_reached(tmp_path, text, monkeypatch):
    monkeypatch.setenv("SECRET", "one")
    mine, listening = tmp_path / "mine", tmp_path / "s"
    mine.write_text("mine", "utf-8")
    before = mine.stat()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
        server.listen()
        told = outcome("import os, socket, time\n" + text.replace("{mine}", str(mine)).replace("{listening}", str(listening)))
    assert re.match("FileNotFoundError|PermissionError|ProcessLookupError|OSError|KeyError|BlockingIOError", told), told
    after = mine.stat()
    assert (after.st_mode, after.st_nlink, after.st_mtime_ns) == (before.st_mode, before.st_nlink, before.st_mtime_ns)
    assert mine.read_text("utf-8") == "mine"


def sandboxes(megabytes: int) -> list[bytes]:
    """The command lines of the sandboxes with this limit of memory that run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(file.read_bytes())
    return [command for command in found if b"sandbox.py" in command and str(megabytes).encode() in command]


def test_a_program_cannot_end_the_one_that_runs_it():
    """Not its parent, nor all of its process group, which reaches out of a namespace."""
    text = "import os, signal\nfor one in (os.getppid(), 1, 0):\n    try: os.kill(one, 9)\n    except OSError: pass"
    assert outcome(text) in ("", "ended with status 247")


def test_what_is_started_ends_with_the_program(monkeypatch):
    """A child of its own session that would live on, and one that asks not to die with its parent."""
    megabytes = random.Random().randrange(1000, 2000)  # tells these processes from those of another run on this machine
    monkeypatch.setattr(code, "MEGABYTES", megabytes)
    text = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep({seconds})"
    seconds = random.Random().uniform(3600, 7200)
    assert outcome(text.replace("{seconds}", str(seconds))) == ""
    until = time.monotonic() + 50
    while sandboxes(megabytes):  # what is killed is gone soon after; what lives on does so for more than a minute
        assert time.monotonic() < until
        time.sleep(0.1)


def test_time_is_bounded(monkeypatch):
    megabytes = random.Random().randrange(1000, 2000)  # tells these processes from those of another run on this machine
    monkeypatch.setattr(code, "MEGABYTES", megabytes)
    monkeypatch.setattr(code, "SECONDS", 1)
    assert "status" in outcome("while True: pass")
    monkeypatch.setattr(code, "WALL", 2)
    assert outcome("import time; time.sleep(600)") == "took over 2 s"
    until = time.monotonic() + 50
    while sandboxes(megabytes):  # what is killed is gone soon after; what lives on does so for more than a minute
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/bin/python3").exists(), reason="not root, or no Python for all")
def test_it_works_for_those_who_are_not_root(tmp_path):
    """With the system's Python, as nobody: the same disk, no way up."""
    tmp_path = Path(tempfile.mkdtemp())
    os.chown(tmp_path, 65534, 65534)
    program = SANDBOX.read_text("utf-8")
    for text, status in (("import json, os\nassert os.listdir('/tmp') == []", 0), ("open('/etc/passwd')", 1)):
        ended = subprocess.run(
            ["/usr/bin/python3", "-I", "-c", program, tmp_path, "5", "512"], input=f"word\n{text}", capture_output=True,
            text=True, user=65534, group=65534, extra_groups=[],
        )  # fmt: skip
        if ended.returncode == REFUSED:
            pytest.skip(f"this machine does not let others than root do it: {ended.stderr}")
        assert (ended.returncode, "word" in ended.stdout) == (status, status == 0), ended.stderr


def test_systems_are_compared_problem_by_problem():
    """With one sample McNemar's test, with several a bootstrap over problems; by hand: 8 problems against none, p = 2 / 256."""
    records = [{"instruction": str(n), "category": "x"} for n in range(10)]
    good, poor = [""] * 8 + ["E"] * 2, ["E"] * 10
    line = "pass@1, all 10 problems: a is better than b (only a right 8, only b right 0, McNemar p = 0.008)"
    (table,), notes = code.tabulate(records, {"a": good, "b": poor})
    assert line in notes and table.rows[0].intervals["b"] == pytest.approx((0, 27.75), abs=0.01)  # Wilson's of 0 of 10
    notes = code.tabulate(records, {"a": good, "a#2": poor, "b": [""] * 4 + ["E"] * 6, "b#2": [*poor[:9], ""]})[1]
    assert any(note.startswith("pass@1, all 10 problems: a and b: no difference can be told (95 % interval") for note in notes)
    (table,), _ = code.tabulate(records, {"a": good, "a#2": poor, "b": poor})  # as many as all have
    assert table.title == "pass@1 in % (1 samples per problem, 10 s, 1024 MB)"
    ended = ["A: x", "B", "A: y", "C", "D", "E", "F", "", "", ""]
    told = "a: 3 of 10 programs pass; the others: A 2, B 1, C 1, D 1, E 1"
    assert told in code.tabulate(records, {"a": ended})[1]
    notes = code.tabulate(records, {"a": good, "a#2": good, "b": poor, "b#2": ["", *poor[1:]]})[1]
    assert any(note.startswith("pass@1, all 10 problems: a is better than b (95 % interval of") for note in notes)


def test_the_script_runs_samples_and_counts(script, tmp_path):
    raw = {"task_id": "x/0", "prompt": ADD.prefix, "entry_point": "add", "test": "def check(f):\n    assert f(1, 2) == 3"}
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(raw) + "\n", "utf-8")
    said = script("data/code/prepare.py", "--raw", tmp_path / "HumanEval.jsonl", "--output_dir", tmp_path).ok()
    assert "MIT" in said
    (problem,) = json.loads((tmp_path / "humaneval.json").read_text("utf-8"))
    write_json(tmp_path / "humaneval.json", [{"instruction": "a question without tests", "output": ""}, problem])
    options = ["--test_input_path", tmp_path / "humaneval.json", "--output_dir", tmp_path / "out"]
    for number, answer in enumerate(["    return a + b", "    return a - b"]):
        other = {"instruction": "not one of the problems", "output": "x"}
        write_json(tmp_path / f"{number}.json", [other, {"instruction": problem["instruction"], "output": answer}])
        options += ["--answers", f"f1={tmp_path / str(number)}.json"]
    assert "missing; say how to compare" in script("judge.py", *options).error
    out = script("judge.py", *options, "--run_code").ok()
    assert "f1: 1 of 2 programs pass; the others: AssertionError 1" in out
    (table,) = json.loads((tmp_path / "out/code.json").read_text("utf-8"))["tables"]
    assert table["title"].startswith("pass@1 in % (2 samples per problem") and table["title"].endswith("not recorded")
    assert [(row["samples"], row["values"]) for row in table["rows"]] == [(1, {"f1": 50.0})]
