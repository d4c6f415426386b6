"""The loss of a causal language model, with logits only where there is a label."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from utils.datasets.encoding import IGNORED
from utils.models.sharding import loads

CHUNK = 512  # supervised tokens whose logits are held at once; torch's own choice (8 to 64) takes twice as long
PROBE = 1000  # far above any model's cap on its logits (Gemma 2: 30)


@contextlib.contextmanager
def returning_loss(
    model: PreTrainedModel, computing: contextlib.AbstractContextManager[Any] | None = None, sharded: bool = False
) -> Iterator[bool]:
    """While the block runs, `model(input_ids, labels)` returns the sum of the cross-entropies of its labelled tokens.

    Yields True if only labelled tokens go through the output layer, False if the model's own logits must be used
    because it processes them further (scales or caps them, say). `computing` is the context that training computes in.
    If the model is `sharded`, each rank calls the output layer exactly once per micro-batch, since the ranks gather its
    weights together.
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    with computing or contextlib.nullcontext():
        sparse = loads() and head is not None and is_decoder_and_head(model, decoder, head)
    if sharded:  # before the model is sharded, only the first rank has the weights
        [sparse] = broadcast_object_list([sparse])
    own = model.__dict__.get("forward")  # there if the model is spread over devices
    if sparse:
        model.forward = functools.partial(sparse_loss, decoder, head, sharded)
    else:
        model.forward = functools.partial(full_loss, model.forward)
    try:
        yield sparse
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@torch.no_grad()
def is_decoder_and_head(model: PreTrainedModel, decoder: nn.Module, head: nn.Module) -> bool:
    """True if the model's logits are exactly what its output layer makes of the decoder's hidden states.

    The output layer's result is enlarged to PROBE on the way, so that capping or scaling shows however small the model's
    own logits are.
    """
    if decoder is model:
        return False
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def enlarge(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        large = output * (PROBE / output.abs().max().clamp(min=1e-3))
        seen.append((inputs[0], large))
        return large

    was_training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    hook = head.register_forward_hook(enlarge)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        if len(seen) != 1:
            return False
        hidden = decoder(input_ids=ids, use_cache=False)[0]
    finally:
        hook.remove()
        model.train(was_training)
    head_input, head_output, hidden, logits = (values.float().cpu() for values in (*seen[0], hidden, logits))
    near = (head_input - hidden).abs().max() <= 1e-2 * hidden.abs().max()
    return bool(near) and torch.equal(logits, head_output)


def sparse_loss(
    decoder: nn.Module,
    head: nn.Module,
    sharded: bool,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    **_: object,
) -> torch.Tensor:
    """Sum of cross-entropies of a micro-batch from `batching.pad`; logits are computed at its `places` only."""
    every = decoder(input_ids=input_ids, use_cache=False)[0].flatten(0, 1)
    if not len(places):  # zero, yet a function of all parameters, which a rank without records needs
        return 0 * head(every[:1]).float().sum()
    hidden, targets = every[places.to(every.device)], labels.flatten()[places + 1]
    if sharded:
        return head_loss(head, hidden, targets)
    layer = plain_layer(head)
    if layer is not None and hidden.dtype == layer.weight.dtype == torch.float32 and hidden.device == layer.weight.device:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        return functional.linear_cross_entropy(
            hidden, layer.weight, targets.to(hidden.device), linear_bias=layer.bias, reduction="sum", options=options
        )
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(head_loss, head, h, t, use_reentrant=False) for h, t in chunks]).sum()


def head_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies of one chunk, in float32 whatever the model's dtype."""
    scores = head(hidden).float()
    return functional.cross_entropy(scores, targets.to(scores.device), reduction="sum")


def plain_layer(head: nn.Module) -> nn.Linear | None:
    """The output layer if it is an ordinary linear layer (or a trained copy of one); None if it has LoRA or is quantized."""
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save["default"]
    return head if type(head) is nn.Linear else None


def full_loss(forward, input_ids: torch.Tensor, labels: torch.Tensor, **_: object) -> torch.Tensor:
    """The same sum from the model's own logits for all tokens."""
    logits = forward(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:].flatten().to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
