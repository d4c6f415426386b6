"""The rows of one computation, a prompt or a beam each, and the model's cache of them.

Prompts are read in groups of similar length, once for all their beams; the cache grows in place; beams exchange only what
they have generated.
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from utils.console import UserError

Ids = list[int]
WORTHWHILE = 12  # fewest common opening tokens worth computing once for several prompts
ROOM = 64  # columns that a full cache grows by
PREFILL_TOKENS = 1024  # read at once: keeps the device busy, but bounds the activations


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, length, dim), with room to append in place.

    Sliding windows are left to the attention mask; the layer keeps every column.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif stop > self.keys.shape[2]:
            self.hold(slice(None), 0, start, stop - start + max(ROOM, start // 4))
        if start:
            self.keys[:, :, start:stop] = key_states
            self.values[:, :, start:stop] = value_states
        self.length = stop
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def hold(self, rows: slice | torch.Tensor, start: int, stop: int, room: int) -> None:
        """Keep these rows and these columns, with `room` columns after them."""
        rows = rows.to(self.keys.device) if isinstance(rows, torch.Tensor) else rows  # layers may be on several devices
        for name in ("keys", "values"):
            old = getattr(self, name)[rows, :, start:stop]
            new = old.new_empty((*old.shape[:2], old.shape[2] + room, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)
        self.length = stop - start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Reader:
    """Runs a model over padded rows; knows which arguments its `forward` takes.

    Padding is on the left and masked, and positions count real tokens only.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        known = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in known
        self.cache_name = "cache" if "cache" in known else "past_key_values"  # since transformers 5.40, and before
        self.takes_keep = "logits_to_keep" in known
        # if attention windows count columns, not positions, there must be no padding after the opening
        config = model.config.get_text_config()
        by_columns = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        self.shares_openings = self.takes_positions and not by_columns

    def read(
        self, prompts: list[Ids], opening: Ids | None = None, first: Cache | None = None
    ) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """Run the model over a few prompts: their cache, mask and last logits, (rows, vocabulary).

        If all of them begin with `opening`, it is already in the cache `first`, one row for all.
        """
        read, device = len(opening or []), self.model.device
        width = max(len(prompt) for prompt in prompts) - read
        padding = [width + read - len(prompt) for prompt in prompts]
        rest = [[0] * pad + prompt[read:] for pad, prompt in zip(padding, prompts, strict=True)]
        real = [[1] * read + [0] * pad + [1] * (width - pad) for pad in padding]
        ids, mask = torch.tensor(rest, device=device), torch.tensor(real, device=device)
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        for index, layer in enumerate(first.layers if first else []):
            cache.update(layer.keys.expand(len(prompts), -1, -1, -1), layer.values.expand(len(prompts), -1, -1, -1), index)
        return cache, mask, self.forward(ids, mask, cache)[:, -1]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, keep: int = 1, padded: bool = True) -> torch.Tensor:
        """Append `ids`, (rows, new), to the cache; the logits of the last `keep` of them, (rows, keep, vocabulary) float32.

        `mask`, (rows, columns), covers the cached columns and the new ones. If not `padded`, it is all ones and not passed
        on, since some models with a state multiply new tokens by all of it. Raises UserError if logits are not numbers.
        """
        options: dict[str, Any] = {"logits_to_keep": keep} if self.takes_keep else {}
        if self.takes_positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        seen = mask if padded else None
        output = self.model(input_ids=ids, attention_mask=seen, use_cache=True, **{self.cache_name: cache}, **options)
        logits = output.logits[:, -keep:].float()
        check_scores(logits[:, -1])
        return logits


def check_scores(scores: torch.Tensor) -> None:
    """Raises UserError if scores, (rows, vocabulary), are not numbers."""
    if scores[:, 0].isnan().any():
        raise UserError("the model's scores are not numbers (broken weights, or float16 overflows); check the folder")


def keeps_states(model: PreTrainedModel) -> bool:
    """True if the library's cache for this model holds anything but keys and values for each column: the state of a
    recurrence or a convolution, an index, or layers that share theirs."""
    layers = DynamicCache(config=model.config).layers
    return any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def start_decoding(model: PreTrainedModel, prompts: list[Ids]) -> "DecodingBatch | StateBatch":
    """The rows of one computation, one per prompt, with the cache that the model needs."""
    return StateBatch(model, prompts) if keeps_states(model) else DecodingBatch(model, prompts)


class StateBatch:
    """Rows of one computation in the library's own caches, one for each prompt with all its beams, without padding, which
    would become part of a state; `logits`: the last ones, (rows, vocabulary)."""

    def __init__(self, model: PreTrainedModel, prompts: list[Ids]):
        self.reader = Reader(model)
        self.parts = [
            (DynamicCache(config=model.config), torch.ones(1, 0, dtype=torch.long, device=model.device)) for _ in prompts
        ]
        self.sizes = [1] * len(prompts)
        self._append(prompts)

    def step(self, tokens: Ids) -> None:
        """Append one token to each row and compute the next logits."""
        self._append([[token] for token in tokens])

    def _append(self, rows: list[Ids]) -> None:
        found, first = [], 0
        for place, size in enumerate(self.sizes):
            cache, mask = self.parts[place]
            ids = torch.tensor(rows[first : first + size], device=mask.device)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            self.parts[place] = cache, mask
            found.append(self.reader.forward(ids, mask, cache, padded=False)[:, -1])
            first += size
        self.logits = torch.cat(found)

    def select(self, rows: list[int]) -> None:
        """Keep `rows`, in this order and as often as named; those of one prompt are adjacent."""
        owners = [place for place, size in enumerate(self.sizes) for _ in range(size)]
        firsts = [sum(self.sizes[:place]) for place in range(len(self.sizes))]
        parts, sizes = [], []
        for place, group in itertools.groupby(rows, lambda row: owners[row]):
            cache, mask = self.parts[place]
            index = torch.tensor([row - firsts[place] for row in group], device=mask.device)
            cache.reorder_cache(index)
            parts.append((cache, mask[index]))
            sizes.append(len(index))
        self.parts, self.sizes = parts, sizes

    def reorder_beams(self, sources: list[int]) -> None:
        """Give each row what row `sources[row]` has read and generated; both continue the same prompt."""
        self.select(sources)


class DecodingBatch:
    """Rows of one computation: their cache, which of its columns are real, and the last `logits`, (rows, vocabulary).

    Prompts of unequal length are padded on the left; the padding is masked, and positions count real tokens only.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[Ids]):
        self.reader = Reader(model)
        self.start = max(len(prompt) for prompt in prompts)  # the column where answers begin
        shares = self.reader.shares_openings
        parts: dict[tuple[int, ...], tuple[Cache, torch.Tensor, torch.Tensor]] = {}
        for family in families(prompts) if shares else [list(range(len(prompts)))]:
            opening = common_opening([prompts[row] for row in family]) if shares else []
            first = self.reader.read([opening])[0] if opening else None
            for rows in groups(family, prompts):
                parts[tuple(rows)] = self.reader.read([prompts[row] for row in rows], opening, first)
        back = torch.tensor([row for rows in parts for row in rows]).argsort()
        self.logits = torch.cat([logits for _, _, logits in parts.values()])[back]
        masks = [torch.nn.functional.pad(mask, (self.start - mask.shape[1], 0)) for _, mask, _ in parts.values()]
        self.mask = torch.cat(masks)[back]
        self.cache = join({rows: cache for rows, (cache, _, _) in parts.items()}, self.start)

    def step(self, tokens: Ids) -> None:
        """Append one token to each row and compute the next logits."""
        ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        self.logits = self.reader.forward(ids, self.mask, self.cache)[:, -1]

    def select(self, rows: list[int]) -> None:
        """Keep `rows`, in this order and as often as named; padding that none of them needs is dropped."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        spare = int(self.mask.argmax(1).min())
        for layer in self.cache.layers:
            layer.hold(index, spare, layer.length, ROOM)
        self.mask = self.mask[:, spare:].contiguous()
        self.start -= spare

    def reorder_beams(self, sources: list[int]) -> None:
        """Give each row what row `sources[row]` has generated; both continue the same prompt."""
        moved = [row for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        to = torch.tensor(moved, device=self.mask.device)
        of = torch.tensor([sources[row] for row in moved], device=self.mask.device)
        for layer in self.cache.layers:
            for part in (layer.keys, layer.values):
                answers = part[:, :, self.start : layer.length]
                answers[to.to(part.device)] = answers[of.to(part.device)]


def families(prompts: list[Ids]) -> list[list[int]]:
    """The rows of `prompts` grouped by their first tokens: a family for each way in which a template opens."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(tuple(prompt[:WORTHWHILE]), []).append(row)
    return list(found.values())


def common(one: Ids, other: Ids) -> int:
    """The number of tokens that two texts begin with in common."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return next(place for place in range(size) if one[place] != other[place])


def common_opening(prompts: list[Ids]) -> Ids:
    """The common beginning of all prompts, such as a template's preamble, leaving at least one token of each.

    Empty if it is too short to be worth computing once instead of once per prompt.
    """
    if len(prompts) < 2:
        return []
    low = min(prompts)
    shared = common(low, max(prompts))
    return low[: min(shared, min(map(len, prompts)) - 1)] if shared >= WORTHWHILE else []


def groups(rows: list[int], prompts: list[Ids]) -> Iterator[list[int]]:
    """Split the rows of `prompts`, keeping their order, into runs of similar length that are read at once."""
    group: list[int] = []
    for row in rows:
        lengths = [len(prompts[other]) for other in [*group, row]]
        wasted = len(lengths) * max(lengths) - sum(lengths)
        if group and (len(lengths) * max(lengths) > PREFILL_TOKENS or wasted > sum(lengths) // 8):
            yield group
            group = []
        group.append(row)
    yield group


def join(caches: dict[tuple[int, ...], Cache], width: int) -> Cache:
    """One cache of `width` columns from several, each with its key's rows, aligned to the right."""
    joined = Cache(layer_class_to_replicate=GrowingLayer)
    for index in range(len(next(iter(caches.values())).layers)):
        layers = {rows: cache.layers[index] for rows, cache in caches.items()}
        buffers = []
        for name in ("keys", "values"):
            first = getattr(next(iter(layers.values())), name)
            buffer = first.new_zeros((sum(map(len, layers)), first.shape[1], width + ROOM, first.shape[3]))
            for rows, layer in layers.items():
                part = getattr(layer, name)[:, :, : layer.length]
                buffer[list(rows), :, width - part.shape[2] : width] = part
                setattr(layer, name, None)  # so that at most one layer is held twice
            buffers.append(buffer)
        joined.update(*buffers, index)
        joined.layers[index].length = width
    return joined
