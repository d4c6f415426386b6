"""Trackers that a run can be logged to, too: TensorBoard, Weights & Biases, SwanLab and MLflow."""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from utils.console import UserError, is_main_process, reason

if TYPE_CHECKING:
    from transformers import Trainer

NAMES = ("tensorboard", "wandb", "swanlab", "mlflow")  # each is the name of its package, too
OFFLINE = {
    "tensorboard": "check the disk",
    "wandb": "log in, or set WANDB_MODE=offline",
    "swanlab": "log in, or set SWANLAB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI, such as a folder",
}
ANSWERS = "eval/answers"  # what the answers of an evaluation are called there
Options = Any  # finetune.Options; modules import no scripts
Answers = list[dict[str, str]]


def wanted(options: Options) -> list[str]:
    """The trackers that are asked for: by --report_to, or, as of old, by naming a project of Weights & Biases."""
    named = [name for name in options.report_to if name != "none"]
    wandb = ["wandb"] if options.wandb_project or os.environ.get("WANDB_PROJECT") else []
    return list(dict.fromkeys(named + wandb))


def check(options: Options) -> None:
    """Raises UserError if a tracker is unknown, or its package is not installed."""
    for name in wanted(options):
        asked = f"--report_to {name}" if name in options.report_to else "--wandb_project (or WANDB_PROJECT)"
        if name not in NAMES:
            raise UserError(f"{asked}: unknown; give {', '.join(NAMES)} or none")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{asked}: the {name} package is not installed; pip install {name}, or leave it out")


def start(options: Options) -> None:
    """Have the trackers begin a run, on the first rank. Raises UserError if one of them cannot, with what it says."""
    if not is_main_process():
        return
    pass_on(options)
    for name in wanted(options):
        try:
            begin(name, options.wandb_run_name or None)
        except Exception as error:  # each library has its own, for no login, no network, no room
            raise UserError(
                f"--report_to {name}: could not start a run ({reason(error)}); {OFFLINE[name]}, or leave it out"
            ) from None


def begin(name: str, run_name: str | None) -> None:
    """Begin a run of one tracker, where the Trainer's own way would be too late or not work."""
    if name == "wandb":
        import wandb

        wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), name=run_name)
    elif name == "swanlab":
        import swanlab

        swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), experiment_name=run_name)
    elif name == "mlflow":
        import mlflow

        mlflow.search_experiments(max_results=1)  # the Trainer begins the run, once it is known that there is a store


def pass_on(options: Options) -> None:
    """Put the options that wandb reads from the environment there."""
    for name in ("project", "watch", "log_model"):
        if value := getattr(options, f"wandb_{name}"):
            os.environ[f"WANDB_{name.upper()}"] = value


def show_answers(trainer: "Trainer", answers: Answers) -> None:
    """Show the answers of an evaluation in each tracker of this run: as a table, or where there are none as text."""
    step, names = trainer.state.global_step, trainer.args.report_to
    rows = [[one["question"], one["answer"]] for one in answers]
    if "tensorboard" in names:
        from transformers.integrations import TensorBoardCallback

        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(ANSWERS, markdown(rows), step)
    if "wandb" in names:
        import wandb

        table = wandb.Table(columns=["question", "answer"], data=rows)
        wandb.log({ANSWERS: table, "train/global_step": step})
    if "swanlab" in names:
        import swanlab

        texts = [swanlab.Text(answer, caption=question) for question, answer in rows]
        swanlab.log({ANSWERS: texts}, step=step)
    if "mlflow" in names:
        import mlflow

        mlflow.log_text(markdown(rows), f"answers/step-{step}.md")


def markdown(rows: list[list[str]]) -> str:
    """Questions and answers as a table in Markdown."""
    lines = [["question", "answer"], ["---", "---"], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in row) + " |" for row in lines)
