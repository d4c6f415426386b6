"""Ratings from pairwise comparisons (Bradley and Terry 1952), with intervals; by choix."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from utils.evaluation.intervals import SURE, Interval

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


def ratings(systems: Sequence[str], verdicts: Sequence[Verdict], seed: int = 0) -> dict[str, tuple[float, Interval | None]]:
    """Each system's rating, on average 1000, with its interval by resampling prompts (None for fewer than two prompts).

    A tie is half a win for both.
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
    if len(prompts) < 2:
        return {system: (middle[place], None) for system, place in places.items()}
    chance = numpy.random.default_rng(seed)
    drawn = [rated(wins[chance.integers(len(prompts), size=len(prompts))].sum(0)) for _ in range(RESAMPLES)]
    low, high = numpy.quantile(drawn, [(1 - SURE) / 2, (1 + SURE) / 2], axis=0).tolist()
    return {system: (middle[place], (low[place], high[place])) for system, place in places.items()}


def rated(wins: "numpy.ndarray") -> list[float]:
    """The maximum-likelihood ratings. `wins`: (systems, systems), of the row's over the column's."""
    import choix
    import numpy

    found = choix.ilsr_pairwise_dense(wins + WEIGHT * (1 - numpy.eye(len(wins))))
    return [MIDDLE + SCALE * value for value in (found - found.mean()).tolist()]
