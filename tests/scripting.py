"""Runs the scripts as real processes, forked from this warm one so that importing torch costs nothing."""

import dataclasses
import importlib
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
HANGS = 600  # seconds after which a process is given up: far more than any takes


def free_port() -> int:
    """A port that nothing listens on: not one after the other, as pages choose them, so that two tests do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass
class Ended:
    """A process that has ended: its exit status (negative: the signal that killed it) and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a user error; checks that it is one, and that the status is 2."""
        assert self.status == 2, f"status {self.status}\n{self.out}\n{self.err}"
        lines = [line for line in self.err.splitlines() if ": error: " in line]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]

    def ok(self) -> str:
        """What was printed; checks that all went well."""
        assert self.status == 0, f"status {self.status}\n{self.out}\n{self.err}"
        return self.out


def warm(*modules: str) -> None:
    """Import what the forked scripts need, so that they need not import it each."""
    for module in modules:
        importlib.import_module(module)


class Running:
    """A forked process."""

    def __init__(self, folder: Path, name: str, argv: list[str], cwd: Path | None, env: dict[str, str]):
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        sys.stdout.flush()
        sys.stderr.flush()
        self.anew = "torch" in sys.modules and sys.modules["torch"].cuda.is_available()  # CUDA survives no fork
        self.pid = os.fork()
        if self.pid == 0:
            self._be(argv, cwd, env)

    def _be(self, argv: list[str], cwd: Path | None, env: dict[str, str]) -> None:
        status = 70
        try:
            for number, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
            os.environ.update(env)
            os.chdir(cwd or os.getcwd())
            sys.argv = argv
            if self.anew:
                os.execv(sys.executable, [sys.executable, *argv])
            if "torch" in sys.modules:  # its pool of threads did not survive the fork, and only one thread may make it anew
                sys.modules["torch"].set_num_threads(1)
            if "accelerate.state" in sys.modules:  # nor are its ranks those of a test that ran in the process itself
                sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
            tqdm.set_lock(threading.RLock())  # not the one that all forks share, which a killed one may have left locked
            runpy.run_path(argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if the process is still there."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = HANGS) -> Ended:
        """Wait for the end; a process that takes longer counts as hanging, and is killed."""
        watch = threading.Timer(seconds, self.kill)
        watch.start()
        _, status = os.waitpid(self.pid, 0)
        assert watch.is_alive(), f"killed, for it hung: {self.out.read_text('utf-8')}\n{self.err.read_text('utf-8')}"
        watch.cancel()
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, self.out.read_text("utf-8"), self.err.read_text("utf-8"))

    def wait_until(self, condition, seconds: float = 120) -> None:
        """Wait until `condition()` holds while the process runs."""
        until = time.time() + seconds
        while not condition():
            assert time.time() < until, "waited in vain"
            pid, _ = os.waitpid(self.pid, os.WNOHANG)
            assert pid == 0, self.err.read_text("utf-8")
            time.sleep(0.002)


class Script:
    """Starts scripts of the repository, their output kept in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0

    def start(self, name: str, *argv: object, cwd: Path | None = None, **env: str) -> Running:
        """Start a script, and do not wait for it."""
        self.count += 1
        return Running(self.folder, f".run{self.count}", [str(ROOT / name), *map(str, argv)], cwd, env)

    def __call__(self, name: str, *argv: object, cwd: Path | None = None, **env: str) -> Ended:
        """Run a script to its end."""
        return self.start(name, *argv, cwd=cwd, **env).wait()

    def ranks(self, count: int, name: str, *argv: object, **env: str) -> str:
        """Run a script as so many ranks that train together, as torchrun would start them; what the first printed."""
        port = str(free_port())
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        started = [self.start(name, *argv, **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
        printed = [running.wait().ok() for running in started]
        return printed[0]
