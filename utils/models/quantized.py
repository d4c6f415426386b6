"""Bases whose files hold quantized weights: what works with them here, and their full weights for merging."""

import re
from pathlib import Path
from typing import Any

import torch

from utils.console import UserError, reason
from utils.models.weights import DerivedWeights, Weights, dtype_name

# tensors of quantized weights: bitsandbytes, GPTQ and AWQ, fp8 and compressed-tensors, mxfp4
SCALES = re.compile(
    r"\.(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|qweight|qzeros|g_idx|weight_scale|weight_scale_inv"
    r"|weight_scale_2|weight_global_scale|weight_packed|weight_shape|weight_zero_point|input_scale|input_activation_scale)$"
    r"|\.quant_state\.|_proj_(scales|blocks)$"
)
DEQUANTIZED = ("bitsandbytes", "fp8")  # methods whose weights are dequantized here for merging
OTHER = "use the same model in float16 or bfloat16"


def method_of(config: dict[str, Any]) -> str:
    """The quantization method that config.json names; "" if none."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return ""
    if isinstance(settings, dict) and not settings.get("quant_method") and way_of(settings):
        return "bitsandbytes"  # as the library takes it
    return str(settings.get("quant_method") or "an unnamed method") if isinstance(settings, dict) else str(settings)[:80]


def way_of(settings: dict[str, Any]) -> str:
    """How bitsandbytes' settings say that weights are quantized: "4-bit", "8-bit", or "" if they do not."""
    return "4-bit" if settings.get("load_in_4bit") else "8-bit" if settings.get("load_in_8bit") else ""


def without_method(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the entries that name a quantization method."""
    return {name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")}


def check(folder: Path, config: Any, device: str = "cpu", training: bool = False) -> None:
    """Raises UserError if a base's weights are quantized in a way that is unsupported here, or not named by config.json.

    `config` is transformers' configuration of the model. Files that are missing (a dry run needs none) or unreadable are
    left to the loader.
    """
    settings = getattr(config, "quantization_config", None) or {}
    named = {"quantization_config": settings if isinstance(settings, dict) else settings.to_dict()}
    method = method_of(named)
    can_train = not method or check_library(folder, method, settings, device)
    if not method or method in DEQUANTIZED:
        try:
            weights = Weights(folder)
        except UserError:
            return
        full(folder, named, weights)  # raises if they have scales without a method, or a method without scales
    if training and not can_train:
        raise UserError(f"{folder}: its weights are quantized ({method}), and the library cannot train on them; {OTHER}")


def check_library(folder: Path, method: str, settings: Any, device: str) -> bool:
    """True if the library can train on weights quantized with these settings. Raises UserError if it cannot even compute."""
    from transformers.quantizers import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, weights_only=True)
        return quantizer.is_trainable
    except Exception as error:  # each method has its own checks, also for other packages
        raise UserError(
            f"{folder}: its weights are quantized ({method}), which does not work here ({reason(error)}); {OTHER}"
        ) from None


def refuse_scales(folder: Path, weights: Weights) -> None:
    """Raises UserError if the files hold quantized weights or their scales, since the weights would be used unscaled."""
    strange = next((name for name in weights.names if SCALES.search(name)), "") or next(
        (name for name in weights.names if name.endswith("weight") and is_quantized(weights, name)), ""
    )
    if strange:
        found = f"its weights are quantized ({dtype_name(weights.dtype(strange))} in {strange})"
        raise UserError(f"{folder}: {found}, and its config.json does not say how; copy config.json again, or {OTHER}")


def is_quantized(weights: Weights, name: str) -> bool:
    """True for a matrix of values of one byte."""
    return len(weights.shape(name)) >= 2 and weights.dtype(name).itemsize == 1 and weights.dtype(name) != torch.bool


def full(folder: Path, config: dict[str, Any], weights: Weights) -> Weights:
    """A model's weights for merging: unchanged, or dequantized by the library that quantized them.

    Raises UserError if they are quantized in a way that is not dequantized here, or does not say which.
    """
    method, settings = method_of(config), config.get("quantization_config")
    if not method:
        refuse_scales(folder, weights)
        return weights
    if method not in DEQUANTIZED or not isinstance(settings, dict):
        raise UserError(f"{folder}: its weights are quantized ({method}), and are not dequantized here; {OTHER}")
    found = (BlockFp8 if method == "fp8" else Bits4 if way_of(settings) == "4-bit" else Bits8)(weights, full_dtype(config))
    if method == "bitsandbytes" and not found.derived:
        raise UserError(
            f"{folder}: its config.json says that its weights are quantized ({method}), but none of them is; copy both again"
        )
    return found


def full_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that config.json names for the model's weights, float16 if it names none."""
    named = config.get("dtype") or config.get("torch_dtype") or "float16"
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1 else torch.float16


class Dequantized(DerivedWeights):
    """A quantized model's tensors dequantized to `full`; their scales and other auxiliary tensors are not listed."""

    helpers: tuple[str, ...]  # what the names of scales add to the weight's name

    def __init__(self, stored: Weights, full: torch.dtype):
        super().__init__(stored)
        self.full = full
        self.names = [name for name in stored.names if not SCALES.search(name)]
        scaled = set(filter(self.has_scales, self.names))  # 4-bit values may be packed into a type of more than a byte
        self.derived = scaled | {name for name in self.names if is_quantized(stored, name)}
        if lost := self.derived - scaled:
            raise UserError(f"{self.folder}: {min(lost)} is quantized, and nothing says how it is scaled; copy the model again")

    def has_scales(self, name: str) -> bool:
        """True if the files hold what scales this tensor."""
        return all(self.helper(name, ending) in self.stored.names for ending in self.helpers)

    def helper(self, name: str, ending: str) -> str:
        """The name of a tensor that belongs to the weight `name`."""
        return name.removesuffix("weight") + ending

    def dtype(self, name: str) -> torch.dtype:
        return self.full if name in self.derived else self.stored.dtype(name)


class Requantized(DerivedWeights):
    """A full model's tensors, with the `linear` ones as they are after quantizing to 4 or 8 bit (`way`), in their own dtype.

    `step` is the lineage of the adapter trained that way, for the dtype they were quantized from.
    """

    MEASURED = 16  # tensors

    def __init__(self, stored: Weights, linear: list[str], way: str, step: dict[str, Any]):
        super().__init__(stored)
        self.derived, self.way = set(linear), way
        self.before = getattr(torch, str(step.get("dtype")), None)

    def difference(self) -> tuple[float, int]:
        """By how much the quantized tensors differ from the full ones (relative root mean square), and over how many."""
        names = sorted(self.derived)
        some = names[:: max(1, -(-len(names) // self.MEASURED))]
        apart = whole = 0.0
        for name in some:
            full = self.stored.tensor(name).float()
            apart += (self.tensor_of(name).float() - full).square().sum().item()
            whole += full.square().sum().item()
        return (apart / whole) ** 0.5 if whole else 0.0, len(some)

    def derive(self, name: str) -> torch.Tensor:
        from bitsandbytes import functional

        stored = self.stored.tensor(name)
        values = stored.to(self.before if isinstance(self.before, torch.dtype) else stored.dtype)
        if self.way == "8-bit":
            whole, scales, _ = functional.int8_vectorwise_quant(values.half())
            return functional.int8_vectorwise_dequant(whole, scales).to(stored.dtype)
        packed, state = functional.quantize_4bit(values.contiguous(), quant_type="nf4", compress_statistics=True)
        return functional.dequantize_4bit(packed, state).to(stored.dtype)


class Bits8(Dequantized):
    """bitsandbytes' LLM.int8: rows of int8, each with its largest value."""

    helpers = ("SCB",)

    def derive(self, name: str) -> torch.Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(self.stored.tensor(name), self.stored.tensor(self.helper(name, "SCB"))).to(self.full)


class Bits4(Dequantized):
    """bitsandbytes' NF4 and FP4: two values per byte, with scales per block, which may be quantized themselves."""

    helpers = ("weight.absmax", "weight.quant_map")

    def _state(self, name: str) -> Any:
        from bitsandbytes.functional import QuantState

        begins = f"{name}."
        parts = {
            other.removeprefix(begins): self.stored.tensor(other) for other in self.stored.names if other.startswith(begins)
        }
        return QuantState.from_dict(parts, torch.device("cpu"))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state(name).shape) if name in self.derived else self.stored.shape(name)

    def derive(self, name: str) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.stored.tensor(name), self._state(name)).to(self.full)


class BlockFp8(Dequantized):
    """float8 in blocks, each with its scale, as DeepSeek and Qwen publish them."""

    helpers = ("weight_scale_inv",)

    def derive(self, name: str) -> torch.Tensor:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        scales = self.stored.tensor(self.helper(name, "weight_scale_inv"))
        return Fp8Dequantize(None)._dequantize_one(self.stored.tensor(name), scales, self.full)
