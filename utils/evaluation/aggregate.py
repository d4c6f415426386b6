"""Aggregates judgements: scores by category, how far repeats agree, and whether the order of systems mattered."""

import itertools
import statistics
from collections.abc import Iterable
from typing import Any

from utils.datasets.prompts import Record
from utils.evaluation.answers import by_category
from utils.evaluation.intervals import FEWEST, Interval, bootstrap, compare
from utils.evaluation.judging import Judgement
from utils.evaluation.tables import Row, Table

SAMPLES = 10  # usual prompts per category, at up to ten points each, for a total out of 100


def tabulate(title: str, records: list[Record], systems: list[str], judgements: Iterable[Judgement]) -> Table:
    """Scores by category: the mean over its prompts (of the mean over repeats), out of 100."""
    judgements = list(judgements)
    given, doubt = by_prompt(judgements), intervals(records, systems, judgements)
    rows = []
    for category, members in by_category(records).items():
        values: dict[str, float | None] = {}
        for system in systems:
            means = [given[prompt, system] for prompt in members if (prompt, system) in given]
            values[system] = 10 * statistics.fmean(means) if means else None
        rows.append(Row(category, len(members), values, doubt[category]))
    return Table(title, systems, rows)


def by_prompt(judgements: Iterable[Judgement]) -> dict[tuple[int, str], float]:
    """The mean score over repeats, by prompt and system; missing scores are left out."""
    given: dict[tuple[int, str], list[float]] = {}
    for judgement in judgements:
        for system, score in judgement.scores.items():
            if score is not None:
                given.setdefault((judgement.prompt, system), []).append(score)
    return {key: statistics.fmean(scores) for key, scores in given.items()}


def intervals(records: list[Record], systems: list[str], judgements: list[Judgement]) -> dict[str, dict[str, Interval | None]]:
    """The 95 % interval over prompts of each system's score, for each category, and for all categories under ""."""
    given = by_prompt(judgements)
    found: dict[str, dict[str, Interval | None]] = {}
    members = by_category(records)
    for name, groups in {"": list(members.values()), **{category: [one] for category, one in members.items()}}.items():
        found[name] = {
            system: bootstrap([[10 * given[p, system] for p in group if (p, system) in given] for group in groups])
            for system in systems
        }
    return found


def differences(records: list[Record], systems: list[str], judgements: list[Judgement]) -> list[str]:
    """In words, for each pair of systems, whether their means over the categories differ, on prompts scored for both."""
    given, groups = by_prompt(judgements), by_category(records).values()
    lines = []
    for one, other in itertools.combinations(systems, 2):
        gaps = [[10 * (given[p, one] - given[p, other]) for p in g if {(p, one), (p, other)} <= given.keys()] for g in groups]
        lines.append(compare(one, other, bootstrap(gaps) if sum(map(len, gaps)) >= FEWEST else None))
    return lines


def agreement(judgements: list[Judgement]) -> dict[str, float] | None:
    """How far repeats of one prompt agree, over all pairs of them; None if there are none.

    `mean_difference`: points between two scores of one answer; `within_one`: share that differ by at most one point;
    `same_best`: share of pairs of repeats with the same best systems.
    """
    repeats: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        repeats.setdefault(judgement.prompt, []).append(judgement)
    pairs = [pair for group in repeats.values() for pair in itertools.combinations(group, 2)]
    differences = [
        abs(one.scores[system] - other.scores[system])  # type: ignore[operator]
        for one, other in pairs
        for system in one.scores
        if one.scores[system] is not None and other.scores[system] is not None
    ]
    complete = [(one, other) for one, other in pairs if None not in (*one.scores.values(), *other.scores.values())]
    if not differences:
        return None
    found = {
        "mean_difference": statistics.fmean(differences),
        "within_one": statistics.fmean(difference <= 1 for difference in differences),
    }
    return found | ({"same_best": statistics.fmean(best(a) == best(b) for a, b in complete)} if complete else {})


def best(judgement: Judgement) -> set[str]:
    """The systems with the highest score in a judgement that has all scores."""
    scores: dict[str, Any] = judgement.scores
    highest = max(scores.values())
    return {system for system, score in scores.items() if score == highest}


def by_position(judgements: list[Judgement]) -> list[dict[str, float]]:
    """For each position: its win rate (a shared win is split; an unbiased judge gives each 1/n) and mean score.

    Only judgements with a score for every system count.
    """
    complete = [judgement for judgement in judgements if None not in judgement.scores.values()]
    found: list[dict[str, float]] = []
    for position in range(len(complete[0].order) if complete else 0):
        shown = [(judgement, judgement.order[position]) for judgement in complete]
        wins = [1 / len(best(judgement)) if system in best(judgement) else 0.0 for judgement, system in shown]
        scores: list[Any] = [judgement.scores[system] for judgement, system in shown]
        means = {"win_rate": statistics.fmean(wins), "mean_score": statistics.fmean(scores)}
        found.append({"position": position + 1} | means)
    return found


def notes(records: list[Record], table: Table, judgements: list[Judgement]) -> list[str]:
    """Notes for the reader of the table, one line each."""
    lines = [
        f"{len(records)} prompts, judged {len(judgements) // len(records)} times, the order of the systems shuffled for each"
    ]
    scaled = [f"{row.label} ({row.samples})" for row in table.rows if row.samples != SAMPLES]
    if scaled:
        lines.append(f"means scaled to 100, since these categories do not have {SAMPLES} samples: {', '.join(scaled)}")
    for system in table.systems:
        gaps = [records[judgement.prompt]["category"] for judgement in judgements if judgement.scores[system] is None]
        if gaps:
            places = ", ".join(f"{row.label} {count}" for row in table.rows if (count := gaps.count(row.category)))
            lines.append(f"{system}: {len(gaps)} of {len(judgements)} scores are missing and not in its means ({places})")
    doubt = intervals(records, table.systems, judgements)[""]
    means = ", ".join(
        f"{system} {table.shown(mean)}" + ("" if (known := doubt[system]) is None else f" ({known[0]:.1f} to {known[1]:.1f})")
        for system, mean in means_of(table).items()
    )
    lines.append(f"mean over the categories (95 % interval, by resampling prompts in each): {means}")
    lines += differences(records, table.systems, judgements)
    agreed = agreement(judgements)
    if agreed:
        line = (
            f"repeats differ by {agreed['mean_difference']:.2f} points in the mean, {agreed['within_one']:.0%} by at most one"
        )
        lines.append(line + (f"; {agreed['same_best']:.0%} have the same best" if "same_best" in agreed else ""))
    positions = by_position(judgements)
    if positions:
        rates = ", ".join(f"System{place['position']} {place['win_rate']:.0%}" for place in positions)
        lines.append(f"wins by position shown (an unbiased judge: {1 / len(positions):.0%} each): {rates}")
    return lines


def means_of(table: Table) -> dict[str, float | None]:
    """Each system's mean over the categories; None if it lacks a value in any of them."""
    means: dict[str, float | None] = {}
    for system in table.systems:
        values = [value for row in table.rows if (value := row.values.get(system)) is not None]
        means[system] = statistics.fmean(values) if values and len(values) == len(table.rows) else None
    return means


def as_record(judgement: Judgement, record: Record) -> dict[str, Any]:
    """A judgement with its prompt, for a file that people read."""
    asked = {key: record[key] for key in ("category", "instruction", "input") if record.get(key)}
    found = judgement._asdict() | {"prompt": judgement.prompt + 1, "repeat": judgement.repeat + 1}
    return asked | found


def facts(records: list[Record], systems: list[str], judgements: list[Judgement]) -> dict[str, Any]:
    """Intervals of the scores, and agreement and position bias of the judge, for the JSON file."""
    return {"intervals": intervals(records, systems, judgements)} | {
        "agreement": agreement(judgements),
        "positions": by_position(judgements),
    }
