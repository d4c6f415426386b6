"""The rows of one computation, a prompt or a beam each, and what the model keeps of them from token to token.

Prompts are read in groups of like length, once for all their beams; the cache grows in place; beams exchange only what
they generated.
"""

import inspect
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from utils.console import UserError

Ids = list[int]
WORTHWHILE = 12  # tokens that prompts have in common, for these to be computed once
ROOM = 64  # columns that a full cache grows by
PREFILL_TOKENS = 1024  # read at once: enough to keep the device busy, few enough to bound the activations


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, length, dim), with room to append in place.

    Sliding windows are left to the attention mask: the layer keeps every column.
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


class Batch:
    """Rows of one computation: their cache, which of its columns are real, and the last `logits`, (rows, vocabulary).

    Prompts of unequal length are padded on the left; the padding is masked, and positions count real tokens only.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[Ids]):
        self.model = model
        known = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in known
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.start = max(len(prompt) for prompt in prompts)  # the column where answers begin
        # where attention goes by columns, not by positions, there must be no padding after the opening
        by_positions = self.takes_positions and not getattr(model.config.get_text_config(), "sliding_window", None)
        parts: dict[tuple[int, ...], tuple[Cache, torch.Tensor, torch.Tensor]] = {}
        for family in families(prompts) if by_positions else [list(range(len(prompts)))]:
            opening = common_opening([prompts[row] for row in family]) if by_positions else []
            first = self._read([opening])[0] if opening else None
            for rows in groups(family, prompts):
                parts[tuple(rows)] = self._read([prompts[row] for row in rows], opening, first)
        back = torch.tensor([row for rows in parts for row in rows]).argsort()
        self.logits = torch.cat([logits for _, _, logits in parts.values()])[back]
        masks = [torch.nn.functional.pad(mask, (self.start - mask.shape[1], 0)) for _, mask, _ in parts.values()]
        self.mask = torch.cat(masks)[back]
        self.cache = join({rows: cache for rows, (cache, _, _) in parts.items()}, self.start)

    def _read(
        self, prompts: list[Ids], opening: Ids | None = None, first: Cache | None = None
    ) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """Run the model over a few prompts: their cache, mask and last logits.

        Where all of them begin with `opening`, it is in the cache `first` already, one row for all.
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
        return cache, mask, self._forward(ids, mask, cache)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        options = dict(self.options)
        if self.takes_positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits = output.logits[:, -1].float()
        if logits[:, 0].isnan().any():
            raise UserError("the model's scores are not numbers (broken weights, or float16 overflows); check the folder")
        return logits

    def step(self, tokens: Ids) -> None:
        """Append one token to each row and compute the next logits."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        self.logits = self._forward(ids, self.mask, self.cache)

    def select(self, rows: list[int]) -> None:
        """Keep `rows`, in this order and as often as named; padding that none of them needs goes."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        spare = int(self.mask.argmax(1).min())
        for layer in self.cache.layers:
            layer.hold(index, spare, layer.length, ROOM)
        self.mask = self.mask[:, spare:].contiguous()
        self.start -= spare

    def exchange(self, sources: list[int]) -> None:
        """Give each row what row `sources[row]` has generated; both continue the same prompt."""
        moved = [row for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        to = torch.tensor(moved, device=self.mask.device)
        of = torch.tensor([sources[row] for row in moved], device=self.mask.device)
        for layer in self.cache.layers:
            for part in (layer.keys, layer.values):
                answers = part[:, :, self.start : layer.length]
                answers[to] = answers[of]


def families(prompts: list[Ids]) -> list[list[int]]:
    """The rows of `prompts` by their first tokens: each way in which a template opens is a family."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(tuple(prompt[:WORTHWHILE]), []).append(row)
    return list(found.values())


def common_opening(prompts: list[Ids]) -> Ids:
    """What all prompts begin with, such as a template's preamble, but for at least one token of each.

    None of it where there is little to win: the opening is computed once instead of once a prompt.
    """
    if len(prompts) < 2:
        return []
    low, high = min(prompts), max(prompts)
    shared = next((place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    return low[: min(shared, min(map(len, prompts)) - 1)] if shared >= WORTHWHILE else []


def groups(rows: list[int], prompts: list[Ids]) -> Iterator[list[int]]:
    """Split the rows of `prompts`, keeping their order, into runs of like length that are read at once."""
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
    """One cache of `width` columns, in which the rows of each are those that its key names, shifted to the right."""
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
                setattr(layer, name, None)  # so that no more than one layer is held twice
            buffers.append(buffer)
        joined.update(*buffers, index)
        joined.layers[index].length = width
    return joined
