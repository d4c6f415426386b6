"""Prefix sharing: both answers of a pair in one row, so that the prompt and what else they begin with is computed once.

Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing" (arXiv 2410.20305).
"""

import torch


def share_prefixes(input_ids: torch.Tensor, places: torch.Tensor, pad_to: int = 1) -> dict[str, torch.Tensor]:
    """The rows of a micro-batch from `batching.pad`, the chosen answers first, as one row for each pair.

    A row holds the chosen sequence, then what the rejected one does not share with it, each without the tokens after
    its last place; padding makes the width a multiple of `pad_to`. Returns `input_ids` and `position_ids`
    (pairs, width), `attention_mask` (pairs, 1, width, width) bool, True where a token sees another, and `places`
    (labelled,) in these rows.
    """
    count, width = len(input_ids) // 2, input_ids.shape[1]
    rows, columns = places // width, places % width
    ends = torch.zeros(2 * count, dtype=torch.long).scatter_reduce(0, rows, columns + 1, "amax")
    chosen, rejected = ends[:count, None], ends[count:, None]
    differs = input_ids[:count] != input_ids[count:]
    shared = torch.where(differs.any(1), differs.int().argmax(1), width)[:, None].minimum(chosen).minimum(rejected)

    longest = max(1, int((chosen + rejected - shared).max()))
    place = torch.arange(-(-longest // pad_to) * pad_to)[None]
    second = place >= chosen  # after the chosen sequence: what only the rejected one has
    positions = torch.where(second, place - chosen + shared, place).clamp(max=width - 1)
    both = torch.stack([input_ids[:count], input_ids[count:]], 2)  # (pairs, width, 2)
    ids = both[torch.arange(count)[:, None], positions, second.long()]
    hidden = second[:, :, None] & ((place >= shared) & (place < chosen))[:, None]  # the chosen answer, from the rejected one
    sees = (place.mT >= place) & ~hidden

    pair = rows % count
    moved = torch.where((rows >= count) & (columns >= shared[pair, 0]), columns + (chosen - shared)[pair, 0], columns)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": sees[:, None],
        "places": pair * place.shape[1] + moved,
    }
