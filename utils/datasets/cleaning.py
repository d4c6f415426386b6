"""What makes records worth training on: near-duplicates, overlap with tests, languages, personal numbers."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasketch import MinHash

from utils.datasets.records import Record

SHINGLE = 5  # characters; Chinese words have two, so that a shingle is about a phrase
PIECE = 2**14  # signatures read at once
PERMUTATIONS, ROWS = 64, 4  # 16 bands of 4 rows find 99.98 % of the pairs that share 0.8 of their shingles
HAN, LATIN = re.compile(r"[\u3400-\u9fff\U00020000-\U000323af]"), re.compile(r"[A-Za-z]")
PERSONAL = {  # in this order, since an ID number may hold what looks like a phone number
    "[邮箱]": re.compile(r"(?<![\w.+-])[\w.+-]+@[A-Z0-9-]+(?:\.[A-Z0-9-]+)*\.[A-Z]{2,}", re.ASCII | re.IGNORECASE),
    "[身份证号]": re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\d{3}[\dX](?!\d)", re.I | re.A),
    "[电话]": re.compile(
        r"(?<![\d.])(?:(?:\+|00)86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)|(?<![\d-])0\d{2,3}-\d{7,8}(?![\d-])", re.ASCII
    ),
}
WEIGHTS, CHECKS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2), "10X98765432"  # GB 11643-1999


def texts_of(record: Record) -> list[str]:
    """All texts of a record: its earlier turns, and as the last three instruction, input and output."""
    turns = [text for turn in record.get("history", []) for text in turn]
    return [*turns, record["instruction"], record.get("input") or "", record.get("output") or ""]


def mask_personal(record: Record) -> tuple[Record, Counter[str]]:
    """The record with e-mail addresses, Chinese ID numbers and phone numbers replaced by their kind, and their counts.

    An ID number counts only if its check digit is right (GB 11643-1999), so other long numbers stay.
    """
    counts: Counter[str] = Counter()

    def masked(value: Any) -> Any:
        if isinstance(value, list):
            return [masked(part) for part in value]
        for mask, pattern in PERSONAL.items() if isinstance(value, str) else ():
            value = pattern.sub(functools.partial(replaced, mask), value)
        return value

    def replaced(mask: str, found: re.Match[str]) -> str:
        if mask == "[身份证号]" and not is_id_number(found[0]):
            return found[0]
        counts[mask] += 1
        return mask

    return cast(Record, {name: masked(value) for name, value in record.items()}), counts


def is_id_number(text: str) -> bool:
    """True if the check digit of 18 characters is right."""
    total = sum(weight * int(digit) for weight, digit in zip(WEIGHTS, text, strict=False))
    return CHECKS[total % 11] == text[17].upper()


def language_of(text: str) -> str:
    """ "zh" if a fifth of the letters are Chinese characters, "en" if nine tenths are Latin, else "other".

    A Chinese character stands for about three Latin letters, so a fifth of them is more than half of the text.
    """
    letters = sum(map(str.isalpha, text))
    if letters and len(HAN.findall(text)) / letters >= 0.2:
        return "zh"
    return "en" if letters and len(LATIN.findall(text)) / letters >= 0.9 else "other"


def normalized(text: str) -> str:
    """Only letters and digits, half-width and lower case: what stays equal when a text is copied."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).lower())


@functools.cache
def factors(width: int) -> np.ndarray:
    """What the characters of a run are multiplied by: (width,) uint64, odd."""
    return np.random.default_rng(0).integers(1, 2**63, width, dtype=np.uint64) | np.uint64(1)


def run_hashes(plain: str, width: int) -> np.ndarray:
    """Hashes of all runs of `width` characters: (runs,) uint64; a shorter text is one run."""
    codes = np.frombuffer(plain.encode("utf-32-le"), np.uint32).astype(np.uint64)
    width = max(1, min(width, len(codes)))
    hashes: np.ndarray = np.zeros(max(1, len(codes) - width + 1), np.uint64)
    for offset, factor in enumerate(factors(width)[: len(codes)]):
        hashes += factor * codes[offset : offset + len(hashes)]
    return hashes


class Contamination:
    """The n-grams of test questions; `hit(record)` is the first question that shares one with a record, or None.

    A question shorter than `size` characters hits only if it is a record's whole instruction.
    """

    def __init__(self, questions: Iterable[str], size: int):
        self.size = size
        self.questions: list[str] = []
        self._grams: dict[int, int] = {}
        for question in questions:
            if plain := normalized(question):
                for gram in run_hashes(plain, size).tolist():
                    self._grams.setdefault(gram, len(self.questions))
            self.questions.append(question)

    def hit(self, record: Record) -> str | None:
        """The test question that the record overlaps with."""
        texts = [normalized(text) for text in texts_of(record)]
        asked = texts[-3]
        for text in texts:
            if len(text) >= self.size or text is asked:
                for gram in filter(self._grams.__contains__, run_hashes(text, self.size).tolist()):
                    return self.questions[self._grams[gram]]
        return None


@functools.cache
def prototype() -> MinHash:
    """The permutations that all signatures share."""
    return MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)


def shingles(text: str) -> np.ndarray:
    """Hashes of a text's runs of SHINGLE characters, each once: (shingles,) uint32; a shorter text is one shingle."""
    return np.unique((run_hashes(normalized(text), SHINGLE) >> np.uint64(32)).astype(np.uint32))


def signature(text: str) -> np.ndarray:
    """A text's MinHash over its shingles (Broder 1997): (PERMUTATIONS,) uint32."""
    seen = prototype()
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=int, permutations=seen.permutations, scheme=seen.scheme)
    sketch.update_batch(shingles(text).tolist())
    return sketch.hashvalues


def similarity(one: str, other: str) -> float:
    """The share of shingles that two texts have in common (Jaccard)."""
    a, b = shingles(one), shingles(other)
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def candidates(file: Path) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) of records whose signatures, stored consecutively in `file`, share a band.

    Each record is paired with the first of each band that it shares; of each record one band's hash is in memory.
    """
    for band in range(0, PERMUTATIONS, ROWS):
        keys = band_hashes(file, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        firsts = order[np.searchsorted(keys, keys)]  # of the same hash, the record that comes first
        later = np.flatnonzero(firsts != order)
        for place in later[np.argsort(order[later])].tolist():
            yield int(firsts[place]), int(order[place])


def band_hashes(file: Path, band: int) -> np.ndarray:
    """A hash of the ROWS numbers from `band` on of each signature in `file`: (records,) uint64; read a piece at a time."""
    found: np.ndarray = np.zeros(file.stat().st_size // (4 * PERMUTATIONS), np.uint64)
    with file.open("rb") as signatures:
        for start in range(0, len(found), PIECE):
            piece = np.fromfile(signatures, np.uint32, PIECE * PERMUTATIONS).reshape(-1, PERMUTATIONS)[:, band : band + ROWS]
            found[start : start + PIECE] = (piece * factors(ROWS)).sum(1, dtype=np.uint64)
    return found
