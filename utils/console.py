"""What a user reads while a script runs: notices, progress bars, and the one-line error."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

TERMINALS = [number for number in (1, 2) if os.isatty(number)]  # checked early, since a closed terminal cannot tell
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tabs and line breaks


class UserError(Exception):
    """An error the user can fix, in one line: what, what is wrong, how to fix it.

    `utils.cli.run` prints it to stderr and ends the script with exit status 2.
    """


def reason(error: BaseException) -> str:
    """The first line of an error's message; if it has none, the error's type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors of Python, torch or CUDA libraries if a device, or the machine, is out of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in OUT_OF_MEMORY))
    )


def is_main_process() -> bool:
    """True in the one process that may print and write (rank 0 under torchrun or accelerate)."""
    return os.environ.get("RANK", "0") == "0"


def harmless(text: str) -> str:
    """A text with its control characters and lone surrogates escaped, since files also determine what is printed."""
    return CONTROL.sub(lambda sign: ascii(sign[0])[1:-1], text)


def wants_color() -> bool:
    """True if standard output is a terminal that shows colors; NO_COLOR turns them off (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def leave_terminal() -> None:
    """Discard all further output if it goes to a terminal: one that has hung up refuses everything."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in TERMINALS:
        os.dup2(nowhere, number)
    os.close(nowhere)


listeners: list[list[str]] = []  # those of `noting`


@contextlib.contextmanager
def noting() -> Iterator[list[str]]:
    """While the block runs, notices are also collected in the list."""
    notes: list[str] = []
    listeners.append(notes)
    try:
        yield notes
    finally:
        listeners.pop()


def say(text: str) -> None:
    """Print one notice, from the main process only."""
    for notes in listeners:
        notes.append(text)
    if is_main_process():
        tqdm.write(harmless(text))


@functools.cache
def say_once(text: str) -> None:
    """Print a notice only the first time: a file may be read several times in a run."""
    say(text)


def progress(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar over `items` (or one to be updated by hand), silent in all but the main process.

    Drawn on a terminal several times a second; into a log file at most every 30 seconds.
    """
    interval = 0.2 if os.isatty(2) else 30
    return tqdm(items, disable=not is_main_process(), mininterval=interval, maxinterval=interval, **options)
