"""Runs a program and ends it, or stops it, at a moment that can be repeated: so many seconds in, or before its n-th
change to the files of its folder (a file opened for writing, renamed, synced, removed; a folder made or removed).

RELIABILITY=full in the environment asks for all of the campaign; RELIABILITY_SEED draws the moments.
"""

import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from scripting import ROOT, Ended, Running

FULL = os.environ.get("RELIABILITY") == "full"
SEED = os.environ.get("RELIABILITY_SEED", "0")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}  # chmod: `sync` does it first
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a signal comes: after so many seconds, or before the change of this number, counted from 1; or `twice`, the
    second time before the next change."""

    seconds: float | None = None
    change: int | None = None
    number: int = signal.SIGKILL
    twice: bool = False


class Doomed(Running):
    """A forked process that gets its signal at its moment; each change to the files below `place` adds a byte to `counted`."""

    def __init__(self, folder: Path, argv: list[str], place: Path, moment: Moment):
        self.place, self.moment, self.counted = place, moment, folder / "changes"
        (folder / "run.out").write_text("")  # of the run before
        super().__init__(folder, "run", argv, None, {})

    def _be(self, argv: list[str], cwd: Path | None, env: dict[str, str]) -> None:
        counter = os.open(self.counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        seen = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if is_change(event, args) and any(is_below(arg, self.place) for arg in args[:2]):
                seen += 1
                os.write(counter, b".")
                if self.moment.change and 0 <= seen - self.moment.change <= self.moment.twice:
                    os.kill(os.getpid(), self.moment.number)

        sys.addaudithook(watch)
        super()._be(argv, cwd, env)

    def end(self) -> Ended:
        """Send the signal at its moment, if that is a time, and wait for the end."""
        if self.moment.seconds is not None:
            time.sleep(self.moment.seconds)
            self.kill(self.moment.number)
        return self.wait()

    def go_on(self) -> Ended:
        """Wait until it has been stopped by SIGSTOP, have it go on, and wait for the end."""
        os.waitpid(self.pid, os.WUNTRACED)
        self.kill(signal.SIGCONT)
        return self.wait()


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """True for what changes a file or a folder, among Python's audit events."""
    return event in CHANGES or (event == "open" and isinstance(args[2], int) and bool(args[2] & WRITING))


def is_below(path: Any, place: Path) -> bool:
    """True for a path in a folder."""
    return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(str(place))


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody disturbs takes, and leaves: seconds, changes to files, the contents of its folder."""

    seconds: float
    changes: int
    contents: dict[str, object]

    def moment(self, draw: random.Random) -> Moment:
        """One drawn evenly over the run's time, or over its changes, turn about at random."""
        if draw.random() < 0.5:
            return Moment(seconds=draw.uniform(0, self.seconds))
        return Moment(change=draw.randint(1, self.changes))


def start(folder: Path, words: list[str], place: Path, moment: Moment | None = None) -> Doomed:
    """Start a script of the repository, its output kept in `folder`."""
    return Doomed(folder, [str(ROOT / words[0]), *words[1:]], place, moment or Moment())
