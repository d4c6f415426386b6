"""What the campaign shares: how much of it is run, the programs, and a folder for each."""

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import killing
import programs
import pytest
import tiny
from cases import FULL, GOOD, HANGS, RECORDS, SECONDS, refusal, run_cold
from scripting import Ended

SLOWEST = 20  # of the refusals, that are printed


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how long refusals took from a cold start, where that was measured."""
    if SECONDS:
        seconds = [second for second, _ in SECONDS]
        middle, slow = statistics.median(seconds), sum(second > 5 for second in seconds)
        terminalreporter.write_line(f"{len(seconds)} refusals, cold: median {middle:.1f} s, {slow} of them over 5 s")
        for second, case in sorted(SECONDS)[: -SLOWEST - 1 : -1]:
            terminalreporter.write_line(f"{second:.1f} s {case}")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, Path]:
    """Good things by name; tests copy what they break."""
    top = tmp_path_factory.mktemp("world")
    base = tiny.llama(top / "base")
    texts = {
        "data": RECORDS,
        "prompts": [{"instruction": record["instruction"]} for record in RECORDS[:3]],
        "one": [record | {"output": "甲"} for record in RECORDS[:3]],
        "two": [record | {"output": "乙"} for record in RECORDS[:3]],
    }
    for name, value in texts.items():
        (top / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    (top / "short.txt").write_text("一", "utf-8")
    (top / "text.txt").write_text("春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n" * 20, "utf-8")
    tokenless = shutil.copytree(base, top / "tokenless", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    found = {name: top / f"{name}.json" for name in texts}
    return found | {
        "base": base,
        "tokenless": tokenless,
        "adapter": tiny.adapter(base, top / "adapter"),
        "text": top / "text.txt",
        "short": top / "short.txt",
        "top": top,
    }


@pytest.fixture
def cold_or_forked(script):
    """Runs a script to its end, and does not wait for one that hangs."""

    def run(name: str, *argv: object, cwd: Path, **env: str) -> Ended:
        if FULL:
            return run_cold(name, *argv, cwd=cwd, **env)
        return script.start(name, *argv, cwd=cwd, **env).wait(HANGS)

    return run


@pytest.fixture
def refused(cold_or_forked, tmp_path, world):
    """Runs a script that must refuse; returns its one line, after checking that nothing is left behind.

    `refused("finetune.py", "--seed -1")`; `{base}`, `{tmp}` and so on stand for paths. `good=False` gives these options alone.
    """

    def run(name: str, options: str = "", good: bool = True, **env: str) -> str:
        words = f"{GOOD.get(name, '') if good else ''} {options}"
        return refusal(cold_or_forked, name, words, tmp_path, world, **env)

    return run


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether all of the campaign is asked for, not the sample of it."""
    return killing.FULL


class Case:
    """A program with a folder to write to, `place`, and what it does when nobody disturbs it."""

    def __init__(self, program: programs.Program, folder: Path):
        self.program, self.folder, self.place = program, folder, folder / "place"
        self.place.mkdir()
        self.undisturbed = self.measure()

    def measure(self) -> killing.Undisturbed:
        """Run the program to its end, and note what that takes and leaves."""
        programs.clear(self.place)
        began = time.monotonic()
        running = self.start()
        running.end().ok()
        seconds, changes = time.monotonic() - began, running.counted.stat().st_size
        found = programs.contents(self.place)
        programs.clear(self.place)
        return killing.Undisturbed(seconds, changes, found)

    def start(self, moment: killing.Moment | None = None) -> killing.Doomed:
        """Start the program, a signal to come at a moment."""
        self.started = killing.start(self.folder, self.program.argv(self.place), self.place, moment)
        return self.started

    def check_same(self) -> None:
        """What the program left is what the undisturbed run left, to the bit."""
        assert not programs.differences(programs.contents(self.place), self.undisturbed.contents)


@pytest.fixture(scope="module", params=programs.BUILDERS)
def case(request, tmp_path_factory) -> Case:
    """Each of the programs in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    return Case(programs.BUILDERS[request.param](folder / "inputs"), folder)


@pytest.fixture
def fresh(case) -> Iterator[Case]:
    """The same with an empty folder, before and after."""
    programs.clear(case.place)
    yield case
    with contextlib.suppress(ProcessLookupError):
        case.started.kill()  # where the test failed
    programs.clear(case.place)
