"""A result file while it is being made: a journal beside it until it is complete, then a note of how it was made."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.console import UserError, say
from utils.datasets.prompts import Record
from utils.datasets.record_writer import write_records
from utils.files import read_json, sha256, write_json
from utils.journal import Journal


def made_path(path: Path) -> Path:
    """The file that records how the answers in `path` were made."""
    return path.with_name(f".{path.name}.made")


class AnswerFile:
    """The result file `path`; `header`: everything that determines an answer; `facts`: what else tables show about it,
    `template` and `dtype`."""

    def __init__(self, path: Path, header: dict[str, Any], facts: dict[str, str]):
        self.path, self.header, self.facts = path, header, facts
        self.made = made_path(path)
        self.journal_path = path.with_name(f".{path.name}.journal")

    def is_done(self) -> bool:
        """True, with a notice, if the result is what this run would make, and unchanged since."""
        if not (self.path.is_file() and self.made.is_file()):
            return False
        made = read_json(self.made)
        if not isinstance(made, dict) or made != made | self.header | {"sha256": sha256(self.path)}:
            return False
        say(f"{self.path}: holds the answers to these prompts with these settings; --overwrite answers them again")
        if self.journal_path.exists():  # a kill left it behind; another run's stays
            with contextlib.suppress(UserError):
                Journal(self.journal_path, self.header).close(done=True)
        return True

    def open_journal(self, overwrite: bool) -> Journal:
        """The journal beside the result; one with other settings is replaced if `overwrite`."""
        try:
            return Journal(self.journal_path, self.header)
        except UserError:
            if not overwrite:
                raise
            say(f"{self.journal_path}: belongs to an unfinished run with other settings; starting over")
            self.journal_path.unlink()
            return Journal(self.journal_path, self.header)

    def finish(self, records: Iterable[Record]) -> None:
        """Write the result, and beside it the record of how it was made."""
        write_records(self.path, records)
        write_json(self.made, self.header | self.facts | {"sha256": sha256(self.path)})
