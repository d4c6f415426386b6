"""The Trainer: whole optimizer steps as units, a loss that is right whatever the micro-batches, checkpoints that last."""

import contextlib
import dataclasses
import pickle
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import DistributedType
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from utils import adapters, checkpoints
from utils.batching import MicroBatch, Plan, Steps, deal, pad
from utils.console import UserError, is_main_process, reason, say
from utils.dataset import Encoded
from utils.loss import returning_loss
from utils.modeling import wants_fsdp
from utils.runlog import RunLog
from utils.tokenizer import save_whole


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run is, beside the Trainer's own arguments.

    `base_model` is recorded in the adapter; `run` is what a checkpoint must have in common with a command that goes
    on with it; evaluation comes every `eval_steps` steps; `keep` checkpoints stay.
    """

    plan: Plan
    base_model: str
    run: dict[str, Any]
    eval_steps: int
    keep: int


class PaddedBatches(torch.utils.data.Dataset):
    """A data set whose items are padded micro-batches, asked for by their record numbers."""

    def __init__(self, records: Encoded, pad_to: int):
        self.records = records
        self.pad_to = pad_to

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        tensors = pad([self.records[number] for number in micro_batch.records], self.pad_to)
        return tensors | {"records": micro_batch.records, "supervised": micro_batch.supervised}


class StepLoader(DataLoader):
    """A DataLoader that passes the epoch on to its batch sampler, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class StepTrainer(Trainer):
    """A Trainer whose data loader gives one optimizer step an item: its micro-batches, as a list.

    The loss of a step is the mean over its supervised tokens, over all micro-batches and processes.
    """

    def __init__(self, model: PeftModel, args: TrainingArguments, job: Job, train: Encoded, validation: Encoded | None):
        self.run_log = RunLog(args.output_dir)
        super().__init__(model, args, train_dataset=train, eval_dataset=validation, callbacks=[self.run_log])
        if wants_fsdp() and self.accelerator.distributed_type != DistributedType.FSDP:
            raise UserError(
                f"FSDP was asked for, but accelerate would run {self.accelerator.distributed_type.value} here; "
                "FSDP needs CUDA GPUs: use another accelerate configuration on this machine"
            )
        self.remove_callback(PrinterCallback)  # the bar and the log of RunLog stand in for it
        self.job = job
        self.stopped_by: int | None = None
        self.add_callback(Flow(self))

    def get_train_dataloader(self) -> DataLoader:
        """Optimizer steps, each a list of `{"input_ids", "labels", "records", "supervised"}`."""
        return StepLoader(
            PaddedBatches(self.train_dataset, self.job.plan.pad_to),
            batch_sampler=Steps(self.train_dataset.lengths, self.train_dataset.supervised, self.job.plan),
            collate_fn=list,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(self.args.seed),  # loading draws none of dropout's random numbers
        )

    def _run_epoch(self, **epoch: Any) -> None:
        """Not one step more: the library (5.23) takes one where a run goes on from its last step amid an epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**epoch)

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward through the micro-batches of one step; processes exchange gradients at the last one.

        Raises UserError, naming step and records, where the loss is not finite.
        """
        model.train()
        *early, last = inputs
        losses = []
        for batch in early:
            with self.accelerator.no_sync(model):
                losses.append(self.forward_backward(model, batch))
        losses.append(self.forward_backward(model, last))
        finite = torch.isfinite(torch.stack(losses))
        if not finite.all():
            bad = [record for batch, ok in zip(inputs, finite.tolist(), strict=True) if not ok for record in batch["records"]]
            numbers = ", ".join(str(self.train_dataset.numbers[record]) for record in sorted(bad))
            way_out = (
                "lower --learning_rate"
                if self.state.global_step
                else "check the weights of the model, which were not trained yet"
            )
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is not finite in the micro-batches of records {numbers} "
                f"(counted from 0 over --data_path); look at these, or {way_out}"
            )
        return torch.stack(losses).sum()

    def forward_backward(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """One micro-batch's share of the step's loss; DDP averages gradients, so it is scaled by the processes."""
        tensors = self._prepare_inputs({"input_ids": batch["input_ids"], "labels": batch["labels"]})
        loss = model(**tensors) * (self.args.world_size / batch["supervised"])
        self.accelerator.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation set, logged as `eval_loss`."""
        data, plan = self.eval_dataset, self.job.plan
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        model.eval()
        batches = deal(range(len(data)), data.lengths, plan.micro_batch_tokens)
        batches += [[]] * (-len(batches) % plan.processes)  # as many for each process
        total = torch.zeros((), device=self.args.device)
        for numbers in batches[plan.process :: plan.processes]:
            total += model(**self._prepare_inputs(pad([data[number] for number in numbers], plan.pad_to)))
        metrics = {"eval_loss": self.accelerator.reduce(total, "sum").item() / sum(data.supervised)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's formula knows neither LoRA nor left-out logits."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter, and read it back."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder = output_dir or self.args.output_dir
            adapters.save(adapters.state(model, state_dict), model.peft_config["default"], folder, self.job.base_model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, seal it when it is whole, and only then delete older ones.

        Raises UserError where it cannot be written; older checkpoints stay.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if is_main_process():
                checkpoints.seal(folder, self.job.run)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            older = checkpoints.in_order(self.args.output_dir)
            way_out = (
                f"free some space and run the same command again: it goes on from {older[-1]}" if older else "free some space"
            )
            raise UserError(f"{folder}: could not be written ({reason(error)}); {way_out}") from error
        if is_main_process():
            checkpoints.rotate(self.args.output_dir, self.job.keep, self.state.best_global_step)


class Flow(TrainerCallback):
    """When to evaluate, to save and to stop: at the chosen steps, at each epoch's end, and when a signal asks for it."""

    def __init__(self, trainer: StepTrainer):
        self.trainer = trainer
        self.evaluates = trainer.eval_dataset is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide after each optimizer step."""
        steps_per_epoch = len(self.trainer.callback_handler.train_dataloader)
        last = state.global_step % steps_per_epoch == 0 or state.global_step == state.max_steps
        control.should_evaluate = self.evaluates and (last or state.global_step % self.trainer.job.eval_steps == 0)
        control.should_save = control.should_save or last
        if self.is_asked_to_stop():
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """The best adapter so far is always on the disk."""
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            control.should_save = True

    def is_asked_to_stop(self) -> bool:
        """True in all processes as soon as one of them got a signal."""
        number = torch.tensor(self.trainer.stopped_by or 0, device=self.trainer.args.device)
        if self.trainer.args.world_size > 1:
            number = self.trainer.accelerator.gather(number).max()
        self.trainer.stopped_by = int(number) or None
        return self.trainer.stopped_by is not None


def train(trainer: StepTrainer, checkpoint: Path | None) -> None:
    """Train, from `checkpoint` on where there is one.

    SIGINT and SIGTERM end the run after the current step with a checkpoint and exit status 130 or 143; a second one
    ends it at once.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if trainer.stopped_by is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        trainer.stopped_by = number
        say("stopping after this step, with a checkpoint; once more stops at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with returning_loss(trainer.model.get_base_model()) as sparse:
            if not sparse:
                say("this model does more than its output layer to its logits: they are computed for all tokens")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except pickle.UnpicklingError:
        raise UserError(f"{checkpoint}: refused, a file in it asks for code to be run on loading; delete it") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.run_log.close()
        with contextlib.suppress(OSError):
            Path(trainer.args.output_dir).rmdir()  # where nothing came of the run, not even a line in its log
    if trainer.stopped_by is not None:
        say(f"stopped at step {trainer.state.global_step}; run the same command again to go on")
        sys.exit(128 + trainer.stopped_by)


def finish(trainer: StepTrainer, tokenizer: PreTrainedTokenizerBase, take_best: bool) -> dict[str, Any]:
    """Choose the adapter to keep, write it with its tokenizer into the output folder; returns what came of the run.

    With `take_best` it is that of the checkpoint with the lowest validation loss.
    Raises UserError where nothing was learned.
    """
    state, output_dir = trainer.state, Path(trainer.args.output_dir)
    if is_main_process():  # a run that was killed between its last checkpoint and this has no other occasion
        checkpoints.rotate(output_dir, trainer.job.keep, state.best_global_step)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluations = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    step = state.best_global_step if take_best else state.global_step
    if evaluations:
        why = "the lowest validation loss" if take_best else "the last one"
        say(f"kept: the adapter of step {step} of {state.global_step}, {why} ({evaluations[step]:.4f})")
    tensors = adapters.read_tensors(output_dir / f"checkpoint-{step}")  # there is one at the end, and one of the best step
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
        "eval_loss": evaluations.get(step),
        "trainable_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
