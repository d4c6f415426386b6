"""How likely a model finds continuations of prompts, in batches; what the prompts have in common is computed once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from utils.inference.kv_cache import GrowingLayer, Ids, Reader, common_opening, keeps_states

READ_TOKENS = 2048  # new tokens per forward pass
CACHED_TOKENS = 32768  # over all rows of a pass, counting the opening in each row; more is not faster
WASTE = 8  # at most 1/8 of a pass is padding


class Asked(NamedTuple):
    """A prompt, and the continuations, none of them empty, whose likelihoods are wanted."""

    prompt: Ids
    continuations: list[Ids]


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, asked: Sequence[Asked], room: int) -> list[list[float]]:
    """For each prompt the log-likelihood of each of its continuations: the sum of its tokens' natural log-probabilities.

    The opening that all prompts of one call share (a description, worked examples) is computed once, except by models with
    a state, of which padding would become a part. `room`: for how many tokens memory can hold keys and values.
    """
    if keeps_states(model):
        return [alone(model, one) for one in asked]
    reader = Reader(model)
    found: list[list[float]] = [[] for _ in asked]
    opening = common_opening([one.prompt for one in asked]) if reader.shares_openings else []
    first = reader.read([opening])[0] if opening else None
    for places in batches(asked, len(opening), min(CACHED_TOKENS, room // 2)):
        prompts = [asked[place].prompt for place in places]
        cache, mask, logits = reader.read(prompts, opening, first)
        scores = logits.log_softmax(-1)
        wanted = [asked[place].continuations for place in places]
        for place, row, ones in zip(places, scores, wanted, strict=True):
            found[place] = [row[ids[0]].item() for ids in ones]
        rows = [(row, number) for row, ones in enumerate(wanted) for number, ids in enumerate(ones) if len(ids) > 1]
        for start in range(0, len(rows), len(places)):  # no more rows at once than there were prompts
            some = rows[start : start + len(places)]
            for (row, number), rest in zip(some, continue_rows(reader, cache, mask, wanted, some), strict=True):
                found[places[row]][number] += rest
    return found


def alone(model: PreTrainedModel, one: Asked) -> list[float]:
    """The log-likelihood of each continuation of one prompt, each text computed from its start; single tokens share a pass."""
    known: dict[tuple[int, ...], torch.Tensor] = {}
    found = []
    for ids in one.continuations:
        rest = tuple(ids[:-1])  # what is read after the prompt; the last token is only predicted
        if rest not in known:
            text = torch.tensor([[*one.prompt, *rest]], device=model.device)
            logits = model(input_ids=text, use_cache=False).logits[0, len(one.prompt) - 1 :]
            known[rest] = logits.float().log_softmax(-1)
        found.append(sum(known[rest][column, token].item() for column, token in enumerate(ids)))
    return found


def continue_rows(
    reader: Reader, cache: Cache, mask: torch.Tensor, wanted: list[list[Ids]], rows: list[tuple[int, int]]
) -> list[float]:
    """The log-likelihood of some continuations after their first token, each given the cached row it belongs to.

    `rows`: for each, its row and its number among the row's continuations.
    """
    index = torch.tensor([row for row, _ in rows], device=mask.device)
    copy = Cache(layer_class_to_replicate=GrowingLayer)
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys[index, :, : layer.length], layer.values[index, :, : layer.length], number)
    texts = [wanted[row][number] for row, number in rows]
    width = max(map(len, texts)) - 1
    ids = torch.tensor([text[:-1] + [0] * (width - len(text) + 1) for text in texts], device=mask.device)
    real = torch.tensor([[1] * (len(text) - 1) + [0] * (width - len(text) + 1) for text in texts], device=mask.device)
    scores = reader.forward(ids, torch.cat([mask[index], real], 1), copy, keep=width).log_softmax(-1)
    return [sum(scores[row, column, token].item() for column, token in enumerate(text[1:])) for row, text in enumerate(texts)]


def batches(asked: Sequence[Asked], opening: int, columns: int) -> Iterator[list[int]]:
    """Indices of prompts that are read together: of similar length, with at most `columns` tokens in the cache."""
    batch: list[int] = []
    new = 0
    for place in sorted(range(len(asked)), key=lambda place: -len(asked[place].prompt)):
        length = len(asked[place].prompt)
        longest = len(asked[batch[0]].prompt) if batch else length
        rows = len(batch) + 1
        padding = rows * (longest - opening) - new - (length - opening)
        too_many = rows * (longest - opening) > READ_TOKENS or rows * longest > columns
        if batch and (too_many or padding * WASTE > rows * (longest - opening)):
            yield batch
            batch, new = [], 0
        batch.append(place)
        new += length - opening
    if batch:
        yield batch
