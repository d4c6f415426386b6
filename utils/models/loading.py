"""The only place that chooses device, dtype, quantization and attention; loads a base model."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import pickle
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, modeling_utils
from transformers.utils import is_flash_attn_2_available

from utils.console import UserError, reason, say
from utils.files import read_json
from utils.memory import is_out_of_memory
from utils.models import quantized, sharding, spread
from utils.models.layers import embedding_names
from utils.models.sharding import wants_fsdp
from utils.models.weights import base_folder, tell_adapter, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # the first takes seconds to import

transformers.utils.logging.set_verbosity_error()
if not os.isatty(2):
    transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="bitsandbytes")  # on the CPU it warns once a layer
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


# several times what the largest models have; many more would take forever to build
MOST = {"num_hidden_layers": 1000, "hidden_size": 200_000, "num_attention_heads": 2000, "vocab_size": 10_000_000}

CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese")  # their is_decoder is false by default, and nothing reads it
REFUSED = {  # families that could be trained, and not asked by what the library's own caches hold
    "minimax": "keeps its states in a cache of its own",
    "rwkv": "keeps a state in place of a cache",
    "xlstm": "keeps states in a cache of its own",
    "cpmant": "reads its question in both directions and takes padding for a part of it",
    "dory": "caches columns of unequal numbers",
    "recurrent_gemma": "answers short prompts otherwise than transformers' own generate",
    "reformer": "keeps hashes in a cache of its own",
    "xlnet": "predicts words in any order",
}

FLASH = "flash_attention_2"

SMALL = 1024  # hidden size below which runs are short in float32, too, and then equal on all machines
WORTH = 1.3  # times as fast as float32
MEASURING = 0.05  # seconds after which no further product is timed


NOTHING_MISSING: dict[str, Any] = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}
NO_ADAPTER = {"subfolder": "not-looked-for"}  # where the library looks for an adapter, which it would put on the base


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """Where and how a model is computed: its device, the type of its weights, "8bit", "4bit" or no quantization.

    With `spread` its layers lie on as many devices as it takes, and `device` is the one that text goes in by. `kernel` is
    the attention kernel, as transformers names it, where one was asked for.
    """

    device: torch.device
    dtype: torch.dtype
    quantize: str | None
    spread: bool = False
    kernel: str = ""

    def __str__(self) -> str:
        return f"{self.device}, {self.numbers}"

    @property
    def numbers(self) -> str:
        """What results are told to be computed with: the quantization, else the type."""
        return self.quantize or self.dtype_name

    @property
    def dtype_name(self) -> str:
        """The type as --dtype names it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def autocast_dtype(self) -> str | None:
        """The type to compute in beside float32 weights that train; None for float32 throughout."""
        return None if self.dtype == torch.float32 or self.device.type == "mps" else self.dtype_name


def place(
    load_8bit: bool | None,
    load_4bit: bool,
    gpu_id: int | None = None,
    dtype: str = "",
    device_map: str = "",
    kernel: str = "",
) -> DeviceConfig:
    """Choose a placement for what this machine has; `load_8bit` None means 8 bit on CUDA, full precision elsewhere.
    `device_map` "auto" spreads the model over all GPUs, main memory and the disk. `kernel` is the attention kernel asked for.

    Without `dtype` CUDA computes in bfloat16 if the device has instructions for it, else in float16; Apple's GPU in
    float16; a CPU in float32. Raises UserError if 8 and 4 bit are both asked for, if a GPU is not there or cannot
    compute in `dtype` or with `kernel`, or if accelerate is configured for what this program does not do.
    """
    if load_8bit and load_4bit:
        raise UserError("--load_8bit and --load_4bit: both given; choose one")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        raise UserError(
            "DeepSpeed: accelerate is configured for it, and it would take an optimizer step at each micro-batch; "
            "configure FSDP instead, or start with torchrun"
        )
    if load_8bit and wants_fsdp():
        raise UserError("--load_8bit: FSDP cannot shard 8-bit weights; give --load_4bit, or --load_8bit False")
    if wants_fsdp():
        sharding.check()
    if device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--device_map auto: one process spreads the model over all GPUs; start without torchrun, or leave it out "
            "(docs/distributed.md: FSDP)"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", cuda_index(gpu_id))
        with torch.cuda.device(device):
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        fast = torch.bfloat16 if has_bfloat16 else torch.float16
        load_8bit = load_8bit if load_8bit is not None else not load_4bit and not wants_fsdp()
    elif has_npu():
        device = torch.device("npu", cuda_index(gpu_id))
        fast = torch.bfloat16 if torch.npu.is_bf16_supported() else torch.float16
        say(f"{device}: an Ascend NPU, found through torch_npu; this has not been tested on one")
        if load_8bit or load_4bit:
            raise UserError(
                f"--load_{8 if load_8bit else 4}bit: not on an Ascend NPU, for which it has no kernels; leave it out"
            )
    elif torch.backends.mps.is_available():
        device, fast = torch.device("mps"), torch.float16
    else:
        device, fast = torch.device("cpu"), torch.float32
    if device_map and device.type == "mps":
        raise UserError("--device_map auto: Apple's GPU has all of the machine's memory; leave it out")
    if dtype == "bfloat16" and device.type == "cuda" and fast != torch.bfloat16:
        raise UserError("--dtype bfloat16: this GPU has no instructions for it; give --dtype float16")
    if dtype == "float16" and device.type == "cpu":
        raise UserError("--dtype float16: a CPU does not compute in it; give --dtype bfloat16 or float32")
    if kernel == FLASH and not has_flash_attention(device):
        raise UserError(
            f"--attn_implementation {FLASH}: needs the package flash-attn and a GPU of compute capability 8.0 (Ampere) or "
            "later; leave it out, or give sdpa"
        )
    quantize = "8bit" if load_8bit else "4bit" if load_4bit else None
    return DeviceConfig(device, getattr(torch, dtype) if dtype else fast, quantize, device_map == "auto", kernel)


def has_flash_attention(device: torch.device) -> bool:
    """True if FlashAttention 2 (Dao 2023) is installed, and has kernels for this device."""
    return device.type == "cuda" and is_flash_attn_2_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def training_kernel(placement: DeviceConfig, base_model: str) -> str:
    """The attention kernel to train with: the one asked for, or FlashAttention 2 where device, type and model have it;
    "" for the one that transformers takes, SDPA where the model has that. On a GPU the choice is printed."""
    if placement.kernel or placement.device.type != "cuda":
        return placement.kernel
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(read_architecture(base_folder(base_model)))]
    in_half = placement.dtype in (torch.bfloat16, torch.float16)
    chosen = FLASH if kind._supports_flash_attn and in_half and has_flash_attention(placement.device) else ""
    say(f"attention kernel: {chosen or 'sdpa where the model has it'} (--attn_implementation: another)")
    return chosen


def has_npu() -> bool:
    """True if torch_npu is installed (it adds `torch.npu` when it is imported) and there is an Ascend NPU.

    Raises UserError if torch_npu cannot be imported.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"torch_npu: cannot be imported ({reason(error)}); source CANN's set_env.sh, or uninstall it") from None
    return bool(torch.npu.is_available())


def with_dtype(placement: DeviceConfig, dtype: str) -> DeviceConfig:
    """`placement` with another type, named as --dtype names it."""
    return dataclasses.replace(placement, dtype=getattr(torch, dtype))


def cuda_index(gpu_id: int | None) -> int:
    """The number of this process's GPU or NPU. Raises UserError, naming what chose it, if this machine has no such one."""
    chosen_by = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "--gpu_id"
    cards = torch.cuda if torch.cuda.is_available() else torch.npu
    index, count = int(os.environ.get("LOCAL_RANK", gpu_id or 0)), cards.device_count()
    if index < count:
        return index
    fix = "start as many processes as there are GPUs" if chosen_by == "LOCAL_RANK" else "numbers start at 0"
    raise UserError(f"{chosen_by} {index}: this machine shows {count} GPUs; {fix}")


def measured(placement: DeviceConfig, base_model: str) -> DeviceConfig:
    """`placement` with the half-precision type if a product of the sizes of this model's layers gains enough by it.

    Its time is measured against that in float32, which takes less than a tenth of a second; what it gives is printed.
    Small models are not measured, nor are quantized ones, which compute in a type of their own.
    """
    config = read_architecture(base_folder(base_model)).get_text_config()
    width = config.hidden_size
    if placement.quantize or placement.device.type == "mps" or width < SMALL:
        return placement
    fast = torch.bfloat16 if placement.device.type == "cpu" else placement.dtype
    gain = half_precision_gain(placement.device, fast, min(width, SMALL))
    dtype = fast if gain >= WORTH else torch.float32
    name = str(fast).removeprefix("torch.")
    chosen = dataclasses.replace(placement, dtype=dtype)
    say(f"{name} computes {gain:.1f} times as fast as float32 here: computing in {chosen.dtype_name} (--dtype: another)")
    return chosen


def half_precision_gain(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """How many times as fast as in float32 a matrix product of rows of `width` values is in `dtype`.

    The two types take turns, and the fastest run of each counts. On a CPU what is measured is one thread's own time,
    in which neither other programs nor other threads have a part.
    """
    on_cpu = device.type == "cpu"
    clock, rows = (time.thread_time, 64) if on_cpu else (time.perf_counter, 2048)
    operands = {
        kind: [torch.ones(size, width, device=device, dtype=kind) for size in (rows, width)] for kind in (torch.float32, dtype)
    }
    fastest = dict.fromkeys(operands, math.inf)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        began, runs = clock(), 0
        while runs < 2 or (clock() - began < MEASURING and runs < 20):  # the first run prepares the kernel
            for kind, (some, weight) in operands.items():
                start = clock()
                torch.nn.functional.linear(some, weight)[0, 0].item()  # which waits for a GPU
                fastest[kind] = min(fastest[kind], clock() - start)
            runs += 1
    finally:
        torch.set_num_threads(threads)
    return fastest[torch.float32] / fastest[dtype]


def load_base(
    base_model: str, tokenizer: "PreTrainedTokenizerBase", placement: DeviceConfig, attn_implementation: str = ""
) -> "PreTrainedModel":
    """Load a base model; its special ids are taken from the tokenizer, since published configs often have wrong ones.

    Raises UserError if the folder, a shard or a tensor is missing, or the tokenizer has ids that the model has no
    row for.
    """
    folder = base_folder(base_model)
    config = read_architecture(folder)
    weight_files(folder)  # the library's own words for what is missing or cannot be read mislead
    quantized.check(folder, config, str(placement.device))
    options: dict[str, Any] = {"dtype": placement.dtype, "device_map": {"": placement.device}}
    if wants_fsdp() and not placement.quantize:
        options["device_map"] = {"": "cpu"}  # from where its parts go to the GPUs
    if placement.spread:
        options |= {"device_map": "auto", "max_memory": spread.room()}
    options["adapter_kwargs"] = NO_ADAPTER
    tell_adapter(folder)
    options["ignore_mismatched_sizes"] = True  # so that they are told below, by name
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    method = quantized.method_of(config.to_dict())
    if method:
        say(f"{base_model}: its weights are quantized already ({method}), and stay so")
    elif placement.quantize:
        options["quantization_config"] = quantization(placement)
    copied = bool(placement.quantize or method) or config.dtype != placement.dtype
    try:
        with reading_weights() if copied else contextlib.nullcontext():
            if placement.quantize or sharding.loads():
                model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
            else:
                model, report = sharding.without_weights(folder, placement.dtype), NOTHING_MISSING
    except pickle.UnpicklingError:
        raise UserError(
            f"{base_model}: refused, its weights ask for code to be run on loading; get them as .safetensors"
        ) from None
    except Exception as error:  # the library checks little, and fails wherever a file is not what it expects
        if is_out_of_memory(error):
            raise
        if placement.spread and "dispatched on the CPU or the disk" in str(error):
            raise UserError(
                f"{base_model}: the GPUs have no room for all of it, and quantized layers cannot lie "
                "elsewhere; give --load_4bit, or --load_8bit False, which leaves layers in main memory"
            ) from None
        raise UserError(f"{base_model}: cannot be loaded ({reason(error)}); check the model folder") from None
    check_report(report, base_model)
    if placement.spread:
        spread.tell(model, base_model)
    if getattr(model, "is_loaded_in_4bit", False):
        prepare_4bit(model, placement)
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, kind)
        for config in (model.config, model.generation_config):
            if config is not None:
                setattr(config, kind, token)
    from utils.models.tokenizer import end_tokens

    ends = end_tokens(base_model, tokenizer)
    if len(ends) > 1:
        for config in filter(None, (model.config, model.generation_config)):
            config.eos_token_id = ends
    return model


def prepare_4bit(model: "PreTrainedModel", placement: DeviceConfig) -> None:
    """Have 4-bit layers compute in the type of `placement`, whatever their files name, and on a CPU with a backward pass."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = placement.dtype, True
        if isinstance(module, Linear4bit) and placement.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False  # else an evaluation packs the weights for one that has none


@contextlib.contextmanager
def reading_weights() -> Iterator[None]:
    """While the block runs, transformers reads the tensors of a file instead of mapping them.

    Mapped pages count as this process's memory until the last tensor is loaded: for a 7B base, 13 GB beside its copy.
    """
    mapping = modeling_utils.safe_open
    modeling_utils.safe_open = lambda file, **options: mapping(file, **(options | {"backend": "pread"}))
    try:
        yield
    finally:
        modeling_utils.safe_open = mapping


def check_report(report: dict[str, Any], base_model: str) -> None:
    """Say which tensors of the files found no place in the model that its configuration describes.

    Raises UserError if the model has tensors that the files lack, or have in another shape.
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
    """What `config.json` says. Raises UserError if it is missing, of an unknown family, or wants its own code to be run."""
    path = folder / "config.json"
    settings = read_json(path)
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise UserError(f"{path}: names no model_type; is it the config of a language model?")
    if settings.get("auto_map") and settings["model_type"] not in transformers.CONFIG_MAPPING:
        raise UserError(f"{path}: asks for code of its own to be run, which is refused; use a family that transformers knows")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        fix = "download the file again, or use a family that transformers knows"
        raise UserError(f"{path}: not understood ({reason(error)}); {fix}") from None
    for name, most in MOST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise UserError(f"{path}: {name} is {value}, which is not plausible; download the file again")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: {settings['model_type']} is not a causal language model; choose one such as LLaMA or BLOOM")
    kind = settings["model_type"]
    is_encoder = getattr(config, "is_decoder", True) is False and kind not in CAUSAL_ANYWAY
    if config.is_encoder_decoder or is_encoder:
        raise UserError(f"{path}: {kind} reads texts in both directions; choose a causal language model such as LLaMA")
    if kind in REFUSED:
        raise UserError(f"{path}: {kind} {REFUSED[kind]}, and cannot be asked here; choose another base model")
    return config


def window_of(config: PreTrainedConfig) -> int | None:
    """The longest text, in tokens, that a model was made for; None where it has no such limit, as BLOOM."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def meta_model(base_model: str) -> "PreTrainedModel":
    """The model without its weights: its layers and their shapes alone. Raises UserError as `read_architecture` does."""
    config = read_architecture(base_folder(base_model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def has_learned_positions(base_model: str, window: int) -> bool:
    """True if a model looks up each position in a table of `window` rows (OPT's has two more), as GPT-2 does."""
    model = meta_model(base_model)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return any(table.num_embeddings in (window, window + 2) for table in tables if table is not model.get_input_embeddings())


def quantization(placement: DeviceConfig) -> BitsAndBytesConfig:
    """bitsandbytes' LLM.int8 (Dettmers et al. 2022) or NF4 with double quantization (QLoRA, Dettmers et al. 2023)."""
    if placement.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=placement.dtype,
        bnb_4bit_quant_storage=placement.dtype if wants_fsdp() else None,  # FSDP shards tensors of one type
    )


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str) -> None:
    """Raises UserError if the tokenizer has more ids than the model has embedding rows.

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

    Raises UserError if the new rows would never be trained.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        from utils.models.tokenizer import load_tokenizer
        from utils.models.vocabulary import grow_embeddings

        layers = embedding_names(model)
        if not {name.split(".")[-1] for name in trained_whole} & set(layers):
            raise UserError(
                f"{base_model}: has {rows} embedding rows for a tokenizer of {len(tokenizer)} tokens; to train the new ones "
                f"give --modules_to_save '[{','.join(layers)}]', or use a base and a tokenizer of one stage"
            )
        grow_embeddings(model, load_tokenizer(base_model), tokenizer)
        say(f"{base_model}: {len(tokenizer) - rows} embedding rows added for new tokens, each the mean of what it replaces")
    check_vocabulary(model, tokenizer, base_model)
