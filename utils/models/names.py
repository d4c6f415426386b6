"""The names of a model's tensors once transformers has loaded them: for many families they differ from the files'."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.console import say
from utils.files import write_json

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclasses.dataclass(frozen=True)
class ModelNames:
    """`stored`: for each name in the model that has one tensor of the files to itself, its name there; `joined`: for each
    that holds one tensor of the files for each expert, or several side by side (gate and up), their names, one list an
    expert; `embedding` and `head`: the names in the model of the weights of its embeddings and its output layer, "" if it
    has none. `in_order`: the names of all tensors of the model, as its layers are built."""

    stored: dict[str, str]
    embedding: str
    head: str
    in_order: tuple[str, ...] = ()
    joined: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)


def meta_model_of(config: dict[str, Any]) -> "PreTrainedModel":
    """The model that transformers builds from a configuration, without values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:  # through a file, since the library has its own notation for infinity
        write_json(Path(folder) / "config.json", config)
        read = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read)


def ask_library(config: dict[str, Any], names: list[str]) -> ModelNames:
    """The names that transformers gives to the tensors `names` of a model's files; none for an unknown family.

    Tensors that it joins otherwise than experts, or divides, have no name of their own in the model, and are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from utils.models.layers import name_of, output_layer

    try:
        model = meta_model_of(config)
    except Exception:  # the library's own checks, for unknown families or values
        say(f"transformers cannot build a {config.get('model_type')}: tensors are matched by the ends of their names")
        return ModelNames({}, "", "")
    known = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stacking = {pattern: number for c in converters if stacks(c) for number, pattern in enumerate(c.source_patterns)}
    stored: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for name in sorted(names):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if pattern is None and renamed in known:
            stored[renamed] = name
        elif pattern in stacking and renamed in known:
            expert = int(re.findall(r"\.(\d+)\.", name)[-1])
            parts.setdefault(renamed, {})[expert, stacking[pattern]] = name
    joined = {name: by_expert for name, found in parts.items() if (by_expert := in_rows(found))}
    ends = [name_of(model, layer) for layer in (model.get_input_embeddings(), output_layer(model))]
    embedding, head = (f"{end}.weight" if end else "" for end in ends)
    return ModelNames(stored, embedding, head, tuple(known), joined)


def stacks(converter: "WeightConverter") -> bool:
    """True if it stacks one tensor per expert, after concatenating several if there are several."""
    kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def in_rows(parts: dict[tuple[int, int], str]) -> list[list[str]]:
    """Names by expert and number as lists, one per expert; [] if one is missing."""
    experts, numbers = (1 + max(place) for place in zip(*parts, strict=True))
    if len(parts) != experts * numbers:
        return []
    return [[parts[expert, number] for number in range(numbers)] for expert in range(experts)]
