"""A journal: each finished piece of work is on disk at once, so that a stopped run can resume."""

import json
import os
from pathlib import Path
from typing import Any

from utils.console import UserError


class Journal:
    """An append-only JSON Lines file with `{"key": …, "value": …}` per line, after a header that identifies its run.

    A line that was cut off by a kill is dropped when the file is opened again.
    Raises UserError if the file on disk belongs to a run with another `header`; the differing entries are named.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]):
        self.path = Path(path)
        self.values: dict[str, Any] = {}
        header = json.loads(json.dumps(header))
        whole = self._read(header) if self.path.exists() else 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")
        self._file.truncate(whole)
        if not whole:
            self._append(header)

    def _read(self, header: dict[str, Any]) -> int:
        """Load the complete lines; return how many bytes they take."""
        whole = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                entry = self._parse(line, number)
                if number == 0:
                    changed = sorted(k for k in header.keys() | entry.keys() if header.get(k) != entry.get(k))
                    if changed:
                        raise UserError(
                            f"{self.path}: belongs to an unfinished run with other settings ({', '.join(changed)}); "
                            "repeat that command, or delete this file to start over"
                        )
                else:
                    self.values[entry["key"]] = entry["value"]
                whole += len(line)
        return whole

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        """One line as an object."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or (number and entry.keys() != {"key", "value"}):
            raise UserError(f"{self.path}: line {number + 1} is damaged; delete this file to start over")
        return entry

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def put(self, key: str, value: Any) -> None:
        """Add one finished piece; it is on disk when this returns."""
        self._append({"key": key, "value": value})
        self.values[key] = value

    def close(self, done: bool) -> None:
        """Close the file; if the run is `done`, its result is elsewhere and the journal is deleted."""
        self._file.close()
        if done:
            self.path.unlink()
