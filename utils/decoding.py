"""Decoding: prompts' ids in, answers' ids out, one token a step; greedy, sampled, or by beams.

The results are those of transformers' `generate` on one prompt at a time. What is different is the work: prompts are
read in groups of like length, once for all their beams; the cache grows in place; beams exchange only what
they generated; and a row that has its answer leaves the batch at once.
"""

import dataclasses
import heapq
import inspect
from collections.abc import Callable, Generator, Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.logits_process import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from utils.console import UserError

Ids = list[int]
WORTHWHILE = 12  # tokens that prompts have in common, for these to be computed once
ROOM = 64  # columns that a full cache grows by
PREFILL_TOKENS = 1024  # read at once: enough to keep the device busy, few enough to bound the activations


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode. Without `do_sample` the temperature, `top_p` and `top_k` have no effect."""

    num_beams: int = 4
    temperature: float = 0.1
    top_p: float = 0.75
    top_k: int = 40
    max_new_tokens: int = 2048
    do_sample: bool = False
    seed: int = 42
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    @property
    def samples(self) -> bool:
        """True where chance has a part; a temperature of 0 means the likeliest token."""
        return self.do_sample and self.temperature > 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a batch: the rows that grew, the ids of those that are `finished`, and of those still `running`.

    With beams `running` is empty: which of them is the answer is known at its end only.
    """

    rows: int
    finished: dict[int, Ids]
    running: dict[int, Ids]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: list[Ids],
    limits: list[int],
    settings: Settings,
    ended: Callable[[Ids], bool],
    seeds: list[int],
) -> Generator[Step]:
    """Answer `prompts`, all at once, with at most `limits` tokens each; one `Step` a token.

    `ended` tells from an answer's ids so far whether its last token ends it. Each prompt has its own seed, so
    what is sampled for it does not depend on the others. To end the computation, close the iterator.
    """
    batch = Batch(model, prompts)
    processors = penalties(settings)
    if settings.num_beams > 1:
        yield from search_beams(batch, prompts, limits, settings, processors, ended, seeds)
    else:
        yield from search_single(batch, prompts, limits, settings, processors, ended, seeds)


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, length, dim), with room to append in place.

    Sliding windows are left to the attention mask: the layer keeps every column.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start, stop = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif stop > self.keys.shape[2]:
            self.hold(slice(None), 0, start, stop - start + max(ROOM, start // 4))
        if start:
            self.keys[:, :, start:stop] = key_states
            self.values[:, :, start:stop] = value_states
        self.length = stop
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def hold(self, rows: slice | torch.Tensor, start: int, stop: int, room: int) -> None:
        """Keep these rows and these columns, with `room` columns after them."""
        for name in ("keys", "values"):
            old = getattr(self, name)[rows, :, start:stop]
            new = old.new_empty((*old.shape[:2], old.shape[2] + room, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)
        self.length = stop - start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Batch:
    """Rows of one computation: their cache, which of its columns are real, and the last `logits`, (rows, vocabulary).

    Prompts of unequal length are padded on the left; the padding is masked, and positions count real tokens only.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[Ids]):
        self.model = model
        known = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in known
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.start = max(len(prompt) for prompt in prompts)  # the column where answers begin
        # where attention goes by columns, not by positions, there must be no padding after the opening
        by_positions = self.takes_positions and not getattr(model.config.get_text_config(), "sliding_window", None)
        parts: dict[tuple[int, ...], tuple[Cache, torch.Tensor, torch.Tensor]] = {}
        for family in families(prompts) if by_positions else [list(range(len(prompts)))]:
            opening = common_opening([prompts[row] for row in family]) if by_positions else []
            first = self._read([opening])[0] if opening else None
            for rows in groups(family, prompts):
                parts[tuple(rows)] = self._read([prompts[row] for row in rows], opening, first)
        back = torch.tensor([row for rows in parts for row in rows]).argsort()
        self.logits = torch.cat([logits for _, _, logits in parts.values()])[back]
        masks = [torch.nn.functional.pad(mask, (self.start - mask.shape[1], 0)) for _, mask, _ in parts.values()]
        self.mask = torch.cat(masks)[back]
        self.cache = join({rows: cache for rows, (cache, _, _) in parts.items()}, self.start)

    def _read(
        self, prompts: list[Ids], opening: Ids | None = None, first: Cache | None = None
    ) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """Run the model over a few prompts: their cache, mask and last logits.

        Where all of them begin with `opening`, it is in the cache `first` already, one row for all.
        """
        read, device = len(opening or []), self.model.device
        width = max(len(prompt) for prompt in prompts) - read
        padding = [width + read - len(prompt) for prompt in prompts]
        rest = [[0] * pad + prompt[read:] for pad, prompt in zip(padding, prompts, strict=True)]
        real = [[1] * read + [0] * pad + [1] * (width - pad) for pad in padding]
        ids, mask = torch.tensor(rest, device=device), torch.tensor(real, device=device)
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        for index, layer in enumerate(first.layers if first else []):
            cache.update(layer.keys.expand(len(prompts), -1, -1, -1), layer.values.expand(len(prompts), -1, -1, -1), index)
        return cache, mask, self._forward(ids, mask, cache)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        options = dict(self.options)
        if self.takes_positions:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits = output.logits[:, -1].float()
        if logits[:, 0].isnan().any():
            raise UserError("the model's scores are not numbers (broken weights, or float16 overflows); check the folder")
        return logits

    def step(self, tokens: Ids) -> None:
        """Append one token to each row and compute the next logits."""
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        self.logits = self._forward(ids, self.mask, self.cache)

    def select(self, rows: list[int]) -> None:
        """Keep `rows`, in this order and as often as named; padding that none of them needs goes."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[index]
        spare = int(self.mask.argmax(1).min())
        for layer in self.cache.layers:
            layer.hold(index, spare, layer.length, ROOM)
        self.mask = self.mask[:, spare:].contiguous()
        self.start -= spare

    def exchange(self, sources: list[int]) -> None:
        """Give each row what row `sources[row]` has generated; both continue the same prompt."""
        moved = [row for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        to = torch.tensor(moved, device=self.mask.device)
        of = torch.tensor([sources[row] for row in moved], device=self.mask.device)
        for layer in self.cache.layers:
            for part in (layer.keys, layer.values):
                answers = part[:, :, self.start : layer.length]
                answers[to] = answers[of]


def families(prompts: list[Ids]) -> list[list[int]]:
    """The rows of `prompts` by their first tokens: each way in which a template opens is a family."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(tuple(prompt[:WORTHWHILE]), []).append(row)
    return list(found.values())


def common_opening(prompts: list[Ids]) -> Ids:
    """What all prompts begin with, such as a template's preamble, but for at least one token of each.

    None of it where there is little to win: the opening is computed once instead of once a prompt.
    """
    if len(prompts) < 2:
        return []
    low, high = min(prompts), max(prompts)
    shared = next((place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    return low[: min(shared, min(map(len, prompts)) - 1)] if shared >= WORTHWHILE else []


def groups(rows: list[int], prompts: list[Ids]) -> Iterator[list[int]]:
    """Split the rows of `prompts`, keeping their order, into runs of like length that are read at once."""
    group: list[int] = []
    for row in rows:
        lengths = [len(prompts[other]) for other in [*group, row]]
        wasted = len(lengths) * max(lengths) - sum(lengths)
        if group and (len(lengths) * max(lengths) > PREFILL_TOKENS or wasted > sum(lengths) // 8):
            yield group
            group = []
        group.append(row)
    yield group


def join(caches: dict[tuple[int, ...], Cache], width: int) -> Cache:
    """One cache of `width` columns, in which the rows of each are those that its key names, shifted to the right."""
    joined = Cache(layer_class_to_replicate=GrowingLayer)
    for index in range(len(next(iter(caches.values())).layers)):
        layers = {rows: cache.layers[index] for rows, cache in caches.items()}
        buffers = []
        for name in ("keys", "values"):
            first = getattr(next(iter(layers.values())), name)
            buffer = first.new_zeros((sum(map(len, layers)), first.shape[1], width + ROOM, first.shape[3]))
            for rows, layer in layers.items():
                part = getattr(layer, name)[:, :, : layer.length]
                buffer[list(rows), :, width - part.shape[2] : width] = part
                setattr(layer, name, None)  # so that no more than one layer is held twice
            buffers.append(buffer)
        joined.update(*buffers, index)
        joined.layers[index].length = width
    return joined


def penalties(settings: Settings) -> LogitsProcessorList:
    """What lowers the scores of tokens for being repetitions."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    return processors


def penalise(scores: torch.Tensor, texts: list[Ids], processors: LogitsProcessorList) -> torch.Tensor:
    """Apply `processors` row by row: a row's padding must not count as its text."""
    if not processors:
        return scores
    rows = [processors(torch.tensor([text], device=scores.device), scores[row : row + 1]) for row, text in enumerate(texts)]
    return torch.cat(rows)


def narrow(scores: torch.Tensor, settings: Settings, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be sampled: the `top_k` best, of these the nucleus `top_p` (Holtzman et al. 2020).

    scores: (rows, vocabulary) float32. Returns the scores divided by the temperature, -inf outside of the nucleus,
    and the tokens, both (rows, top_k), best first; at least `least` of each row are finite.
    """
    count = min(max(settings.top_k or scores.shape[1], least), scores.shape[1])
    best, tokens = (scores / settings.temperature).topk(count, dim=1)
    chances = best.softmax(1)
    outside = chances.cumsum(1) - chances >= settings.top_p
    outside[:, :least] = False
    return best.masked_fill(outside, -torch.inf), tokens


def noise(tokens: torch.Tensor, vocabulary: int, generators: list[torch.Generator]) -> torch.Tensor:
    """Gumbel noise for `tokens`, (rows, candidates), drawn from the generators in turn, each for as many rows.

    The largest of scores + noise are a sample without replacement from softmax(scores) (Kool et al. 2019). The
    noise is drawn for the whole vocabulary, so that a token's does not hang on its rank, which rounding may change.
    """
    rows = len(tokens) // len(generators)
    drawn = [torch.empty(rows, vocabulary).exponential_(generator=generator) for generator in generators]
    return -torch.cat(drawn).gather(1, tokens.cpu()).log().to(tokens.device)


def search_single(
    batch: Batch,
    prompts: list[Ids],
    limits: list[int],
    settings: Settings,
    processors: LogitsProcessorList,
    ended: Callable[[Ids], bool],
    seeds: list[int],
) -> Iterator[Step]:
    """The likeliest token, or a sampled one, at each step of each row."""
    rows = list(range(len(prompts)))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    answers: list[Ids] = [[] for _ in prompts]
    while rows:
        scores = penalise(batch.logits, [prompts[row] + answers[row] for row in rows], processors)
        if settings.samples:
            best, tokens = narrow(scores, settings, 1)
            drawn = best + noise(tokens, scores.shape[1], [generators[row] for row in rows])
            chosen = tokens.gather(1, drawn.argmax(1, keepdim=True))[:, 0]
        else:
            chosen = scores.argmax(1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            answers[row].append(token)
        done = {row: answers[row] for row in rows if ended(answers[row]) or len(answers[row]) >= limits[row]}
        kept = [place for place, row in enumerate(rows) if row not in done]
        grown, rows = len(rows), [rows[place] for place in kept]
        yield Step(grown, done, {row: answers[row] for row in rows})
        if rows:
            if done:
                batch.select(kept)
            batch.step([answers[row][-1] for row in rows])


class Beams:
    """The beams of one prompt: `running` ones, best first, as (score, ids), and the best `finished` ones.

    A score is the sum of log-probabilities; that of a finished beam is divided by its length. The rules are those
    of transformers with `early_stopping=False` and `length_penalty=1`.
    """

    def __init__(self, width: int, limit: int):
        self.width, self.limit = width, limit
        self.running: list[tuple[float, Ids]] = [(0.0, [])]
        self.finished: list[tuple[float, Ids]] = []
        self.done = False

    def extend(self, candidates: list[tuple[float, int, int]], ended: Callable[[Ids], bool]) -> list[int]:
        """Go on with the best `candidates` (score, beam, token; best first); return the beams they continue."""
        length = len(self.running[0][1]) + 1
        running: list[tuple[float, Ids]] = []
        sources: list[int] = []
        for rank, (score, beam, token) in enumerate(candidates):
            ids = [*self.running[beam][1], token]
            if length < self.limit and not ended(ids):
                if len(running) < self.width:
                    running.append((score, ids))
                    sources.append(beam)
            elif rank < self.width:
                self.finished.append((score / length, ids))
        self.finished = heapq.nlargest(self.width, self.finished, key=lambda beam: beam[0])
        improvable = len(self.finished) < self.width or (running and running[0][0] / length > self.finished[-1][0])
        self.done = not (running and improvable)
        while running and len(running) < self.width:  # every candidate of a beam ended: keep the batch's shape
            running.append((-1e9, running[-1][1]))
            sources.append(sources[-1])
        self.running = running
        return sources


def search_beams(
    batch: Batch,
    prompts: list[Ids],
    limits: list[int],
    settings: Settings,
    processors: LogitsProcessorList,
    ended: Callable[[Ids], bool],
    seeds: list[int],
) -> Iterator[Step]:
    """Beam search, or beam sampling with `do_sample`: `num_beams` texts for each prompt, the best of which is its answer."""
    rows = list(range(len(prompts)))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    beams = [Beams(settings.num_beams, limit) for limit in limits]
    while rows:
        width = len(beams[rows[0]].running)  # 1 at the first step, then `num_beams`
        texts = [prompts[row] + ids for row in rows for _, ids in beams[row].running]
        scores = penalise(batch.logits.log_softmax(1), texts, processors)
        wanted = min(2 * settings.num_beams, scores.shape[1])  # enough to go on if every beam could end
        best, tokens = narrow(scores, settings, 2) if settings.samples else scores.topk(wanted, dim=1)
        sums = torch.tensor([[score for score, _ in beams[row].running] for row in rows], device=scores.device)
        best = best + sums.view(-1, 1)
        ranked = best
        if settings.samples:
            ranked = best + noise(tokens, scores.shape[1], [generators[row] for row in rows])
        best, ranked = best.view(len(rows), -1), ranked.view(len(rows), -1)
        places = ranked.topk(min(wanted, ranked.shape[1]), dim=1).indices
        values, words = best.gather(1, places).tolist(), tokens.view(len(rows), -1).gather(1, places).tolist()
        origins = (places // tokens.shape[1]).tolist()
        sources: list[int] = []
        for place, row in enumerate(rows):
            found = [c for c in zip(values[place], origins[place], words[place], strict=True) if c[0] > -torch.inf]
            kept = beams[row].extend(found, ended)
            if not beams[row].done:
                sources += [place * width + beam for beam in kept]
        done = {row: beams[row].finished[0][1] for row in rows if beams[row].done}
        grown, rows = len(rows), [row for row in rows if row not in done]
        yield Step(grown, done, {})
        if rows:
            if done or width < settings.num_beams:
                batch.select(sources)
            else:
                batch.exchange(sources)
            batch.step([ids[-1] for row in rows for _, ids in beams[row].running])
