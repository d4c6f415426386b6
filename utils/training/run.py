"""A training run from its first step to the adapter that is kept; a signal ends it with a checkpoint."""

import contextlib
import pickle
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch._dynamo
from transformers import PreTrainedTokenizerBase, TrainingArguments

from utils.adapters import adapters
from utils.console import UserError, is_main_process, leave_terminal, say
from utils.models.tokenizer import save_whole
from utils.training import checkpoints, evaluations
from utils.training.trainer import StepTrainer


def train(trainer: StepTrainer, checkpoint: Path | None) -> None:
    """Train, resuming from `checkpoint` if there is one.

    SIGINT, SIGTERM and SIGHUP (but for those that are ignored, as under nohup) end the run after the current step with
    a checkpoint and exit status 130, 143 or 129; a second one, but for SIGHUP, ends a single process at once. A rank gets
    the same one twice where both Slurm and torchrun pass it on, and its launcher ends it if it takes too long.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == "SIGHUP":
            leave_terminal()
            signal.signal(number, signal.SIG_IGN)  # both the kernel and the shell send it
        elif trainer.stopped_by is not None and trainer.args.world_size == 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        trainer.stopped_by = number
        at_once = "; once more stops at once" if trainer.args.world_size == 1 else ""
        say(f"stopping after this step, with a checkpoint{at_once}")

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        with trainer.returning_loss() as sparse:
            if not sparse:
                say("this model does more than its output layer to its logits: they are computed for all tokens")
            if checkpoint:
                trainer.budget.load(checkpoint, trainer.args.process_index)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise UserError(f"--torch_compile: torch cannot compile the model here: {reason}; train without it") from None
    except pickle.UnpicklingError:
        raise UserError(f"{checkpoint}: refused, because loading a file in it would run code; delete it") from None
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)
        trainer.run_log.close()
        with contextlib.suppress(OSError):
            Path(trainer.args.output_dir).rmdir()  # if it is empty: the run left nothing, not even a line in its log
    if trainer.stopped_by is not None:
        say(f"stopped at step {trainer.state.global_step}; run the same command again to resume")
        sys.exit(128 + trainer.stopped_by)


def finish(trainer: StepTrainer, tokenizer: PreTrainedTokenizerBase, take_best: bool) -> dict[str, Any]:
    """Write the adapter to keep and its tokenizer into the output folder; returns the results of the run.

    With `take_best` it is the adapter of the checkpoint with the best value of the Trainer's metric.
    Raises UserError if nothing was learned.
    """
    state, output_dir = trainer.state, Path(trainer.args.output_dir)
    if is_main_process():  # the only occasion in a run that was killed right after its last checkpoint
        checkpoints.rotate(output_dir, trainer.job.keep, state.best_global_step)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    step = state.best_global_step if take_best else state.global_step
    evaluated: dict[str, float] = {}
    for entry in state.log_history:
        if entry["step"] == step:
            evaluated |= {name: entry[name] for name in (evaluations.LOSS, *evaluations.SCORES) if name in entry}
    if evaluated:
        say(f"kept: the adapter of step {step} of {state.global_step}, {why_kept(trainer.args, take_best, evaluated)}")
    tensors = adapters.read_tensors(output_dir / f"checkpoint-{step}")  # there is one of the last step and one of the best
    if not adapters.has_moved(tensors):
        raise UserError(f"{output_dir}: no lora_B has moved from zero, so nothing was learned; raise --learning_rate")
    if is_main_process():
        config = trainer.accelerator.unwrap_model(trainer.model).peft_config["default"]
        adapters.save(tensors, config, output_dir, trainer.job.base_model)
        save_whole(tokenizer, output_dir)
    return {
        "steps": state.global_step,
        "kept_step": step,
        "train_loss": sum(losses) / len(losses),
        "eval_loss": evaluated.pop(evaluations.LOSS, None),
        **evaluated,
        "trainable_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def why_kept(args: TrainingArguments, take_best: bool, evaluated: dict[str, float]) -> str:
    """In words, why the adapter of a step is kept, and its evaluation results."""
    name = args.metric_for_best_model if take_best else None
    shown = [
        f"{evaluations.SCORES[one]} {value:.1f}" if one in evaluations.SCORES else f"{value:.4f}"
        for one, value in evaluated.items()
    ]
    if name in evaluations.SCORES:
        return f"the first with the highest {name} ({', '.join(shown)})"
    return f"{'the lowest validation loss' if name else 'the last one'} ({', '.join(shown)})"
