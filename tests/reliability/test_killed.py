"""Killed at any moment, and again while it goes on, a program started again with the same command ends where it would have."""

import random
import signal

import pytest
from killing import FULL, SEED, Moment
from programs import check_nothing_half_written, clear

pytestmark = pytest.mark.slow

KILLS = {True: 20, False: 3}
LAST = {True: 10, False: 3}  # changes to the files at the end of a run, when results get their names and journals go


def test_killed_and_started_again(fresh, full):
    """SIGKILL at seeded moments: of these, half are times, half just before a change to the files."""
    draw = random.Random(f"{SEED} {fresh.program.name}")
    kills = ends = 0
    while kills < KILLS[full]:
        ended = fresh.start(fresh.undisturbed.moment(draw)).end()
        if ended.status == -signal.SIGKILL:
            kills += 1
            check_nothing_half_written(fresh.place, fresh.undisturbed.contents)
            if draw.random() < 0.5 and kills < KILLS[full]:
                continue  # killed again before it has caught up
            ended = fresh.start().end()
        check_done(ended)
        fresh.check_same()
        ends += 1
        clear(fresh.place)
    print(f"{fresh.program.name}: {kills} kills, {ends} ends equal to the undisturbed run's")


@pytest.mark.parametrize("back", range(LAST[FULL]))
def test_killed_while_it_finishes(fresh, back):
    """Before one of the last changes to its files, the removal of its lock being the very last."""
    ended = fresh.start(Moment(change=fresh.undisturbed.changes - back)).end()
    assert ended.status == -signal.SIGKILL
    check_nothing_half_written(fresh.place, fresh.undisturbed.contents)
    check_done(fresh.start().end())
    fresh.check_same()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_twice_to_end(fresh, number):
    """The second time as it clears up. It ends at once, nothing half done stays, and the same command ends as ever."""
    if fresh.program.name == "training":
        pytest.skip("it saves a checkpoint first; see tests/training/test_start.py")
    draw = random.Random(f"{SEED} {fresh.program.name} {number}")
    ended = fresh.start(Moment(change=draw.randint(2, fresh.undisturbed.changes // 2), number=number, twice=True)).end()
    assert ended.status == 128 + number and "Traceback" not in ended.err, ended.err
    left = [file for file in fresh.place.rglob(".*") if file.name.endswith((".part", ".lock", ".old"))]
    assert not left
    check_nothing_half_written(fresh.place, fresh.undisturbed.contents)
    check_done(fresh.start().end())
    fresh.check_same()


def check_done(ended):
    """The run came to its end, or had done so already when it was killed, and says that."""
    assert not ended.status or "finished run" in ended.error or "--overwrite" in ended.error, ended.err
