"""Adapters (LoRA weights): find, check, load, save."""

import dataclasses
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from utils.console import UserError, say
from utils.files import read_json, replacing, write_json
from utils.weights import Weights

if TYPE_CHECKING:  # peft takes seconds to import, and reading an adapter's files does not need it
    from peft import LoraConfig, PeftModel

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FULL_CHECKPOINT = "pytorch_model.bin"  # what alpaca-lora's runs of 2023 left in their checkpoints


def find_weights(folder: str | Path) -> Path:
    """The file with an adapter's weights. Raises UserError where the folder has none, or an empty one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of an adapter")
    for name in (*WEIGHTS, FULL_CHECKPOINT):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: holds no {' or '.join(WEIGHTS)}; name the folder of an adapter")


def open_tensors(folder: str | Path) -> tuple[Weights, dict[str, str]]:
    """An adapter's tensors, not read yet, and their names: as peft saves them, without an adapter's -> as in the file.

    Raises UserError where the file is broken, holds no LoRA weights, or is the untouched shell of a failed save.
    """
    file = find_weights(folder)
    weights = Weights(file.parent, [file])
    names: dict[str, str] = {}
    for name in weights.names:
        is_base = file.name == FULL_CHECKPOINT and "lora_" not in name and "modules_to_save" not in name
        if not is_base and ".original_module." not in name:
            plain = re.sub(r"\.(modules_to_save\.)?default(?=\.|$)", "", name).replace("modules_to_save.", "")
            if plain in names:
                raise UserError(f"{file}: {names[plain]} and {name} are one tensor; delete the one that is not meant")
            if not weights.dtype(name).is_floating_point:
                kind = str(weights.dtype(name)).removeprefix("torch.")
                raise UserError(f"{file}: {name} is of {kind}, and a LoRA of floating-point numbers; copy it again")
            names[plain] = name
    if not any("lora_" in name for name in names):
        raise UserError(f"{file}: holds no LoRA weights ({len(weights.names)} tensors); the save failed, or it is another file")
    return weights, names


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by the names peft saves them under, without an adapter's name in them; raises as above."""
    weights, names = open_tensors(folder)
    return {plain: weights.tensor(name) for plain, name in names.items()}


def read_settings(folder: str | Path) -> dict[str, Any]:
    """An adapter's settings as they are written. Raises UserError where the file is missing or describes no LoRA."""
    path = Path(folder) / "adapter_config.json"
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: does not describe a LoRA adapter; name the folder of one")
    wrong = wrong_setting(settings)
    if wrong:
        raise UserError(f"{path}: {wrong} is {str(settings.get(wrong))[:80]}, as it is for no LoRA; copy the file again")
    return settings


def wrong_setting(settings: dict[str, Any]) -> str:
    """The name of a setting that is not of the kind that a LoRA has; "" where all are."""
    for name in ("r", "lora_alpha"):
        if not is_amount(settings.get(name)):
            return name
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict) or not all(is_pattern(key) and is_amount(patterns[key]) for key in patterns):
            return name
    for name in ("target_modules", "modules_to_save"):
        names = settings.get(name) or []
        if not isinstance(names, str) and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
            return name
    return ""


def is_amount(value: Any) -> bool:
    """True for a number that a rank or an alpha can be."""
    return isinstance(value, (int, float)) and 0 < value < math.inf


def is_pattern(text: str) -> bool:
    """True for a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def read_config(folder: str | Path) -> "LoraConfig":
    """An adapter's settings for peft; keys of older or other programs that peft does not know are left out, and said.

    Raises UserError where the file is missing or describes no LoRA.
    """
    from peft import LoraConfig

    path = Path(folder) / "adapter_config.json"
    settings = read_settings(folder)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = sorted(settings.keys() - known)
    if any(settings[key] for key in unknown):
        say(f"{path}: settings unknown to peft are left out: {', '.join(key for key in unknown if settings[key])}")
    return LoraConfig(**{key: value for key, value in settings.items() if key in known})


def linear_layers(model: nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, each once, without the output layer's."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return list(
        dict.fromkeys(name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output)
    )


def check_layers(model: nn.Module, **options: Any) -> None:
    """Raises UserError where an option (None: not given; a text: a pattern) names a layer that the model has not."""
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    for option, wanted in options.items():
        missing = sorted(set(wanted or []) - names) if not isinstance(wanted, str) else []
        if missing:
            layers = ", ".join(linear_layers(model))
            raise UserError(f"--{option}: the model has no layer {', '.join(missing)}; its linear layers are {layers}")


def add(model: nn.Module, config: "LoraConfig") -> "PeftModel":
    """A fresh adapter on `model`: its weights in float32, the only ones that train (a count that is checked).

    Raises UserError where a target or a module to save is not in the model.
    """
    from peft import get_peft_model

    check_layers(model, lora_target_modules=config.target_modules, modules_to_save=config.modules_to_save)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # merging unties them, and says so
        wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trainable(wrapped)
    return wrapped


def load(model: nn.Module, folder: str | Path, config: "LoraConfig") -> "PeftModel":
    """The adapter of `folder` on `model`, with the settings `config`, to be trained on.

    Raises UserError, naming the first differences, where its tensors are not those that `config` asks for on this model.
    """
    wrapped = add(model, config)
    fill(wrapped, read_tensors(folder), Path(folder))
    return wrapped


def fill(model: "PeftModel", tensors: dict[str, torch.Tensor], source: Path, adapter: str = "default") -> None:
    """Put `tensors` into the adapter of `model` called `adapter`. Raises UserError where names or shapes differ."""
    from peft import set_peft_model_state_dict

    tensors = {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name}  # the base's own, saved along
    wanted = {name: tuple(tensor.shape) for name, tensor in state(model, adapter=adapter).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differences = [
        f"{name} is {found.get(name, 'missing')}, the model wants {wanted.get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        raise UserError(
            f"{source}: the adapter does not fit this base model and these options in {len(differences)} tensors "
            f"({'; '.join(differences[:3])}); use the base it was trained on"
        )
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)


def check_trainable(model: "PeftModel") -> None:
    """Compare the number of trainable parameters with the formula; a difference is a defect in this program."""
    from peft.utils import ModulesToSaveWrapper

    config = model.peft_config["default"]
    expected = 0
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            expected += module.r["default"] * (module.in_features + module.out_features)
            expected += module.out_features if config.use_dora else 0
        if isinstance(module, ModulesToSaveWrapper):
            expected += sum(parameter.numel() for parameter in module.modules_to_save["default"].parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable != expected or not trainable:
        raise RuntimeError(f"{trainable} parameters would be trained, the formula gives {expected}")


def save(tensors: dict[str, torch.Tensor], config: "LoraConfig", folder: str | Path, base_model: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, then read them back.

    The base is recorded as `base_model`. Raises UserError where the file on disk is not what was to be saved.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(folder / WEIGHTS[0]) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    settings: dict[str, Any] = config.to_dict()
    settings |= {"inference_mode": True, "base_model_name_or_path": base_model}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    write_json(folder / "adapter_config.json", settings)
    read = read_tensors(folder)
    if read.keys() != tensors.keys() or any(not torch.equal(read[name], tensor) for name, tensor in tensors.items()):
        raise UserError(f"{folder / WEIGHTS[0]}: what was read back differs from what was saved; check the disk")


def state(model: "PeftModel", state_dict: dict[str, Any] | None = None, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's tensors, by the names they are saved under; the frozen embeddings of the base are not among them.

    `state_dict` is the whole model's, and is given where the model itself is sharded.
    """
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, state_dict, adapter, save_embedding_layers=False)


def has_moved(tensors: dict[str, torch.Tensor]) -> bool:
    """True if any `lora_B` is not all zero, as each one is before the first step."""
    return any(tensor.any().item() for name, tensor in tensors.items() if "lora_B" in name)
