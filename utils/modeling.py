"""The only place that chooses device, dtype, quantisation and attention; loads a base model."""

import dataclasses
import os
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from utils.console import UserError, reason, say
from utils.files import read_json
from utils.weights import base_folder, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # the first takes seconds to import

transformers.utils.logging.set_verbosity_error()
if not os.isatty(2):
    transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="bitsandbytes")  # on the CPU it warns once a layer
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


# several times what the largest models have; many more would take for ever to build
MOST = {"num_hidden_layers": 1000, "hidden_size": 200_000, "num_attention_heads": 2000, "vocab_size": 10_000_000}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where and how a model is computed: its device, the type of its weights, "8bit", "4bit" or no quantisation."""

    device: torch.device
    dtype: torch.dtype
    quantise: str | None

    def __str__(self) -> str:
        return f"{self.device}, {self.quantise or str(self.dtype).removeprefix('torch.')}"


def place(load_8bit: bool | None, load_4bit: bool, gpu_id: int | None = None) -> Placement:
    """Choose a placement for what this machine has; `load_8bit` None means 8 bit on CUDA, full precision elsewhere.

    CUDA computes in bfloat16 where the device has it, else in float16; Apple's GPU in float16; a CPU in float32,
    since most CPUs multiply half-precision matrices many times slower than float32 ones.
    Raises UserError where 8 and 4 bit are both asked for, or a GPU is not there.
    """
    if load_8bit and load_4bit:
        raise UserError("--load_8bit and --load_4bit: both given; choose one")
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", gpu_id or 0))
        if index >= torch.cuda.device_count():
            raise UserError(f"--gpu_id {index}: this machine shows {torch.cuda.device_count()} GPUs; numbers start at 0")
        device = torch.device("cuda", index)
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        load_8bit = load_8bit if load_8bit is not None else not load_4bit
    elif torch.backends.mps.is_available():
        device, dtype = torch.device("mps"), torch.float16
    else:
        device, dtype = torch.device("cpu"), torch.float32
    return Placement(device, dtype, "8bit" if load_8bit else "4bit" if load_4bit else None)


def precision(device: torch.device, bf16: bool | None, fp16: bool | None) -> str | None:
    """The type to compute in beside float32 weights that train: "bfloat16", "float16", or None for float32 throughout.

    Raises UserError where the device cannot compute in the type that is asked for.
    """
    if bf16 or fp16:
        if device.type != "cuda" and fp16:
            raise UserError(f"--fp16: mixed precision in float16 needs a CUDA GPU, this is {device}; leave it out")
        if device.type == "cuda" and bf16 and not torch.cuda.is_bf16_supported():
            raise UserError("--bf16: this GPU does not compute in bfloat16; give --fp16")
        return "bfloat16" if bf16 else "float16"
    if device.type != "cuda" or bf16 is False or fp16 is False:
        return None
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def load_base(
    base_model: str, tokenizer: "PreTrainedTokenizerBase", placement: Placement, attn_implementation: str = ""
) -> "PreTrainedModel":
    """Load a base model; its special ids are taken from the tokenizer, since published configs often have wrong ones.

    Raises UserError where the folder, a shard or a tensor is missing, or the tokenizer has ids that the model has no
    row for.
    """
    folder = base_folder(base_model)
    read_architecture(folder)
    weight_files(folder)  # the library's own words for what is missing or cannot be read mislead
    options: dict[str, Any] = {"dtype": placement.dtype, "device_map": {"": placement.device}}
    options["ignore_mismatched_sizes"] = True  # so that they are told below, by name
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if placement.quantise:
        options["quantization_config"] = quantisation(placement)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except pickle.UnpicklingError:
        raise UserError(
            f"{base_model}: refused, its weights ask for code to be run on loading; get them as .safetensors"
        ) from None
    except Exception as error:  # the library checks little, and fails wherever a file is not what it expects
        raise UserError(f"{base_model}: cannot be loaded ({reason(error)}); check the model folder") from None
    check_report(report, base_model)
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, kind)
        for config in (model.config, model.generation_config):
            if config is not None:
                setattr(config, kind, token)
    return model


def check_report(report: dict[str, Any], base_model: str) -> None:
    """Say which tensors of the files found no place in the model that its configuration describes.

    Raises UserError where the model has tensors that the files lack, or have in another shape.
    """
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise UserError(f"{base_model}: {len(report['missing_keys'])} tensors are missing ({name}, …); check its files")
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise UserError(
            f"{base_model}: {len(report['mismatched_keys'])} tensors are not of the shapes that its config.json describes "
            f"({name} is {tuple(stored)}, not {tuple(wanted)}, …); copy weights and configuration of one model"
        )
    if report["unexpected_keys"]:
        name = min(report["unexpected_keys"])
        say(f"{base_model}: {len(report['unexpected_keys'])} tensors of its files are not part of the model ({name}, …)")


def read_architecture(folder: Path) -> PreTrainedConfig:
    """What `config.json` says. Raises UserError where it is missing, of an unknown family, or wants its own code to be run."""
    path = folder / "config.json"
    settings = read_json(path)
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise UserError(f"{path}: names no model_type; is it the config of a language model?")
    if settings.get("auto_map") and settings["model_type"] not in transformers.CONFIG_MAPPING:
        raise UserError(f"{path}: asks for code of its own to be run, which is refused; use a family that transformers knows")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        way_out = "copy the file again, or use a family that transformers knows"
        raise UserError(f"{path}: not understood ({reason(error)}); {way_out}") from None
    for name, most in MOST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise UserError(f"{path}: {name} is {value}, as in no model; copy the file again")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: {settings['model_type']} is no causal language model; choose one such as LLaMA or BLOOM")
    return config


def quantisation(placement: Placement) -> BitsAndBytesConfig:
    """bitsandbytes' LLM.int8 (Dettmers et al. 2022) or NF4 with double quantisation (QLoRA, Dettmers et al. 2023)."""
    if placement.quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=placement.dtype,
        bnb_4bit_quant_storage=placement.dtype if wants_fsdp() else None,  # FSDP shards tensors of one type
    )


def wants_fsdp() -> bool:
    """True where accelerate's configuration names FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str) -> None:
    """Raises UserError where the tokenizer has more ids than the model has embedding rows.

    Fewer ids are right: BLOOM pads 250,680 of them to 250,880 rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{base_model}: has {rows} embedding rows for a tokenizer of {len(tokenizer)} tokens; "
            "32000 belong to LLaMA, 49953 to Chinese-LLaMA, 49954 to Chinese-Alpaca: use model and tokenizer of one stage"
        )
    if rows > len(tokenizer):
        say(f"{base_model}: {rows} embedding rows, {len(tokenizer)} tokens in use")


def fit_embeddings(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str, trained_whole: list[str]
) -> None:
    """Give a model embedding rows for a tokenizer with more tokens than the base's; `trained_whole` layers must hold them.

    Raises UserError where the new rows would never be trained.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        from utils.tokenizer import load_tokenizer
        from utils.vocabulary import grow_embeddings

        layers = {"embed_tokens", "lm_head", "word_embeddings", "wte"} & set(trained_whole)
        if not layers:
            raise UserError(
                f"{base_model}: has {rows} embedding rows for a tokenizer of {len(tokenizer)} tokens; to train the new ones "
                "give --modules_to_save '[embed_tokens,lm_head]', or use a base and a tokenizer of one stage"
            )
        grow_embeddings(model, load_tokenizer(base_model), tokenizer)
        say(f"{base_model}: {len(tokenizer) - rows} embedding rows added for new tokens, each the mean of what it replaces")
    check_vocabulary(model, tokenizer, base_model)
