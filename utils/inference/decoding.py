"""Decoding: prompts' ids in, answers' ids out, one token per step; greedy, sampling, or beam search.

The results are those of transformers' `generate` on one prompt at a time, but the work differs
(`utils.inference.kv_cache`): a row whose answer is finished leaves the batch at once. That is 1.5 times (one beam) to 2.2
times (four) as fast as `generate` on left-padded batches of prompts of similar length (`benchmarks/generate.py`).
"""

import dataclasses
import heapq
from collections.abc import Callable, Generator, Iterator

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from utils.inference.kv_cache import DecodingBatch, Ids, StateBatch, start_decoding
from utils.inference.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a batch: the number of rows that grew, the ids of `finished` ones, and of those still `running`.

    With beams `running` is empty: which of them becomes the answer is known only at the end.
    """

    rows: int
    finished: dict[int, Ids]
    running: dict[int, Ids]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: list[Ids],
    limits: list[int],
    settings: SamplingParams,
    is_finished: Callable[[Ids], bool],
    seeds: list[int],
) -> Generator[Step]:
    """Answer `prompts`, all at once, with at most `limits` tokens each; one `Step` per token.

    `is_finished` tells from an answer's ids so far whether its last token ends it. Each prompt has its own seed, so
    what is sampled for it does not depend on the others. To end the computation, close the iterator.
    """
    search, batch = search_beams if settings.num_beams > 1 else search_single, start_decoding(model, prompts)
    generators = [torch.Generator(batch.logits.device).manual_seed(seed) for seed in seeds]
    yield from search(batch, prompts, limits, settings, is_finished, generators)


def penalties(settings: SamplingParams) -> LogitsProcessorList:
    """Logits processors that lower the scores of repetitions."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    return processors


def penalize(scores: torch.Tensor, texts: list[Ids], processors: LogitsProcessorList) -> torch.Tensor:
    """Apply `processors` row by row, since a row's padding must not count as its text."""
    if not processors:
        return scores
    rows = [processors(torch.tensor([text], device=scores.device), scores[row : row + 1]) for row, text in enumerate(texts)]
    return torch.cat(rows)


def top_k_top_p(scores: torch.Tensor, settings: SamplingParams, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be sampled: the `top_k` best, and among these the nucleus `top_p` (Holtzman et al. 2020).

    scores: (rows, vocabulary) float32. Returns the scores divided by the temperature, -inf outside the nucleus,
    and the tokens, both (rows, top_k), best first; at least `least` of each row are finite.
    """
    count = min(max(settings.top_k or scores.shape[1], least), scores.shape[1])
    best, tokens = (scores / settings.temperature).topk(count, dim=1)
    chances = best.softmax(1)
    outside = chances.cumsum(1) - chances >= settings.top_p
    outside[:, :least] = False
    return best.masked_fill(outside, -torch.inf), tokens


def gumbel_noise(tokens: torch.Tensor, vocabulary: int, generators: list[torch.Generator]) -> torch.Tensor:
    """Gumbel noise for `tokens`, (rows, candidates), drawn from the generators in turn, each for equally many rows.

    The largest of scores + noise are a sample without replacement from softmax(scores) (Kool et al. 2019). The noise
    is drawn for the whole vocabulary, so that a token's noise does not depend on its rank, which rounding may change.
    """
    rows = len(tokens) // len(generators)
    drawn = [torch.empty(rows, vocabulary, device=tokens.device).exponential_(generator=generator) for generator in generators]
    return -torch.cat(drawn).gather(1, tokens).log()


def choose(scores: torch.Tensor, settings: SamplingParams, generators: list[torch.Generator]) -> Ids:
    """The likeliest token of each row of `scores`, (rows, vocabulary), or one sampled with the row's generator."""
    if not settings.samples:
        return scores.argmax(1).tolist()
    best, tokens = top_k_top_p(scores, settings, 1)
    drawn = best + gumbel_noise(tokens, scores.shape[1], generators)
    return tokens.gather(1, drawn.argmax(1, keepdim=True))[:, 0].tolist()


def search_single(
    batch: DecodingBatch | StateBatch,
    prompts: list[Ids],
    limits: list[int],
    settings: SamplingParams,
    is_finished: Callable[[Ids], bool],
    generators: list[torch.Generator],
) -> Iterator[Step]:
    """The likeliest token, or a sampled one, at each step of each row."""
    rows, processors = list(range(len(prompts))), penalties(settings)
    answers: list[Ids] = [[] for _ in prompts]
    while rows:
        scores = penalize(batch.logits, [prompts[row] + answers[row] for row in rows], processors)
        for row, token in zip(rows, choose(scores, settings, [generators[row] for row in rows]), strict=True):
            answers[row].append(token)
        done = {row: answers[row] for row in rows if is_finished(answers[row]) or len(answers[row]) >= limits[row]}
        kept = [place for place, row in enumerate(rows) if row not in done]
        grown, rows = len(rows), [rows[place] for place in kept]
        yield Step(grown, done, {row: answers[row] for row in rows})
        if rows:
            if done:
                batch.select(kept)
            batch.step([answers[row][-1] for row in rows])


class Beams:
    """The beams of one prompt: the `running` ones, best first, as (score, ids), and the best `finished` ones.

    A score is the sum of log-probabilities, for a finished beam divided by its length. The rules are those of
    transformers with `early_stopping=False` and `length_penalty=1`.
    """

    def __init__(self, width: int, limit: int):
        self.width, self.limit = width, limit
        self.running: list[tuple[float, Ids]] = [(0.0, [])]
        self.finished: list[tuple[float, Ids]] = []
        self.done = False

    def extend(self, candidates: list[tuple[float, int, int]], is_finished: Callable[[Ids], bool]) -> list[int]:
        """Continue with the best `candidates` (score, beam, token; best first); returns the beams they continue."""
        length = len(self.running[0][1]) + 1
        running: list[tuple[float, Ids]] = []
        sources: list[int] = []
        for rank, (score, beam, token) in enumerate(candidates):
            ids = [*self.running[beam][1], token]
            if length < self.limit and not is_finished(ids):
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
    batch: DecodingBatch | StateBatch,
    prompts: list[Ids],
    limits: list[int],
    settings: SamplingParams,
    is_finished: Callable[[Ids], bool],
    generators: list[torch.Generator],
) -> Iterator[Step]:
    """Beam search, or beam sampling with `do_sample`: `num_beams` texts for each prompt, the best of which is its answer."""
    rows, processors = list(range(len(prompts))), penalties(settings)
    beams = [Beams(settings.num_beams, limit) for limit in limits]
    while rows:
        width = len(beams[rows[0]].running)  # 1 at the first step, then `num_beams`
        texts = [prompts[row] + ids for row in rows for _, ids in beams[row].running]
        scores = penalize(batch.logits.log_softmax(1), texts, processors)
        wanted = min(2 * settings.num_beams, scores.shape[1])  # enough to continue if every beam could end
        best, tokens = top_k_top_p(scores, settings, 2) if settings.samples else scores.topk(wanted, dim=1)
        sums = torch.tensor([[score for score, _ in beams[row].running] for row in rows], device=scores.device)
        best = ranked = best + sums.view(-1, 1)
        if settings.samples:
            ranked = best + gumbel_noise(tokens, scores.shape[1], [generators[row] for row in rows])
        best, ranked = best.view(len(rows), -1), ranked.view(len(rows), -1)
        places = ranked.topk(min(wanted, ranked.shape[1]), dim=1).indices
        values, words = best.gather(1, places).tolist(), tokens.view(len(rows), -1).gather(1, places).tolist()
        origins = (places // tokens.shape[1]).tolist()
        sources: list[int] = []
        for place, row in enumerate(rows):
            found = [c for c in zip(values[place], origins[place], words[place], strict=True) if c[0] > -torch.inf]
            kept = beams[row].extend(found, is_finished)
            if not beams[row].done:
                sources += [place * width + beam for beam in kept]
        done = {row: beams[row].finished[0][1] for row in rows if beams[row].done}
        grown, rows = len(rows), [row for row in rows if row not in done]
        yield Step(grown, done, {})
        if rows:
            if done or width < settings.num_beams:
                batch.select(sources)
            else:
                batch.reorder_beams(sources)
            batch.step([ids[-1] for row in rows for _, ids in beams[row].running])
