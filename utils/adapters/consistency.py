"""Whether an adapter's settings and its tensors belong together: the layers, biases and magnitudes that they speak of."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from utils.console import UserError

PREFIX = "base_model.model."
PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|A|B|magnitude_vector)(?P<bias>\.bias)?(?:\.weight)?$")
TOKENS = ".token_adapter.trainable_tokens_delta"
LAYER = r".*?\.[^.]*\.(\d+)\."


def check(folder: str | Path, settings: dict[str, Any], names: Iterable[str]) -> None:
    """Raises UserError if the tensors `names` of an adapter do not match its settings, or are biases that only peft can use."""
    found = [name.removeprefix(PREFIX) for name in names]
    parts = [match for match in map(PART.match, found) if match]
    modules = sorted({match["module"] for match in parts})
    with_magnitude = {match["module"] for match in parts if match["part"] == "magnitude_vector"}
    why = ""
    if not settings.get("target_parameters"):
        other = next((module for module in modules if not is_target(settings, module)), "")
        why = f"its weights have a LoRA on {other}, its settings leave it out" if other else ""
    if any(match["bias"] for match in parts) and not settings.get("lora_bias"):
        why = "its weights have biases of their own, its settings leave them out (lora_bias)"
    if len(with_magnitude) != (len(modules) if settings.get("use_dora") else 0):
        why = f"its settings have use_dora {str(bool(settings.get('use_dora'))).lower()}, its weights do not match"
    if any(name.endswith(TOKENS) for name in found) != bool(settings.get("trainable_token_indices")):
        why = "its settings and its weights differ in trainable_token_indices"
    if why:
        raise UserError(f"{folder}: {why}; its two files do not belong together, download both again")
    biases = own_biases(settings.get("modules_to_save"), found)
    others = sorted({name.rpartition(".")[0] for name in biases} - set(modules))
    why = f"changes biases of layers without a LoRA, too ({', '.join(others[:3])})" if others else ""
    if biases and any("lora_embedding" in name for name in found):
        why = "changes the base's biases and has a LoRA on the embeddings"
    if biases and settings.get("use_dora"):
        why = "changes the base's biases beside DoRA"
    if why:
        raise UserError(f"{folder}: {why}, which cannot be switched; merge it with peft's merge_and_unload")


def own_biases(saved: Collection[str] | None, names: Iterable[str]) -> dict[str, str]:
    """The base's own biases that an adapter has as it trained them (`bias: lora_only`): as in the base -> as in the adapter.

    `saved` are its `modules_to_save`, whose biases are not among them.
    """
    found = {name: name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in names if ".lora_" not in name}
    return {plain: name for name, plain in found.items() if plain.endswith(".bias") and not is_within(saved, plain)}


def unnamed(saved: Collection[str] | None, tensors: dict[str, Any]) -> dict[str, Any]:
    """The weights of whole layers among an adapter's tensors that its `modules_to_save` do not name, as the base calls them."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return {
        name: tensor
        for name, tensor in found.items()
        if name.endswith(".weight") and ".lora_" not in name and not is_within(saved, name)
    }


def is_within(saved: Collection[str] | None, name: str) -> bool:
    """True if the tensor `name` lies in one of the modules `saved`."""
    return any(f".{module}." in f".{name}" for module in saved or [])


def is_target(settings: dict[str, Any], module: str) -> bool:
    """True if an adapter's settings put a LoRA on `module`, as peft reads them."""
    targets = settings.get("target_modules")
    if targets is None:
        return True  # those of peft's own list for the family
    if named(settings.get("exclude_modules") or [], module):
        return False
    if targets == "all-linear" or isinstance(targets, str) or module in targets:
        return targets == "all-linear" or named(targets, module)
    layers = settings.get("layers_to_transform")
    if layers in (None, []):
        return named(targets, module)
    patterns = settings.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in ([patterns] if isinstance(patterns, str) else patterns)] or [LAYER]
    number = next((int(match[1]) for pattern in patterns if (match := re.match(pattern, module))), None)
    return named(targets, module) and number in (layers if isinstance(layers, list) else [layers])


def named(names: list[str] | str, module: str) -> bool:
    """True if `module` is one of `names`, or ends in one from a dot on, or is what the pattern `names` means."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(f".{module}".endswith(f".{name}") for name in names)


def missing_layer(settings: dict[str, Any], modules: Iterable[str], beside: Iterable[str], config: dict[str, Any]) -> str:
    """A layer of the base on which an adapter's settings put a LoRA that it lacks, having them on `modules`; "" if none.

    The library is asked, which takes seconds, where one of the layers `beside` those, by their names in the base's files,
    could be it.
    """
    from utils.adapters.targets import TRAINABLE
    from utils.models.layers import LINEAR, output_layer
    from utils.models.names import meta_model_of

    targets, ends = settings.get("target_modules") or [], sorted({module.rpartition(".")[2] for module in modules})
    if not any(named(targets, layer) or (isinstance(targets, str) and named(ends, layer)) for layer in beside):
        return ""
    try:
        model = meta_model_of(config)
    except Exception:  # the library's own checks, of a family or of values that it does not know
        return ""
    own, kinds = (output_layer(model), LINEAR) if targets == "all-linear" else (None, TRAINABLE)
    kept = settings.get("modules_to_save") or []
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not own and is_target(settings, name) and not named(kept, name)
    }
    lost = found - set(modules) if found & set(modules) else set()
    return min(lost, default="")
