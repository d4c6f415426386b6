"""One forward pass for many texts, each with its own adapter: they share the weights, but not attention.

Every token is a row. Linear layers see all rows at once; attention is computed for each text over its own cache, so
there is no padding, a text joins or leaves without copying, and no result depends on the length of other texts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from utils.adapters import switching
from utils.console import say
from utils.inference.answerers import BASE
from utils.inference.engine import Engine
from utils.inference.kv_cache import GrowingLayer, Ids

ATTENTION = "text_by_text"  # the name of `attend` in transformers
ALIKE = 16  # with this many rows or more, a row's bits do not depend on the others (with fewer, oneMKL uses other kernels)
PROBE = 12  # tokens in the texts of the check
CLOSE = 1e-2  # largest difference of log-probabilities, many times the rounding error in bfloat16


class Text:
    """A growing text: `ids` are the tokens whose keys and values are in its `cache`."""

    def __init__(self, ids: Sequence[int] = (), cache: Cache | None = None):
        self.ids, self.cache = list(ids), cache or Cache(layer_class_to_replicate=GrowingLayer)

    @property
    def columns(self) -> int:
        """For how many tokens its cache takes memory."""
        return self.cache.layers[0].keys.shape[2] if self.cache.layers else 0

    def opening(self, length: int) -> "Text":
        """A copy of its first tokens."""
        copy = Text(self.ids[:length])
        for index, layer in enumerate(self.cache.layers):
            copy.cache.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
        return copy

    def cut(self, length: int) -> None:
        """Drop all but its first tokens."""
        del self.ids[length:]
        for layer in self.cache.layers:
            layer.length = length


@dataclasses.dataclass(frozen=True)
class Part:
    """New tokens of a text, and the adapter they are computed with (or BASE)."""

    text: Text
    ids: Ids
    adapter: str


@dataclasses.dataclass
class Segment:
    """The rows of one text in a forward pass; `cache` is None for padding rows."""

    cache: Cache | None
    start: int
    stop: int
    masks: dict[tuple[int | None, torch.device], torch.Tensor | None] = dataclasses.field(default_factory=dict)

    def mask(self, total: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Which of `total` columns each row sees: (rows, columns); None for all. Made once for each `window` and device."""
        made = window, device
        if made not in self.masks:
            count = self.stop - self.start
            if count == 1 and (window is None or total <= window):
                self.masks[made] = None
            else:
                seen = torch.ones(count, total, dtype=torch.bool, device=device).tril(total - count)
                self.masks[made] = seen if window is None else seen.triu(total - count - window + 1)
        return self.masks[made]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Sequence[Segment] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it, (tokens, heads, 1, dim) each; returns (tokens, 1, heads, dim).

    The rows of each segment are appended to its cache and attend to what is in it.
    """
    query, key, value = query.transpose(0, 2), key.transpose(0, 2), value.transpose(0, 2)  # (1, heads, tokens, dim)
    outputs = []
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        asked = query[:, :, rows]
        if segment.cache is None:
            outputs.append(torch.zeros_like(asked[..., : value.shape[-1]]))
            continue
        keys, values = segment.cache.update(key[:, :, rows], value[:, :, rows], module.layer_idx)  # type: ignore[arg-type]
        mask = segment.mask(keys.shape[2], sliding_window, keys.device)
        if mask is None:  # one row: the heads that share keys are rows of one matrix product
            grouped = asked.reshape(1, keys.shape[1], -1, asked.shape[-1])
            output = scaled_dot_product_attention(grouped, keys, values, scale=scaling).view(1, asked.shape[1], 1, -1)
        else:
            output = scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
        outputs.append(output)
    return torch.cat(outputs, 2).permute(2, 0, 1, 3), None


AttentionInterface.register(ATTENTION, attend)


class SharedForward:
    """Computes texts of one engine together.

    `works`: whether the model gives the same scores this way as alone; `takes_turns`: adapters that do not when mixed.
    Both are found by trying: families and kinds of adapters differ in what they read besides the texts.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.names: list[str] | None = None  # peft's name of each row's adapter, while several are mixed
        self.lasts: torch.Tensor | None = None  # the rows whose scores are needed, during a forward pass
        self.hooked: set[nn.Module] = set()
        self.takes_turns: set[str] = set()
        self.hook()
        self.works = self.agrees(BASE)
        if not self.works:
            say(f"{engine.base_model}: {engine.config.model_type} cannot compute several answers at once; they take turns")
        for one in engine.answerers:
            self.admit(one.name)

    def admit(self, name: str) -> None:
        """Find out whether an adapter can be computed together with others."""
        self.hook()
        if self.works and name != BASE and not self.agrees(name):
            self.takes_turns.add(name)
            say(f"{name}: cannot be mixed with other adapters in one batch; its answers take turns with theirs")

    def hook(self) -> None:
        """Tell every layer with adapters which adapter each row uses, and the output layer which rows are needed."""
        self.head = self.engine.model.get_output_embeddings()

        def named(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            names = self.names
            if module is self.head and self.lasts is not None:
                args = (args[0][self.lasts], *args[1:])
                names = names and [names[row] for row in self.lasts.tolist()]
            if names and isinstance(module, AuxiliaryTrainingWrapper):  # fails for names of adapters that do not change it
                names = [name if name in module._adapters else "__base__" for name in names]
            return args, kwargs | ({"adapter_names": names} if names and takes_names(module) else {})

        for module in self.engine.model.modules():
            if (module is self.head or takes_names(module)) and module not in self.hooked:
                self.hooked.add(module)
                module.register_forward_pre_hook(named, with_kwargs=True)

    @torch.inference_mode()
    def __call__(self, parts: list[Part], exact: bool) -> torch.Tensor:
        """Append `parts` to their texts; the scores after the last token of each, (parts, vocabulary) float32.

        With `exact`, a text's scores are bit for bit those it would have alone, at the price of some more rows.
        """
        ids: Ids = []
        positions: list[int] = []
        names: list[str] = []
        segments: list[Segment] = []
        for part in parts:
            segments.append(Segment(part.text.cache, len(ids), len(ids) + len(part.ids)))
            positions += range(len(part.text.ids), len(part.text.ids) + len(part.ids))
            ids += part.ids
            names += [part.adapter] * len(part.ids)
        lasts = [segment.stop - 1 for segment in segments]
        if exact:
            for name in sorted(set(names)):
                missing = max(0, ALIKE - names.count(name))
                segments.append(Segment(None, len(ids), len(ids) + missing))
                ids, positions, names = ids + [0] * missing, positions + [0] * missing, names + [name] * missing
            lasts += [lasts[0]] * max(0, ALIKE - len(lasts))
        scores = self.compute(ids, positions, names, lasts, segments)
        for part in parts:
            part.text.ids += part.ids
        return scores[: len(parts)].float()

    def compute(
        self, ids: Ids, positions: list[int], names: list[str], lasts: list[int], segments: list[Segment]
    ) -> torch.Tensor:
        """Run the model once; afterwards its attention and the rows' adapters are reset."""
        model = self.engine.model
        config = model.config.get_text_config()
        before = config._attn_implementation
        self.lasts = torch.tensor(lasts, device=model.device)
        if len(set(names)) > 1:
            self.engine.use(next(name for name in names if name != BASE))  # any one: each row's own name takes precedence
            self.names = ["__base__" if name == BASE else switching.key_of(name) for name in names]
        else:
            self.engine.use(names[0])
        try:
            config._attn_implementation = ATTENTION
            rows, places = torch.tensor([ids, positions], device=model.device)[:, :, None]
            output = model(input_ids=rows, position_ids=places, use_cache=False, segments=segments)
        finally:
            config._attn_implementation, self.lasts, self.names = before, None, None
        return output.logits[:, -1]

    @torch.inference_mode()
    def agrees(self, name: str) -> bool:
        """True if an adapter's scores, computed with others here, match those of the model as transformers runs it."""
        vocabulary = self.engine.model.get_input_embeddings().weight.shape[0]
        texts = [[(7 * place + offset) % vocabulary for place in range(PROBE)] for offset in (11, 5, 3)]
        mine, others = (texts[0], texts[1]), texts[2]
        try:
            known = [Text(), Text(), Text()]
            self([Part(known[0], mine[0][:5], name), Part(known[2], others[:7], BASE)], exact=False)
            parts = [Part(known[0], mine[0][5:], name), Part(known[2], others[7:], BASE), Part(known[1], mine[1], name)]
            ours = self(parts, exact=False).log_softmax(1)[[0, 2]]
        except Exception:  # a family or an adapter may fail in any way
            return False
        self.engine.use(name)
        alone = self.engine.model(input_ids=torch.tensor(list(mine), device=self.engine.model.device)).logits[:, -1]
        return bool((ours - alone.float().log_softmax(1)).abs().max() < CLOSE)


def takes_names(module: nn.Module) -> bool:
    """True for the layers that can use a different adapter for each row (peft)."""
    return isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))
