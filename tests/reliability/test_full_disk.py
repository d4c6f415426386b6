"""A disk that fills up, or that refuses writes: one line that says so, and with more room the same command ends as ever."""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import SEED, Moment
from programs import check_nothing_half_written
from scripting import Ended

pytestmark = pytest.mark.slow

SIZES = {True: 10, False: 2}
BIG, PAGE = 2**30, 4096


@pytest.fixture
def disk(fresh):
    """Has the program's folder on a disk of so many bytes while a block runs."""
    return lambda size: mounted(fresh.place, size)


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[None]:
    """A disk of `size` bytes at `place`; skips the test where none can be mounted."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # lazy: after a failure something may still use it


def remount(place: Path, how: str) -> None:
    """Change a mounted disk: `size=…`, `ro`, `rw`."""
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)


def taken(disk: Path) -> int:
    """The bytes that are in use on a disk, those of nameless files among them."""
    room = os.statvfs(disk)
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def test_a_disk_that_is_too_small(fresh, disk, full):
    """Disks of seeded sizes, all smaller than what the program leaves."""
    draw = random.Random(f"{SEED} {fresh.program.name}")
    with disk(BIG):
        fresh.start().wait().ok()
        needed = taken(fresh.place)
    for _ in range(SIZES[full]):
        size = draw.randrange(PAGE, needed, PAGE)
        with disk(size):
            check_says_full(fresh.start().wait())
            check_nothing_half_written(fresh.place, fresh.undisturbed.contents)
            remount(fresh.place, f"size={BIG}")
            fresh.start().wait().ok()
            fresh.check_same()


def test_a_disk_that_fills_up_meanwhile(fresh, disk, full):
    """At seeded changes to its files, others have taken the rest of the disk, but for a few pages."""
    draw = random.Random(f"{SEED} {fresh.program.name}")
    for _ in range(SIZES[full]):
        with disk(BIG):
            change = draw.randint(2, fresh.undisturbed.changes)
            running = fresh.start(Moment(change=change, number=signal.SIGSTOP))
            os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WNOWAIT)
            remount(fresh.place, f"size={taken(fresh.place) + PAGE * (2 + draw.randrange(3))}")
            ended = running.go_on()
            if ended.status == 0:
                continue  # that was room enough
            check_says_full(ended)
            check_nothing_half_written(fresh.place, fresh.undisturbed.contents)
            remount(fresh.place, f"size={BIG}")
            fresh.start().wait().ok()
            fresh.check_same()


def check_says_full(ended: Ended) -> None:
    """One line says that there is no room, whoever found it out."""
    said = ("No space left on device", "could not be written", "make room")
    assert any(words in ended.error for words in said), ended.error


def test_a_disk_that_refuses_writes(fresh, disk):
    """A run that was killed half way cannot go on while its disk may only be read; then it does."""
    with disk(BIG):
        fresh.start(Moment(change=fresh.undisturbed.changes // 2)).wait()
        remount(fresh.place, "ro")
        assert "Read-only file system" in fresh.start().wait().error
        check_nothing_half_written(fresh.place, fresh.undisturbed.contents)
        remount(fresh.place, "rw")
        fresh.start().wait().ok()
        fresh.check_same()
