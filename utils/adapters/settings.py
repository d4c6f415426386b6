"""An adapter's settings (`adapter_config.json`): one reader for training, merging, answering and the page."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.console import UserError, reason, say_once
from utils.files import read_json

if TYPE_CHECKING:  # peft takes seconds to import, and merging does not need it
    from peft import LoraConfig

FILE = "adapter_config.json"
UNSUPPORTED = {  # settings with which an adapter is more than a change of weights, or changes other weights on loading
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it is active only in parts of a text",
    "use_qalora": "it groups inputs for a quantized base",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "it truncates the base's weights on loading",
    "arrow_config": "it chooses among experts",
    "monteclora_config": "its weights are sampled",
    "megatron_config": "it belongs to Megatron's layers",
    "velora_config": "it keeps compressed activations beside its matrices",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights, or prefixes of them
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")  # these only choose an adapter's initial values
OTHER_SETTINGS = {  # known to peft, without effect on a saved adapter
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
}
SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
UNBOUNDED, MOST_REPETITIONS = r"[*+]|\{\d*,", 6
TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def read_settings(folder: str | Path) -> dict[str, Any]:
    """An adapter's settings; null ones are left out, since they mean peft's defaults, and whole numbers are int. Unknown
    settings are also left out, and printed if they are on. Raises UserError if the file is missing, describes no LoRA, has
    an invalid value, or describes a LoRA for a changed base.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; name the folder of an adapter")
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: does not describe a LoRA adapter; name the folder of one")
    settings = {name: as_written(value) for name, value in settings.items()}
    wrong = wrong_setting(settings)
    if wrong:
        raise UserError(f"{path}: invalid value {str(settings.get(wrong))[:80]} for {wrong}; download the file again")
    for setting, why in UNSUPPORTED.items():
        if settings.get(setting) not in (None, False, []):  # {} means on, with default settings
            raise UserError(f"{folder}: cannot be used here, since {why} ({setting}); use it through peft")
    written = settings.get("init_lora_weights")
    start = written.lower() if isinstance(written, str) else ""  # peft takes some of them in any case
    if start.startswith(CHANGES_BASE):
        fix = "save it with peft's path_initial_model_for_weight_conversion, which converts it to one for the unchanged base"
        if start.startswith("loftq"):
            fix = "save that base too, set init_lora_weights to true here, and use both together"
        raise UserError(f"{folder}: belongs to a base changed by {written}; {fix}")
    settings |= {"init_lora_weights": start} if start else {}
    if settings.get("loftq_config") and settings.get("base_model_name_or_path"):
        say_once(f"{folder}: was made by LoftQ, and fits only the base changed by it: {settings['base_model_name_or_path']}")
    unknown = sorted(name for name in settings.keys() - KINDS.keys() - UNSUPPORTED.keys() - OTHER_SETTINGS if settings[name])
    if unknown:
        say_once(f"{path}: unknown settings are left out: {', '.join(unknown)}")
    known = KINDS.keys() | OTHER_SETTINGS - {"runtime_config"}
    return {name: value for name, value in settings.items() if value is not None and name in known}


def as_written(value: Any) -> Any:
    """A value with 8.0 read as 8, also in a mapping: programs not in Python write whole numbers like that."""
    if isinstance(value, dict):
        return {key: as_written(inner) for key, inner in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def wrong_setting(settings: dict[str, Any]) -> str:
    """The name of a setting with an invalid value; "" if there is none."""
    if settings.get("target_modules") == [] and not any(map(settings.get, ("target_parameters", "trainable_token_indices"))):
        return "target_modules"
    for name, is_right in KINDS.items():
        value = settings.get(name)
        if not is_right(value) and (value is not None or name in ("r", "lora_alpha")):
            return name
    return ""


def is_whole(value: Any) -> bool:
    """True for an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_rank(value: Any) -> bool:
    """True for an integer of at least 1."""
    return is_whole(value) and value > 0


def is_amount(value: Any) -> bool:
    """True for a valid alpha."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def is_pattern(text: Any) -> bool:
    """True for a regular expression that is matched in a bounded time."""
    try:
        re.compile(text)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return isinstance(text, str) and not may_take_forever(text)


def may_take_forever(pattern: str) -> bool:
    """True if a group is repeated that holds a repetition or a choice, or many repetitions follow each other: to find that a
    name does not match, Python would try all ways to divide it among these."""
    pattern = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)  # each stands for one character

    def repetitions(text: str) -> int:
        return max(len(re.findall(UNBOUNDED, part)) for part in text.split("|"))

    while group := re.search(rf"\(([^()]*)\)({UNBOUNDED})?", pattern):
        inner, repeated = group[1], group[2] or ""
        if repeated and (repetitions(inner) or "|" in inner):
            return True
        pattern = pattern[: group.start()] + "x" + "*" * repetitions(inner) + repeated + pattern[group.end() :]
    return repetitions(pattern) > MOST_REPETITIONS


def is_names(value: Any) -> bool:
    """True for a list of names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_numbers(value: Any) -> bool:
    """True for a list of integers of at least 0."""
    return isinstance(value, list) and all(map(is_whole, value))


def patterns_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check for a mapping from patterns to values for which `is_right` holds."""
    return lambda value: isinstance(value, dict) and all(is_pattern(key) and is_right(value[key]) for key in value)


def is_initialization(value: Any) -> bool:
    """True for a way to initialize adapters: by name, or one of peft's two defaults."""
    named = isinstance(value, str) and (value.lower() in KEEPS_BASE or value.lower().startswith(CHANGES_BASE))
    return named or isinstance(value, bool)


KINDS: dict[str, Callable[[Any], bool]] = {
    "r": is_rank,
    "lora_alpha": is_amount,
    "lora_dropout": lambda value: value == 0 or (is_amount(value) and value <= 1),
    "rank_pattern": patterns_of(is_rank),
    "alpha_pattern": patterns_of(is_amount),
    "target_modules": lambda value: is_names(value) or is_pattern(value),
    "exclude_modules": lambda value: is_names(value) or is_pattern(value),
    "modules_to_save": is_names,
    "target_parameters": is_names,
    "layers_to_transform": lambda value: is_whole(value) or is_numbers(value),
    "layers_pattern": lambda value: is_pattern(value) or (is_names(value) and all(map(is_pattern, value))),
    "trainable_token_indices": lambda value: all(map(is_numbers, value.values() if isinstance(value, dict) else [value])),
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "init_lora_weights": is_initialization,
    "task_type": lambda value: value in TASKS,
    **dict.fromkeys(SWITCHES, lambda value: isinstance(value, bool)),
}  # fmt: skip


def read_config(folder: str | Path) -> "LoraConfig":
    """An adapter's settings for peft. Raises UserError like `read_settings`, and if peft refuses their combination."""
    from peft import LoraConfig

    settings = read_settings(folder)
    known = {field.name for field in dataclasses.fields(LoraConfig)}  # an older peft has fewer
    try:
        return LoraConfig(**{key: value for key, value in settings.items() if key in known})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{Path(folder) / FILE}: refused by peft ({reason(error)}); download the file again") from None
