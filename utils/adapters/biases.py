"""Biases that an adapter brings: which bases can have them, and the base's own as it trained them, put beside these."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.adapters.consistency import PART, PREFIX, own_biases
from utils.console import UserError
from utils.files import read_json
from utils.models.names import meta_model_of

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import LoraConfig, PeftModel

SWITCHES = ("attention_bias", "mlp_bias")


def built_by(config: dict[str, Any], switches: dict[str, bool]) -> dict[str, tuple[int, ...]]:
    """The biases of the model of a configuration with some switches on, by name; {} for a family that is not known."""
    try:
        model = meta_model_of(config | switches)
    except Exception:  # the library's own checks, of a family or of values that it does not know
        return {}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name.endswith(".bias")}


def switches_for(config: dict[str, Any], names: Iterable[str], folder: str | Path) -> dict[str, bool]:
    """The switches of a base's configuration that give its layers the biases that an adapter, with tensors `names`, has.

    As few as do; none where the base has these biases. Raises UserError if the base cannot have them.
    """
    matches = [PART.match(name.removeprefix(PREFIX)) for name in names]
    wanted = {f"{match['module']}.bias" for match in matches if match and match["bias"]}
    off = {name: True for name in SWITCHES if not config.get(name)}
    for switches in ({}, *({name: True} for name in off), off):
        if wanted <= (wanted and built_by(config, switches).keys()):
            return switches
    layer = min(wanted - built_by(config, off).keys()).removesuffix(".bias")
    raise UserError(f"{folder}: {layer} has a bias, the base's has none; it cannot be merged, use it through peft")


def check_base(folder: str | Path, names: Iterable[str], base: Path) -> None:
    """Raises UserError if an adapter with tensors `names` has biases that the model in `base` cannot have."""
    if (base / "config.json").is_file():
        switches_for(read_json(base / "config.json"), names, folder)


def beside_base(config: "LoraConfig", names: Iterable[str]) -> "LoraConfig":
    """An adapter's settings with the base's own biases, if it has any, as biases of its own, which can be switched."""
    if own_biases(config.modules_to_save, names):
        config.lora_bias, config.init_lora_weights = True, True  # peft has the first only with the second
    config.bias = "none"
    return config


def as_its_own(model: "PeftModel", tensors: dict[str, torch.Tensor], adapter: str, source: Path) -> dict[str, torch.Tensor]:
    """`tensors` with the base's own biases as what `adapter` adds to them; layers for which it has none are left without.

    Raises UserError if the base's biases are of other shapes.
    """
    config, modules = model.peft_config[adapter], dict(model.named_modules())
    if not config.lora_bias:
        return tensors
    tensors = dict(tensors)
    for plain, name in own_biases(config.modules_to_save, list(tensors)).items():
        layer, tuned = modules[f"{PREFIX}{plain.removesuffix('.bias')}"], tensors.pop(name)
        bias = getattr(layer.get_base_layer(), "bias", None)
        if bias is None or bias.shape != tuned.shape:
            shape = tuple(tuned.shape)
            raise UserError(f"{source}: changes {plain} of {shape}, which the base lacks; use the base it was trained on")
        before = torch.zeros_like(tuned) if bias.is_meta else bias.detach().cpu()
        change = (tuned.float() - before.float()) / layer.scaling[adapter]
        tensors[f"{PREFIX}{plain.removesuffix('bias')}lora_B.bias"] = change
    for name, layer in modules.items():
        if f"{name}.lora_B.bias" not in tensors and getattr(layer, "lora_bias", {}).get(adapter):
            layer.lora_B[adapter].bias, layer.lora_bias[adapter] = None, False
    return tensors
