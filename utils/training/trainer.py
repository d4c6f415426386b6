"""The Trainer: whole optimizer steps as units, a loss independent of the micro-batches, checkpoints that are verified."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import DistributedType
from peft import PeftModel
from safetensors import SafetensorError
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from utils.adapters import adapters
from utils.console import UserError, is_main_process, is_out_of_memory, reason, say
from utils.datasets.dataset import EncodedDataset
from utils.models.sharding import wants_fsdp
from utils.training import checkpoints, evaluations
from utils.training.batching import BatchConfig, MicroBatch, StepBatchSampler, pack_micro_batches, pad
from utils.training.budget import Budget
from utils.training.loss import returning_loss
from utils.training.run_log import RunLog

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What defines a run besides the Trainer's own arguments.

    `base_model` is recorded in the adapter; `run` is what a checkpoint must have in common with the command that resumes
    it; every `eval_steps` steps the validation loss is computed and the `evaluator`, if any, called; `keep` checkpoints
    are kept.
    """

    plan: BatchConfig
    base_model: str
    run: dict[str, Any]
    eval_steps: int
    keep: int
    evaluator: evaluations.Evaluator | None = None


class PaddedBatches(torch.utils.data.Dataset):
    """A dataset whose items are padded micro-batches, indexed by record numbers."""

    def __init__(self, records: EncodedDataset, pad_to: int):
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
    """A Trainer whose data loader yields one optimizer step per item: its micro-batches, as a list.

    The loss of a step is the mean over its supervised tokens, over all micro-batches and ranks. A rank that runs out of
    memory repeats its part of the step with smaller micro-batches; the other ranks need not know.
    """

    repeats_alone = True  # whether a rank can repeat its part of a step without the others

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        job: RunConfig,
        train: EncodedDataset,
        validation: EncodedDataset | None,
    ):
        self.run_log = RunLog(args.output_dir)
        super().__init__(model, args, train_dataset=train, eval_dataset=validation, callbacks=[self.run_log])
        if wants_fsdp() and self.accelerator.distributed_type != DistributedType.FSDP:
            raise UserError(
                f"FSDP was asked for, but accelerate would run {self.accelerator.distributed_type.value} here; "
                "FSDP needs CUDA GPUs: use another accelerate configuration on this machine"
            )
        self.remove_callback(PrinterCallback)  # RunLog's progress bar and log replace it
        self.job = job
        self.stopped_by: int | None = None
        self.budget = Budget(job.plan.micro_batch_tokens)
        self.computing = (0, 0)  # records, and their padded length, of the micro-batch being computed
        self.failure = ""  # what kept this rank from computing its part of a step
        self.step_records: list[list[int]] = []  # of each micro-batch of the step; below: their losses and the gradient norm
        self.step_losses = self.gradient_norm = torch.zeros(0)
        self.add_callback(StepCallback(self))

    def get_train_dataloader(self) -> DataLoader:
        """Optimizer steps, each a list of `{"input_ids", "labels", "records", "supervised"}`."""
        return StepLoader(
            PaddedBatches(self.train_dataset, self.job.plan.pad_to),
            batch_sampler=StepBatchSampler(self.train_dataset.lengths, self.train_dataset.supervised, self.job.plan),
            collate_fn=list,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",  # so that copies to the GPU are asynchronous
            generator=torch.Generator().manual_seed(self.args.seed),  # keeps loading apart from dropout's random numbers
        )

    def _run_epoch(self, **epoch: Any) -> None:
        """Work around transformers 5.23, which runs one extra step when resuming from the final step mid-epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**epoch)

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward pass over the micro-batches of one step; the ranks then average their gradients."""
        model.train()
        try:
            self.step_records, losses = self.until_it_fits(lambda: self.compute_step(model, inputs))
        except UserError as error:
            if self.args.world_size == 1:
                raise
            self.failure, losses = str(error), [torch.zeros((), device=self.args.device)]  # check_step tells the others
            model.zero_grad()
        if self.args.world_size > 1 and not self.is_fsdp_enabled:
            self.average_gradients()
        self.step_losses = torch.stack(losses)
        return self.step_losses.sum()

    def compute_step(self, model: nn.Module, inputs: list[dict[str, Any]]) -> tuple[list[list[int]], list[torch.Tensor]]:
        """One attempt at this rank's part of a step: the records of its micro-batches, and their losses."""
        if self.budget.is_reduced:
            inputs = self.repacked(inputs)
        losses = []
        for number, batch in enumerate(self.completed(inputs), 1):
            is_early = self.is_fsdp_enabled and number < len(inputs)
            with self.accelerator.no_sync(model) if is_early else contextlib.nullcontext():
                losses.append(self.forward_backward(model if self.is_fsdp_enabled else self.model, batch))
        return [batch["records"] for batch in inputs], losses

    def repacked(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records of a step's micro-batches, packed again within the current budget."""
        records, supervised = [record for batch in inputs for record in batch["records"]], inputs[0]["supervised"]
        padded = PaddedBatches(self.train_dataset, self.job.plan.pad_to)
        return [padded[MicroBatch(part, supervised)] for part in self.budget.pack(records, self.train_dataset.lengths)]

    def until_it_fits(self, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, which is repeated with half as much at once if it runs out of memory; that is printed.

        Raises UserError if a single record does not fit in memory.
        """
        restore = self.snapshot()
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                alone = self.args.world_size == 1 or (self.repeats_alone and not self.is_fsdp_enabled)
                if not alone or not is_out_of_memory(error):
                    raise
            say(self.budget.reduce(*self.computing))  # here, since the error and the tensors it held are gone by now
            restore()

    def snapshot(self) -> Callable[[], None]:
        """A function that restores the state of now, before a step or an evaluation: gradients and random numbers."""
        cuda = self.args.device.type == "cuda"
        cpu_state, cuda_state = torch.get_rng_state(), torch.cuda.get_rng_state(self.args.device) if cuda else None

        def restore() -> None:
            self.model.zero_grad()
            torch.set_rng_state(cpu_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, self.args.device)
                torch.cuda.empty_cache()

        return restore

    def average_gradients(self) -> None:
        """Give all ranks the mean of their gradients, once each has computed its part of the step."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for work in [distributed.all_reduce(parameter.grad, async_op=True) for parameter in trained]:
            work.wait()
        for parameter in trained:
            parameter.grad /= self.args.world_size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Keep the norm for `check_step`; for a sharded model it is gathered from the ranks."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self.gradient_norm

    def check_step(self) -> None:
        """Check a step's losses and gradient; this is the only place where a step waits for the device.

        A signal that one rank received is passed on to all. Raises UserError if a loss is not finite, naming step and
        records, or if the gradient is exactly zero.
        """
        norm = torch.as_tensor(self.gradient_norm, device=self.args.device)
        results = torch.cat([self.step_losses.float(), norm.reshape(1).float()])
        if self.args.world_size > 1:
            signals = torch.tensor([[self.stopped_by or 0, bool(self.failure)]], device=self.args.device)
            *losses, norm, number, failed = torch.cat([results, self.accelerator.gather(signals).amax(0)]).tolist()
            self.stopped_by = int(number) or None
            if failed:
                raise UserError(self.failure or "another rank has run out of memory with a single record")
        else:
            *losses, norm = results.tolist()
        bad = [
            record
            for records, loss in zip(self.step_records, losses, strict=True)
            if not math.isfinite(loss)
            for record in records
        ]
        step = self.state.global_step
        if bad:
            numbers = ", ".join(str(self.train_dataset.numbers[record]) for record in sorted(bad))
            fix = "lower --learning_rate" if step > 1 else "check the model's weights, which have not been trained yet"
            raise UserError(
                f"step {step}: the loss is not finite in the micro-batches of records {numbers} "
                f"(counted from 0 over --data_path); look at these, or {fix}"
            )
        if norm == 0:
            raise UserError(
                f"step {step}: the gradient is exactly zero, so nothing is learned; "
                "train other layers (--lora_target_modules), or in another --dtype or quantization"
            )

    def returning_loss(self) -> contextlib.AbstractContextManager[bool]:
        """While the block runs, the model returns the loss of the records it is called with."""
        return returning_loss(self.model.get_base_model(), self.accelerator.autocast(), self.is_fsdp_enabled)

    def forward_backward(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """One micro-batch's share of the step's loss, scaled by the number of ranks, whose gradients are averaged."""
        self.computing = len(batch["records"]), batch["input_ids"].shape[1]
        loss = model(**self.on_device(batch)).to(self.args.device) * (self.args.world_size / batch["supervised"])
        self.accelerator.backward(loss)
        return loss.detach()

    def completed(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Micro-batches of a step or of the validation set, completed with what depends on all of them (here: nothing)."""
        return batches

    def on_device(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A micro-batch's tensors, on the device or on their way there."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in tensors.items()}

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Results of the validation set and the evaluator, if any, logged under names that begin with `eval_`."""
        metrics = self.validate() if self.eval_dataset is not None else {}
        if self.job.evaluator:
            metrics |= evaluations.evaluate_answers(self, self.job.evaluator)
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validate(self) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation set."""
        data, plan = self.eval_dataset, self.job.plan
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        model.eval()
        batches = pack_micro_batches(range(len(data)), data.lengths, plan.micro_batch_tokens)
        batches += [[]] * (-len(batches) % plan.world_size)  # as many for each rank
        mine = batches[plan.rank :: plan.world_size]
        total = self.until_it_fits(lambda: self.sum_of_losses(model, data, mine))
        return {"eval_loss": self.accelerator.reduce(total, "sum").item() / sum(data.supervised)}

    def sum_of_losses(self, model: nn.Module, data: EncodedDataset, batches: list[list[int]]) -> torch.Tensor:
        """One attempt at summing the losses of the records whose numbers the micro-batches list."""
        if self.budget.is_reduced:
            batches = [part for batch in batches for part in self.budget.pack(batch, data.lengths)]
        total = torch.zeros((), device=self.args.device)
        padded = [pad([data[number] for number in numbers], self.job.plan.pad_to) for numbers in batches]
        for numbers, batch in zip(batches, self.completed(padded), strict=True):
            self.computing = len(numbers), batch["input_ids"].shape[1]
            total += model(**self.on_device(batch)).to(total.device)
        return total

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's formula accounts for neither LoRA nor skipped logits."""
        return 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the checkpoint's adapter, checked; peft would re-dispatch a model that is already spread over devices."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            adapters.fill(self.model, adapters.read_tensors(resume_from_checkpoint), Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter, and read it back."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            folder = output_dir or self.args.output_dir
            adapters.save(adapters.state(model, state_dict), model.peft_config["default"], folder, self.job.base_model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, seal it once it is complete, and only then delete older ones.

        Raises UserError if it cannot be written; older checkpoints stay.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.budget.save(folder, self.args.process_index)
            self.accelerator.wait_for_everyone()
            if is_main_process():
                checkpoints.seal(folder, self.job.run)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            older = checkpoints.in_order(self.args.output_dir)
            fix = f"free some space and run the same command again: it resumes from {older[-1]}" if older else "free some space"
            raise UserError(f"{folder}: could not be written ({reason(error)}); {fix}") from error
        if is_main_process():
            checkpoints.rotate(self.args.output_dir, self.job.keep, self.state.best_global_step)


class StepCallback(TrainerCallback):
    """Decides when to evaluate, save and stop: at the chosen steps, at the end of each epoch, and on a signal."""

    def __init__(self, trainer: StepTrainer):
        self.trainer = trainer
        self.evaluates = trainer.eval_dataset is not None or trainer.job.evaluator is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the optimizer step, and decide what follows it."""
        steps_per_epoch = len(self.trainer.callback_handler.train_dataloader)
        last = state.global_step % steps_per_epoch == 0 or state.global_step == state.max_steps
        control.should_evaluate = self.evaluates and (last or state.global_step % self.trainer.job.eval_steps == 0)
        control.should_save = control.should_save or last
        self.trainer.check_step()
        if self.trainer.stopped_by is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Save whenever the adapter is the best so far, so that the best one is always on disk."""
        best = args.metric_for_best_model
        if best is None:
            return
        more = metrics[best] - (state.best_metric or 0.0)
        if state.best_metric is None or (more > 0 if args.greater_is_better else more < 0):
            control.should_save = True
