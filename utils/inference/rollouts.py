"""Answers of a model in training, sampled for rewards or greedy at evaluations, by the batch engine's decoding."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.console import UserError, is_out_of_memory
from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.prompters import make_prompter
from utils.datasets.templates import Prompter
from utils.inference.batch import plan
from utils.inference.decoding import decode
from utils.inference.engine import Ending
from utils.inference.kv_cache import Ids
from utils.inference.sampling_params import SamplingParams
from utils.models.tokenizer import end_tokens

CACHE_ROOM = 16  # micro-batches: their keys and values take less memory than the activations of one


class Sampler:
    """Answers with `settings`, within the model's `window`; `room`: tokens at once, including the prompts'."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompter: Prompter | ChatPrompter,
        ends: Iterable[int],
        settings: SamplingParams,
        room: int,
        window: int | None = None,
    ):
        self.ending = Ending.after(prompter, tokenizer, ends, [])
        self.settings, self.room, self.window = settings, room, window

    def __call__(self, model: PreTrainedModel, prompts: list[Ids], seeds: list[int]) -> list[Ids]:
        """An answer's ids for each prompt, including what ended it; each is drawn with its own seed, whatever the others."""
        answers: dict[int, Ids] = {}
        with ready_to_answer(model):
            for batch in plan(prompts, 1, self.settings.max_new_tokens, self.room, 0):
                answers |= self.answer(model, batch, prompts, seeds)
        return [answers[place] for place in range(len(prompts))]

    def answer(self, model: PreTrainedModel, batch: list[int], prompts: list[Ids], seeds: list[int]) -> dict[int, Ids]:
        """The answers to one batch of prompts, given by their indices; it is halved if memory runs out."""
        asked = [prompts[place] for place in batch]
        most = self.settings.max_new_tokens
        limits = [most if self.window is None else min(most, self.window - len(prompt)) for prompt in asked]
        found: dict[int, Ids] = {}
        try:
            for step in decode(model, asked, limits, self.settings, self.ending, [seeds[place] for place in batch]):
                found |= {batch[row]: ids for row, ids in step.finished.items()}
            return found
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:
            raise UserError("out of memory on one answer; give a smaller --max_new_tokens or --cutoff_len")
        half = len(batch) // 2
        parts = (self.answer(model, part, prompts, seeds) for part in (batch[:half], batch[half:]))
        return {place: ids for part in parts for place, ids in part.items()}

    def text(self, ids: Ids) -> str:
        """The part of an answer that a person reads."""
        return self.ending.text(ids)

    def is_cut(self, ids: Ids) -> bool:
        """True if an answer reached its limit of tokens before its end."""
        return not self.ending(ids)


def make_sampler(options: Any, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """The sampler for a step's questions, from the options of finetune.py."""
    ends = end_tokens(options.base_model, tokenizer)
    prompter = make_prompter(options.prompt_template_name, tokenizer, ends)
    settings = SamplingParams(
        num_beams=1,
        max_new_tokens=options.max_new_tokens,
        do_sample=True,
        temperature=options.temperature,
        top_p=1.0,  # from the whole vocabulary, as a policy must
        top_k=0,
    )
    return Sampler(tokenizer, prompter, ends, settings, cache_room(options))


def cache_room(options: Any) -> int:
    """For how many tokens training leaves memory for keys and values."""
    return CACHE_ROOM * options.micro_batch_size * options.cutoff_len


@contextlib.contextmanager
def ready_to_answer(model: PreTrainedModel) -> Iterator[None]:
    """Give the model its own `forward` back, which training replaces, and turn off dropout, while the block runs."""
    replaced, was_training = model.__dict__.pop("forward", None), model.training
    model.eval()
    try:
        yield
    finally:
        if replaced is not None:
            model.forward = replaced
        model.train(was_training)
