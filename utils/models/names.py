"""What transformers calls the tensors of a model's files once it is loaded: it renames those of many families."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from utils.console import say
from utils.files import write_json


@dataclasses.dataclass(frozen=True)
class ModelNames:
    """`stored`: for each name in the model that has one tensor of the files to itself, its name there; `embedding` and
    `head`: the names in the model of the weights of its embeddings and its output layer, "" if it has none. `in_order`:
    the names of all tensors of the model, as its layers are built."""

    stored: dict[str, str]
    embedding: str
    head: str
    in_order: tuple[str, ...] = ()


def ask_library(config: dict[str, Any], names: list[str]) -> ModelNames:
    """The names that transformers gives to the tensors `names` of a model's files; of a family that it does not know, none.

    Tensors that it joins or divides, such as those of experts, have no name of their own in the model, and are left out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from utils.models.layers import name_of, output_layer

    try:
        with tempfile.TemporaryDirectory() as folder:  # read as a file, in which the library writes infinity in its own way
            write_json(Path(folder) / "config.json", config)
            read = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(read)
    except Exception:  # the library's own checks, of a family or of values that it does not know
        say(f"transformers does not build a {config.get('model_type')}: tensors are found by the ends of their names")
        return ModelNames({}, "", "")
    known = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stored = {}
    for name in sorted(names):
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converter is None and renamed in known:
            stored[renamed] = name
    ends = [name_of(model, layer) for layer in (model.get_input_embeddings(), output_layer(model))]
    embedding, head = (f"{end}.weight" if end else "" for end in ends)
    return ModelNames(stored, embedding, head, tuple(known))
