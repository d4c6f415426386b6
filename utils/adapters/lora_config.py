"""The settings of the adapter to train: from the options, its parent, and the defaults."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.adapters.adapters import config_on, read_tensors
from utils.adapters.settings import FILE, read_settings
from utils.console import say

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

DEFAULT_R, DEFAULT_ALPHA = 8, 16


def lora_config(model: "nn.Module", wanted: dict[str, Any], parent: Path | None, every_layer: bool = False) -> "LoraConfig":
    """The settings of the adapter to train: those `wanted` (None: not given), else the parent's or the defaults.

    With `every_layer` a fresh adapter is by default on all linear layers, as new knowledge requires.
    """
    from peft import LoraConfig

    from utils.adapters.targets import choose_targets

    if parent is None:
        targets = choose_targets(model, wanted["lora_target_modules"], every_layer)
        settings = {"lora_r": DEFAULT_R, "lora_alpha": DEFAULT_ALPHA} | given(wanted) | {"lora_target_modules": targets}
    else:
        settings = settings_of(parent, wanted)
        taken = [f"--{name} {shown(value)}" for name, value in settings.items() if name not in given(wanted) and value]
        if taken:
            say(f"taken from {parent}: {', '.join(taken)}")
        if (parent / FILE).is_file():
            config = config_on(model, parent)
            config.lora_dropout, config.inference_mode = wanted["lora_dropout"], False
            if config.target_parameters and config.lora_dropout:
                say(f"--lora_dropout {config.lora_dropout}: is 0 here, as peft needs it for single parameters ({parent})")
                config.lora_dropout = 0.0
            return config
        seen = f"rank {settings['lora_r']} on {', '.join(settings['lora_target_modules'])}; alpha {settings['lora_alpha']}"
        say(f"{parent}: has no adapter_config.json; its weights show {seen} is assumed")
    return LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["lora_target_modules"],
        lora_dropout=wanted["lora_dropout"],
        use_rslora=settings.get("use_rslora", False),
        use_dora=settings.get("use_dora", False),
        modules_to_save=settings.get("modules_to_save") or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def given(wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted settings that were given and must match a parent's: all but dropout, which each run chooses."""
    return {name: value for name, value in wanted.items() if name != "lora_dropout" and value not in (None, [])}


def settings_of(parent: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """A parent's settings under the options' names; for an alpaca-lora checkpoint, which has only weights, as these show
    them."""
    if (parent / FILE).is_file():
        settings = read_settings(parent)
        return {
            "lora_r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "lora_target_modules": settings.get("target_modules"),
            "use_rslora": settings.get("use_rslora", False),
            "use_dora": settings.get("use_dora", False),
            "modules_to_save": settings.get("modules_to_save") or [],
        }
    loras = {name: tensor for name, tensor in read_tensors(parent).items() if name.endswith("lora_A.weight")}
    targets = sorted({name.split(".")[-3] for name in loras})
    rank = next(iter(loras.values())).shape[0]
    alpha = wanted["lora_alpha"] or DEFAULT_ALPHA
    variants = {"use_rslora": False, "use_dora": False, "modules_to_save": []}
    return {"lora_r": rank, "lora_alpha": alpha, "lora_target_modules": targets} | variants


def as_set(value: Any) -> Any:
    """Lists and sets of names compared without their order."""
    return set(value) if isinstance(value, (list, set, tuple)) else value


def shown(value: Any) -> str:
    """A setting as written on the command line."""
    return f"[{','.join(sorted(value))}]" if isinstance(value, (list, set, tuple)) else str(value)
