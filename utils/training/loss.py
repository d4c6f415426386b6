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

CHUNK = 512  # supervised tokens whose logits are held at once; torch's own choice, of 8 to 64, takes twice the time
PROBE = 1000  # beyond what any model caps its logits at (Gemma 2: 30)


@contextlib.contextmanager
def returning_loss(
    model: PreTrainedModel, computing: contextlib.AbstractContextManager[Any] | None = None, sharded: bool = False
) -> Iterator[bool]:
    """While the block runs, `model(input_ids, labels)` returns the sum of the cross-entropies of its labelled tokens.

    Yields True where only labelled tokens go through the output layer, False where the model's own logits must be
    used because it does more to them than its output layer does (it scales or caps them, say). `computing` is the
    context that training computes in; of a model that is `sharded` each rank calls the output layer once a micro-batch,
    since the ranks gather its weights together.
    """
    decoder, head = model.base_model, model.get_output_embeddings()
    with computing or contextlib.nullcontext():
        sparse = loads() and head is not None and is_decoder_and_head(model, decoder, head)
    if sharded:  # until it is, the first rank alone has the weights
        [sparse] = broadcast_object_list([sparse])
    own = model.__dict__.get("forward")  # of a model that is spread over devices
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
    """True if the model's logits are its output layer's, applied to what its decoder gives.

    The output layer's result is replaced by one of up to PROBE on the way: a model that caps or scales its logits
    shows it there, however small they are themselves.
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
    put_in, came_out = seen[0]
    put_in, came_out, hidden, logits = (values.float().cpu() for values in (put_in, came_out, hidden, logits))
    near = (put_in - hidden).abs().max() <= 1e-2 * hidden.abs().max()
    return bool(near) and torch.equal(logits, came_out)


def sparse_loss(
    decoder: nn.Module,
    head: nn.Module,
    sharded: bool,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    **_: object,
) -> torch.Tensor:
    """Sum of cross-entropies of a micro-batch as `batching.pad` gives it; logits exist at its `places` only."""
    every = decoder(input_ids=input_ids, use_cache=False)[0].flatten(0, 1)
    if not len(places):  # zero, and still a function of all parameters, as a rank without records needs it
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
    """Sum of cross-entropies of one chunk, in float32 whatever the model computes in."""
    scores = head(hidden).float()
    return functional.cross_entropy(scores, targets.to(scores.device), reduction="sum")


def plain_layer(head: nn.Module) -> nn.Linear | None:
    """The output layer where it is an ordinary linear one (or a trained copy of one), else None: LoRA, quantized."""
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save["default"]
    return head if type(head) is nn.Linear else None


def full_loss(forward, input_ids: torch.Tensor, labels: torch.Tensor, **_: object) -> torch.Tensor:
    """The same sum out of the model's own logits for all tokens."""
    logits = forward(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:].flatten().to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
