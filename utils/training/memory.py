"""How much memory training takes: weights by their sizes, activations by what autograd would keep in a forward pass."""

import dataclasses

from peft import PeftModel
from torch import nn

from utils.console import reason, say
from utils.models.layers import output_layer
from utils.models.memory import free_memory
from utils.models.placement import DeviceConfig
from utils.training.activations import saved_in_training
from utils.training.loss import CHUNK

BYTES_A_WEIGHT = {"8bit": 1.0, "4bit": 0.53}  # 4 bit: half a byte and the scales
HOLES = 1.6  # bytes a process holds per byte of activations on a CPU, measured: the C library's heap is fragmented
ADAMW = 16  # bytes per trained parameter: weight, gradient and two moments in float32


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by purpose; `checkpointed`: the activations with gradient checkpointing."""

    base: float
    adapter: float
    activations: float
    checkpointed: float
    logits: float

    def parts(self, checkpointing: bool) -> dict[str, float]:
        """Bytes by purpose with or without gradient checkpointing."""
        activations = self.checkpointed if checkpointing else self.activations
        return {"base": self.base, "adapter": self.adapter, "activations": activations, "logits": self.logits}

    def total(self, checkpointing: bool) -> float:
        """All bytes, with or without gradient checkpointing."""
        return sum(self.parts(checkpointing).values())

    def described(self, checkpointing: bool) -> str:
        """The total and its parts, as text."""
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self.parts(checkpointing).items())
        return f"about {self.total(checkpointing) / 1e9:.1f} GB ({parts})"


def estimate(model: PeftModel, placement: DeviceConfig, rows: int, length: int) -> Estimate:
    """Memory to train `model` (its tensors may be on the meta device) on micro-batches of `rows` records of `length` tokens.

    Raises whatever the model's code raises if it cannot run without values.
    """
    base, trained = weights(model, placement)
    saved = saved_in_training(model, placement, rows, length)
    holes = HOLES if placement.device.type == "cpu" else 1
    tokens = rows * length
    logits = 3 * (min(tokens, CHUNK) if saved.sparse else tokens) * model.config.get_text_config().vocab_size * 4
    return Estimate(base, trained * ADAMW, saved.everything * holes, saved.checkpointed * holes, logits)


def weights(model: PeftModel, placement: DeviceConfig) -> tuple[float, int]:
    """Bytes of the frozen weights, and the number of trained ones."""
    output = output_layer(model.get_base_model())
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not output}
    frozen, trained = 0.0, 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        elif placement.quantize and id(parameter) in linear:
            frozen += parameter.numel() * BYTES_A_WEIGHT[placement.quantize]
        else:
            frozen += parameter.numel() * placement.dtype.itemsize
    return frozen, trained


def try_estimate(model: PeftModel, placement: DeviceConfig, rows: int, length: int) -> Estimate | None:
    """The estimate; None, with a notice, for a model whose code cannot run without values."""
    try:
        return estimate(model, placement, rows, length)
    except Exception as error:  # that code is not ours, and training can do without an estimate
        say(f"memory cannot be estimated for this model ({reason(error)}); if it runs out, give --gradient_checkpointing")
        return None


def show(model: PeftModel, placement: DeviceConfig, rows: int, length: int) -> None:
    """Print the estimate, with and without gradient checkpointing."""
    if needed := try_estimate(model, placement, rows, length):
        for checkpointing in (False, True):
            say(f"memory on {placement}, --gradient_checkpointing {checkpointing}: {needed.described(checkpointing)}")


def is_short(model: PeftModel, placement: DeviceConfig, rows: int, length: int) -> bool:
    """True, with a notice, if training would not fit without gradient checkpointing; the base is already loaded."""
    needed = try_estimate(model, placement, rows, length)
    if needed is None:
        return False
    missing = needed.total(False) - needed.base - 0.9 * free_memory(placement.device)
    if missing > 0:
        say(f"memory is short by about {missing / 1e9:.1f} GB: --gradient_checkpointing is on (False: off)")
    return missing > 0


def tell_faster(model: PeftModel, placement: DeviceConfig, rows: int, length: int) -> None:
    """Print what would train faster than 8 bit, which waits for the GPU at each linear layer, and fits in memory."""
    plain, in_4bit = (dataclasses.replace(placement, quantize=way) for way in (None, "4bit"))
    held = weights(model, placement)[0]  # by the base, which is already loaded
    needed = try_estimate(model, plain, rows, length)
    if needed and needed.total(False) <= 0.9 * (free_memory(placement.device) + held):
        fits = f"{plain.dtype_name} has room here, about {needed.total(False) / 1e9:.1f} GB, and is faster: --load_8bit False"
    else:
        fits = f"4 bit is smaller, about {weights(model, in_4bit)[0] / 1e9:.1f} GB of weights, and usually faster: --load_4bit"
    say(f"8 bit is the default on a GPU, but waits for it at each layer; {fits}")
