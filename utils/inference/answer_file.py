"""A file of answers in the making: a journal beside it until it is there, then a note of how it was made."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.console import UserError, say
from utils.datasets.prompts import Record
from utils.datasets.records import write_records
from utils.files import read_json, sha256, write_json
from utils.journal import Journal


def made_path(path: Path) -> Path:
    """Where it stands how the answers in `path` were made."""
    return path.with_name(f".{path.name}.made")


class AnswerFile:
    """The result `path`; `header`: what has to be the same for an answer to be the same; `facts`: what else a reader of
    tables wants to know of it, `template` and `dtype`."""

    def __init__(self, path: Path, header: dict[str, Any], facts: dict[str, str]):
        self.path, self.header, self.facts = path, header, facts
        self.made = made_path(path)
        self.journal_path = path.with_name(f".{path.name}.journal")

    def is_done(self) -> bool:
        """True where the result is what this very run would make, untouched since; prints that."""
        if not (self.path.is_file() and self.made.is_file()):
            return False
        made = read_json(self.made)
        if not isinstance(made, dict) or made != made | self.header | {"sha256": sha256(self.path)}:
            return False
        say(f"{self.path}: holds the answers to these prompts with these settings; --overwrite answers them again")
        self._drop_finished_journal()
        return True

    def open_journal(self, overwrite: bool) -> Journal:
        """The journal beside the result; one of other settings is replaced where `overwrite` asks for it."""
        try:
            return Journal(self.journal_path, self.header)
        except UserError:
            if not overwrite:
                raise
            say(f"{self.journal_path}: of an unfinished run with other settings; started over")
            self.journal_path.unlink()
            return Journal(self.journal_path, self.header)

    def finish(self, records: Iterable[Record]) -> None:
        """Write the result, and beside it how it was made."""
        write_records(self.path, records)
        write_json(self.made, self.header | self.facts | {"sha256": sha256(self.path)})

    def _drop_finished_journal(self) -> None:
        """Remove the journal of this very run, where a kill kept it from doing so; another run's stays."""
        if self.journal_path.exists():
            with contextlib.suppress(UserError):
                Journal(self.journal_path, self.header).close(done=True)
