"""Measures of answers that need no judge: closeness to a reference, exact numbers, length, repetition, script, refusals."""

import re
import statistics
import unicodedata
from collections.abc import Callable
from fractions import Fraction

from utils.prompts import Record
from utils.tables import Row, Table

Pairs = list[tuple[str, str]]  # answers with their references
DIGITS = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
UNITS = {"十": 10, "百": 100, "千": 1000}
NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?")
IN_CHINESE = re.compile(rf"[{''.join(DIGITS)}{''.join(UNITS)}万]+")
MARKER = re.compile(r"答案\s*(?:应该|应)?(?:是|为|:|】)+|\\boxed|####|answer\s*(?:is|:)+", re.I)
FRACTION = re.compile(r"\\[dt]?frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}")
PARTS = re.compile(r"([零〇一二两三四五六七八九十百千]+)分之([零〇一二两三四五六七八九十百千]+)|(\d+)分之(\d+)")
CANNOT = "(?:不能|无法|不可以|没有办法|没办法|不会|拒绝|不便|不应该)"
REFUSAL = re.compile(
    rf"(?:抱歉|对不起|不好意思|请原谅|遗憾)[^。！？\n]{{0,30}}{CANNOT}"
    rf"|(?:我|本人|作为[^。！？\n]{{0,20}}[，,]\s*我?){CANNOT}(?:向您|向你|为您|为你|给您|给你|帮您|帮你|对此|满足)?"
    r"(?:提供|帮助|协助|回答|告诉|满足|参与|支持|编写|编造|写|做|完成|执行|讨论|给出|生成|创作|这样|这么|您|你)"
    r"|i(?:'m|’m| am) sorry|i (?:can't|can’t|cannot|won't|won’t|am unable|am not able)|i(?:'m|’m) (?:unable|not able)",
    re.I,
)
OPENING = 120  # characters within which an answer that refuses says so


def tokens(text: str) -> list[str]:
    """Characters of Chinese, words of other scripts, marks: sacrebleu's tokenisation for Chinese, in lower case."""
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return TokenizerZh()(text).lower().split()


def bleu(pairs: Pairs) -> float:
    """BLEU of a set of answers (Papineni et al. 2002), 0 to 100, by sacrebleu with its Chinese tokenisation."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="zh").corpus_score([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score


def chrf(pairs: Pairs) -> float:
    """chrF of a set of answers (Popović 2015), 0 to 100, by sacrebleu."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF().corpus_score([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score


def rouge_l(pairs: Pairs) -> float:
    """ROUGE-L (Lin 2004): the mean F1 of the longest common subsequence of tokens, 0 to 100."""
    scores = []
    for answer, reference in pairs:
        ours, wanted = tokens(answer), tokens(reference)
        common = common_subsequence(ours, wanted)
        scores.append(200 * common / (len(ours) + len(wanted)) if common else 0.0)
    return statistics.fmean(scores)


def common_subsequence(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, a row of the table at a time as one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for position, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << position
    whole = (1 << len(one)) - 1
    row = whole
    for token in other:
        matched = row & places.get(token, 0)
        row = (row + matched | row - matched) & whole
    return len(one) - row.bit_count()


def exact(pairs: Pairs) -> float:
    """The share of answers, in percent, whose final number is the reference's."""
    return 100 * statistics.fmean(final_number(answer) == final_number(reference) for answer, reference in pairs)


def final_number(text: str) -> Fraction | None:
    """The number that an answer ends in: the one after its last 答案 (or the like), else its last one; None without one.

    Fractions, percentages without their sign, thousands separators and, after 答案, Chinese numerals are read; of an
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
    """A Chinese numeral below 100 million in digits; any other text as it is."""
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


def length(answers: list[str]) -> float:
    """Characters an answer, in the mean."""
    return statistics.fmean(map(len, answers))


def repetition(answers: list[str]) -> float:
    """The share of runs of four tokens, in percent, that the same answer had before (seq-rep-4, Welleck et al. 2020)."""
    shares = []
    for answer in answers:
        found = tokens(answer)
        runs = [tuple(found[start : start + 4]) for start in range(len(found) - 3)]
        shares.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    return 100 * statistics.fmean(shares)


def chinese(answers: list[str]) -> float:
    """The share of Chinese characters among all letters, in percent."""
    letters = [sign for answer in answers for sign in answer if sign.isalpha()]
    return 100 * statistics.fmean(is_chinese(sign) for sign in letters) if letters else 0.0


def is_chinese(sign: str) -> bool:
    return "\u4e00" <= sign <= "\u9fff" or "\u3400" <= sign <= "\u4dbf" or "\U00020000" <= sign <= "\U0003134f"


def refusals(answers: list[str]) -> float:
    """The share of answers, in percent, that open with a refusal (found by its usual wordings, Chinese and English)."""
    return 100 * statistics.fmean(bool(REFUSAL.search(answer[:OPENING])) for answer in answers)


CLOSENESS: dict[str, Callable[[Pairs], float]] = {"BLEU": bleu, "chrF": chrf, "ROUGE-L": rouge_l}
SHAPE: dict[str, Callable[[list[str]], float]] = {
    "length (characters)": length,
    "repetition (%)": repetition,
    "Chinese (%)": chinese,
    "refusals (%)": refusals,
}


def measure(records: list[Record], members: dict[str, list[int]], answers: dict[str, list[str]]) -> list[Table]:
    """A table for each measure. `members`: positions of each category; `answers`: of each system, one for each record.

    Closeness is measured on the records with a reference; exact numbers where every reference of a category is a number.
    """
    referenced = {category: [p for p in positions if records[p].get("reference")] for category, positions in members.items()}
    numeric = {c: ps for c, ps in referenced.items() if ps and all(NUMBER.fullmatch(records[p]["reference"]) for p in ps)}

    def pairs(system: str, positions: list[int]) -> Pairs:
        return [(answers[system][position], records[position]["reference"]) for position in positions]

    def table(title: str, groups: dict[str, list[int]], measured: Callable[[str, list[int]], float], marked: bool) -> Table:
        rows = [Row(c, len(ps), {name: measured(name, ps) for name in answers}) for c, ps in groups.items() if ps]
        return Table(title, list(answers), rows, marked=marked)

    tables = [table(name, referenced, lambda s, ps, f=f: f(pairs(s, ps)), True) for name, f in CLOSENESS.items()]  # type: ignore[misc]
    tables.append(table("exact number (%)", numeric, lambda s, ps: exact(pairs(s, ps)), True))
    for name, function in SHAPE.items():
        tables.append(table(name, members, lambda s, ps, f=function: f([answers[s][p] for p in ps]), False))  # type: ignore[misc]
    return [table for table in tables if table.rows]
