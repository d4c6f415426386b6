"""Batch runs: a file or folder of prompts in, `test.json` out; each answer is saved as soon as it is finished."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import lineage
from utils.adapters.adapters import find_weights
from utils.console import UserError, is_out_of_memory, progress, say
from utils.datasets.prompts import Record, answered, check_output
from utils.files import locked, sha256
from utils.inference.answer_file import AnswerFile
from utils.inference.engine import Engine
from utils.inference.kv_cache import Ids
from utils.inference.sampling_params import SamplingParams
from utils.journal import Journal

BatchPlan = list[list[int]]  # batches of positions among the distinct prompts
EXPECTED = 256  # tokens per answer that batches are planned for; longer answers are replanned during the run
ROWS = 128  # more rows than this slow a step down without more tokens per second
PADDED = 1.5  # a batch's cache has at most this many columns for each that holds a token


def run(
    engine: Engine, outputs: list[Path], records: list[Record], settings: SamplingParams, batch_size: int, overwrite: bool
) -> None:
    """Answer `records` with each of the engine's answerers in turn, into the files `outputs`.

    `batch_size` 0 means batches by a budget of tokens. Raises UserError before the first answer if a prompt is too
    long for the model, or there is an unfinished run with other settings.
    """
    tasks = []
    for one, path in zip(engine.answerers, outputs, strict=True):
        tasks.append(Task(engine, one.name, path, records, settings))
    for task in tasks:
        with locked(task.path):
            check_output(task.path, records, overwrite)  # again: another run may have written it meanwhile
            task.answer_all(batch_size, overwrite)


class Task:
    """One answerer's run over all prompts. Prompts with equal ids are answered once."""

    def __init__(self, engine: Engine, name: str, path: Path, records: list[Record], settings: SamplingParams):
        self.engine, self.name, self.path, self.records, self.settings = engine, name, path, records, settings
        without = sum(bool(record.get("tools")) for record in records) * ("tools" not in engine.prompter(name).carries)
        if without:
            say(f"{name}: {without} prompts have tools, which its template {engine.prompter(name).name} does not support")
        with progress(records, desc="encoding", leave=False) as bar:  # an error ends it and gets its own line
            encoded = [tuple(engine.encode(name, record)) for record in bar]
        self.prompts: list[Ids] = [list(ids) for ids in dict.fromkeys(encoded)]
        places = {tuple(ids): place for place, ids in enumerate(self.prompts)}
        self.places = [places[ids] for ids in encoded]
        self.room: float = 0  # tokens that a batch may have in memory
        self.check_lengths()

    def check_lengths(self) -> None:
        """Print how much of the model's window is left for the answers. Raises UserError if nothing is."""
        limits = [self.engine.limit(prompt, self.settings) for prompt in self.prompts]
        for number, place in enumerate(self.places, 1):
            if limits[place] < 1:
                raise UserError(
                    f"prompt {number}: {len(self.prompts[place])} tokens, the model's window is {self.engine.window}; "
                    "shorten or remove it"
                )
        short = sum(limit < self.settings.max_new_tokens for limit in limits)
        if short:
            say(
                f"{short} of {len(limits)} answers have room for {min(limits)} to {max(limits)} tokens instead of "
                f"{self.settings.max_new_tokens}: prompt and answer share the model's window of {self.engine.window}"
            )

    def answer_all(self, batch_size: int, overwrite: bool) -> None:
        """Answer what the journal does not have yet, then write the result and the record of how it was made."""
        facts = {"template": self.engine.prompter(self.name).name, "dtype": self.engine.placement.numbers}
        file = AnswerFile(self.path, self.header(), facts)
        if not overwrite and file.is_done():
            return
        doubles = len(self.records) - len(self.prompts)
        if doubles:
            say(f"{doubles} of {len(self.records)} prompts equal an earlier one and share its answer")
        self.room = self.engine.batch_room(self.name)  # loads the model, before there is a journal
        journal = file.open_journal(overwrite)
        if "plan" not in journal.values:
            expected = min(EXPECTED, self.settings.max_new_tokens)
            journal.put("plan", plan(self.prompts, self.settings.num_beams, expected, self.room, batch_size))
        if batch_size:
            self.room = math.inf  # the user's choice
        known = sum(str(place) in journal.values for place in range(len(self.prompts)))
        if known:
            say(f"{journal.path}: {known} of {len(self.prompts)} answers are there already; continuing")
        began, tokens = time.monotonic(), 0
        try:
            with (
                self.engine.merged(self.name),
                progress(total=len(self.prompts), initial=known, desc=self.name, unit=" answers") as bar,
            ):
                for batch in pending(journal):
                    for grown, finished in self.answer_batch(batch, journal):
                        tokens += grown
                        bar.update(finished)
                        bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.0f} tokens/s", refresh=False)
        except BaseException:
            known = sum(str(place) in journal.values for place in range(len(self.prompts)))
            journal.close(done=not known)  # without answers it is not worth keeping
            if known:
                say(f"{journal.path}: keeps {known} of {len(self.prompts)} answers; run the same command again to resume")
            raise
        file.finish(self.answered(journal.values))
        self.report(journal.values, tokens, time.monotonic() - began)
        journal.close(done=True)

    def header(self) -> dict[str, Any]:
        """Everything that determines an answer."""
        one = next(one for one in self.engine.answerers if one.name == self.name)
        return {
            "settings": dataclasses.asdict(self.settings),
            "prompts": lineage.digest(self.prompts),
            "base model": lineage.fingerprint(self.engine.base_model),
            "adapter": sha256(find_weights(one.folder)) if one.folder else None,
            "placement": str(self.engine.placement),
            "stop strings": self.engine.ending(self.name).stops,
        }

    def answer_batch(self, batch: list[int], journal: Journal) -> Iterator[tuple[int, int]]:
        """Answer one batch, split if memory runs out or will; yields the numbers of new tokens and answers, step by step."""
        ending = self.engine.ending(self.name)
        longest = max(len(self.prompts[place]) for place in batch)
        try:
            steps = self.engine.answer(self.name, [self.prompts[place] for place in batch], self.settings)
            for columns, step in enumerate(steps, longest + 1):
                new = [row for row in step.finished if str(batch[row]) not in journal.values]
                for row in new:
                    ids = step.finished[row]
                    cut = not ending(ids)
                    journal.put(str(batch[row]), {"output": ending.text(ids), "tokens": len(ids), "cut": cut})
                yield step.rows, len(new)
                rows = (step.rows - len(step.finished)) * self.settings.num_beams
                if len(batch) > 1 and rows * columns > self.room:
                    steps.close()
                    return self.replan(batch, journal)
            return
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:
            raise UserError(
                f"out of memory on one prompt of {len(self.prompts[batch[0]])} tokens; "
                "give fewer --num_beams or --max_new_tokens, or --load_8bit"
            )
        half = (len(batch) + 1) // 2
        say(f"out of memory with {len(batch)} prompts at once; continuing with {half}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        journal.put("plan", halved(journal.values["plan"], half, batch))

    def replan(self, batch: list[int], journal: Journal) -> None:
        """Split what is unanswered of a batch into batches with room for answers of the maximum length."""
        left = [place for place in batch if str(place) not in journal.values]
        limit = self.settings.max_new_tokens
        parts = plan([self.prompts[place] for place in left], self.settings.num_beams, limit, self.room, 0)
        say(f"{len(left)} answers are longer than planned for; they are computed in {len(parts)} batches")
        batches = journal.values["plan"]
        first = batches.index(batch)
        journal.put("plan", [*batches[:first], *([left[place] for place in part] for part in parts), *batches[first + 1 :]])

    def answered(self, values: dict[str, Any]) -> Iterator[Record]:
        """The records of the result, in the order of the input."""
        for record, place in zip(self.records, self.places, strict=True):
            yield answered(record, values[str(place)]["output"])

    def report(self, values: dict[str, Any], tokens: int, seconds: float) -> None:
        """Print the number of answers and tokens, and how many answers were cut."""
        answers = [values[str(place)] for place in range(len(self.prompts))]
        say(f"{self.path}: {len(self.records)} answers; {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} a second)")
        cut = sum(answer["cut"] for answer in answers)
        if cut:
            say(f"{cut} answers reached the token limit before their end (--max_new_tokens)")


def pending(journal: Journal) -> Iterator[list[int]]:
    """The batches of the journal's plan that are not completely answered, each until it is.

    Such a batch is recomputed as a whole, so that its rows are rounded as in an uninterrupted run.
    """
    place = 0
    while place < len(journal.values["plan"]):
        batch = journal.values["plan"][place]
        if all(str(prompt) in journal.values for prompt in batch):
            place += 1
        else:
            yield batch


def plan(prompts: list[Ids], beams: int, expected: int, room: float, batch_size: int) -> BatchPlan:
    """Batches of prompts of similar length, longest first, so that what does not fit shows at once.

    With `batch_size` 0, a batch has as many rows (`beams` for each prompt) as are worthwhile and as fit in memory, which
    has `room` for so many tokens, with answers of `expected` tokens.
    """
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    batches: BatchPlan = []
    for place in order:
        batch = [*batches[-1], place] if batches else [place]
        longest, real = len(prompts[batch[0]]), sum(len(prompts[other]) for other in batch)
        if batch_size:
            fits = len(batch) <= batch_size
        else:
            rows = len(batch) * beams
            fits = rows <= ROWS and rows * (longest + expected) <= room and len(batch) * longest <= PADDED * real
        if fits and batches:
            batches[-1] = batch
        else:
            batches.append([place])
    return batches


def greedy_texts(
    engine: Engine, name: str, prompts: list[Ids], longest: int, template: str | None = "", stops: Sequence[str] = ()
) -> list[str]:
    """Greedy answers of `name`, which must be in use, of at most `longest` tokens; "" if a prompt leaves no room for one.

    `template` and `stops`: as for `Engine.answer`.
    """
    settings = SamplingParams(num_beams=1, max_new_tokens=longest)
    fitting = [place for place, prompt in enumerate(prompts) if engine.limit(prompt, settings) > 0]
    texts, ending = [""] * len(prompts), engine.ending(name, template, stops)
    for batch in plan([prompts[place] for place in fitting], settings.num_beams, longest, engine.room, 0):
        places = [fitting[place] for place in batch]
        for step in engine.answer(name, [prompts[place] for place in places], settings, template, stops):
            for row, ids in step.finished.items():
                texts[places[row]] = ending.text(ids)
    return texts


def halved(batches: BatchPlan, half: int, batch: list[int]) -> BatchPlan:
    """The plan with `batch`, and every later batch of more than `half` prompts, cut into parts of at most `half`."""
    first = batches.index(batch)
    cut = [part[start : start + half] for part in batches[first:] for start in range(0, len(part), half)]
    return batches[:first] + cut
