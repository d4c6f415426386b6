"""What a user reads while a script runs: notices, progress bars, and the one-line error."""

import os
import re
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tabs and the ends of lines


class UserError(Exception):
    """A mistake that the user can mend; its text is one line: the thing, what is wrong, the way out.

    `utils.cli.run` prints it to stderr and ends the script with exit status 2.
    """


def reason(error: BaseException) -> str:
    """The first line of what an error says; where it says nothing, its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_main_process() -> bool:
    """True in the one process that may print and write (rank 0 under torchrun or accelerate)."""
    return os.environ.get("RANK", "0") == "0"


def harmless(text: str) -> str:
    """A text with its control characters and lone surrogates escaped: files, too, decide what is printed."""
    return CONTROL.sub(lambda sign: ascii(sign[0])[1:-1], text)


def say(text: str) -> None:
    """Print one notice, from the main process only."""
    if is_main_process():
        tqdm.write(harmless(text))


def progress(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar over `items` (or one to be updated by hand), silent in all but the main process.

    Drawn on a terminal several times a second; into a log file at most every 30 seconds.
    """
    interval = 0.2 if os.isatty(2) else 30
    return tqdm(items, disable=not is_main_process(), mininterval=interval, maxinterval=interval, **options)
