"""What the cases of bad input share: a small world of good things to break, and what every refusal must be.

A case runs a script with good options, and after them those of the case (of an option given twice the last counts).
With RELIABILITY=full each case is a process of its own, started cold, and what that took is printed in the end;
otherwise it is forked from the warm test process, which leaves the imports out.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scripting import ROOT, Ended

FULL = os.environ.get("RELIABILITY") == "full"
HANGS = 120  # seconds after which a process counts as hanging, and is killed: far more than any case takes
SECONDS: list[tuple[float, str]] = []  # that refusals from a cold start took, and of which case
WORK = re.compile(r"Loading weights|encoding|merging:|[1-9]\d* ?records")  # bars that a long work begins with
PROGRESS = re.compile(r"\d+%\||\d+ ?records \[|\[\d\d:\d\d")
RECORDS = [{"instruction": f"第{number}问？", "input": "", "output": f"答{number}。" * 3} for number in range(12)]
GOOD = {
    "finetune.py": "--base_model {base} --data_path {data} --output_dir {tmp}/out --val_set_size 2 --batch_size 4",
    "generate.py": "--base_model {base} --lora_weights {adapter} --is_ui False --test_input_path {prompts} "
    "--output_path {tmp}/out/answers.json --max_new_tokens 4 --num_beams 1",
    "merge_weights.py": "--base_model {base} --lora_model {adapter} --output_dir {tmp}/out",
    "judge.py": "--answers one={one} --answers two={two} --metrics --test_input_path {prompts} --output_dir {tmp}/out",
    "extend_vocab.py": "--base_model {base} --text {text} --output_dir {tmp}/out",
}


class Case(NamedTuple):
    """Which script is given which options, and the words that its one line must have: the thing, the way out."""

    what: str
    script: str
    options: str
    words: tuple[str, ...]


def cases(script: str, *rows: tuple[str, ...]) -> list:
    """Parameters of a test: each row says what is broken, with which options, and the words of the refusal."""
    made = [Case(what, script, options, words) for what, options, *words in rows]
    return [pytest.param(case, id=f"{script.removesuffix('.py')}: {case.what}") for case in made]


def run_cold(name: str, *argv: object, cwd: Path, before: Sequence[str] = (), **env: str) -> Ended:
    """Run a script as a user does, with the words `before` it."""
    command, began = [*before, sys.executable, str(ROOT / name), *map(str, argv)], time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=HANGS, check=False
    )
    if done.returncode == 2:
        SECONDS.append((time.monotonic() - began, os.environ["PYTEST_CURRENT_TEST"].partition("::")[2]))
    return Ended(done.returncode, done.stdout, done.stderr)


def refusal(
    run: Callable[..., Ended], name: str, words: str, tmp_path: Path, world: dict[str, Path], at_once: bool = False, **more: Any
) -> str:
    """The one line with which a script refuses what is broken in `tmp_path` or `world`, after checking that nothing is
    left behind, and if `at_once` that no long work had begun."""
    cwd = tmp_path / "cwd"
    cwd.mkdir(exist_ok=True)
    before = listing(tmp_path) | listing(world["top"])
    ended = run(name, *(word.format(tmp=tmp_path, **world) for word in shlex.split(words)), cwd=cwd, **more)
    line = the_line(ended)
    assert not (at_once and WORK.search(ended.err)), ended.err
    assert listing(tmp_path) | listing(world["top"]) == before, "something was written, or removed"
    return line


def the_line(ended: Ended) -> str:
    """The one line of a refusal: what is refused, what is wrong, the way out; nothing else on stderr, status 2."""
    assert ended.status == 2, f"status {ended.status}\n{ended.out}\n{ended.err}"
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line.strip() and not PROGRESS.search(line)]
    assert len(lines) == 1, ended.err
    assert re.fullmatch(r"[\w.]+: error: \S.*[;:?].+", lines[0]), f"not of the form thing: what is wrong; way out: {lines[0]}"
    assert len(lines[0]) < 1500, f"{len(lines[0])} characters are no line that a person reads"
    return lines[0]


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything in a folder, with size and time of change; what the tests themselves print into is left out."""
    found = {}
    for path in folder.rglob("*"):
        if not path.name.startswith(".run"):
            status = path.lstat()
            found[path] = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def has(line: str, words: tuple[str, ...]) -> None:
    """All `words` stand in the line."""
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"
