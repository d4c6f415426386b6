"""Which choices a generated answer names, if that is certain."""

import re
import unicodedata
from collections.abc import Sequence

from utils.datasets.choices import LETTERS
from utils.datasets.templates import without_thoughts

SAID = re.compile(
    r"(?:答案|正确选项|选项|应选|故选|选择|选|\bchoose|\b(?:answer|choice)(?:\s+is)?|\\boxed)"
    r"(?:[\s:是为应该\"'“”‘’(\[{*]|选项)*([A-J](?:[\s,、和与及]*[A-J])*)(?![A-Za-z])",
    re.I,
)
OPENS = re.compile(r"[\s(\[\"'“*]*([A-J](?:[,、和与及\s]*[A-J])*)(?![A-Za-z'’])")
ALONE = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z'’])")
DENIED = re.compile(
    r"(?:不是|并非|非|除了?|排除|不能?选|不[应该]选|\bnot|\bexcept)(?:\s+for|\s+the)?[\W_]*(?:选项|选)?[\W_]*$", re.I
)
DOUBTED = re.compile(  # right after a letter; an A before an English word is an article
    r"[)\]】」”\"'*\s]*(?:选项|项)?[是就也都并均有\s]*"
    r"(?:不|错|误|可能|或|还是|[中外]|以外|之外|or\b|isn't|(?:is|are)\s+(?:not|wrong|incorrect|false)|wrong|incorrect)",
    re.I,
)
ARTICLE = re.compile(r"A\s+(?!because|since|is\b|as\b)[a-z]")
REVISED = re.compile(r"不对|更正|修正|纠正|改为|改选|重新|抱歉|\b(?:wait|actually|sorry|correction)\b", re.I)


def read_answer(text: str, choices: Sequence[str]) -> list[int] | None:
    """The indices of the choices that a generated answer names; None if that is uncertain.

    They are those after 答案 or the like, if always the same; else the letters that the answer begins with; else the only
    letter in it, or the only choice whose text it is. A letter that is denied, doubted or taken back is not certain.
    """
    text = unicodedata.normalize("NFKC", without_thoughts(text)).strip()
    opening = OPENS.match(text)
    named = list(SAID.finditer(text)) or ([opening] if opening else list(ALONE.finditer(text)))
    given = {letters(match[1]) for match in named}
    found = given.pop() if len(given) == 1 and not any(is_doubted(match) for match in named) else ""
    if not found:
        same = [place for place, choice in enumerate(choices) if plain(choice) == plain(text) or choice.strip() == text]
        return same if len(same) == 1 and plain(text) else None
    places = [LETTERS.index(letter) for letter in found]
    return places if max(places) < len(choices) else None


def is_doubted(match: re.Match[str]) -> bool:
    """True if a text denies or doubts the letters that it names, or another follows a revision."""
    text, (start, end) = match.string, match.span(1)
    revised = REVISED.search(text, end)
    changed = revised and not set(ALONE.findall(text, revised.end())) <= set(match[1].upper())
    return bool(changed or DENIED.search(text[:start]) or DOUBTED.match(text, end) or ARTICLE.match(text, start))


def letters(text: str) -> str:
    """The choice letters in a text, sorted."""
    return "".join(sorted(set(re.sub("[^A-J]", "", text.upper()))))


def plain(text: str) -> str:
    """A text without punctuation and spaces."""
    return re.sub(r"\W", "", unicodedata.normalize("NFKC", text))
