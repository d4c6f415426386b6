"""What a model is asked at each evaluation during training: a few prompts, and multiple-choice questions."""

import dataclasses
from pathlib import Path
from typing import Any

from utils.console import UserError
from utils.datasets.choices import Choice, read_choices
from utils.datasets.final_numbers import NUMBER
from utils.datasets.prompts import Record, prompt_files, read_prompts
from utils.files import sha256


@dataclasses.dataclass(frozen=True)
class TrainingQuestions:
    """The prompts and the multiple-choice questions in `files`."""

    prompts: list[Record]
    questions: list[Choice]
    files: list[Path]

    def __bool__(self) -> bool:
        """True if there is anything to ask."""
        return bool(self.prompts or self.questions)

    def scores(self) -> list[str]:
        """The names of the scores available: those of answers only if each prompt has a reference."""
        references = [reference_of(record) for record in self.prompts]
        found = ["eval_choices"] if self.questions else []
        if references and all(references):
            found += ["eval_chrf"] + (["eval_exact"] if all(NUMBER.fullmatch(text) for text in references) else [])
        return found

    def hashes(self) -> dict[str, str]:
        """The hash of each file, by its name."""
        return {str(file): sha256(file) for file in self.files}


def read(options: Any) -> TrainingQuestions:
    """The questions that the options of finetune.py name. Raises UserError if a file cannot be read or holds nothing to ask,
    or the best adapter cannot be chosen by them."""
    prompts = read_prompts([options.eval_answers]) if options.eval_answers else []
    questions = read_choices([options.eval_choices], "--eval_choices") if options.eval_choices else []
    found = TrainingQuestions(prompts, questions, prompt_files(filter(None, (options.eval_answers, options.eval_choices))))
    best_metric(options.metric_for_best_model, found, bool(options.val_set_size))
    if options.metric_for_best_model and not options.load_best_model_at_end:
        raise UserError(
            "--metric_for_best_model: chooses the best adapter, but --load_best_model_at_end is False; give only one"
        )
    return found


def reference_of(record: Record) -> str:
    """The expected answer to a prompt; "" if unknown."""
    return record.get("reference") or record.get("output") or ""


def best_metric(wanted: str, questions: TrainingQuestions, validates: bool) -> str:
    """The name in the log of the metric that chooses the best adapter; "" if none is measured.

    `wanted` is a name with or without `eval_`, or "". Raises UserError if it is not measured.
    """
    measured = [*(["eval_loss"] if validates else []), *questions.scores()]
    if not wanted:
        return "eval_loss" if validates else ""
    name = f"eval_{wanted.removeprefix('eval_')}"
    needs = {
        "eval_loss": "a validation set (--val_set_size)",
        "eval_choices": "--eval_choices",
        "eval_chrf": "--eval_answers, with an output for each of its prompts",
        "eval_exact": "--eval_answers, with a number as output for each of its prompts",
    }
    if name not in needs:
        raise UserError(f"--metric_for_best_model {wanted}: unknown; give loss, choices, chrf or exact")
    if name not in measured:
        raise UserError(f"--metric_for_best_model {wanted}: needs {needs[name]}; give that, or leave it out")
    return name
