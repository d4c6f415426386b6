"""Memory of training: the estimate of what autograd saves, against what is counted in a real forward pass.

    python -m benchmarks.memory

Random models of five families, each in four dtypes, with three sets of trained layers, with and without gradient
checkpointing. What is counted: the distinct tensors held by `saved_tensors_hooks` and by bitsandbytes' own contexts;
with checkpointing also what the largest layer holds while it is recomputed.
"""

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks.common import Figures, report, written
from utils.adapters import adapters
from utils.cli import option, run
from utils.models.layers import embedding_names, linear_layers
from utils.models.loading import prepare_4bit, quantization
from utils.models.placement import DeviceConfig, place
from utils.training.activations import Counter, Saved, saved_in_training, storage
from utils.training.batching import pad
from utils.training.loss import returning_loss

SIZES = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 2048}
GROUPED = SIZES | {"intermediate_size": 704, "num_key_value_heads": 2, "head_dim": 64}
FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("LlamaConfig", SIZES | {"intermediate_size": 704}),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED),
    "bloom": ("BloomConfig", SIZES | {"n_layer": 3, "n_head": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", GROUPED | {"moe_intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 2}),
}
KINDS = {
    "float32": functools.partial(place, False, False, dtype="float32"),
    "bfloat16": functools.partial(place, False, False, dtype="bfloat16"),
    "8 bit": functools.partial(place, True, False, dtype="bfloat16"),
    "4 bit": functools.partial(place, False, True, dtype="bfloat16"),
}
TRAINED = ("q and v", "all linear layers", "embeddings too")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    records: int = option(2, "records in a micro-batch", least=1)
    length: int = option(96, "tokens per record", least=2)


def main(options: Options) -> None:
    """Count and estimate all cases, and report the ratios."""
    medians: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            base = random_model(family, Path(folder, family))
            for kind, trained in cases():
                name = f"{family}, {kind}, {trained}"
                medians[name] = compare(base, kind, trained, options.records, options.length)
                print(f"{name}: {written(medians[name])}", file=sys.stderr, flush=True)
    found = [ratio for figures in medians.values() for key, ratio in figures.items() if "ratio" in key]
    ratios = {"estimated / counted, lowest": min(found), "estimated / counted, highest": max(found)}
    report(medians, ratios, ("torch", "transformers", "peft", "bitsandbytes"), **dataclasses.asdict(options))


def cases() -> Iterator[tuple[str, str]]:
    """Each dtype with each set of trained layers."""
    return ((kind, trained) for kind in KINDS for trained in TRAINED)


def random_model(family: str, folder: Path) -> Path:
    """Save a random model of a family."""
    name, sizes = FAMILIES[family]
    config: PreTrainedConfig = getattr(transformers, name)(**sizes, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def compare(base: Path, kind: str, trained: str, records: int, length: int) -> Figures:
    """Megabytes counted and estimated, and their ratio, without and with gradient checkpointing."""
    placement = KINDS[kind]()
    model = with_adapter(base, placement, trained)
    estimated = saved_in_training(model, placement, records, length)
    counted = count(model, placement, records, length)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": placement.quantize == "8bit"})
    checkpointed = count(model, placement, records, length).everything + counted.largest
    return {
        "counted_mb": counted.everything / 1e6,
        "estimated_mb": estimated.everything / 1e6,
        "ratio": estimated.everything / counted.everything,
        "checkpointed_counted_mb": checkpointed / 1e6,
        "checkpointed_estimated_mb": estimated.checkpointed / 1e6,
        "checkpointed_ratio": estimated.checkpointed / checkpointed,
    }


def with_adapter(base: Path, placement: DeviceConfig, trained: str) -> PeftModel:
    """The model in training mode, with its adapter."""
    quantized = {"quantization_config": quantization(placement)} if placement.quantize else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=placement.dtype, **quantized)
    if placement.quantize == "4bit":
        prepare_4bit(model, placement)
    linear = linear_layers(model)
    attention = [name for name in linear if name in ("q_proj", "v_proj", "query_key_value")]
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=linear if trained == "all linear layers" else attention,
        modules_to_save=embedding_names(model) if trained == "embeddings too" else None,
        task_type="CAUSAL_LM",
    )
    return adapters.add(model, config).train()


def count(model: PeftModel, placement: DeviceConfig, records: int, length: int) -> Saved:
    """What autograd holds after a forward pass."""
    ids = [torch.randint(4, 2000, (length,)).tolist() for _ in range(records)]
    batch = pad([{"input_ids": one, "labels": one} for one in ids], 1)
    autocast = functools.partial(torch.autocast, "cpu", placement.dtype, enabled=placement.autocast_dtype is not None)
    counter = Counter(model)
    counter.known |= {storage(tensor) for tensor in quantized_weights(model)}
    hooks = [layer.register_forward_hook(functools.partial(count_8bit, counter)) for layer in counter.layers]
    with returning_loss(model.get_base_model(), autocast()), autocast(), counter.counting():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return counter.saved()


def quantized_weights(model: PeftModel) -> list[torch.Tensor]:
    """bitsandbytes' 8-bit weights, which are no longer parameters after their first use."""
    states = [module.state for module in model.modules() if hasattr(module, "state")]
    return [tensor for state in states for tensor in (state.CB, state.SCB) if tensor is not None]


def count_8bit(counter: Counter, _module: nn.Module, _inputs: Any, output: Any) -> None:
    """Count what bitsandbytes' products behind a layer's `output` hold in addition to what autograd shows to its hooks."""
    seen: set[Any] = set()
    rest: list[Any] = [tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor)]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        rest += [following for following, _ in node.next_functions]
        for tensor in tree_leaves([getattr(node, "A", None), getattr(node, "tensors", None)]):
            if isinstance(tensor, torch.Tensor):
                counter.save(tensor)


if __name__ == "__main__":
    run(main, Options)
