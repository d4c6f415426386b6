"""What the campaign shares: how much of it is run, the programs, and a folder for each."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import cases
import killing
import programs
import pytest

SLOWEST = 20  # of the refusals, that are printed


def pytest_terminal_summary(terminalreporter) -> None:
    """Print how long refusals took from a cold start, where that was measured."""
    if cases.SECONDS:
        seconds = [second for second, _ in cases.SECONDS]
        middle, slow = statistics.median(seconds), sum(second > 5 for second in seconds)
        terminalreporter.write_line(f"{len(seconds)} refusals, cold: median {middle:.1f} s, {slow} of them over 5 s")
        for second, case in sorted(cases.SECONDS)[: -SLOWEST - 1 : -1]:
            terminalreporter.write_line(f"{second:.1f} s {case}")


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
        running.end().ok  # noqa: B018
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
