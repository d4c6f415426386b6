"""The loss of a causal language model, with logits only where there is a label."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from utils.encoding import IGNORED

CHUNK = 512  # supervised tokens whose logits are held at once; torch's own choice, of 8 to 64, takes twice the time


@contextlib.contextmanager
def returning_loss(model: PreTrainedModel) -> Iterator[bool]:
    """While the block runs, `model(input_ids, labels)` returns the sum of the cross-entropies of its labelled tokens.

    Yields True where only labelled tokens go through the output layer, False where the model's own logits must be
    used because it does more to them than its output layer does (it scales or caps them, say).
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    sparse = head is not None and is_decoder_and_head(model, decoder, head)
    model.forward = functools.partial(sparse_loss, decoder, head) if sparse else functools.partial(full_loss, model.forward)
    try:
        yield sparse
    finally:
        del model.forward


@torch.no_grad()
def is_decoder_and_head(model: PreTrainedModel, decoder: nn.Module, head: nn.Module) -> bool:
    """True if the model's logits are its output layer's, applied to what its decoder gives."""
    if decoder is model:
        return False
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    try:
        hidden = decoder(input_ids=ids, use_cache=False)[0]
        return torch.allclose(head(hidden).float(), model(input_ids=ids, use_cache=False).logits.float(), rtol=1e-2, atol=1e-3)
    finally:
        model.train(was_training)


def sparse_loss(
    decoder: nn.Module, head: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, **_: object
) -> torch.Tensor:
    """Sum of cross-entropies; `input_ids`, `labels`: (batch, length) int64; logits exist for labelled tokens only."""
    hidden = decoder(input_ids=input_ids, use_cache=False)[0][:, :-1]
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    hidden, targets = hidden[labelled], targets[labelled]
    if not len(targets):
        return hidden.sum()  # zero, and still a function of the parameters, as a process without records needs it
    layer = plain_layer(head)
    if layer is not None and hidden.dtype == torch.float32:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        return functional.linear_cross_entropy(
            hidden, layer.weight, targets, linear_bias=layer.bias, reduction="sum", options=options
        )
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(head_loss, head, h, t, use_reentrant=False) for h, t in chunks]).sum()


def head_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies of one chunk, in float32 whatever the model computes in."""
    return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def plain_layer(head: nn.Module) -> nn.Linear | None:
    """The output layer where it is an ordinary linear one (or a trained copy of one), else None: LoRA, quantised."""
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save["default"]
    return head if type(head) is nn.Linear else None


def full_loss(forward, input_ids: torch.Tensor, labels: torch.Tensor, **_: object) -> torch.Tensor:
    """The same sum out of the model's own logits for all tokens."""
    logits = forward(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
