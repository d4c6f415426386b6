"""Writing records: one JSON array, as a stream."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from utils.files import replacing


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records as a stream: one JSON array, UTF-8, indent 1, completely or not at all. Returns their number."""
    with writers([path]) as (writer,):
        for record in records:
            writer.write([record])
    return writer.count


@contextlib.contextmanager
def writers(paths: Sequence[str | Path]) -> Iterator[list["RecordWriter"]]:
    """Yield a writer for each path; all files are there when the block ends, none if it ends with an error."""
    with contextlib.ExitStack() as stack:
        asides = [stack.enter_context(replacing(path)) for path in paths]
        files = [stack.enter_context(open(aside, "wb", buffering=1 << 20)) for aside in asides]
        opened = [RecordWriter(file) for file in files]
        yield opened
        for writer in opened:
            writer.end()


class RecordWriter:
    """Writes records into an open binary file, byte for byte as `json.dump(…, ensure_ascii=False, indent=1)` would."""

    def __init__(self, file: Any):
        self._file = file
        self.count = 0

    def write(self, records: Sequence[Mapping[str, Any]]) -> list[int]:
        """Add records; returns the bytes that each takes."""
        texts = [encoded(record) for record in records]
        if texts:
            self._file.write(b",\n " + b" },\n ".join(texts) + b" }")
        self.count += len(texts)
        return [len(text) + 5 for text in texts]

    def copy(self, source: Any, size: int, count: int) -> None:
        """Add `count` records that another writer has written as the next `size` bytes of `source`."""
        self.count += count
        while size:
            size -= self._file.write(source.read(min(size, 1 << 20)))

    def end(self) -> None:
        """Complete the array: close it, and replace the first comma with its opening bracket."""
        self._file.write(b"\n]\n" if self.count else b"[]\n")
        if self.count:
            self._file.seek(0)
            self._file.write(b"[")


def encoded(record: Mapping[str, Any]) -> bytes:
    """One record as written in an array of indent 1, without the space and brace at its end."""
    if record.keys() & {"history", "learn", "choices", "groups", "tools", "messages"}:
        return json.dumps(record, ensure_ascii=False, indent=1).replace("\n", "\n ").removesuffix(" }").encode()
    return orjson.dumps(record, option=orjson.OPT_INDENT_2)[:-1]  # for texts the result is the same, in a tenth of the time
