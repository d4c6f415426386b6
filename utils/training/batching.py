"""Which records make up an optimizer step, how they are packed into micro-batches, and how these are padded.

A step's gradient does not depend on how its records are packed, as long as its loss is the mean over all its
supervised tokens. So each step's records are drawn at random, and only then sorted by length and cut: the steps
stay the same, with almost no padding.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.trainer_pt_utils import get_length_grouped_indices

from utils.datasets.encoding import IGNORED

OVERHEAD = 128  # fixed cost of a micro-batch, in tokens that could be computed in the same time


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """How batches are formed: records per step over all ranks, the limit of tokens per micro-batch (padding included), etc.

    `group_by_length` puts records of similar length into a step, as transformers does; otherwise they are drawn at random.
    """

    batch_size: int
    micro_batch_tokens: int
    world_size: int = 1
    rank: int = 0
    group_by_length: bool = False
    seed: int = 42
    pad_to: int = 1


def pack_micro_batches(indices: Sequence[int], lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Cut records, longest first, into micro-batches of at most `most_tokens` tokens with padding.

    The cut minimizes the number of padded tokens plus OVERHEAD per micro-batch. A record longer than `most_tokens` is
    a micro-batch of its own.
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    costs, starts = [0], [0]  # for the first n records: cost of the cheapest cut, and where its last micro-batch begins
    for stop in range(1, len(order) + 1):
        ways: list[tuple[int, int]] = []
        for start in range(stop - 1, -1, -1):
            tokens = (stop - start) * lengths[order[start]]
            if tokens > most_tokens and ways:
                break
            ways.append((costs[start] + tokens + OVERHEAD, start))
        cost, start = min(ways)
        costs.append(cost)
        starts.append(start)
    micro_batches: list[list[int]] = []
    stop = len(order)
    while stop:
        micro_batches.append(order[starts[stop] : stop])
        stop = starts[stop]
    return micro_batches[::-1]


def split_across_ranks(indices: Sequence[int], lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Spread a step's records over ranks so that all have about the same work: sorted by length, in alternating direction."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for position, index in enumerate(sorted(indices, key=lambda i: (-lengths[i], i))):
        lap, place = divmod(position, world_size)
        shares[place if lap % 2 == 0 else world_size - 1 - place].append(index)
    return shares


class MicroBatch(NamedTuple):
    """Numbers of the records computed at once, and how many supervised tokens their whole step has."""

    records: list[int]
    supervised: int


class StepBatchSampler:
    """A batch sampler: for each optimizer step of an epoch, this rank's micro-batches.

    All ranks get the same number of micro-batches (empty ones where records run out), since some ways of sharding
    synchronize at each. The order depends on seed and epoch alone. `lengths` and `supervised` count tokens per record.
    """

    def __init__(self, lengths: Sequence[int], supervised: Sequence[int], plan: BatchConfig):
        self.lengths = lengths
        self.supervised = supervised
        self.plan = plan
        self.epoch = 0

    def __len__(self) -> int:
        """Optimizer steps per epoch; the last one may have fewer records."""
        return math.ceil(len(self.lengths) / self.plan.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """The epoch's records in the order in which steps take them: each record once."""
        generator = torch.Generator().manual_seed(self.plan.seed + self.epoch)
        if self.plan.group_by_length:
            return get_length_grouped_indices(list(self.lengths), self.plan.batch_size, generator=generator)
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        order, size = self.order(), self.plan.batch_size
        for start in range(0, len(order), size):
            step = order[start : start + size]
            supervised = sum(self.supervised[index] for index in step)
            packed = [
                pack_micro_batches(part, self.lengths, self.plan.micro_batch_tokens)
                for part in split_across_ranks(step, self.lengths, self.plan.world_size)
            ]
            mine = packed[self.plan.rank]
            mine = mine + [[]] * (max(map(len, packed)) - len(mine))
            yield [MicroBatch(records, supervised) for records in mine]


def pad(records: Sequence[dict[str, Any]], pad_to: int) -> dict[str, torch.Tensor]:
    """Records as `input_ids` and `labels`: (records, longest) int64, padded on the right; `places`: (labelled,) int64.

    `places` counts, over all rows together, the tokens whose next one has a label: where logits are needed.

    Under causal attention no token sees anything to its right, so padding needs no attention mask; its labels are
    ignored. No records give one token without a label. For pairs, the chosen answers come first, then the rejected
    ones; their reference is `reference`: (pairs, 2) float32. Labels of whole answers are `good`: (records,) bool.
    """
    if records and "rejected_ids" in records[0]:
        rejected = [{"input_ids": record["rejected_ids"], "labels": record["rejected_labels"]} for record in records]
        both = pad([*({name: record[name] for name in ("input_ids", "labels")} for record in records), *rejected], pad_to)
        references = [torch.as_tensor(record["reference"]) for record in records if "reference" in record]
        good = {"good": torch.tensor([record["good"] for record in records])} if "good" in records[0] else {}
        return both | good | ({"reference": torch.stack(references)} if references else {})
    longest = max((len(record["input_ids"]) for record in records), default=1)
    longest = -(-longest // pad_to) * pad_to
    input_ids = torch.zeros(max(1, len(records)), longest, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    for row, record in enumerate(records):
        length = len(record["input_ids"])
        input_ids[row, :length] = torch.as_tensor(record["input_ids"])
        labels[row, :length] = torch.as_tensor(record["labels"])
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    places = (following.flatten() != IGNORED).nonzero().flatten()
    return {"input_ids": input_ids, "labels": labels, "places": places}
