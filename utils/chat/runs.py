"""Training runs as the page shows them, read from their logs: the losses, and how far a run is that goes on."""

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
QUIET = 120.0  # seconds without a step, and ten times what one took: then a run is taken for stopped


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: `points` of its curves (step, loss, which); its steps, seconds a step and seconds left, where these are known.

    `scores`: the newest ones of answers at evaluations, by name; `answers`: question, first answer and newest one, of the
    evaluations after the steps `answered`.
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
    """The runs in the folders that adapters stand in, by name, the newest first."""
    parents = {folder.absolute().parent for folder in folders}
    logs = [log for parent in sorted(parents) for log in parent.glob(f"*/{LOG}")]
    logs.sort(key=lambda log: log.stat().st_mtime, reverse=True)
    found: dict[str, Path] = {}
    for log in logs[:MOST_RUNS]:
        name = log.parent.name if log.parent.name not in found else str(log.parent)
        found[name] = log.parent
    return found


def read_run(folder: Path) -> Run:
    """What the files of a run say at the moment; half a line that is being written is left out."""
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
    """The steps of the first and the newest evaluation with answers, and question, first and newest answer of each prompt."""
    found = [entry for entry in entries if ANSWERS in entry]
    if not found:
        return None, []
    pairs = zip(found[0][ANSWERS], found[-1][ANSWERS], strict=False)
    return (found[0]["step"], found[-1]["step"]), [(one["question"], one["answer"], new["answer"]) for one, new in pairs]


def progress_of(folder: Path, step: int) -> tuple[str, int | None, float | None, float | None]:
    """State, all steps, seconds a step and seconds left of a run that is at `step`."""
    going = parsed("".join(lines_of(folder / PROGRESS)))
    if going:
        done = going["step"] - going["first"]
        pace = going["seconds"] / done if done else None
        quiet = time.time() - (folder / PROGRESS).stat().st_mtime
        if quiet <= QUIET + 10 * (pace or 0):
            return "running", going["steps"], pace, pace and pace * (going["steps"] - going["step"])
        return "stopped", going["steps"], pace, None
    try:
        known = lineage.read(folder)
    except UserError:
        known = None
    if known is None:
        return "stopped", None, None, None
    seconds = (known.get("time") or {}).get("seconds")
    return "finished", step, seconds / step if seconds and step else None, None


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve with so few points that a browser draws it at once, the last one always among them."""
    every = max(1, -(-len(curve) // MOST_POINTS))
    return curve[::-1][::every][::-1]


def lines_of(path: Path) -> list[str]:
    """The lines of a file, none where it cannot be read."""
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
