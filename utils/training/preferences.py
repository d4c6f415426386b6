"""Learning from preferences: DPO, IPO, ORPO and SimPO on pairs of answers, KTO on labelled ones; the parent is the reference.

At its first step a run's adapter is what it starts from: nothing, or its parent adapter. So the reference's
log-probabilities are those of the model before the first step, computed once and kept; no second model is loaded.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainingArguments

from utils.console import progress, say
from utils.datasets.dataset import EncodedDataset
from utils.files import replacing
from utils.training import checkpoints
from utils.training.batching import pack_micro_batches, pad
from utils.training.loss import CHUNK
from utils.training.prefix_sharing import share_prefixes
from utils.training.trainer import RunConfig, StepTrainer

LOSSES = ("dpo", "ipo", "orpo", "simpo")
WITH_REFERENCE = ("dpo", "ipo", "kto")
INPUTS = ("input_ids", "labels", "places")
REFERENCE = "reference.npz"  # in the output folder: the reference's log-probabilities of each answer of each pair


@dataclasses.dataclass(frozen=True)
class Preference:
    """Which `loss`; `beta` scales it, `sft` is the weight of the chosen answers' own loss added to it, `margin` is SimPO's.

    KTO's loss of a good answer counts `good_weight` times, that of a bad one `bad_weight` times.
    """

    loss: str
    beta: float
    sft: float
    margin: float
    good_weight: float = 1.0
    bad_weight: float = 1.0


def pair_losses(
    settings: Preference, log_probs: torch.Tensor, counts: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (pairs,) and rewards (pairs, 2), the chosen answer's first.

    `log_probs` and `reference` are sums over the answers' tokens, `counts` the numbers of tokens: (pairs, 2) each.
    DPO: Rafailov et al. 2023, eq. 7. IPO: Azar et al. 2023, eq. 17, on means over tokens as its authors advise.
    ORPO: Hong et al. 2024, eq. 6 and 7. SimPO: Meng et al. 2024, eq. 6.
    """
    means = log_probs / counts.clamp(min=1)
    if settings.loss == "dpo":
        rewards = settings.beta * (log_probs - reference)
        losses = -functional.logsigmoid(rewards[:, 0] - rewards[:, 1])
    elif settings.loss == "ipo":
        gains = (log_probs - reference) / counts.clamp(min=1)
        rewards = settings.beta * gains
        losses = (gains[:, 0] - gains[:, 1] - 1 / (2 * settings.beta)) ** 2
    elif settings.loss == "simpo":
        rewards = settings.beta * means
        losses = -functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - settings.margin)
    else:
        rewards = settings.beta * means
        odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-6)))
        losses = -means[:, 0] - settings.beta * functional.logsigmoid(odds[:, 0] - odds[:, 1])
    return losses - settings.sft * means[:, 0], rewards.detach()


def sparse_log_probs(
    decoder: nn.Module,
    head: nn.Module,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    temperature: float = 1.0,
    **attention: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities of the `targets` after the `places` of `batching.pad`: (labelled,); no other logits are computed.

    `attention` is what else the decoder needs to know of shared rows: their `position_ids` and `attention_mask`.
    """
    every = decoder(input_ids=input_ids, use_cache=False, **attention)[0].flatten(0, 1)
    if not len(places):  # zero, yet a function of all parameters, which a rank without records needs
        return 0 * head(every[:1]).float().sum(1)
    chunks = zip(every[places.to(every.device)].split(CHUNK), targets.split(CHUNK), strict=True)
    found = [checkpoint(head_log_probs, head, h, t, temperature, use_reentrant=False) for h, t in chunks]
    return torch.cat(found).to(places.device)


def head_log_probs(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of one chunk of tokens, in float32 whatever the model's dtype."""
    scores = head(hidden).float() / temperature
    return -functional.cross_entropy(scores, targets.to(scores.device), reduction="none")


def full_log_probs(
    forward: Callable[..., Any],
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    temperature: float = 1.0,
    **attention: torch.Tensor,
) -> torch.Tensor:
    """The same from the model's own logits for all tokens."""
    logits = forward(input_ids=input_ids, use_cache=False, **attention).logits.flatten(0, 1)
    scores = logits[places.to(logits.device)].float() / temperature
    found = functional.cross_entropy(scores, targets.to(logits.device), reduction="none")
    return -found.to(places.device)


def log_probs_by(model: PreTrainedModel, sparse: bool, temperature: float = 1.0) -> Callable[..., torch.Tensor]:
    """A function that gives `model`'s log-probabilities; `sparse` if only its output layer follows the hidden states."""
    if sparse:
        found = functools.partial(sparse_log_probs, model.base_model, model.get_output_embeddings())
    else:
        found = functools.partial(full_log_probs, functools.partial(type(model).forward, model))
    return functools.partial(found, temperature=temperature)


def pair_loss(
    log_probs: Callable[..., torch.Tensor],
    settings: Preference,
    rewards: torch.Tensor,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    reference: torch.Tensor | None = None,
    shared: dict[str, torch.Tensor] | None = None,
    **_: object,
) -> torch.Tensor:
    """The sum of a micro-batch's losses; without `reference` (pairs, 2) the log-probabilities themselves (2 * pairs,).

    The first half of the rows are the chosen answers, the other half the rejected ones; `shared` are the same in shared
    rows, if these are to be computed. In training, sums of the rewards, of the pairs in the right order and of all pairs
    are added to `rewards` (4,).
    """
    tokens = log_probs(targets=labels.flatten()[places + 1], **(shared or {"input_ids": input_ids, "places": places}))
    if len(input_ids) < 2:
        return tokens.sum()
    rows = places // input_ids.shape[1]
    sums = sums_by_row(tokens, rows, len(input_ids))
    if reference is None:
        return sums
    counts = sums_by_row(torch.ones_like(tokens), rows, len(input_ids))
    losses, found = pair_losses(settings, sums.view(2, -1).T, counts.view(2, -1).T, reference)
    if torch.is_grad_enabled():
        right = (found[:, 0] > found[:, 1]).sum()
        rewards += torch.stack([*found.sum(0), right, right.new_tensor(len(found))]).to(rewards)
    return losses.sum()


def sums_by_row(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The values of each of `count` rows added up: (count,)."""
    return values.new_zeros(count).index_add(0, rows, values)


def judged_loss(
    log_probs: Callable[..., torch.Tensor],
    settings: Preference,
    totals: torch.Tensor,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    reference: torch.Tensor | None = None,
    good: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """The sum of a micro-batch's KTO losses; without `kl` the answers' log-probabilities themselves (rows,).

    Ethayarajh et al. 2024, eq. 7 and 8: `kl` is a number, `reference` and `good` have one for each row. In training
    the rewards of good and of bad answers, their numbers, and the number of those on the right side of `kl` are
    added to `totals` (5,).
    """
    tokens = log_probs(input_ids=input_ids, targets=labels.flatten()[places + 1], places=places)
    if reference is None and not len(places):
        return tokens.sum()
    sums = sums_by_row(tokens, places // input_ids.shape[1], len(input_ids))
    if kl is None or reference is None or good is None:
        return sums
    gains = sums - reference
    toward = torch.where(good, gains - kl, kl - gains)
    weights = torch.where(good, settings.good_weight, settings.bad_weight)
    losses = weights * (1 - torch.sigmoid(settings.beta * toward))
    if torch.is_grad_enabled():
        rewards = settings.beta * gains.detach()
        found = [(rewards * good).sum(), (rewards * ~good).sum(), good.sum(), (~good).sum(), (toward > 0).sum()]
        totals += torch.stack(found).to(totals)
    means = sums / sums_by_row(torch.ones_like(tokens), places // input_ids.shape[1], len(input_ids)).clamp(min=1)
    return (losses - settings.sft * torch.where(good, means, 0)).sum()


def half_of(batch: dict[str, Any], second: bool) -> dict[str, Any]:
    """The first or second half of the rows of a micro-batch from `pad`, with their column of the reference."""
    rows, width = len(batch["input_ids"]) // 2, batch["input_ids"].shape[1]
    mine = slice(rows, None) if second else slice(rows)
    places = batch["places"]
    places = places[places >= rows * width] - rows * width if second else places[places < rows * width]
    half = {"input_ids": batch["input_ids"][mine], "labels": batch["labels"][mine], "places": places}
    return batch | half | {"reference": batch["reference"][:, int(second)]}


class PreferenceTrainer(StepTrainer):
    """A StepTrainer on pairs: the loss of a step is the mean over its pairs."""

    compute: Callable[..., torch.Tensor] = staticmethod(pair_loss)
    totals = 4  # how many sums it keeps
    shares_prefixes = True  # whether both answers of a pair are computed in one row

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        job: RunConfig,
        train: EncodedDataset,
        validation: EncodedDataset | None,
        settings: Preference,
    ):
        super().__init__(model, args, job, train, validation)
        self.settings = settings
        self.rewards = torch.zeros(self.totals, device=args.device)
        self.shares_prefixes = self.shares_prefixes and self.can_share_prefixes()
        self.attach_reference()

    @contextlib.contextmanager
    def returning_loss(self) -> Iterator[bool]:
        """While the block runs, the model returns the loss of the pairs it is called with."""
        model: PreTrainedModel = self.model.get_base_model()
        with super().returning_loss() as sparse:
            model.forward = functools.partial(self.compute, log_probs_by(model, sparse), self.settings, self.rewards)
            yield sparse

    @torch.no_grad()
    def can_share_prefixes(self) -> bool:
        """True if the model computes the longest pair in a shared row as in two: tried, and printed if not.

        Some models take no mask or positions, some lose their sliding window by it. Means over tokens may differ by rounding.
        """
        data, model = self.train_dataset, self.model.get_base_model()
        batch = pad([data[max(range(len(data)), key=data.lengths.__getitem__)]], self.job.plan.pad_to)
        is_rounded = getattr(model, "is_quantized", False) or self.accelerator.mixed_precision != "no"
        most = 1e-4 if model.dtype == torch.float32 and not is_rounded else 0.02
        self.model.eval()
        with self.returning_loss(), self.accelerator.autocast():
            apart = self.model(**super().on_device(batch))
            with contextlib.suppress(AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                difference = (self.model(**self.on_device(batch)) - apart).abs().max() / len(batch["places"])
                if difference < most:
                    return True
        say("the answers of a pair are computed in rows of their own: in one row, this model computes them differently")
        return False

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch's tensors on the device, with the pairs in shared rows."""
        tensors: dict[str, Any] = super().on_device(batch)
        if self.shares_prefixes and len(batch["places"]):
            rows = share_prefixes(batch["input_ids"], batch["places"], self.job.plan.pad_to)
            tensors["shared"] = super().on_device(rows)
        return tensors

    def attach_reference(self) -> None:
        """Give each pair the reference's log-probabilities: computed before the first step, later read from the file.

        Raises UserError if the file is missing in a run that is resumed.
        """
        parts = {"train": self.train_dataset} | ({"validation": self.eval_dataset} if self.eval_dataset is not None else {})
        path = Path(self.args.output_dir) / REFERENCE
        if self.settings.loss not in WITH_REFERENCE:
            kept: dict[str, np.ndarray] = {name: np.zeros((len(data), 2), np.float32) for name, data in parts.items()}
        elif checkpoints.is_resumed(path):
            with np.load(path, allow_pickle=False) as file:
                kept = {name: file[name] for name in parts}
        else:
            kept = {name: self.log_probs_of(data) for name, data in parts.items()}
            if self.args.should_save:
                with replacing(path) as aside, aside.open("wb") as file:
                    np.savez(file, **kept)  # type: ignore[arg-type]
        for name, data in parts.items():
            data.reference = kept[name]

    @torch.no_grad()
    def log_probs_of(self, data: EncodedDataset) -> np.ndarray:
        """The model's log-probabilities of all answers: (pairs, 2) float32; each rank computes its share."""
        plan = self.job.plan
        batches = pack_micro_batches(range(len(data)), data.lengths, plan.micro_batch_tokens)
        found = torch.zeros(len(data), 2, device=self.args.device)
        self.model.eval()
        say("computing the reference's log-probability of each answer, once")
        with (
            self.returning_loss(),
            self.accelerator.autocast(),
            progress(total=len(data), desc="reference", unit="pair") as bar,
        ):
            for numbers in batches[plan.rank :: plan.world_size]:
                tensors = pad([data[number] for number in numbers], plan.pad_to)
                found[numbers] = self.model(**self.on_device(tensors)).view(2, -1).T
                bar.update(len(numbers))
        return self.accelerator.reduce(found, "sum").cpu().numpy()

    def snapshot(self) -> Callable[[], None]:
        """A function that restores everything, including the sums of the rewards."""
        restore, rewards = super().snapshot(), self.rewards.clone()

        def restore_all() -> None:
            restore()
            self.rewards.copy_(rewards)

        return restore_all

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the rewards of the steps since the last entry: the means, their margin, and the share in the right order."""
        if "loss" in logs:
            logs |= self.reward_logs()
            self.rewards.zero_()
        super().log(logs, *args, **kwargs)

    def reward_logs(self) -> dict[str, float]:
        """The sums in `rewards` as means over pairs."""
        chosen, rejected, right, pairs = self.accelerator.reduce(self.rewards.clone(), "sum").tolist()
        return {
            "reward_chosen": chosen / max(1, pairs),
            "reward_rejected": rejected / max(1, pairs),
            "reward_margin": (chosen - rejected) / max(1, pairs),
            "reward_accuracy": right / max(1, pairs),
        }


class KTOTrainer(PreferenceTrainer):
    """A PreferenceTrainer on labelled answers, each with a mismatched one (`JudgedDataset`)."""

    repeats_alone = False  # the ranks exchange `kl` at the beginning of a step
    compute = staticmethod(judged_loss)
    totals = 5
    shares_prefixes = False  # its answers are no pairs

    def __init__(self, *args: Any, **kwargs: Any):
        self.kl = 0.0
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def completed(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of the micro-batches, with KTO's `kl`: how much likelier mismatched answers are than by the reference.

        It is the mean over the whole step, and at least 0; no gradient flows through it.
        """
        was_training = self.model.training
        self.model.eval()  # as when the reference was computed, so that there is no difference at first
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        found = torch.zeros(2, device=self.args.device)
        for batch in batches:
            tensors = self.on_device(half_of(batch, second=True) if "reference" in batch else batch)
            with self.accelerator.autocast():
                sums = model(**{name: tensors[name] for name in INPUTS})
            if "reference" in tensors:
                found += torch.stack([(sums - tensors["reference"]).sum(), found.new_tensor(len(sums))])
        self.model.train(was_training)
        total, count = self.accelerator.reduce(found, "sum")
        kl = (total / count.clamp(min=1)).clamp(min=0)
        self.kl = kl.item()
        return [half_of(batch, second=False) | {"kl": kl} if "reference" in batch else batch for batch in batches]

    def reward_logs(self) -> dict[str, float]:
        """Means over good and over bad answers, the share on the right side of `kl`, and the last step's `kl`."""
        good, bad, goods, bads, right = self.accelerator.reduce(self.rewards.clone(), "sum").tolist()
        if not goods + bads:
            return {}
        means = {"reward_chosen": good / goods} if goods else {}
        means |= {"reward_rejected": bad / bads} if bads else {}
        margin = {"reward_margin": good / goods - bad / bads} if goods and bads else {}
        return means | margin | {"reward_accuracy": right / (goods + bads), "kl": self.kl}
