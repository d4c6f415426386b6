"""Evaluates a model during training: it answers a few prompts, and multiple-choice questions."""

import time
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.console import UserError
from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.encoding import encode_prompt
from utils.datasets.prompters import make_prompter
from utils.datasets.prompts import Record
from utils.datasets.templates import Prompter, split_thinking
from utils.evaluation import choices
from utils.evaluation.answers import grouped
from utils.evaluation.intervals import share
from utils.evaluation.metrics import CLOSENESS, is_exact
from utils.evaluation.training_questions import TrainingQuestions, reference_of
from utils.inference.answerers import BASE
from utils.inference.engine import Engine
from utils.inference.kv_cache import Ids
from utils.inference.rollouts import Sampler, cache_room, ready_to_answer
from utils.inference.sampling_params import SamplingParams
from utils.models.architecture import window_of
from utils.models.tokenizer import end_tokens
from utils.training.evaluations import Evaluated

WAY = choices.Way()  # the defaults of judge.py --choices


class LoadedEngine(Engine):
    """An engine on an already loaded model, its only answerer; `room` as in Sampler."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], room: int):
        self.stops, self.answerers, self.config = [], [], model.config
        self.tokenizers, self.ends = {BASE: tokenizer}, {BASE: list(ends)}
        self.__dict__["loaded"] = model, None
        self.tokens = room

    @property
    def room(self) -> int:
        """For how many tokens training leaves memory for keys and values."""
        return self.tokens


class Evaluator:
    """Evaluates a model with the same questions each time; prompts are answered greedily.

    `window`: the model's longest text in tokens, if limited; `room`: for how many tokens memory can hold keys and values.
    Raises UserError if a prompt leaves no room for an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompter: Prompter | ChatPrompter,
        ends: Iterable[int],
        asked: TrainingQuestions,
        longest: int,
        window: int | None,
        room: int,
        dtype: str,
    ):
        self.tokenizer, self.ends, self.room, self.dtype = tokenizer, list(ends), room, dtype
        self.prompts, self.questions, self.scores = asked.prompts, asked.questions, asked.scores()
        self.template = prompter.name
        self.sampler = Sampler(tokenizer, prompter, ends, SamplingParams(num_beams=1, max_new_tokens=longest), room, window)
        self.encoded: list[Ids] = [encode_prompt(record, prompter, tokenizer) for record in self.prompts]
        for number, ids in enumerate(self.encoded, 1):
            if window is not None and len(ids) >= window:
                raise UserError(
                    f"--eval_answers: prompt {number} has {len(ids)} tokens, the model's window is {window}; shorten it"
                )

    def __call__(self, model: PreTrainedModel) -> Evaluated:
        """Evaluate the model in its current state; this changes neither the model nor the random state."""
        began, scores, notes = time.monotonic(), {}, []
        with ready_to_answer(model):
            if self.questions:
                scores["eval_choices"], note = self.choose(model)
                notes.append(note)
            texts, cut = self.answer(model)
        if "eval_chrf" in self.scores:
            found, note = self.measure(texts)
            scores |= found
            notes.append(note)
        if cut:
            notes.append(f"{cut} of {len(texts)} answers reached --max_new_tokens before their end")
        notes.append(f"answering took {time.monotonic() - began:.1f} s")
        answers = [{"question": question_of(record), "answer": text} for record, text in zip(self.prompts, texts, strict=True)]
        return Evaluated(scores, answers, notes)

    def choose(self, model: PreTrainedModel) -> tuple[float, str]:
        """The share of right choices in percent, and a note on what it is based on."""
        engine = LoadedEngine(model, self.tokenizer, self.ends, self.room)
        right = counted = 0
        for questions in grouped(self.questions, lambda one: one.category).values():
            marks, _ = choices.mark(engine, BASE, questions, [], WAY)
            places = choices.scored(questions, {BASE: marks}, WAY)
            counted += len(places)
            right += sum(choices.is_right(questions[place], marks[place]) for place in places)
        if not counted:
            raise UserError("--eval_choices: no question has one right choice and fits the model's window; give others")
        value, (low, high) = share(right, counted)
        basis = f"{counted} of {len(self.questions)} questions, {WAY}, {self.dtype}; 95 % interval {low:.1f} to {high:.1f}"
        return value, f"right choices {value:.1f} % ({basis})"

    def answer(self, model: PreTrainedModel) -> tuple[list[str], int]:
        """The answers' texts without thoughts, and how many were cut."""
        if not self.encoded:
            return [], 0
        ids = self.sampler(model, self.encoded, [0] * len(self.encoded))
        texts = [split_thinking(self.sampler.text(one))[1] for one in ids]
        return texts, sum(map(self.sampler.is_cut, ids))

    def measure(self, texts: list[str]) -> tuple[dict[str, float], str]:
        """How close the answers are to their references, and a note on what that is based on."""
        pairs = [(text, reference_of(record)) for text, record in zip(texts, self.prompts, strict=True)]
        basis = f"{len(pairs)} prompts, template {self.template}, greedy, {self.dtype}; 95 % interval"
        value, interval = CLOSENESS["chrF"].with_interval(pairs)
        scores = {"eval_chrf": value}
        edges = f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else "unknown for a single prompt"
        shown = f"chrF {value:.1f} ({basis} {edges})"
        if "eval_exact" in self.scores:
            right = sum(is_exact(text, reference) for text, reference in pairs)
            scores["eval_exact"], (low, high) = share(right, len(pairs))
            shown += f", exact numbers {scores['eval_exact']:.1f} % ({low:.1f} to {high:.1f})"
        return scores, shown


def make_evaluator(
    options: Any, asked: TrainingQuestions, tokenizer: PreTrainedTokenizerBase, model: Any, dtype: str
) -> Evaluator:
    """The evaluator for the options of finetune.py."""
    ends = end_tokens(options.base_model, tokenizer)
    prompter = make_prompter(options.prompt_template_name, tokenizer, ends, options.enable_thinking)
    window, room = window_of(model.config), cache_room(options)
    return Evaluator(tokenizer, prompter, ends, asked, options.max_new_tokens, window, room, dtype)


def question_of(record: Record) -> str:
    """A prompt with its earlier turns, as one text."""
    turns: list[Any] = [text for turn in record.get("history") or [] for text in turn]
    return "\n".join(text for text in [*turns, record["instruction"], record.get("input") or ""] if text)
