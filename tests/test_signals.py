"""Signals: the first ends a script, after which it clears up undisturbed; a worker process ends with its parent."""

import itertools
import signal

from scripting import ROOT

WORKER = """
import ctypes, signal, sys
sys.path.insert(0, {root!r})
from utils import cli
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
cli.end_when_told()
told = [signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGINT)]
print(told[0] == signal.SIG_IGN, told[1] != signal.default_int_handler)
cli.end_with_parent()
told = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(told))  # PR_GET_PDEATHSIG
print(*(signal.getsignal(one).name for one in (signal.SIGINT, signal.SIGTERM)), signal.Signals(told.value).name)
"""


def test_what_nohup_ignores_stays_so_and_a_worker_ends_with_its_parent_without_a_word(script, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    assert script(tmp_path / "worker.py").ok() == "True True\nSIG_IGN SIG_DFL SIGKILL\n"


TOLD_TWICE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from utils import cli
class Options: pass
def main(options):
    try:
        os.kill(os.getpid(), {first})
        time.sleep(60)
    finally:
        os.kill(os.getpid(), {second})
        print("cleaned up")
cli.parse = lambda *_: None
cli.run(main, Options, [])
"""


def test_a_second_signal_does_not_disturb_the_cleanup_that_the_first_began(script, tmp_path):
    names = {signal.SIGINT: "", signal.SIGTERM: " (SIGTERM)", signal.SIGHUP: " (SIGHUP)"}
    for first, second in itertools.permutations([*names, signal.SIGINT], 2):
        (tmp_path / "told.py").write_text(TOLD_TWICE.format(root=str(ROOT), first=int(first), second=int(second)))
        ended = script(tmp_path / "told.py")
        assert (ended.status, ended.out, ended.err) == (128 + first, "cleaned up\n", f"told.py: interrupted{names[first]}\n")
