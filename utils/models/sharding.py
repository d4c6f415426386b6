"""FSDP: a base model of which each GPU holds a part. The first rank reads the weights, and accelerate distributes them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from utils.console import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEEDED = {  # required settings of accelerate, as environment variables
    "FSDP_VERSION": ("fsdp_version", "2"),  # the first one has rotary frequencies in bfloat16: 0.6 rad wrong at position 511
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", "FULL_STATE_DICT"),  # an adapter is saved as one file
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("fsdp_cpu_ram_efficient_loading", "true"),  # only the first rank has weights
}


def wants_fsdp() -> bool:
    """True if accelerate's configuration names FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check() -> None:
    """Raises UserError if accelerate's FSDP configuration would train wrongly or not at all."""
    for variable, (name, wanted) in NEEDED.items():
        found = os.environ.get(variable, "")
        if found.lower() != wanted.lower():
            raise UserError(f"FSDP: {name} is {found or 'missing'}, but must be {wanted}; see scripts/accelerate/fsdp.yaml")


def loads() -> bool:
    """True for the rank that reads the base's weights."""
    return not wants_fsdp() or os.environ.get("RANK", "0") == "0"


def without_weights(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The model in `folder` for a rank that does not read the weights: with zeros that take no memory in their place.

    Buffers have their values, such as rotary frequencies, in float32 whatever `dtype` is.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    model.tie_weights()
    return model
