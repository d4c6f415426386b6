"""The encoding of a text file: one for the whole file, decided from all of its bytes, and printed if it is not UTF-8."""

import codecs
import contextlib
import io
import os
import re
from pathlib import Path
from typing import IO

from utils.console import UserError, say
from utils.datasets.items import lines_of

CHUNK = 1 << 20  # bytes
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
NAMES = {"utf-32": "UTF-32", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "gb18030": "GB18030 (GBK)"}
SEQUENCE = re.compile(rb"[\xe1-\xef][\x80-\xbf]{2}")  # a Chinese character in UTF-8; in GBK such bytes are rare
PAIR = re.compile(rb"[\x81-\xfe][\x40-\x7e\x80-\xfe]")
COMMON = re.compile(rb"[\xa1-\xa3\xa6-\xf7][\xa1-\xfe]")  # what simplified Chinese uses of GBK: GB 2312 without kana
EARLY, LATE = re.compile(rb"[\xb0-\xc8]"), re.compile(rb"[\xc9-\xf7]")  # Chinese characters by sound; where EUC-KR has Hangul
MOST = 0.75

known: dict[tuple, str] = {}  # the encodings found so far, by path and version


def as_utf8(path: Path, file: IO[bytes]) -> IO[bytes]:
    """The file, from its beginning, as UTF-8 bytes. Raises UserError if its encoding is unknown."""
    status = os.stat(path)
    encoding = encoding_of(path, (status.st_ino, status.st_size, status.st_mtime_ns), file)
    file.seek(0)
    return file if encoding == "utf-8" else io.BufferedReader(Transcoded(path, file, encoding))


def encoding_of(path: Path, version: tuple, file: IO[bytes]) -> str:
    """The encoding of a file, detected once for each `version` of it and printed if it is not UTF-8."""
    if (path, version) not in known:
        encoding = known[path, version] = detect(path, file)
        if encoding != "utf-8":
            say(f"{path}: is not UTF-8; read as {NAMES[encoding]}")
    return known[path, version]


def detect(path: Path, file: IO[bytes]) -> str:
    """UTF-8 if all bytes, or most of the non-ASCII ones, are valid in it; else UTF-16 or GB18030 if all bytes are valid.

    A file in none of these that is almost all ASCII is read as UTF-8, so that only the records with bad bytes are dropped.
    Raises UserError for any other file.
    """
    head = file.read(4096)
    file.seek(0)
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    if head[1:2] == b"\0" or head[:1] == b"\0":
        encoding = "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
        if is_all(file, encoding):
            return encoding
    if is_all(file, "utf-8"):
        return "utf-8"
    total, high, sequences, pairs, common, early, late = counts(path, file)
    if 3 * sequences >= high / 2:
        return "utf-8"
    is_korean = early > 40 and late < early / 10
    if common >= MOST * pairs and 2 * pairs >= MOST * high and not is_korean and is_all(file, "gb18030"):
        return "gb18030"
    if high < total / 20:
        return "utf-8"
    raise UserError(
        f"{path}: is neither UTF-8 nor surely GB18030 (GBK); convert it to UTF-8 (iconv -f ENCODING -t UTF-8), from what it "
        "was written in: GB18030, BIG5, EUC-KR, …"
    )


def is_all(file: IO[bytes], encoding: str) -> bool:
    """True if a whole file is valid in that encoding; a UTF-8 file may be cut off within its last character."""
    decoder = codecs.getincrementaldecoder(encoding)()
    file.seek(0)
    try:
        while chunk := file.read(CHUNK):
            decoder.decode(chunk)
        decoder.decode(b"", encoding != "utf-8")
    except UnicodeError:
        return False
    return True


def counts(path: Path, file: IO[bytes]) -> tuple[int, ...]:
    """A file's numbers of bytes, non-ASCII bytes, three-byte UTF-8 sequences, GBK pairs, and among these common, early and
    late ones."""
    file.seek(0)
    found = [0] * 7
    for lines in lines_of(path, file, CHUNK):
        chunk = b"".join(lines)
        pairs = PAIR.findall(chunk)
        high = len(chunk) - len(re.sub(rb"[\x80-\xff]+", b"", chunk))
        kinds = (sum(map(bool, map(kind.match, pairs))) for kind in (COMMON, EARLY, LATE))
        counted = (len(chunk), high, len(SEQUENCE.findall(chunk)), len(pairs), *kinds)
        found = [one + more for one, more in zip(found, counted, strict=True)]
    return tuple(found)


class Transcoded(io.RawIOBase):
    """A file of another encoding as UTF-8 bytes. Raises UserError when it reads a damaged part."""

    def __init__(self, path: Path, file: IO[bytes], encoding: str):
        self._path, self._file, self._encoding = path, file, encoding
        self._text = io.TextIOWrapper(file, encoding, newline="")
        self._waiting, self._position = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go back to the beginning, the only position supported."""
        if offset or whence:
            raise io.UnsupportedOperation("only to the beginning")
        self._text.detach()
        self._file.seek(0)
        self._text = io.TextIOWrapper(self._file, self._encoding, newline="")
        self._waiting, self._position = b"", 0
        return 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._waiting:
            try:
                self._waiting = self._text.read(CHUNK).encode()
            except UnicodeError:
                raise UserError(f"{self._path}: is damaged {NAMES[self._encoding]}; fetch it again") from None
        count = min(len(buffer), len(self._waiting))
        buffer[:count], self._waiting = self._waiting[:count], self._waiting[count:]
        self._position += count
        return count

    def close(self) -> None:
        """Close this, but leave the underlying file to whoever opened it."""
        with contextlib.suppress(ValueError):  # closed or detached already
            self._text.detach()
        super().close()
