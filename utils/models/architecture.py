"""What config.json says about a model before any weight is read: its layers without values, and its window."""

import itertools
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from utils.console import UserError, reason
from utils.files import read_json
from utils.models.weights import base_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # the first takes seconds to import

transformers.utils.logging.set_verbosity_error()
if not os.isatty(2):
    transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="bitsandbytes")  # on the CPU it warns once a layer
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

# several times what the largest models have; many more would take forever to build
MOST = {
    "num_hidden_layers": 1000, "hidden_size": 200_000, "num_attention_heads": 2000, "vocab_size": 10_000_000,
    "max_position_embeddings": 2**31,
}  # fmt: skip
MOST_LABELS = 100_000  # the library writes out a name for each
CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese")  # their is_decoder is false by default, and nothing reads it
REFUSED = {  # families that can be trained, but cannot answer: the library's own caches do not hold what they need
    "minimax": "keeps its states in a cache of its own",
    "rwkv": "keeps a state in place of a cache",
    "xlstm": "keeps states in a cache of its own",
    "cpmant": "reads its question in both directions and treats padding as part of it",
    "dory": "caches different numbers of columns",
    "recurrent_gemma": "answers short prompts differently from transformers' own generate",
    "reformer": "keeps hashes in a cache of its own",
    "xlnet": "predicts words in any order",
}


def read_architecture(folder: Path) -> PreTrainedConfig:
    """The configuration in `config.json`. Raises UserError if it is missing, of an unknown family, or requires its own code."""
    path = folder / "config.json"
    settings = read_json(path)
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise UserError(f"{path}: names no model_type; is it the config of a language model?")
    if settings.get("auto_map") and settings["model_type"] not in transformers.CONFIG_MAPPING:
        raise UserError(f"{path}: requires its own code to be run, which is refused; use a family that transformers knows")
    check_labels(path, settings)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        fix = "download the file again, or use a family that transformers knows"
        raise UserError(f"{path}: not understood ({reason(error)}); {fix}") from None
    for name, part in itertools.product(MOST, (config, config.get_text_config())):
        value = getattr(part, name, None)
        if isinstance(value, int) and not 1 <= value <= MOST[name]:
            raise UserError(f"{path}: {name} is {value}, which is not plausible; download the file again")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: {settings['model_type']} is not a causal language model; choose one such as LLaMA or BLOOM")
    kind = settings["model_type"]
    is_encoder = getattr(config, "is_decoder", True) is False and kind not in CAUSAL_ANYWAY
    if config.is_encoder_decoder or is_encoder:
        raise UserError(f"{path}: {kind} reads texts in both directions; choose a causal language model such as LLaMA")
    if kind in REFUSED:
        raise UserError(f"{path}: {kind} {REFUSED[kind]}, and cannot answer here; choose another base model")
    return config


def check_labels(path: Path, settings: Any) -> None:
    """Raises UserError if the `settings` of a `config.json` have the library name so many labels that it hangs."""
    for part in (settings, *settings.values()) if isinstance(settings, dict) else ():
        labels = part.get("num_labels") if isinstance(part, dict) else None
        if isinstance(labels, (int, float)) and labels > MOST_LABELS:
            raise UserError(f"{path}: num_labels is {labels:g}, which is not plausible; download the file again")


def window_of(config: PreTrainedConfig) -> int | None:
    """The longest text, in tokens, that a model was made for; None if it has no such limit, like BLOOM."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def meta_model(base_model: str) -> "PreTrainedModel":
    """The model without its weights: only its layers and their shapes. Raises UserError like `read_architecture`,
    and if no model can be built from it."""
    config = read_architecture(base_folder(base_model))
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever the layers make of values that do not go together
        raise UserError(f"{base_model}: cannot be loaded ({reason(error)}); check the model folder") from None


def has_learned_positions(base_model: str, window: int) -> bool:
    """True if a model looks up each position in a table of `window` rows (OPT's has two more), as GPT-2 does."""
    model = meta_model(base_model)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return any(table.num_embeddings in (window, window + 2) for table in tables if table is not model.get_input_embeddings())
