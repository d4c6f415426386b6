"""Learning by rewards (GRPO): groups of answers are sampled, and the better ones of each group made likelier.

A step samples answers to its questions from the current model, with random numbers that depend only on the seed, the
step and the question; so a run that was stopped resumes with the same answers.
"""

import contextlib
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from utils.console import UserError, say
from utils.datasets.dataset import EncodedDataset
from utils.datasets.encoding import IGNORED
from utils.files import digest, replacing
from utils.training import checkpoints
from utils.training.batching import pack_micro_batches, pad
from utils.training.loss import returning_loss
from utils.training.preferences import log_probs_by
from utils.training.rewards import WeightedReward, value_of
from utils.training.trainer import RunConfig, StepTrainer

REFERENCE = "reference.safetensors"  # in the output folder: the adapter that the run started from
SPREAD = 1e-4  # added to the standard deviation of a group's rewards
Ids = list[int]


class Sampler(Protocol):
    """Draws answers; the script supplies `utils.inference.rollouts.Sampler`."""

    def __call__(self, model: PreTrainedModel, prompts: list[Ids], seeds: list[int]) -> list[Ids]:
        """The ids of an answer to each prompt."""

    def text(self, ids: Ids) -> str:
        """The part of an answer that a person reads."""

    def is_cut(self, ids: Ids) -> bool:
        """True if an answer was cut before its end."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """`group` answers per question, drawn at `temperature`; ratios are clipped at 1 ± `clip`; `beta` weighs the KL term.

    `updates` is the number of optimizer steps on the answers of one sampling.
    """

    rewards: list[WeightedReward]
    group: int
    temperature: float
    clip: float
    beta: float
    updates: int


@dataclasses.dataclass
class Answer:
    """A sampled answer: the question's ids, its own, its text, unweighted rewards, their weighted sum, and its advantage."""

    question: Ids
    ids: Ids
    text: str
    cut: bool
    values: list[float]
    reward: float
    advantage: float = 0.0


def sampling_seeds(seed: int, step: int, records: Sequence[int], group: int) -> list[int]:
    """The seeds of the answers to some records' questions, `group` to each, at one step."""
    return [int(digest([seed, step, record, place])[:12], 16) for record in records for place in range(group)]


def advantages(rewards: list[float]) -> list[float]:
    """The rewards of one group minus their mean, over their standard deviation (Shao et al. 2024, section 4.1.2)."""
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    return [(reward - mean) / (spread + SPREAD) for reward in rewards]


def policy_losses(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantage: torch.Tensor,
    clip: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and KL terms of tokens, (tokens,) each.

    All arguments are (tokens,): log-probabilities by the model, by the one that sampled, and by the reference (None
    where `beta` is 0), and the advantage of the answer that the token is in. Shao et al. 2024, eq. 3 and 4.
    """
    ratio = torch.exp(log_probs - old)
    losses = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if reference is None:
        return losses, torch.zeros_like(losses)
    gap = reference - log_probs
    kl = torch.exp(gap) - gap - 1
    return losses + beta * kl, kl


def policy_loss(
    log_probs: Callable[..., torch.Tensor],
    settings: Policy,
    totals: torch.Tensor,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    advantage: torch.Tensor | None = None,
    old: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """The sum of the losses of a micro-batch's tokens; without `advantage` (rows,) their log-probabilities (tokens,).

    Without `old` (tokens,) the model is the one that sampled. Sums of the KL terms, of the clipped tokens and of all
    tokens are added to `totals` (3,).
    """
    found = log_probs(input_ids, labels.flatten()[places + 1], places)
    if advantage is None:
        return found
    if not len(places):
        return found.sum()
    old = found.detach() if old is None else old
    per_token = advantage[places // input_ids.shape[1]]
    losses, kl = policy_losses(found, old, reference, per_token, settings.clip, settings.beta)
    ratio = torch.exp(found.detach() - old)
    clipped = ((ratio - 1) * per_token.sign() > settings.clip).sum()
    totals += torch.stack([kl.detach().sum(), clipped, clipped.new_tensor(len(places))]).to(totals)
    return losses.sum()


class GRPOTrainer(StepTrainer):
    """A StepTrainer on questions: the loss of a step is the mean over the tokens of all its answers."""

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        job: RunConfig,
        train: EncodedDataset,
        validation: EncodedDataset | None,
        settings: Policy,
        sampler: Sampler,
    ):
        super().__init__(model, args, job, train, validation)
        self.settings, self.sampler = settings, sampler
        self.totals = torch.zeros(3, device=args.device)
        self.figures: dict[str, float] = {}
        self.nothing_to_learn = False
        if self.is_fsdp_enabled:
            raise UserError("--rewards: is not supported with FSDP; train with DDP, or on one GPU")
        self.reference = self.attach_reference() if settings.beta else {}

    @contextlib.contextmanager
    def returning_loss(self) -> Iterator[bool]:
        """While the block runs, the model returns the loss of the answers it is called with."""
        model: PreTrainedModel = self.model.get_base_model()
        with returning_loss(model, self.accelerator.autocast()) as sparse:
            log_probs = log_probs_by(model, sparse, self.settings.temperature)
            model.forward = functools.partial(policy_loss, log_probs, self.settings, self.totals)
            yield sparse

    def attach_reference(self) -> dict[str, torch.Tensor]:
        """The trained weights that the run started with, kept in the output folder for when it is resumed.

        Raises UserError if the file is missing in a run that is resumed.
        """
        path = Path(self.args.output_dir) / REFERENCE
        mine = trained_weights(self.model)
        if checkpoints.is_resumed(path):
            return {name: tensor.to(mine[name].device) for name, tensor in load_file(path).items()}
        kept = {name: parameter.detach().clone() for name, parameter in mine.items()}
        if self.args.should_save:
            with replacing(path) as aside:
                save_file({name: tensor.cpu().contiguous() for name, tensor in kept.items()}, aside)
        return kept

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> torch.Tensor:
        """Sample and reward answers to a step's questions, and learn from them; all but the last update happen here."""
        numbers = [number for batch in inputs for number in batch["records"]]
        answers = self.sampled(numbers)
        batches = self.micro_batches(answers)
        for _ in range(self.settings.updates - 1):
            super().training_step(model, batches)
            if self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            model.zero_grad()
        loss = super().training_step(model, batches)
        self.step_records = [numbers] * len(batches)
        self.note(answers)
        return loss

    def sampled(self, numbers: list[int]) -> list[Answer]:
        """A group of answers to each of the questions of these records, rewarded and compared."""
        rows = [self.train_dataset[number] for number in numbers]
        asked = [row["input_ids"] for row in rows for _ in range(self.settings.group)]
        records = [int(self.train_dataset.numbers[number]) for number in numbers]
        seeds = sampling_seeds(self.args.seed, self.state.global_step, records, self.settings.group)
        answers = self.rewarded(rows, asked, seeds, self.settings.group)
        for start in range(0, len(answers), self.settings.group):
            group = answers[start : start + self.settings.group]
            for answer, advantage in zip(group, advantages([one.reward for one in group]), strict=True):
                answer.advantage = advantage
        return answers

    def rewarded(self, rows: list[dict[str, Any]], asked: list[Ids], seeds: list[int], group: int) -> list[Answer]:
        """Answers to `asked`, `group` of them to the question of each row, with their rewards."""
        with self.accelerator.autocast():
            drawn = self.sampler(self.model.get_base_model(), asked, seeds) if asked else []
        records = [json.loads(row["record"]) for row in rows for _ in range(group)]
        answers = []
        for question, ids, record in zip(asked, drawn, records, strict=True):
            text = self.sampler.text(ids)
            values = [value_of(reward, text, record) for reward in self.settings.rewards]
            total = sum(value * reward.weight for value, reward in zip(values, self.settings.rewards, strict=True))
            answers.append(Answer(question, ids, text, self.sampler.is_cut(ids), values, total))
        return answers

    @torch.no_grad()
    def micro_batches(self, answers: list[Answer]) -> list[dict[str, Any]]:
        """The answers as padded micro-batches, with the model's and the reference's log-probabilities if needed."""
        plan = self.job.plan
        rows: list[dict[str, Any]] = [
            {"input_ids": one.question + one.ids, "labels": [IGNORED] * len(one.question) + one.ids, "advantage": one.advantage}
            for one in answers
        ]
        parts = pack_micro_batches(range(len(rows)), [len(row["input_ids"]) for row in rows], plan.micro_batch_tokens)
        tokens = self.accelerator.reduce(torch.tensor(sum(len(one.ids) for one in answers), device=self.args.device), "sum")
        batches = []
        for part in parts or [[]]:
            batch: dict[str, Any] = pad([rows[row] for row in part], plan.pad_to)
            batch["advantage"] = torch.tensor([rows[row]["advantage"] for row in part] or [0.0])
            if self.settings.updates > 1:
                batch["old"] = self.log_probs_of(batch)
            if self.settings.beta:
                with self.as_reference():
                    batch["reference"] = self.log_probs_of(batch)
            batches.append(batch | {"records": part, "supervised": max(1, tokens.item())})
        return batches

    def log_probs_of(self, batch: dict[str, Any]) -> torch.Tensor:
        """The log-probabilities of a micro-batch's supervised tokens, without dropout: (tokens,)."""
        self.model.eval()
        inputs = self.on_device({name: batch[name] for name in ("input_ids", "labels", "places")})
        with self.accelerator.autocast():
            found = self.model(**inputs)
        self.model.train()
        return found

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """The model with the weights that the run started from, while the block runs."""
        mine = trained_weights(self.model)
        now = {name: parameter.data for name, parameter in mine.items()}
        try:
            for name, parameter in mine.items():
                parameter.data = self.reference[name]
            yield
        finally:
            for name, parameter in mine.items():
                parameter.data = now[name]

    def note(self, answers: list[Answer]) -> None:
        """Keep a step's figures for its log entry: means over the answers of all ranks."""
        count = len(answers)
        groups = [answers[start : start + self.settings.group] for start in range(0, count, self.settings.group)]
        equal = sum(len({one.reward for one in group}) == 1 for group in groups)
        columns = [[one.values[place] for one in answers] for place in range(len(self.settings.rewards))]
        names = [f"reward_{reward.name}" for reward in self.settings.rewards]
        sums = [
            sum(one.reward for one in answers), *map(sum, columns), sum(len(one.ids) for one in answers),
            sum(one.cut for one in answers), count, equal, len(groups),
        ]  # fmt: skip
        found = self.accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=self.args.device), "sum").tolist()
        *means, count, equal, all_groups = found
        labels = ["reward", *(names if len(names) > 1 else [])]
        if len(names) == 1:
            del means[1]
        labels += ["answer_tokens", "answers_cut"]
        self.figures = {label: value / count for label, value in zip(labels, means, strict=True)}
        self.figures["groups_equal"] = equal / all_groups
        self.nothing_to_learn = equal == all_groups

    def check_step(self) -> None:
        """As for any step; but if all answers of each group have the same reward, a zero gradient is no error."""
        if self.nothing_to_learn:
            say(f"step {self.state.global_step}: all answers of each group have the same reward; nothing is learned from them")
            self.gradient_norm = torch.ones(())
        super().check_step()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the figures of the step's answers."""
        if "loss" in logs:
            kl, clipped, tokens = self.accelerator.reduce(self.totals.clone(), "sum").tolist()
            self.totals.zero_()
            logs |= self.figures | {"answers_clipped": clipped / max(1, tokens)}
            logs |= {"kl": kl / max(1, tokens)} if self.settings.beta else {}
        super().log(logs, *args, **kwargs)

    def validate(self) -> dict[str, float]:
        """The mean reward of one sampled answer to each question of the validation set, as `eval_reward`.

        Its negative replaces the loss, so that the best adapter is the one with the highest reward.
        """
        data, plan = self.eval_dataset, self.job.plan
        mine = range(plan.rank, len(data), plan.world_size)
        rows = [data[number] for number in mine]
        seeds = [int(digest([self.args.seed, int(data.numbers[number])])[:12], 16) for number in mine]
        answers = self.rewarded(rows, [row["input_ids"] for row in rows], seeds, 1)
        total = torch.tensor(float(sum(one.reward for one in answers)), device=self.args.device)
        mean = self.accelerator.reduce(total, "sum").item() / len(data)
        return {"eval_loss": -mean, "eval_reward": mean}


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
