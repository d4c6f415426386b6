"""What the model answers during training, and how well: at each evaluation, on the first rank."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from utils.console import say
from utils.training import trackers

ANSWERS = "answers"  # the entry of the log that holds them
LOSS = "eval_loss"
SCORES = {"eval_choices": "right choices (%)", "eval_chrf": "chrF", "eval_exact": "exact numbers (%)"}


class Evaluated(NamedTuple):
    """Results of an evaluation: `scores` by their names in the log (each 0 to 100), `answers` as `{"question", "answer"}`,
    and `notes`, lines to print."""

    scores: dict[str, float]
    answers: list[dict[str, str]]
    notes: list[str]


Evaluator = Callable[[PreTrainedModel], Evaluated]  # the script supplies that of `utils.evaluation.during_training`


def evaluate_answers(trainer: Any, evaluator: Evaluator) -> dict[str, float]:
    """Have the first rank of a `StepTrainer` evaluate while the others wait; returns the scores on all ranks, and logs the
    answers."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if trainer.is_world_process_zero():
        with trainer.accelerator.autocast():
            found = [evaluator(trainer.accelerator.unwrap_model(trainer.model).get_base_model())]
    if trainer.args.world_size > 1:
        broadcast_object_list(found)
    evaluated: Evaluated = found[0]
    say("\n".join(f"step {trainer.state.global_step}: {note}" for note in evaluated.notes))
    if evaluated.answers:
        trainer.state.log_history.append({"step": trainer.state.global_step, ANSWERS: evaluated.answers})
        trainer.run_log.add_newest(trainer.state)
        if trainer.is_world_process_zero():
            trackers.show_answers(trainer, evaluated.answers)
    return evaluated.scores
