"""How likely a model finds the right answers: the mean log-likelihood of references under each adapter of a base."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.console import UserError, progress, say
from utils.datasets.encoding import encode
from utils.datasets.prompts import Record
from utils.evaluation.intervals import bootstrap, compare
from utils.evaluation.tables import Row, Table
from utils.inference.answerers import BASE, resolve, with_base
from utils.inference.engine import Engine
from utils.models.placement import place
from utils.training.loss import full_loss

LONGEST = 1 << 20  # tokens: nothing is cut


def load_engine(base_model: str, folders: Sequence[str | Path], load_8bit: bool) -> Engine:
    """A base model, and the adapters in `folders` on it. Raises UserError if they cannot be loaded or do not fit each other."""
    base_model, answerers = resolve(base_model, [str(folder) for folder in folders], "")
    return Engine(base_model, with_base(answerers), place(load_8bit, False))


def log_likelihoods(engine: Engine, name: str, records: Sequence[Record]) -> list[float | None]:
    """For each record, the mean natural log-probability of its reference's tokens, including the end of sequence, after the
    prompt, by the answerer `name`; None if the model's window is too short."""
    engine.use(name)
    answered = [record | {"output": record["reference"]} for record in records]
    how = {"prompter": engine.prompters[name], "tokenizer": engine.tokenizers[name], "train_on_inputs": False}
    encoded = [encode([one], cutoff_len=LONGEST, **how)[-1] for one in answered]  # the sequence that ends with the answer
    found: list[float | None] = []
    for one in progress(encoded, desc=f"log-likelihood, {name}", leave=False):
        if engine.window is not None and one.full_length > engine.window:
            found.append(None)
            continue
        found.append(-sum_of_losses(engine, one.input_ids, one.labels) / one.answer_tokens)
    return found


@torch.inference_mode()
def sum_of_losses(engine: Engine, ids: list[int], labels: list[int]) -> float:
    """The sum of the losses of one sequence's labelled tokens (nats) by the answerer in use."""
    inputs, targets = (torch.tensor([row], device=engine.model.device) for row in (ids, labels))
    return full_loss(engine.model.forward, inputs, targets).item()


def engine_where_possible(base_model: str, folders: Sequence[str | Path], load_8bit: bool) -> Engine | None:
    """`load_engine`; None, with a notice, if no `base_model` was given and the adapters' own cannot be loaded."""
    try:
        return load_engine(base_model, folders, load_8bit)
    except UserError as error:
        if base_model:
            raise
        say(f"log-likelihoods are left out: {error}")
        return None


def table_of(
    engine: Engine, adapters: Sequence[str], records: Sequence[Record], members: dict[str, list[int]]
) -> tuple[Table, list[str]]:
    """The mean log-likelihood of the references of each category, under the base and each adapter on it; and in words which of
    them differ.

    `adapters`: the systems' names of the engine's adapters; `members`: positions of each category's records.
    """
    groups = {c: [p for p in positions if records[p].get("reference")] for c, positions in members.items()}
    asked = [position for positions in groups.values() for position in positions]
    found = {
        system: dict(zip(asked, log_likelihoods(engine, one.name, [records[p] for p in asked]), strict=True))
        for system, one in zip([BASE, *adapters], engine.answerers, strict=True)
    }
    too_long = {position for given in found.values() for position, value in given.items() if value is None}
    if too_long:
        say(f"{len(too_long)} of {len(asked)} references exceed, with their prompts, the model's window; left out")
    rows = []
    for category, positions in groups.items():
        kept = [position for position in positions if position not in too_long]
        if kept:
            numbers: dict[str, list[Any]] = {system: [given[p] for p in kept] for system, given in found.items()}
            means = {system: (statistics.fmean(of), bootstrap([of])) for system, of in numbers.items()}
            rows.append(Row.of(category, len(kept), means))
    title = f"log-likelihood of the reference (nats per token; own template, {engine.placement.numbers})"
    everywhere = [position for position in asked if position not in too_long]
    lines = []
    for one, other in itertools.combinations(found, 2):
        gaps = [found[one][p] - found[other][p] for p in everywhere]  # type: ignore[operator]
        lines.append(f"log-likelihood, all {len(gaps)} prompts: {compare(one, other, bootstrap([gaps]), 3)}")
    return Table(title, list(found), rows, digits=3), lines
