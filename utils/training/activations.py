"""What autograd keeps from a forward pass for the backward one, counted for a real model or for one without values.

Nothing here knows about architectures: the model's own code runs on tensors that have shapes but no values
(`torch._subclasses.FakeTensorMode`), which takes about a second, and autograd reports what it would keep
(`torch.autograd.graph.saved_tensors_hooks`).
"""

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel, masking_utils
from transformers.integrations import moe
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from utils.adapters.adapters import train_in_float32
from utils.models.layers import output_layer
from utils.models.placement import DeviceConfig
from utils.training.loss import full_loss, sparse_loss


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes that are kept for one micro-batch.

    `everything`: without gradient checkpointing. With it: the inputs of layers (`into_layers`), what is kept `outside`
    them, and what the `largest` layer keeps while it is recomputed. `sparse`: logits exist for labelled tokens only.
    """

    everything: int
    into_layers: int
    outside: int
    largest: int
    sparse: bool = True

    @property
    def checkpointed(self) -> int:
        """The most that is kept at once with gradient checkpointing."""
        return self.into_layers + self.outside + self.largest


class Counter:
    """Counts the distinct tensors that autograd keeps, by the checkpointable layer they belong to."""

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.known = {storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.alive: list[torch.Tensor] = []  # so that no new tensor reuses the storage of a counted one
        self.kept: dict[int, tuple[int | None, int]] = {}  # by storage: the layer, and bytes
        self.inputs: dict[int, int] = {}
        self.layer: int | None = None

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called by autograd with each tensor that it keeps."""
        if storage(tensor) not in self.known:
            self.alive.append(tensor)
            self.kept.setdefault(storage(tensor), (self.layer, tensor.untyped_storage().nbytes()))
        return tensor

    def enter(self, number: int, _: nn.Module, args: Any, options: Any) -> None:
        """Called when a layer begins: its inputs are what checkpointing keeps."""
        self.layer = number
        for tensor in tree_leaves((args, options)):
            if isinstance(tensor, torch.Tensor) and storage(tensor) not in self.known:
                self.alive.append(tensor)
                self.inputs[storage(tensor)] = tensor.untyped_storage().nbytes()

    def leave(self, *_: Any) -> None:
        """Called when a layer ends."""
        self.layer = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """While the block runs, what autograd keeps is counted."""
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                before = functools.partial(self.enter, number)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(self.leave).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.save, lambda tensor: tensor))
            yield

    def saved(self, sparse: bool = True) -> Saved:
        """The totals."""
        by_layer: dict[int | None, int] = {}
        for place, (layer, size) in self.kept.items():
            if place not in self.inputs:
                by_layer[layer] = by_layer.get(layer, 0) + size
        outside = by_layer.pop(None, 0)
        everything = sum(size for _, size in self.kept.values())
        return Saved(everything, sum(self.inputs.values()), outside, max(by_layer.values(), default=0), sparse)


def storage(tensor: torch.Tensor) -> int:
    """Identifies a tensor's storage; a view shares that of its base."""
    return tensor.untyped_storage()._cdata


def saved_in_training(model: PeftModel, placement: DeviceConfig, rows: int, length: int) -> Saved:
    """What training `model` keeps for a micro-batch of `rows` records of `length` tokens, all of them labelled.

    The model may be on the meta device, or hold its weights, which are not touched. Raises whatever its code raises if it
    looks at values.
    """
    computes_here = placement.device.type != "cuda" or torch.cuda.is_available()
    device = placement.device if computes_here else torch.device("cpu")
    model = without_values(model, placement.dtype)
    base: PreTrainedModel = model.get_base_model()
    with computing_without_values(), torch.device(device):
        give_tensors(model)
        if placement.quantize:
            compute_as_quantized(base, placement)
        ids, places = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows * (length - 1), dtype=torch.long)
        with torch.autocast(device.type, placement.dtype, enabled=placement.autocast_dtype is not None):
            sparse = gives_logits_of_its_output_layer(base)
            head = base.get_output_embeddings()
            loss = functools.partial(sparse_loss, base.base_model, head, False) if sparse else base.forward
            base.forward = loss if sparse else functools.partial(full_loss, loss)
            counter = Counter(model)
            with counter.counting():
                model.train()(input_ids=ids, labels=ids, places=places)
    return counter.saved(sparse)


def product_of_experts(values: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Stands in for torch's grouped product, which supports only bfloat16 without values: (tokens, in), (experts, in, out)."""
    return values.to(weight.dtype) @ weight[0]


@contextlib.contextmanager
def computing_without_values() -> Iterator[None]:
    """While the block runs, tensors have shapes but no values; torch's log of operations that need values is silenced."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level, grouped, packed = logger.level, moe._grouped_mm, masking_utils.find_packed_sequence_indices
    logger.setLevel(logging.CRITICAL)
    moe._grouped_mm = product_of_experts
    masking_utils.find_packed_sequence_indices = lambda *_: None  # avoids a mask that training does without
    try:
        with FakeTensorMode():
            yield
    finally:
        logger.setLevel(level)
        moe._grouped_mm, masking_utils.find_packed_sequence_indices = grouped, packed


def without_values(model: PeftModel, dtype: torch.dtype) -> PeftModel:
    """A model of the same architecture with the same adapter, on the meta device, its frozen weights in `dtype`."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        wrapped = get_peft_model(base, copy.deepcopy(model.peft_config["default"]))
    train_in_float32(wrapped)
    return wrapped


def give_tensors(model: nn.Module) -> None:
    """Replace a model's tensors with new ones on the current device; shared ones stay shared."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in new:
                new[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
            setattr(module, name, new[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


class Product8bit(torch.autograd.Function):
    """A linear layer as bitsandbytes computes it in 8 bit: it keeps its input, though its weight does not train."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product of `values`, (…, in), and `weight`, (out, in)."""
        ctx.save_for_backward(values)
        return functional.linear(values, weight.to(values.dtype), bias)


def product_4bit(layer: nn.Linear, values: torch.Tensor) -> torch.Tensor:
    """A linear layer as bitsandbytes computes it in 4 bit: it keeps nothing, and returns the dtype of its input."""
    return functional.linear(values.to(layer.weight.dtype), layer.weight, layer.bias).to(values.dtype)


def product_8bit(layer: nn.Linear, values: torch.Tensor) -> torch.Tensor:
    """A linear layer in 8 bit."""
    return Product8bit.apply(values, layer.weight, layer.bias)


def compute_as_quantized(base: PreTrainedModel, placement: DeviceConfig) -> None:
    """Have the linear layers that would be quantized keep what their quantized form keeps for the backward pass."""
    product = product_8bit if placement.quantize == "8bit" else product_4bit
    for module in base.modules():
        if isinstance(module, nn.Linear) and module is not output_layer(base) and not module.weight.requires_grad:
            module.forward = functools.partial(product, module)  # type: ignore[method-assign]


class Hidden(BaseModelOutputWithPast):
    """A decoder's output with hidden states only."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def gives_logits_of_its_output_layer(base: PreTrainedModel) -> bool:
    """True if a model's logits are its output layer's, neither scaled nor capped; the decoder is not run."""
    decoder, head = base.base_model, output_layer(base)
    if decoder is base or head is None:
        return False
    given: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    hidden = torch.empty(1, 2, base.config.get_text_config().hidden_size, dtype=base.dtype)
    decoder.forward = lambda *_, **__: Hidden(last_hidden_state=hidden)
    try:
        logits = base(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits
    finally:
        hook.remove()
        del decoder.forward
    return len(given) == 1 and logits is given[0]
