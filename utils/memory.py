"""How much memory training takes, by the sizes of the model's tensors; an estimate, good to a third or so."""

import ctypes
import dataclasses
import sys

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from utils.console import say
from utils.loss import CHUNK
from utils.modeling import Placement, read_architecture
from utils.weights import base_folder

BYTES_A_WEIGHT = {"8bit": 1.0, "4bit": 0.53}  # 4 bit: half a byte and the scales
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
HOLES = 1.6  # what a process holds for each byte of activations on a CPU, by measurement: the C library's heap has holes
ADAMW = 16  # bytes a trained parameter: weight, gradient and two moments in float32


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by purpose."""

    base: float
    adapter: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.base + self.adapter + self.activations + self.logits

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in dataclasses.asdict(self).items())
        return f"about {self.total / 1e9:.1f} GB ({parts})"


def skeleton(base_model: str) -> PreTrainedModel:
    """The model without its weights: its layers and their shapes alone. Raises UserError as `read_architecture` does."""
    config = read_architecture(base_folder(base_model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def estimate(model: nn.Module, placement: Placement, half: str | None, tokens: int, checkpointing: bool) -> Estimate:
    """Memory to train `model` (with its adapter; a skeleton will do) on micro-batches of `tokens` tokens.

    Activations are what autograd keeps a token and layer when only LoRA weights train: about eight vectors of the
    hidden size and four of the MLP's; with `checkpointing` one vector a layer, and one layer's activations.
    """
    config = model.config
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layers = config.num_hidden_layers
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    output = model.get_output_embeddings()
    base = trained = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        elif placement.quantise and id(parameter) in linear and (output is None or parameter is not output.weight):
            base += parameter.numel() * BYTES_A_WEIGHT[placement.quantise]
        else:
            base += parameter.numel() * placement.dtype.itemsize
    width = 2 if half else 4
    layer = tokens * (8 * hidden + 4 * inner) * width
    activations = layer + layers * tokens * hidden * width if checkpointing else layers * layer
    if placement.device.type == "cpu":
        activations *= HOLES
    return Estimate(base, trained * ADAMW, activations, 3 * min(tokens, CHUNK) * config.vocab_size * 4)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def keep_freed() -> bool:
    """Have the C library keep what is freed instead of giving each large block back to the kernel; True if it does.

    Training on a CPU allocates and frees the same large blocks at every layer; each time the kernel would clear them
    page by page. Does nothing where the C library is not glibc (mallopt(3)).
    """
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(*setting) for setting in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)))


def is_short(model: nn.Module, placement: Placement, half: str | None, tokens: int) -> bool:
    """True if training would not fit without gradient checkpointing, which is said; the base is loaded already."""
    needed = estimate(model, placement, half, tokens, checkpointing=False)
    missing = needed.total - needed.base - 0.9 * free_memory(placement.device)
    if missing > 0:
        say(f"memory is short by about {missing / 1e9:.1f} GB: --gradient_checkpointing is on (False: off)")
    return missing > 0
