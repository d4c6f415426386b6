"""What a run leaves for people to read: the log as JSON lines, and its loss curves."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from utils.console import is_main_process, progress, say
from utils.files import replacing
from utils.training.evaluations import SCORES

LOG, PLOT = "train_log.jsonl", "loss.png"
PANELS = {  # what is drawn together, if it is logged
    "loss": ("loss", "eval_loss"),
    "reward": ("reward", "eval_reward", "reward_chosen", "reward_rejected", "reward_margin"),
    "accuracy": ("reward_accuracy",),
    "score": tuple(SCORES),
}
CURVES = {"loss": "training", "eval_loss": "validation", "reward": "training", "eval_reward": "validation", **SCORES}
PROGRESS = ".progress.json"  # beside the log during the run: its first, current and last step, and its seconds so far


class RunLog(TrainerCallback):
    """Writes `train_log.jsonl` during the run, and `loss.png` at each evaluation and at the end.

    The log is the Trainer's own history, so after a resume it is that of an undisturbed run.
    """

    def __init__(self, output_dir: str):
        self.folder = Path(output_dir)
        self.bar: Any = None
        self.first, self.began = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write what the resumed checkpoint, if any, has logged, and show the progress so far."""
        self.bar = progress(total=state.max_steps, initial=state.global_step, desc="training", unit="step")
        self.first, self.began = state.global_step, time.time()
        if is_main_process():
            (self.folder / LOG).unlink(missing_ok=True)
            self.add(entry for entry in state.log_history if "train_runtime" not in entry)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the newest entry."""
        if "loss" in state.log_history[-1]:
            self.bar.set_postfix(loss=f"{state.log_history[-1]['loss']:.4f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        if "train_runtime" not in state.log_history[-1]:
            self.add_newest(state)

    def add_newest(self, state: TrainerState) -> None:
        """Add the history's newest entry, and record the progress."""
        if is_main_process():
            self.add([state.log_history[-1]])
            steps = {"first": self.first, "step": state.global_step, "steps": state.max_steps}
            text = json.dumps(steps | {"seconds": round(time.time() - self.began, 1)})
            (self.folder / PROGRESS).write_text(text, "utf-8")  # not synced, since nobody needs it after the run

    def close(self) -> None:
        """Close the progress bar, however the run ended."""
        if is_main_process():
            (self.folder / PROGRESS).unlink(missing_ok=True)
        if self.bar is not None:
            self.bar.close()

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append entries to the log, whose file is created with the first."""
        lines = [line(entry) for entry in entries]
        if lines:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.writelines(lines)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Draw the curves so far."""
        kind = "reward" if "eval_reward" in metrics else "loss"
        if f"eval_{kind}" in metrics:
            say(f"step {state.global_step} of {state.max_steps}: validation {kind} {metrics[f'eval_{kind}']:.4f}")
        if is_main_process():
            plot(state.log_history, self.folder / PLOT)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the curves of the whole run."""
        if is_main_process():
            plot(state.log_history, self.folder / PLOT)


def line(entry: dict[str, Any]) -> str:
    """One entry of the history as a line of JSON."""
    return json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n"


def curve(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity in the Trainer's history."""
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """Plot the losses over the optimizer steps, and below them rewards, accuracy and scores if any, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {title: found for title, names in PANELS.items() if (found := [name for name in names if curve(history, name)[0]])}
    figure = Figure(figsize=(7, 1 + 3 * len(panels)), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name in names:
            dots = {"marker": "o", "markersize": 4} if name.startswith("eval_") else {"linewidth": 1}
            axes.plot(*curve(history, name), label=CURVES.get(name, name), **dots)
        axes.set(xlabel="optimizer step", ylabel=title)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as aside:
        FigureCanvasAgg(figure).print_png(str(aside))
