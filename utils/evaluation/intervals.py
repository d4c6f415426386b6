"""How certain results are: 95 % intervals of shares and means, and whether two systems differ at all."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import Any

SURE = 0.95
RESAMPLES = 2000
SEED = 0
FEWEST = 6  # prompts; of fewer not even a system that is better on each is shown to be: by signs alone p = 2 / 2⁵ > 0.05

Interval = tuple[float, float]


def wilson(right: float, total: float) -> Interval:
    """The interval, in percent, of a share, `right` of `total` (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + SURE) / 2)
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def share(right: float, total: float) -> tuple[float, Interval]:
    """A share in percent, and its interval."""
    return 100 * right / total, wilson(right, total)


def mcnemar(only_one: int, only_other: int) -> float:
    """The probability that two equally good systems differ this much or more (exact, two-sided; McNemar 1947).

    `only_one`, `only_other`: how many questions only the one, or only the other, answered correctly.
    """
    discordant = only_one + only_other
    tail = sum(math.comb(discordant, count) for count in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def bootstrap(groups: Sequence[Sequence[float]]) -> Interval | None:
    """The interval of the mean of the groups' means, by resampling values within each group (Efron 1979).

    None if a group has fewer than two values, since resampling a single value tells nothing.
    """
    import numpy

    if not groups or min(map(len, groups)) < 2:
        return None
    chance = numpy.random.default_rng(SEED)
    means = [numpy.asarray(group)[chance.integers(len(group), size=(RESAMPLES, len(group)))].mean(1) for group in groups]
    return middle(numpy.mean(means, 0))


def of_mean(values: Sequence[float]) -> Interval | None:
    """The interval of the mean of a few random values (Student 1908); None if there are fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return None
    half = float(stats.t.ppf((1 + SURE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def resampled(counts: Sequence[Sequence[float]], value: Callable[[Sequence[float]], float]) -> Any:
    """`value` of the sums over questions drawn with replacement (Efron 1979), for each resample: (resamples,).

    `counts`: the same numbers for each question. The same questions are drawn for every system with equally many, so that
    two systems' values can be subtracted (a paired bootstrap, Koehn 2004).
    """
    import numpy

    total = len(counts)
    times = numpy.random.default_rng(SEED).multinomial(total, [1 / total] * total, RESAMPLES)
    return numpy.array([value(sums) for sums in (times @ numpy.asarray(counts)).tolist()])


def sums(counts: Iterable[Sequence[float]]) -> list[float]:
    """The sums over questions of the numbers that are given for each of them."""
    return [sum(column) for column in zip(*counts, strict=True)]


def percent(counts: Sequence[float]) -> float:
    """A share in percent, from a count and its total."""
    return 100 * counts[0] / counts[1]


def of_share(counts: Sequence[Sequence[float]]) -> Interval:
    """The interval in percent of a share, given for each question as a count and its total: by resampling questions; Wilson's
    if each is yes or no, or all are alike, of which resampling would show no doubt at all."""
    shares = {one / total for one, total in counts}
    if len(shares) > 1 and not shares <= {0.0, 1.0}:
        return middle(resampled(counts, percent))
    one, total = sums(counts)
    return wilson(len(counts) * one / total, len(counts))


def middle(values: Any) -> Interval:
    """The interval that holds the middle 95 % of values."""
    import numpy

    low, high = numpy.quantile(values, [(1 - SURE) / 2, (1 + SURE) / 2]).tolist()
    return low, high


def compare(one: str, other: str, interval: Interval | None, digits: int = 1, word: str = "better") -> str:
    """In words, how the system `one` differs from `other`, by the interval of the difference of their means.

    `word` says what a larger value means; None: fewer than FEWEST prompts.
    """
    if interval is None:
        return f"{one} and {other}: too few prompts to tell a difference"
    shown = f"95 % interval of the difference {interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}"
    return in_words(one, other, (interval[0] > 0) - (interval[1] < 0), shown, word)


def in_words(one: str, other: str, lead: int, basis: str, word: str = "better") -> str:
    """Which of two systems has more, by the sign of the `lead` of `one` (0: no difference can be told), on what `basis`."""
    if not lead:
        return f"{one} and {other}: no difference can be told ({basis})"
    more, less = (one, other) if lead > 0 else (other, one)
    return f"{more} {'is better' if word == 'better' else f'has {word}'} than {less} ({basis})"


def compare_counts(one: str, other: str, only_one: int, only_other: int, basis: str, word: str = "better") -> str:
    """The same by McNemar's test, whose result is added to the `basis`."""
    chance = mcnemar(only_one, only_other)
    lead = only_one - only_other if chance < 1 - SURE else 0
    return in_words(one, other, lead, f"{basis}, McNemar p = {chance:.3f}", word)


def compare_shares(right: dict[str, list[bool]], word: str = "better") -> list[str]:
    """A line for each pair of systems: whether they differ in which of the same questions they answered correctly.

    `word` says what a larger share means.
    """
    hit = "right" if word == "better" else "yes"
    lines = []
    for one, other in itertools.combinations(right, 2):
        pairs = list(zip(right[one], right[other], strict=True))
        counts = pairs.count((True, False)), pairs.count((False, True))
        basis = f"only {one} {hit} {counts[0]}, only {other} {hit} {counts[1]}"
        lines.append(compare_counts(one, other, *counts, basis, word))
    return lines
