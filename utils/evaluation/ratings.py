"""Ratings from pairwise comparisons (Bradley and Terry 1952), with intervals; by choix."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from utils.evaluation.intervals import SEED, SURE, Interval

if TYPE_CHECKING:
    import numpy

MIDDLE, SCALE = 1000.0, 400 / math.log(10)  # as in chess: 400 points are odds of ten to one
WEIGHT = 0.1  # wins added for each system over each other, so that one that always wins has a finite rating
RESAMPLES = 500


class Verdict(NamedTuple):
    """The outcome of one comparison: 1.0 if `one` is better than `other`, 0.0 if it is worse, 0.5 for a tie."""

    prompt: int
    one: str
    other: str
    outcome: float


def ratings(systems: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, tuple[float | None, Interval | None]]:
    """Each system's rating, on average 1000 (None: it has no verdict), with its interval (None for fewer than two prompts).

    A tie is half a win for both. The interval is by random weights of the prompts (the Bayesian bootstrap, Rubin 1981), and of
    one more on which all are equal: without it, one that always wins would have a rating beyond doubt.
    """
    import numpy

    places = {system: place for place, system in enumerate(systems)}
    prompts = sorted({verdict.prompt for verdict in verdicts})
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    wins = numpy.zeros((len(prompts), len(systems), len(systems)))
    for prompt, one, other, outcome in verdicts:
        wins[rows[prompt], places[one], places[other]] += outcome
        wins[rows[prompt], places[other], places[one]] += 1 - outcome
    middle = rated(wins.sum(0))
    known = {system for verdict in verdicts for system in (verdict.one, verdict.other)}
    if len(prompts) < 2:
        return {system: (middle[place] if system in known else None, None) for system, place in places.items()}
    pairs = len(systems) * (len(systems) - 1)
    units = numpy.concatenate([wins, [(1 - numpy.eye(len(systems))) * wins.sum() / len(prompts) / pairs]])
    weights = numpy.random.default_rng(SEED).dirichlet(numpy.ones(len(units)), RESAMPLES) * len(prompts)
    drawn = [rated(numpy.tensordot(each, units, 1)) for each in weights]
    low, high = numpy.quantile(drawn, [(1 - SURE) / 2, (1 + SURE) / 2], axis=0).tolist()
    return {
        system: (middle[place], (min(low[place], middle[place]), max(high[place], middle[place])))
        if system in known
        else (None, None)
        for system, place in places.items()
    }


def linked(systems: Sequence[str], verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The systems in groups that verdicts link, directly or by way of others."""
    groups = {system: [system] for system in systems}
    for verdict in verdicts:
        one, other = groups[verdict.one], groups[verdict.other]
        if one is not other:
            one += other
            groups |= dict.fromkeys(other, one)
    return list({id(group): group for group in groups.values()}.values())


def rated(wins: "numpy.ndarray") -> list[float]:
    """The maximum-likelihood ratings. `wins`: (systems, systems), of the row's over the column's."""
    import choix
    import numpy

    found = choix.ilsr_pairwise_dense(wins + WEIGHT * (1 - numpy.eye(len(wins))))
    return [MIDDLE + SCALE * value for value in (found - found.mean()).tolist()]
