"""Raw text to pre-train on: .txt and .md files, and {"text": …} records."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.console import UserError, say
from utils.datasets.file_formats import opened, read_items
from utils.datasets.item_formats import ANSWERS, DIALOGUES, QUESTIONS
from utils.datasets.items import UnreadableItem, lines_of, place_of
from utils.datasets.text_encoding import as_utf8

ENDINGS = (".txt", ".md", ".txt.gz", ".md.gz")
LONGEST = 2**22  # bytes; a longer text file becomes several documents


def is_text_file(file: Path) -> bool:
    """True for a file that is a document itself."""
    return file.name.lower().endswith(ENDINGS)


def is_document(item: Any) -> bool:
    """True for an item such as {"text": …} that has none of the fields of questions and answers."""
    others = {*QUESTIONS, *ANSWERS, *DIALOGUES}
    return isinstance(item, dict) and isinstance(item.get("text"), str) and not others & item.keys()


def read_documents(path: Path) -> Iterator[str]:
    """The texts of one file; at its end the number of dropped ones is printed, and where the first was.

    Raises UserError if the file cannot be read, is neither UTF-8 nor GBK nor UTF-16, or holds no text.
    """
    found, dropped, first = 0, 0, ""
    for number, item in text_parts(path) if is_text_file(path) else read_items(path):
        text = item["text"] if isinstance(item, dict) and is_document(item) else item if isinstance(item, str) else ""
        if isinstance(item, UnreadableItem) or not text.strip():
            dropped, first = dropped + 1, first or place_of(path, number)
            continue
        found += 1
        yield text
    if dropped:
        say(f"{path}: {dropped} of {found + dropped} documents dropped, which have no text (the first: {first})")
    if not found:
        raise UserError(f'{path}: holds no text; write documents as {{"text": …}}, one per line, or as a .txt or .md file')


def text_parts(path: Path) -> Iterator[tuple[int, str]]:
    """A text file as one document or, if it is large, as several that end at line ends, with a notice; each with a number."""
    number = 0
    with opened(path) as file:
        for number, part in enumerate(cut(path, as_utf8(path, file)), 1):
            try:
                yield number, part.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(
                    f"{path}: has bytes that are not UTF-8; convert it (iconv -c -t UTF-8), or download it again"
                ) from None
    if number > 1:
        say(f"{path}: read as {number} documents, since it is longer than {LONGEST / 1e6:.0f} MB")


def cut(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """A text in parts of about `LONGEST` bytes that end at line ends; a last line without one is no part by itself."""
    part = b""
    for lines in lines_of(path, file, LONGEST):
        more = b"".join(lines)
        if part and len(part) + len(more) > LONGEST:
            yield part
            part = b""
        part += more
    if part:
        yield part
