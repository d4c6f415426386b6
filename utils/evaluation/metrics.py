"""Metrics that need no judge: closeness to a reference, exact numbers, length, repetition, script, refusals."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from utils.datasets.final_numbers import NUMBER, final_number
from utils.datasets.prompts import Record
from utils.evaluation.answers import samples
from utils.evaluation.intervals import FEWEST, Interval, compare, compare_shares, middle, percent, resampled, sums, wilson
from utils.evaluation.tables import Row, Table

Pairs = list[tuple[str, str]]  # answers with their references
CANNOT = "(?:不能|无法|不可以|没有办法|没办法|不会|拒绝|不便|不应该)"
REFUSAL = re.compile(
    rf"(?:抱歉|对不起|不好意思|请原谅|遗憾)[^。！？\n]{{0,30}}{CANNOT}"
    rf"|(?:我|本人|作为[^。！？\n]{{0,20}}[，,]\s*我?){CANNOT}(?:向您|向你|为您|为你|给您|给你|帮您|帮你|对此|满足)?"
    r"(?:提供|帮助|协助|回答|告诉|满足|参与|支持|编写|编造|写|做|完成|执行|讨论|给出|生成|创作|这样|这么|您|你)"
    r"|i(?:'m|’m| am) sorry|i (?:can't|can’t|cannot|won't|won’t|am unable|am not able)|i(?:'m|’m) (?:unable|not able)",
    re.I,
)
OPENING = 120  # characters; a refusal says so within these


def tokens(text: str) -> list[str]:
    """Chinese characters, words of other scripts, punctuation: sacrebleu's Chinese tokenization, in lower case."""
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    return TokenizerZh()(text).lower().split()


@dataclasses.dataclass(frozen=True)
class Measure:
    """A metric of a set of answers: `count` gives some numbers for each answer, and `value` the result from their sums.

    With `yes_or_no` the numbers are 1 or 0, followed by 1, and the value is a share in percent.
    """

    count: Callable[[Pairs], list[Any]]
    value: Callable[[Sequence[float]], float]
    yes_or_no: bool = False

    def __call__(self, pairs: Pairs) -> float:
        """The value of answers with their references ("" if the metric needs none)."""
        return self.value(sums(self.count(pairs)))

    def with_interval(self, pairs: Pairs) -> tuple[float, Interval | None]:
        """The value, and its 95 % interval (Wilson's for a share, else by resampling answers; None for a single answer)."""
        counts = self.count(pairs)
        value = self.value(sums(counts))
        if self.yes_or_no:
            return value, wilson(*sums(counts))
        return value, middle(resampled(counts, self.value)) if len(counts) > 1 else None


def of_library(name: str, **settings: Any) -> Measure:
    """A metric from sacrebleu."""

    @functools.cache
    def metric() -> Any:
        import sacrebleu.metrics

        return getattr(sacrebleu.metrics, name)(**settings)

    def count(pairs: Pairs) -> list[Any]:
        answers, references = zip(*pairs, strict=True)
        return metric()._extract_corpus_statistics(answers, [references])

    return Measure(count, lambda counts: metric()._compute_score_from_stats(counts).score)


def mean(of_one: Callable[[str, str], float], percent: bool = True) -> Measure:
    """The mean over answers of a number, which must be from 0 to 1 if given in percent."""
    factor = 100 if percent else 1
    return Measure(lambda pairs: [(of_one(*pair), 1) for pair in pairs], lambda counts: factor * counts[0] / counts[1])


def share(of_one: Callable[[str, str], bool]) -> Measure:
    """The share of answers, in percent, for which something is true."""
    return dataclasses.replace(mean(of_one), yes_or_no=True)


bleu = of_library("BLEU", tokenize="zh")  # Papineni et al. 2002; 0 to 100, with sacrebleu's Chinese tokenization
chrf = of_library("CHRF")  # Popović 2015; 0 to 100


def common_share(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) of an answer: the F1 of the longest common subsequence of tokens."""
    ours, wanted = tokens(answer), tokens(reference)
    common = common_subsequence(ours, wanted)
    return 2 * common / (len(ours) + len(wanted)) if common else 0.0


def common_subsequence(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, computed one table row at a time as an integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for position, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << position
    full = (1 << len(one)) - 1
    row = full
    for token in other:
        matched = row & places.get(token, 0)
        row = (row + matched | row - matched) & full
    return len(one) - row.bit_count()


def is_exact(answer: str, reference: str) -> bool:
    """True if an answer's final number is the reference's."""
    return final_number(answer) == final_number(reference)


def repeated(answer: str, _: str) -> float:
    """The share of repeated 4-grams of tokens in the answer (seq-rep-4, Welleck et al. 2020)."""
    found = tokens(answer)
    runs = [tuple(found[start : start + 4]) for start in range(len(found) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def letters(pairs: Pairs) -> list[tuple[int, int]]:
    """The numbers of Chinese characters and of letters of any script in each answer."""
    signs = [[sign for sign in answer if sign.isalpha()] for answer, _ in pairs]
    return [(sum(map(is_chinese, one)), len(one)) for one in signs]


def is_chinese(sign: str) -> bool:
    return "\u4e00" <= sign <= "\u9fff" or "\u3400" <= sign <= "\u4dbf" or "\U00020000" <= sign <= "\U0003134f"


def refuses(answer: str, _: str = "") -> bool:
    """True if an answer opens with a refusal in the usual Chinese or English wordings; evasive ones are not found."""
    return bool(REFUSAL.search(answer[:OPENING]))


rouge_l = mean(common_share)
exact = share(is_exact)
length = mean(lambda answer, _: len(answer), percent=False)
repetition = mean(repeated)
chinese = Measure(letters, lambda counts: percent(counts) if counts[1] else 0.0)  # of all letters, not the mean of shares
refusals = share(refuses)

CLOSENESS = {"BLEU": bleu, "chrF": chrf, "ROUGE-L": rouge_l}
EXACT = "exact number (%)"
SHAPE = {"length (characters)": length, "repetition (%)": repetition, "Chinese (%)": chinese, "refusals (%)": refusals}


def numeric_only(records: list[Record], referenced: dict[str, list[int]]) -> dict[str, list[int]]:
    """The categories in which every reference is a number."""
    return {c: ps for c, ps in referenced.items() if ps and all(NUMBER.fullmatch(records[p]["reference"]) for p in ps)}


def measure(
    records: list[Record], members: dict[str, list[int]], answers: dict[str, list[str]]
) -> tuple[list[Table], list[str]]:
    """A table for each metric, with 95 % intervals, and in words which systems differ in it.

    `members`: positions of each category; `answers`: for each system, one for each record. Closeness is measured on the
    records with a reference, exact numbers only in categories where every reference is a number.
    """
    referenced = {category: [p for p in positions if records[p].get("reference")] for category, positions in members.items()}
    groups = [(name, one, referenced) for name, one in CLOSENESS.items()]
    groups += [(EXACT, exact, numeric_only(records, referenced))]
    groups += [(name, one, members) for name, one in SHAPE.items()]
    tables, notes = [], []
    for name, one, categories in groups:
        rows = []
        for category, positions in categories.items():
            if positions:
                found = {system: one.with_interval(pairs_of(records, given, positions)) for system, given in answers.items()}
                rows.append(Row.of(category, len(positions), found))
        if rows:
            tables.append(Table(name, list(answers), rows, marked=name not in SHAPE))
            everywhere = [position for positions in categories.values() for position in positions]
            counts = {system: one.count(pairs_of(records, given, everywhere)) for system, given in answers.items()}
            notes += [f"{name}, all {len(everywhere)} prompts: {line}" for line in differences(one, counts, name in SHAPE)]
    return tables, notes


def pairs_of(records: list[Record], answers: list[str], positions: list[int]) -> Pairs:
    """The answers at these positions, with their references."""
    return [(answers[position], records[position].get("reference") or "") for position in positions]


def differences(one: Measure, counts: dict[str, list[Any]], neither_is_better: bool) -> list[str]:
    """A line for each pair of systems: whether they differ in a metric, by McNemar's test or a paired bootstrap.

    `counts`: for each system, on the same prompts. The samples of a system are pooled.
    """
    groups = samples(list(counts))
    word = "more" if neither_is_better else "better"
    if one.yes_or_no and all(len(systems) == 1 for systems in groups.values()):
        return compare_shares({system: [bool(yes) for yes, _ in found] for system, found in counts.items()}, word)
    pooled = {
        name: [sums(of_one) for of_one in zip(*map(counts.get, systems), strict=True)]  # type: ignore[arg-type]
        for name, systems in groups.items()
    }
    if any(len(found) < FEWEST for found in pooled.values()):
        return [compare(first, second, None) for first, second in itertools.combinations(pooled, 2)]
    drawn = {name: resampled(found, one.value) for name, found in pooled.items()}
    pairs = itertools.combinations(drawn, 2)
    return [compare(first, second, middle(drawn[first] - drawn[second]), word=word) for first, second in pairs]
