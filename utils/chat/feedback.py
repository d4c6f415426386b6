"""Visitors' feedback on answers, as JSON Lines: votes as preference records, thumbs as records with a label."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.console import UserError, say
from utils.files import check_folder, replacing

FOLDER = "feedback"  # where it goes unless told otherwise
VOTES, TIES, THUMBS = "votes.jsonl", "ties.jsonl", "thumbs.jsonl"


def usable(folder: str) -> str:
    """The folder for feedback; "" (none is taken) if it is FOLDER and cannot be written, as in a read-only container.

    Raises UserError if another one cannot be written.
    """
    try:
        check_folder(folder, "--feedback_dir")
    except UserError as error:
        if folder != FOLDER:
            raise
        say(f"{error}; votes and thumbs are not taken")
        return ""
    return folder


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Raises UserError if writing `path` in the block fails: its folder is read-only by now, or the disk full."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error}); free disk space, or fix the permissions") from None


class Feedback:
    """Writes into a folder, which is created with the first line. Raises UserError if a line cannot be written; then the
    files are as before.
    """

    def __init__(self, folder: str):
        self.folder, self.lock = Path(folder), threading.Lock()

    def vote(self, question: dict[str, Any], answers: dict[str, str], better: str, settings: dict[str, Any], vote: str) -> Path:
        """Record which of two answerers' answers is `better`, as a record for finetune.py; "" if neither is.

        `vote` says of equal ones whether both are good or both bad. Returns the file.
        """
        facts = {"settings": settings, "time": now()}
        if not better:
            return self.append(TIES, question | {"answers": answers, "vote": vote} | facts)
        (other,) = answers.keys() - {better}
        pair = {"chosen": answers[better], "rejected": answers[other], "chosen_model": better, "rejected_model": other}
        return self.append(VOTES, question | pair | facts)

    def thumb(self, key: str, record: dict[str, Any], by: dict[str, Any], liked: bool | None) -> Path:
        """Record that the answer identified by `key` was liked or not; None takes it back. Returns the file."""
        path = self.folder / THUMBS
        with self.lock, told(path):
            lines = path.read_text("utf-8").splitlines() if path.is_file() else []
            kept = [line for line in lines if id_of(line) != key]
            if liked is not None:
                kept.append(line_of(record | {"label": liked, "by": by, "id": key, "time": now()}))
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as aside:
                aside.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        return path

    def append(self, name: str, line: dict[str, Any]) -> Path:
        """Append a line to a file, or nothing."""
        path, rest = self.folder / name, f"{line_of(line)}\n".encode()
        with self.lock, told(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(size)  # the part of the line for which there was room
                    raise
        return path


def line_of(value: dict[str, Any]) -> str:
    """An object as a line."""
    return json.dumps(value, ensure_ascii=False)


def id_of(line: str) -> Any:
    """The answer that a line is about; None if the line cannot be read."""
    try:
        return json.loads(line).get("id")
    except (ValueError, AttributeError, RecursionError):
        return None


def now() -> str:
    """The current time in UTC, in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
