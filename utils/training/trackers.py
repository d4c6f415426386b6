"""Trackers that a run can also be logged to: TensorBoard, Weights & Biases, SwanLab and MLflow."""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from utils.console import UserError, is_main_process, reason

if TYPE_CHECKING:
    from transformers import Trainer

NAMES = ("tensorboard", "wandb", "swanlab", "mlflow")  # each is also the name of its package
OFFLINE = {
    "tensorboard": "check the disk",
    "wandb": "log in, or set WANDB_MODE=offline",
    "swanlab": "log in, or set SWANLAB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI, such as a folder",
}
ANSWERS = "eval/answers"  # the name under which trackers show the answers of an evaluation
Options = Any  # finetune.Options; modules import no scripts
Answers = list[dict[str, str]]


def wanted(options: Options) -> list[str]:
    """The trackers asked for: by --report_to or, as in older versions, by naming a Weights & Biases project."""
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
    """Have the trackers begin a run, on the first rank. Raises UserError with a tracker's own message if it cannot."""
    if not is_main_process():
        return
    pass_on(options)
    for name in wanted(options):
        try:
            begin(name, options.wandb_run_name or None)
        except Exception as error:  # each library has its own for a missing login, network or disk space
            raise UserError(
                f"--report_to {name}: could not start a run ({reason(error)}); {OFFLINE[name]}, or leave it out"
            ) from None


def begin(name: str, run_name: str | None) -> None:
    """Begin a run of one tracker, if the Trainer would do so too late or not at all."""
    if name == "wandb":
        import wandb

        wandb.init(project=os.environ.get("WANDB_PROJECT", "huggingface"), name=run_name)
    elif name == "swanlab":
        import swanlab

        swanlab.init(project=os.environ.get("SWANLAB_PROJECT"), experiment_name=run_name)
    elif name == "mlflow":
        import mlflow

        mlflow.search_experiments(max_results=1)  # fails if there is no store; the Trainer begins the run


def pass_on(options: Options) -> None:
    """Put the options for wandb into the environment, where it reads them."""
    for name in ("project", "watch", "log_model"):
        if value := getattr(options, f"wandb_{name}"):
            os.environ[f"WANDB_{name.upper()}"] = value


def show_answers(trainer: "Trainer", answers: Answers) -> None:
    """Show the answers of an evaluation in each tracker of this run: as a table, or as text if it has no tables."""
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
    """Questions and answers as a Markdown table."""
    lines = [["question", "answer"], ["---", "---"], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in row) + " |" for row in lines)
