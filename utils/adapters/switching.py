"""Several adapters on one base, for answering: attached once, switched in milliseconds, merged in memory and back."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from utils.adapters.adapters import config_on, fill, read_tensors
from utils.console import UserError, reason
from utils.models.layers import linear_layers
from utils.models.spread import shown_where_computed

FULL = (torch.float32, torch.bfloat16, torch.float16)


def attach(model: PreTrainedModel, folders: dict[str, Path], base_model: str, wrapped: PeftModel | None = None) -> PeftModel:
    """Attach the adapters in `folders`, by name, to `model`, frozen; `wrapped` is the model with those it already has.

    Raises UserError if one is broken, or was trained on another kind of model.
    """
    for name, folder in folders.items():
        tensors = read_tensors(folder)
        config = config_on(model, folder)
        config.inference_mode = True
        config.init_lora_weights = True  # all values are loaded, so none need be initialized
        try:
            with shown_where_computed(model):
                if wrapped is None:
                    wrapped = PeftModel(model, config, adapter_name=key_of(name))
                else:
                    wrapped.add_adapter(key_of(name), config)
        except ValueError as error:  # what peft raises for missing layers
            layers = ", ".join(linear_layers(model))
            raise UserError(
                f"{folder}: does not fit {base_model} ({reason(error)}), whose layers are {layers}; "
                "use the base it was trained on"
            ) from None
        fill(wrapped, tensors, folder, key_of(name))
    assert wrapped is not None
    return wrapped.eval()


def key_of(name: str) -> str:
    """A name that peft allows: without dots, and unlike anything in a tensor's name."""
    return f"adapter_{name.encode().hex()}"


def activate(model: PeftModel, name: str | None) -> None:
    """Compute with the adapter `name` from now on; with None, as the base alone."""
    if name is None:
        model.base_model.disable_adapter_layers()
        return
    model.base_model.enable_adapter_layers()
    if model.active_adapters != [key_of(name)]:
        model.set_adapter(key_of(name), inference_mode=True)


def can_merge(layer: LoraLayer, key: str) -> bool:
    """False for a layer whose weights are quantized or not on the device, or that lacks a bias that the adapter has."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    is_plain = type(weight) is nn.Parameter and getattr(weight, "dtype", None) in FULL and not getattr(weight, "is_meta", True)
    return is_plain and not (layer.lora_bias.get(key) and getattr(base, "bias", None) is None)


def layers_to_merge(model: PeftModel, name: str) -> list[LoraLayer]:
    """The layers into whose weights the adapter `name` can be merged."""
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer) and can_merge(layer, key_of(name))]


def merged_bytes(model: PeftModel, name: str) -> int:
    """The bytes of the merged weights that `merged` creates."""
    return sum(layer.get_base_layer().weight.nbytes for layer in layers_to_merge(model, name))


@contextlib.contextmanager
def merged(model: PeftModel, name: str) -> Iterator[None]:
    """While the block runs, the adapter `name` is merged into the base's weights, in layers that allow it. Afterwards the
    base's own tensors are back, untouched (subtracting would leave rounding errors). A merged weight is a new tensor, so
    that a weight shared by two layers changes only in the trained one.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    layers = layers_to_merge(model, name)
    try:
        for layer in layers:
            base = layer.get_base_layer()
            for part in ("weight", "bias"):
                original = getattr(base, part, None)
                if isinstance(original, nn.Parameter):
                    kept.append((base, part, original))
                    setattr(base, part, nn.Parameter(original.detach().clone(), requires_grad=False))
            layer.merge(adapter_names=[key_of(name)])
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for base, part, original in kept:
            setattr(base, part, original)
