"""A base model over several devices: layers on each GPU, in main memory and on the disk, as the library's hooks serve them."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from utils.console import UserError, say
from utils.models.layers import name_of, output_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # its warnings are replaced by our own notices

SHARE = 0.8  # of a device's free memory; the rest is for activations, keys and values
PLACES = {"cpu": "in main memory", "disk": "on the disk"}


def room() -> dict[int | str, int]:
    """Bytes that weights may take on each GPU, by number, and in main memory ("cpu"); the rest goes to disk."""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    free: dict[int | str, int] = {card: torch.cuda.mem_get_info(card)[0] for card in cards}
    free["cpu"] = psutil.virtual_memory().available
    return {place: int(size * SHARE) for place, size in free.items()}


def place_of(name: str, device_map: dict[str, Any]) -> str:
    """Where the device map puts the tensor `name`, in words."""
    parts = name.split(".")
    prefixes = (".".join(parts[:size]) for size in range(len(parts), -1, -1))
    device = next(device_map[prefix] for prefix in prefixes if prefix in device_map)
    return PLACES.get(str(device)) or f"on {f'cuda:{device}' if isinstance(device, int) else device}"


def tell(model: "PreTrainedModel", base_model: str) -> None:
    """Print where the weights are. Raises UserError if only the disk had room for the embeddings."""
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:  # the library keeps no map if one device holds everything
        return say(f"{base_model}: all of its weights are on {model.device}")
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        place = place_of(name, device_map)
        sizes[place] = sizes.get(place, 0) + parameter.numel() * parameter.element_size()
    slow = "; weights that are not on a computing device are read for each pass" if offloaded(model) else ""
    say(f"{base_model}: {', '.join(f'{size / 1e9:.2f} GB {place}' for place, size in sizes.items())}{slow}")
    if model.get_input_embeddings() in offloaded(model):
        raise UserError(f"{base_model}: no device has room for its embeddings; close other programs, or give --load_4bit")


def offloaded(model: nn.Module) -> list[nn.Module]:
    """The layers whose weights are read from main memory or the disk for each pass."""
    return [module for module in model.modules() if getattr(hook_of(module), "offload", False)]


def hook_of(module: nn.Module) -> Any:
    """The hook with which accelerate brings a layer's weights and inputs together; None if there is none."""
    return getattr(module, "_hf_hook", None)


@contextlib.contextmanager
def shown_where_computed(model: nn.Module) -> Iterator[None]:
    """While the block runs, weights that are read for each pass appear to be on the device that computes with them.

    An adapter is put on the device of its layer's weights, which otherwise would be none. The stand-ins have no values and
    take no memory. Afterwards they are frozen.
    """
    kept = [(module, dict(module._parameters)) for module in offloaded(model)]
    for module, parameters in kept:
        for name, parameter in parameters.items():
            if parameter is not None:
                empty = torch.zeros((), dtype=parameter.dtype, device=hook_of(module).execution_device)
                module._parameters[name] = nn.Parameter(empty.expand(parameter.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)
            module.requires_grad_(False)


def check_adapter(model: "PreTrainedModel", trained_whole: list[str], use_dora: bool) -> None:
    """Raises UserError if an adapter would need the values of weights that are read for each pass, or train them."""
    layers = offloaded(model)
    if layers and use_dora:
        raise UserError(
            "--use_dora: needs weights that --device_map auto left in main memory or on disk; leave one of them out"
        )
    whole = [name_of(model, layer) for layer in (model.get_input_embeddings(), output_layer(model)) if layer in layers]
    for name in whole:
        if name.split(".")[-1] in trained_whole:
            raise UserError(
                f"--modules_to_save {name.split('.')[-1]}: --device_map auto left it in main memory or on the disk, "
                "where it cannot be trained; train other layers, or give --load_4bit"
            )
