"""Two runs with one output folder: the second refuses and names the first; locks that nobody holds are told from those
that somebody may hold."""

import os
import random
import signal
import socket
import time

import pytest
from killing import SEED, Moment, start
from programs import clear

pytestmark = pytest.mark.slow

ROUNDS = {True: 5, False: 1}


@pytest.fixture
def second(fresh, tmp_path):
    """Starts the same program once more, beside the first."""
    return lambda: start(tmp_path, fresh.program.argv(fresh.place), fresh.place)


def test_the_second_names_the_first(fresh, second):
    lock = fresh.place / fresh.program.lock
    first = fresh.start()
    first.wait_until(lambda: lock.is_file() and lock.read_text())
    first.kill(signal.SIGSTOP)
    error = second().wait().error
    assert f"in use by process {first.pid} on {socket.gethostname()}" in error
    first.go_on().ok()
    fresh.check_same()


def test_a_lock_of_a_process_that_is_gone_is_no_lock(fresh):
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    lock = fresh.place / fresh.program.lock
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(f"process {gone} on {socket.gethostname()}")
    said = fresh.start().wait().ok()
    assert f"removed a stale lock left by process {gone} on {socket.gethostname()}" in said
    fresh.check_same()


def test_a_lock_from_another_machine_is_kept_and_the_fix_is_said(fresh):
    """Not every shared folder passes the kernel's locks on, so the other machine's run may be at work."""
    lock = fresh.place / fresh.program.lock
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("process 7 on elsewhere")
    error = fresh.start().wait().error
    assert "process 7 on elsewhere" in error and f"delete {lock}" in error
    assert [path for path in fresh.place.rglob("*") if path.is_file()] == [lock]
    lock.unlink()
    fresh.start().wait().ok()
    fresh.check_same()


def test_started_at_the_same_moment(fresh, second, full):
    """One of them wins; the other refuses, or comes after it and finds the work done."""
    draw = random.Random(f"{SEED} {fresh.program.name}")
    for _ in range(ROUNDS[full]):
        clear(fresh.place)
        running = [fresh.start()]
        time.sleep(draw.choice([0, draw.uniform(0, fresh.undisturbed.seconds)]))
        running.append(second())
        ended = [one.wait() for one in running]
        assert 0 in [one.status for one in ended], [one.err for one in ended]
        for one in ended:
            if one.status:
                assert "in use by process" in one.error or "holds a finished run" in one.error or "--overwrite" in one.error
        fresh.check_same()


@pytest.mark.parametrize("case", ["training"], indirect=True)
def test_training_keeps_the_folder_from_the_moment_it_has_looked_into_it(fresh, second):
    """Else a run that ended in between would be trained over by one that has not seen its end."""
    first = fresh.start()
    first.wait_until(lambda: "incremental training" in first.out.read_text("utf-8"))
    first.kill(signal.SIGSTOP)
    assert f"in use by process {first.pid}" in second().wait().error
    first.go_on().ok()
    fresh.check_same()


@pytest.mark.parametrize("case", ["answering"], indirect=True)
def test_answers_that_another_run_has_written_meanwhile_are_not_replaced(fresh):
    """A run that found no answers, and then took its time to load the model, looks again before it writes."""
    running = fresh.start(Moment(change=1, number=signal.SIGSTOP))  # the folder for the lock is about to be made
    os.waitid(os.P_PID, running.pid, os.WSTOPPED | os.WNOWAIT)
    (fresh.place / "out").mkdir()
    (fresh.place / "out/test.json").write_text("[]")
    assert "holds answers to other prompts" in running.go_on().error
    assert (fresh.place / "out/test.json").read_text() == "[]"
