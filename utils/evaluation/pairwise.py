"""Pairwise comparison: which of two answers is better, asked in both orders; win rates, ratings, and the judge's biases."""

import itertools
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.console import UserError, say
from utils.datasets.file_formats import read_items
from utils.datasets.preferences import read_pairs
from utils.datasets.prompts import Record
from utils.datasets.templates import without_thoughts
from utils.evaluation.answers import by_category, key_of
from utils.evaluation.intervals import compare_counts, of_share, percent, share, sums
from utils.evaluation.judging import Question, ask_for_verdict, question
from utils.evaluation.ratings import Verdict, linked, ratings
from utils.evaluation.tables import Row, Table
from utils.inference.requests import Endpoint

TASK = (
    "请比较两个助手对同一个问题的回答，看正确、切题、有用和表达，不看长短，也不看先后。"
    "先用几句话说明理由，最后单独写一行：“结论：A”、“结论：B”或“结论：平局”。"
)
REMINDER = "（上一次的回答里找不到结论。请在最后单独写一行：“结论：A”、“结论：B”或“结论：平局”。）"
VERDICT = re.compile(  # up to its end: of "结论：A 不如 B" the letter alone would be the wrong one
    r"结论\W{0,6}(?:是|为)?\W{0,4}(?:(?:助手|回答)\s*)?(A|B|平局|平手|一样好|tie)"
    r"(?:\s*(?:的?回答)?\s*(?:更好|更优|更佳|较好|略好|稍好|胜出|获胜|胜))?"
    r"[\s*_`\"'”’』】\])}]*(?:\Z|[\n。.;!(]|,(?!\s*[AB]))",
    re.I,
)
PEOPLE = "votes"  # the judge's name for votes on the page


class Comparison(NamedTuple):
    """A comparison of two answers to one prompt, shown in this order: outcome 1.0 for the first, 0.0 for the second, 0.5 for a
    tie, None if unreadable; the judge's texts, and what is wrong."""

    prompt: int
    first: str
    second: str
    outcome: float | None
    answers: list[str]
    problem: str


def compare_prompt(record: Record, first: str, second: str, with_reference: bool) -> str:
    """The text that asks the judge about two answers."""
    reference = record.get("reference") if with_reference else ""
    known = [f"[参考答案]\n{reference}\n[参考答案完]"] if reference else []
    parts = [TASK, f"[问题]\n{question(record)}\n[问题完]", *known]
    return "\n\n".join([*parts, f"[A 的回答]\n{first}\n[A 的回答完]", f"[B 的回答]\n{second}\n[B 的回答完]"])


def read_verdict(text: str) -> float | None:
    """The verdict in a judge's text: 1.0 for A, 0.0 for B, 0.5 for a tie; None if there is none, or several differ."""
    text = unicodedata.normalize("NFKC", without_thoughts(text))
    found = {match.upper() for match in VERDICT.findall(text)}
    values = {1.0 if word == "A" else 0.0 if word == "B" else 0.5 for word in found}
    return values.pop() if len(values) == 1 else None


async def compare(endpoint: Endpoint, asked: Question) -> Comparison:
    """Have two answers compared in one order; if the verdict is unreadable, the judge is asked up to twice more."""
    outcome, texts, is_refused = await ask_for_verdict(endpoint, asked, read_verdict, REMINDER)
    problem = f"refused: {texts[-1]}" if is_refused else "no readable verdict" if outcome is None else ""
    prompt, first, second = asked.about
    return Comparison(prompt, first, second, outcome, texts, problem)


def questions(records: list[Record], answers: dict[str, list[str]], with_references: bool) -> list[Question]:
    """The requests that compare each pair of systems on every prompt, in both orders, unless their answers are equal."""
    found = []
    for prompt, record in enumerate(records):
        for first, second in itertools.permutations(answers, 2):
            one, other = answers[first][prompt], answers[second][prompt]
            if one.strip() != other.strip():
                content = compare_prompt(record, one, other, with_references)
                found.append(Question((prompt, first, second), f"{first} before {second}", content))
    return found


def compare_all(endpoint: Endpoint, asked: list[Question], answers: dict[str, list[str]]) -> list[Comparison]:
    """Ask the judge all questions; pairs that are not asked about have equal answers, and are ties."""
    different = {one.about for one in asked}
    ties = [
        Comparison(prompt, first, second, 0.5, [], "the answers are equal: a tie")
        for prompt in range(len(next(iter(answers.values()))))
        for first, second in itertools.permutations(answers, 2)
        if (prompt, first, second) not in different
    ]
    found = endpoint.gather([compare(endpoint, one) for one in asked], "comparing")
    return sorted([*found, *ties], key=lambda one: (one.prompt, one.first, one.second))


def read_votes(paths: Sequence[str], records: list[Record], answers: dict[str, list[str]]) -> list[Comparison]:
    """Votes as comparisons: systems are found by their answers' texts; how many votes are on other texts is printed.

    Raises UserError if a file holds no vote on these answers.
    """
    prompts = {key_of(record): place for place, record in enumerate(records)}
    found: list[Comparison] = []
    for path in paths:
        unknown = ambiguous = taken = 0
        for asked, texts, outcome in votes_of(Path(path)):
            place = prompts.get(key_of(asked))
            whose = [[name for name in answers if place is not None and answers[name][place].strip() == text] for text in texts]
            if place is None or not all(whose):
                unknown += 1
            elif any(len(names) > 1 for names in whose):
                ambiguous += 1
            else:
                found.append(Comparison(place, whose[0][0], whose[1][0], outcome, [], ""))
                taken += 1
        if unknown or ambiguous:
            say(
                f"{path}: {taken} votes counted; not counted: {unknown} on other prompts or answers, "
                f"{ambiguous} on answers that several systems gave"
            )
        if not taken:
            raise UserError(f"{path}: holds no votes on these systems' answers; name votes on the same prompts and answers")
    return found


def votes_of(path: Path) -> Iterator[tuple[Record, list[str], float]]:
    """The question, the two answers, and the outcome for the first, of each vote in a file: preference records, or the page's
    file of ties."""
    items = [item for _, item in read_items(path)]
    if all(isinstance(item, dict) and isinstance(item.get("answers"), dict) and len(item["answers"]) == 2 for item in items):
        for item in items:
            texts = [str(text).strip() for text in item["answers"].values()]
            yield {"instruction": str(item.get("instruction", "")), "input": item.get("input") or ""}, texts, 0.5
    else:
        for pair in read_pairs(path):
            yield pair.chosen, [one["output"].strip() for one in pair], 1.0


def verdicts(comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The readable comparisons, as outcomes for ratings."""
    return [Verdict(one.prompt, one.first, one.second, one.outcome) for one in comparisons if one.outcome is not None]


def combined(comparisons: Sequence[Comparison]) -> dict[tuple[int, str, str], list[float]]:
    """The outcomes for each prompt and pair of systems, in both orders, from the view of the name that sorts first."""
    found: dict[tuple[int, str, str], list[float]] = {}
    for one in comparisons:
        if one.outcome is not None:
            names = sorted((one.first, one.second))
            outcome = one.outcome if names[0] == one.first else 1 - one.outcome
            found.setdefault((one.prompt, *names), []).append(outcome)  # type: ignore[arg-type]
    return found


def tabulate(judge: str, records: list[Record], systems: list[str], comparisons: Sequence[Comparison]) -> list[Table]:
    """The share of comparisons that each system wins, by category (a tie is half a win), and the ratings."""
    rows = []
    for category, members in by_category(records).items():
        inside = set(members)
        given: dict[str, dict[int, list[float]]] = {system: {} for system in systems}
        for prompt, one, other, outcome in verdicts(comparisons):
            if prompt in inside:
                given[one].setdefault(prompt, []).append(outcome)
                given[other].setdefault(prompt, []).append(1 - outcome)
        counts = {name: [(sum(one), len(one)) for one in by_prompt.values()] for name, by_prompt in given.items()}
        shares = {name: (percent(sums(of)), of_share(of)) if of else (None, None) for name, of in counts.items()}
        rows.append(Row.of(category, len(members), shares))
    overall = Row.of("all", len({one.prompt for one in comparisons}), ratings(systems, verdicts(comparisons)))
    titles = f"wins in %, a tie is half a win, by {judge}", f"Bradley–Terry rating by {judge}"
    return [Table(titles[0], systems, rows), Table(titles[1], systems, [overall], digits=0)]


def notes(judge: str, records: list[Record], answers: dict[str, list[str]], comparisons: Sequence[Comparison]) -> list[str]:
    """Notes, one line each: biases of the judge, which systems differ, and what was unreadable."""
    read = [one for one in comparisons if one.outcome is not None]
    referenced = sum(bool(record.get("reference")) for record in records)
    lines = [f"{judge}: {len(read)} of {len(comparisons)} comparisons of {len(records)} prompts have a verdict"]
    lines[0] += f"; {referenced} prompts have a reference" if referenced else ""
    for problem, count in Counter(one.problem.partition(":")[0] for one in comparisons if one.problem).most_common():
        lines.append(f"{judge}: {count} comparisons: {problem}")
    asked = [one for one in read if one.problem == "" and one.answers]
    twice = [both for both in combined(asked).values() if len(both) == 2]
    if twice:
        agreed = sum(one == other for one, other in twice)
        lines.append(f"{judge}: both orders agree in {shown_share(agreed, len(twice))} of {len(twice)}")
    decided = [one for one in asked if one.outcome != 0.5]
    if decided:
        first = sum(one.outcome == 1.0 for one in decided)
        lines.append(
            f"{judge}: position: the answer shown first wins {shown_share(first, len(decided))} of {len(decided)} decided"
        )
    groups = [" and ".join(group) for group in linked(list(answers), verdicts(comparisons))]
    if len(groups) > 1:
        lines.append(f"{judge}: no comparison links {'; '.join(groups)}: ratings can be compared only within these")
    lines += length_notes(judge, answers, [one for one in read if one.outcome != 0.5])
    return lines + differences(judge, list(answers), comparisons)


def length_notes(judge: str, answers: dict[str, list[str]], decided: Sequence[Comparison]) -> list[str]:
    """How often the longer answer wins."""
    unequal = [
        (len(answers[one.first][one.prompt]) > len(answers[one.second][one.prompt])) == (one.outcome == 1.0)
        for one in decided
        if len(answers[one.first][one.prompt]) != len(answers[one.second][one.prompt])
    ]
    if not unequal:
        return []
    return [f"{judge}: length: the longer answer wins {shown_share(sum(unequal), len(unequal))} of {len(unequal)} decided"]


def differences(judge: str, systems: Sequence[str], comparisons: Sequence[Comparison]) -> list[str]:
    """In words, for each pair of systems, whether one of them wins more prompts (McNemar's test, without ties)."""
    outcomes = combined(comparisons)
    lines = []
    for one, other in itertools.combinations(systems, 2):
        names = sorted((one, other))
        means = [statistics.fmean(both) for (_, *pair), both in outcomes.items() if pair == names]
        means = [mean if names[0] == one else 1 - mean for mean in means]
        won, lost = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
        if means:
            basis = f"{one}: {won} prompts won, {lost} lost, {len(means) - won - lost} tied"
            lines.append(f"{judge}: {compare_counts(one, other, won, lost, basis)}")
    return lines


def agreement(judges: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """How far each pair of judges agrees if both have a verdict: the share, and Cohen's kappa (1960)."""
    lines = []
    for (one, mine), (other, theirs) in itertools.combinations(judges.items(), 2):
        first, second = (
            {key: decision(statistics.fmean(both)) for key, both in combined(given).items()} for given in (mine, theirs)
        )
        common = sorted(first.keys() & second.keys())
        if not common:
            lines.append(f"{one} and {other}: no comparison in common")
            continue
        pairs = [(first[key], second[key]) for key in common]
        agreed = sum(a == b for a, b in pairs)
        line = f"{one} and {other} agree in {shown_share(agreed, len(pairs))} of {len(pairs)} comparisons"
        kappa = cohen(pairs)
        lines.append(line + (f", Cohen's kappa {kappa:.2f}" if kappa is not None else ""))
    return lines


def decision(mean: float) -> str:
    """A win, a loss or a tie, from the mean over both orders."""
    return "win" if mean > 0.5 else "loss" if mean < 0.5 else "tie"


def cohen(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa of two judges' decisions: agreement beyond chance; None if chance alone gives full agreement."""
    total = len(pairs)
    observed = sum(one == other for one, other in pairs) / total
    ones, others = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    chance = sum(ones[name] * others[name] for name in ones) / total**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def shown_share(count: int, total: int) -> str:
    """A share in percent, with its interval."""
    value, (low, high) = share(count, total)
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def shown(one: Comparison, judge: str) -> str:
    """A verdict in one line."""
    winner = {None: "no verdict", 0.5: "a tie", 1.0: one.first, 0.0: one.second}[one.outcome]
    return f"{judge}: {one.first} before {one.second}: {winner}"


def as_record(one: Comparison, record: Record, judge: str) -> dict[str, Any]:
    """A comparison with its prompt, for a file that people read."""
    asked = {key: record[key] for key in ("category", "instruction", "input", "reference") if record.get(key)}
    return {"judge": judge} | asked | one._asdict() | {"prompt": one.prompt + 1}
