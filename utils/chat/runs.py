"""Training runs as the page shows them, read from their logs: the losses, and the progress of running ones."""

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils import lineage
from utils.console import UserError
from utils.training.evaluations import ANSWERS, SCORES
from utils.training.run_log import LOG, PROGRESS

MOST_RUNS, MOST_POINTS = 200, 500
QUIET = 120.0  # seconds, plus ten times the time of a step, without a step: then a run counts as stopped


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: `points` of its curves (step, loss, which); its steps, seconds per step and seconds left, if known.

    `scores`: the newest scores of evaluations, by name; `answers`: questions with their answers at the first and the newest
    evaluation, which came after the steps `answered`.
    """

    points: list[tuple[int, float, str]]
    state: str  # running, stopped or finished
    step: int
    steps: int | None
    pace: float | None
    left: float | None
    loss: float | None
    validation: float | None
    scores: dict[str, float]
    answered: tuple[int, int] | None
    answers: list[tuple[str, str, str]]


def runs_beside(folders: Iterable[Path]) -> dict[str, Path]:
    """The runs in the parent folders of adapters, by name, newest first."""
    parents = {folder.absolute().parent for folder in folders}
    logs = [log for parent in sorted(parents) for log in parent.glob(f"*/{LOG}")]
    logs.sort(key=lambda log: log.stat().st_mtime, reverse=True)
    found: dict[str, Path] = {}
    for log in logs[:MOST_RUNS]:
        name = log.parent.name if log.parent.name not in found else str(log.parent)
        found[name] = log.parent
    return found


def read_run(folder: Path) -> Run:
    """The current state of a run, from its files; a half-written line is ignored."""
    entries = [entry for line in lines_of(folder / LOG) if (entry := parsed(line))]
    kinds = (("loss", "training"), ("eval_loss", "validation"))
    curves = {kind: [(entry["step"], entry[key]) for entry in entries if key in entry] for key, kind in kinds}
    points = [(step, loss, kind) for kind, curve in curves.items() for step, loss in thinned(curve)]
    step = max((entry["step"] for entry in entries), default=0)
    last = {kind: curve[-1][1] if curve else None for kind, curve in curves.items()}
    state, steps, pace, left = progress_of(folder, step)
    scores = {SCORES[name]: entry[name] for entry in entries for name in SCORES if name in entry}
    answered, answers = answers_of(entries)
    return Run(points, state, step, steps, pace, left, last["training"], last["validation"], scores, answered, answers)


def answers_of(entries: list[dict[str, Any]]) -> tuple[tuple[int, int] | None, list[tuple[str, str, str]]]:
    """The steps of the first and newest evaluations with answers, and each prompt's question, first and newest answer."""
    found = [entry for entry in entries if ANSWERS in entry]
    if not found:
        return None, []
    pairs = zip(found[0][ANSWERS], found[-1][ANSWERS], strict=False)
    return (found[0]["step"], found[-1]["step"]), [(one["question"], one["answer"], new["answer"]) for one, new in pairs]


def progress_of(folder: Path, step: int) -> tuple[str, int | None, float | None, float | None]:
    """State, number of steps, seconds per step and seconds left of a run that is at `step`."""
    progress = parsed("".join(lines_of(folder / PROGRESS)))
    if progress:
        done = progress["step"] - progress["first"]
        pace = progress["seconds"] / done if done else None
        quiet = time.time() - (folder / PROGRESS).stat().st_mtime
        if quiet <= QUIET + 10 * (pace or 0):
            return "running", progress["steps"], pace, pace and pace * (progress["steps"] - progress["step"])
        return "stopped", progress["steps"], pace, None
    try:
        known = lineage.read(folder)
    except UserError:
        known = None
    if known is None:
        return "stopped", None, None, None
    seconds = (known.get("time") or {}).get("seconds")
    return "finished", step, seconds / step if seconds and step else None, None


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve with few enough points for a browser, always including the last."""
    every = max(1, -(-len(curve) // MOST_POINTS))
    return curve[::-1][::every][::-1]


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def parsed(line: str) -> dict[str, Any] | None:
    """A line of JSON as an object, if it is one."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
