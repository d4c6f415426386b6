"""The target layers of an adapter: those that the options name, checked against the model, or the defaults."""

import re

from torch import nn

from utils.adapters.settings import is_pattern
from utils.console import UserError, say
from utils.models.layers import LINEAR, linear_layers, on_language_part

ALL_LINEAR = "all-linear"
TRAINABLE = (*LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d)  # layers that can have a LoRA
DEFAULTS = (  # the first of these that a model has is used
    ["q_proj", "v_proj"],
    ["q_b_proj", "kv_b_proj"],  # DeepSeek's latent attention, and its smaller models
    ["q_b_proj", "kv_proj"],
    ["q_proj", "kv_b_proj"],
    *([name] for name in ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "att_proj")),  # BLOOM, Phi-3, GPT-2, MPT, …
    ["Wq", "Wv"],  # CTRL
    ["in_proj", "x_proj"],  # Mamba, whose kernels for out_proj and conv1d would ignore a LoRA
    ["in_proj"],
)


def check_layers(model: nn.Module, targets: list[str] | str | None, modules_to_save: list[str] | None) -> None:
    """Raises UserError if --lora_target_modules or --modules_to_save names layers that the model lacks, or that cannot be
    trained that way.

    A target is the end of a layer's name after a dot or, if a text, a pattern for whole names; "all-linear" always exists.
    """
    modules = dict(model.named_modules())
    layers = f"its linear layers are {', '.join(linear_layers(model))}"
    for name in modules_to_save or []:
        found = [module for key, module in modules.items() if is_named(key, name)]
        if not found:
            raise UserError(f"--modules_to_save: the model has no layer {name}; {layers}")
        if any(isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in found):
            raise UserError(f"--modules_to_save {name}: is a list of layers, not a layer; name layers in it; {layers}")
        if not any(True for module in found for _ in module.parameters()):
            raise UserError(f"--modules_to_save {name}: has no weights to train; leave it out; {layers}")
    if targets is None or targets == ALL_LINEAR:
        return
    for target in [targets] if isinstance(targets, str) else targets:
        found = [key for key in modules if key and (re.fullmatch(target, key) if target is targets else is_named(key, target))]
        if not found:
            raise UserError(f"--lora_target_modules: the model has no layer {target}; {layers}")
        wrong = next((key for key in found if not isinstance(modules[key], TRAINABLE)), "")
        if wrong:
            kind = type(modules[wrong]).__name__
            raise UserError(f"--lora_target_modules {target}: {wrong} is a {kind}, which cannot have a LoRA; {layers}")
        if any(is_named(part, name) for key in found for part in parts_of(key) for name in modules_to_save or []):
            raise UserError(f"--lora_target_modules and --modules_to_save: {target} is in both; name it in one of them")


def is_named(key: str, name: str) -> bool:
    """True if `name` is a layer's whole name, or its end after a dot."""
    return key == name or key.endswith(f".{name}")


def parts_of(key: str) -> list[str]:
    """The names of a layer and of all modules that contain it."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def as_targets(names: list[str]) -> list[str] | str:
    """What --lora_target_modules means: names, or one pattern as a text, which may be "all-linear".

    Raises UserError if a pattern is not a regular expression, or is not alone.
    """
    patterns = [name for name in names if name.lower() == ALL_LINEAR or re.search(r"[^\w.-]", name)]
    if not patterns:
        return names
    if len(names) > 1:
        raise UserError(f"--lora_target_modules {','.join(names)}: {patterns[0]} is a pattern; give it alone, or only names")
    if not is_pattern(names[0]):
        raise UserError(f"--lora_target_modules {names[0]}: not a regular expression; write one such as '.*_proj', or names")
    return ALL_LINEAR if names[0].lower() == ALL_LINEAR else names[0]


def choose_targets(model: nn.Module, named: list[str] | str, every_layer: bool) -> list[str] | str:
    """The targets `named`, or else q_proj and v_proj or the family's equivalents, which are printed.

    With `every_layer` the default is all linear layers. In a multimodal model, defaults and "all-linear" mean layers of its
    language model.
    """
    layers = linear_layers(model)
    if named:
        pattern = on_language_part(model, layers) if named == ALL_LINEAR else named
        return pattern if isinstance(pattern, str) else named
    if every_layer:
        say(f"raw text: the adapter goes on all linear layers, {', '.join(layers)} (--lora_target_modules chooses others)")
        return on_language_part(model, layers)
    names = next((names for names in DEFAULTS if set(names) <= set(layers)), layers)
    targets = on_language_part(model, names)
    if names != DEFAULTS[0]:
        say(f"this model has no q_proj and v_proj: the adapter goes on {', '.join(names)}")
    if isinstance(targets, str):
        say(f"the adapter goes on the language model only: {targets}")
    return targets
