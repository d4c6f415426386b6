"""The only place that chooses device, dtype, quantization and the attention kernel."""

import dataclasses
import importlib.util
import math
import os
import time

import torch
import transformers
from transformers.utils import is_flash_attn_2_available

from utils.console import UserError, reason, say
from utils.models import sharding
from utils.models.architecture import read_architecture
from utils.models.sharding import wants_fsdp
from utils.models.weights import base_folder, dtype_name

FLASH = "flash_attention_2"
SMALL = 1024  # hidden size below which float32 runs are short anyway, and equal on all machines
WORTH = 1.3  # times as fast as float32
MEASURING = 0.05  # seconds after which no more products are timed


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """Where and how a model is computed: its device, the dtype of its weights, "8bit", "4bit" or no quantization.

    With `spread` its layers are on as many devices as necessary, and `device` is the one with the input. `kernel` is the
    attention kernel, if one was asked for, as transformers names it.
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
        """What results say they were computed with: the quantization, else the dtype."""
        return self.quantize or self.dtype_name

    @property
    def dtype_name(self) -> str:
        """The dtype as --dtype names it."""
        return dtype_name(self.dtype)

    @property
    def autocast_dtype(self) -> str | None:
        """The dtype to compute in beside float32 weights in training; None for float32 throughout."""
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
    check_asked(load_8bit, load_4bit, device_map)
    device, fast = fastest_device(gpu_id)
    if device.type == "cuda" and load_8bit is None:
        load_8bit = not load_4bit and not wants_fsdp()
    if device.type == "npu" and (load_8bit or load_4bit):
        raise UserError(f"--load_{8 if load_8bit else 4}bit: has no kernels for an Ascend NPU; leave it out")
    if device_map and device.type == "mps":
        raise UserError("--device_map auto: Apple's GPU shares all of the machine's memory; leave it out")
    if dtype == "bfloat16" and device.type == "cuda" and fast != torch.bfloat16:
        raise UserError("--dtype bfloat16: this GPU has no instructions for it; give --dtype float16")
    if dtype == "float16" and device.type == "cpu":
        raise UserError("--dtype float16: not supported on a CPU; give --dtype bfloat16 or float32")
    if kernel == FLASH and not has_flash_attention(device):
        raise UserError(
            f"--attn_implementation {FLASH}: needs the package flash-attn and a GPU of compute capability 8.0 (Ampere) or "
            "later; leave it out, or give sdpa"
        )
    quantize = "8bit" if load_8bit else "4bit" if load_4bit else None
    return DeviceConfig(device, getattr(torch, dtype) if dtype else fast, quantize, device_map == "auto", kernel)


def check_asked(load_8bit: bool | None, load_4bit: bool, device_map: str) -> None:
    """Raises UserError if what is asked for cannot be done on any device, or not as accelerate is configured."""
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


def fastest_device(gpu_id: int | None) -> tuple[torch.device, torch.dtype]:
    """The device to compute on, and the dtype that it is fast in."""
    if torch.cuda.is_available():
        device = torch.device("cuda", cuda_index(gpu_id))
        with torch.cuda.device(device):
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return device, torch.bfloat16 if has_bfloat16 else torch.float16
    if has_npu():
        device = torch.device("npu", cuda_index(gpu_id))
        say(f"{device}: an Ascend NPU, found through torch_npu; not tested on this hardware")
        return device, torch.bfloat16 if torch.npu.is_bf16_supported() else torch.float16
    if torch.backends.mps.is_available():
        return torch.device("mps"), torch.float16
    return torch.device("cpu"), torch.float32


def has_flash_attention(device: torch.device) -> bool:
    """True if FlashAttention 2 (Dao 2023) is installed, and has kernels for this device."""
    return device.type == "cuda" and is_flash_attn_2_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def with_training_kernel(placement: DeviceConfig, base_model: str) -> DeviceConfig:
    """`placement` with the attention kernel to train with: the one asked for, or FlashAttention 2 where device, type and
    model have it; "" for the one that transformers takes, SDPA where the model has that. On a GPU the choice is printed."""
    if placement.kernel or placement.device.type != "cuda":
        return placement
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(read_architecture(base_folder(base_model)))]
    in_half = placement.dtype in (torch.bfloat16, torch.float16)
    chosen = FLASH if kind._supports_flash_attn and in_half and has_flash_attention(placement.device) else ""
    say(f"attention kernel: {chosen or 'sdpa where the model has it'} (--attn_implementation: another)")
    return dataclasses.replace(placement, kernel=chosen)


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
    """`placement` with another dtype, named as in --dtype."""
    return dataclasses.replace(placement, dtype=getattr(torch, dtype))


def cuda_index(gpu_id: int | None) -> int:
    """The number of this process's GPU or NPU. Raises UserError, naming what chose it, if this machine does not have it."""
    chosen_by = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "--gpu_id"
    cards = torch.cuda if torch.cuda.is_available() else torch.npu
    index, count = int(os.environ.get("LOCAL_RANK", gpu_id or 0)), cards.device_count()
    if index < count:
        return index
    fix = "start as many processes as there are GPUs" if chosen_by == "LOCAL_RANK" else "numbers start at 0"
    raise UserError(f"{chosen_by} {index}: this machine shows {count} GPUs; {fix}")


def measured(placement: DeviceConfig, base_model: str) -> DeviceConfig:
    """`placement` with the half-precision dtype if matrix products of this model's sizes gain enough by it.

    Its time is measured against float32's, which takes less than a tenth of a second; the result is printed. Small models
    are not measured, nor are quantized ones, which have their own compute dtype.
    """
    config = read_architecture(base_folder(base_model)).get_text_config()
    width = config.hidden_size
    if placement.quantize or placement.device.type == "mps" or width < SMALL:
        return placement
    fast = torch.bfloat16 if placement.device.type == "cpu" else placement.dtype
    gain = half_precision_gain(placement.device, fast, min(width, SMALL))
    chosen = fast if gain >= WORTH else torch.float32
    found = f"{dtype_name(fast)} computes {gain:.1f} times as fast as float32 here"
    say(f"{found}: computing in {dtype_name(chosen)} (--dtype: another)")
    return dataclasses.replace(placement, dtype=chosen)


def half_precision_gain(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """How many times as fast a matrix product of rows of `width` values is in `dtype` as in float32.

    The two dtypes take turns, and the fastest run of each counts. On a CPU one thread's own time is measured, without other
    programs and threads.
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
                torch.nn.functional.linear(some, weight)[0, 0].item()  # waits for a GPU
                fastest[kind] = min(fastest[kind], clock() - start)
            runs += 1
    finally:
        torch.set_num_threads(threads)
    return fastest[torch.float32] / fastest[dtype]
