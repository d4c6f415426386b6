"""The final number of an answer, exactly: what is compared where a number is asked for."""

import re
import unicodedata
from fractions import Fraction

DIGITS = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
UNITS = {"十": 10, "百": 100, "千": 1000}
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?")
IN_CHINESE = re.compile(rf"[{''.join(DIGITS)}{''.join(UNITS)}万]+")
MARKER = re.compile(r"答案\s*(?:应该|应)?(?:是|为|:|】)+|\\boxed|####|answer\s*(?:is|:)+", re.I)
FRACTION = re.compile(r"\\[dt]?frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}")
PARTS = re.compile(r"([零〇一二两三四五六七八九十百千]+)分之([零〇一二两三四五六七八九十百千]+)|(\d+)分之(\d+)")


def final_number(text: str) -> Fraction | None:
    """An answer's final number: the one after its last 答案 (or the like), else its last one; None if there is none.

    It reads fractions, percentages (ignoring the sign), thousands separators and, after 答案, Chinese numerals; of an
    equation, the right side counts.
    """
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").replace("−", "-")
    text = PARTS.sub(lambda m: f"{in_digits(m[2] or m[4])}/{in_digits(m[1] or m[3])}", FRACTION.sub(r"\1/\2", text))
    for marker in reversed(list(MARKER.finditer(text))):
        line = text[marker.end() :].strip().partition("\n")[0].rpartition("=")[2]
        found = NUMBER.search(line) or IN_CHINESE.search(line)
        if found:
            return as_fraction(found[0])
    numbers = NUMBER.findall(text)
    return as_fraction(numbers[-1]) if numbers else None


def as_fraction(number: str) -> Fraction | None:
    """`1,234.5`, `2/15` or `四十二` as an exact number."""
    over, _, under = re.sub(r"[\s,]", "", number).partition("/")
    try:
        return Fraction(in_digits(over)) / Fraction(under or 1)
    except ZeroDivisionError:
        return None


def in_digits(number: str) -> str:
    """A Chinese numeral below 100 million in digits; any other text unchanged."""
    if not IN_CHINESE.fullmatch(number):
        return number
    total, section, digit = 0, 0, 0
    for sign in number:
        if sign in DIGITS:
            digit = DIGITS[sign]
        elif sign in UNITS:
            section += (digit or 1) * UNITS[sign]
            digit = 0
        else:
            total, section, digit = (section + digit or 1) * 10000, 0, 0
    return str(total + section + digit)
