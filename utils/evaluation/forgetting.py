"""What a chain forgets: each step's adapter on the held-out records of every step, by loss and right answers.

The matrix is that of continual learning (Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840, section 3).
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.console import UserError, progress, say
from utils.datasets import dataset, encoders, stages
from utils.datasets.final_numbers import final_number
from utils.datasets.records import Record
from utils.datasets.sources import sources
from utils.evaluation.chosen import plain
from utils.evaluation.likelihood import load_engine, sum_of_losses
from utils.evaluation.tables import Row, Table, Values
from utils.files import sha256
from utils.inference import batch
from utils.inference.answerers import BASE, ChatModel, tokenizer_home
from utils.inference.engine import Engine
from utils.models.tokenizer_files import tokenizer_mark

MOST = 100  # records per step: the first of its validation set
ANSWER = 128  # tokens of an answer
LOSS, RIGHT = "loss of held-out records (nats per token)", "right answers to held-out records (%)"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A step's records that were not trained on: `rows` encoded as in that step and, if they are questions with answers, the
    `records` themselves."""

    step: str
    stage: str
    rows: list[dict[str, Any]]
    records: list[Record]


def named_files(held_out: Sequence[str], steps: Sequence[str]) -> dict[str, str]:
    """The files given as STEP=FILE, by step. Raises UserError if one has another form, or names an unknown step."""
    found = {}
    for part in held_out:
        name, sign, path = part.partition("=")
        if not sign or not path:
            raise UserError(f"--held_out {part}: give a step and its records, as f1=records.json")
        if name not in steps:
            raise UserError(f"--held_out {part}: {name} is not a step of the chain; its steps are {', '.join(steps)}")
        if name in found:
            raise UserError(f"--held_out {part}: {name} is given twice; name each step once")
        for source in sources(path):
            if not source.files:
                raise UserError(f"--held_out {part}: holds no records; give another file")
        found[name] = path
    return found


def held_out_records(engine: Engine, named: dict[str, str]) -> list[HeldOut]:
    """The held-out records of each step of the engine's adapters: those of `named`, else its validation set.

    A step is left out, with a notice, if it has none, if its files are gone or changed, or if it did not learn from texts,
    answers or pairs.
    """
    found = []
    for one in engine.answerers:
        if one.folder is None:
            continue
        step = one.lineage or {}
        data = step.get("data") or {}
        why = unusable(step, data) if one.name not in named else ""
        stage = stages.stage_of(named[one.name]) if one.name in named else data.get("stage", stages.INSTRUCTION)
        if stage not in (stages.TEXT, stages.INSTRUCTION, stages.PREFERENCE):
            why = f"it learned from {stages.NAMES.get(stage, 'rewards')}, which is not measured"
        if why:
            say(f"{one.name}: has no held-out records, since {why} (name some with --held_out {one.name}=FILE)")
            continue
        found.append(read_held_out(engine, one, stage, step, named.get(one.name, "")))
    return found


def unusable(step: dict[str, Any], data: dict[str, Any]) -> str:
    """Why the validation set of a step cannot be drawn again; "" if it can."""
    if not data.get("validation"):
        return "it was trained without --val_set_size"
    for file, content in data["files"].items():
        if not Path(file).is_file():
            return f"{file} no longer exists"
        if sha256(file) != content:
            return f"{file} has changed since it was learned"
    is_told = {"seed", "val_set_size", "data_path"} <= step["options"].keys()
    return "" if is_told else "its lineage.json does not say how to draw them"


def read_held_out(engine: Engine, one: ChatModel, stage: str, step: dict[str, Any], path: str) -> HeldOut:
    """The records of `path` ("": the validation set that training drew), encoded as in that step."""
    options = step.get("options", {})
    tokenizer, cutoff = engine.tokenizers[one.name], options.get("cutoff_len", 512)
    words = tokenizer_mark(tokenizer_home(one, engine.base_model), tokenizer)
    how = (engine.prompters[one.name], tokenizer, words, cutoff, options.get("train_on_inputs", False))
    encoder = encoders.make_encoder(stage, *how)
    data_path, seed = path or options["data_path"], options.get("seed", 42)
    parts = sources(data_path)
    hashes = {str(file): sha256(file) for source in parts for file in source.files}
    table, asked = dataset.encode_all(encoder, data_path, hashes, seed, keep=False)
    numbers = dataset.usable(table, asked, cutoff)
    if not path:
        numbers = dataset.split(numbers, options["val_set_size"], seed)[1]
    if len(numbers) > MOST:
        say(f"{one.name}: the first {MOST} of {len(numbers):,} held-out records are measured")
    numbers = numbers[:MOST]
    records = records_at(encoder, parts, numbers) if stage == stages.INSTRUCTION else []
    return HeldOut(one.name, stage, [table[int(number)] for number in numbers], records)


def records_at(encoder: Any, parts: Sequence[Any], numbers: np.ndarray) -> list[Record]:
    """The records with these numbers among those of all files, of which the encoder makes one row each."""
    wanted = set(numbers.tolist())
    every = itertools.chain.from_iterable(encoder.read(file) for source in parts for file in source.files)
    found = {number: record for number, record in enumerate(every) if number in wanted}
    return [found[number] for number in numbers.tolist()]


def mean_loss(engine: Engine, rows: list[dict[str, Any]], ids: str = "input_ids", labels: str = "labels") -> list[float]:
    """The mean loss of each row's supervised tokens by the answerer in use."""
    return [sum_of_losses(engine, row[ids], row[labels]) / max(1, supervised(row[labels])) for row in rows]


def measure(engine: Engine, name: str, one: HeldOut) -> tuple[float, list[bool]]:
    """The mean loss of the answerer `name` on a step's held-out tokens, and which records it answers correctly.

    An answer is right if it equals the record's except for punctuation and spaces, or ends with the number that the record's
    is; for a pair, if the chosen answer's tokens are on average likelier than the rejected one's. Texts have no answers.
    """
    engine.use(name)
    losses = mean_loss(engine, one.rows)
    weights = [row["supervised"] if one.stage != stages.PREFERENCE else supervised(row["labels"]) for row in one.rows]
    loss = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
    if one.stage == stages.PREFERENCE:
        other = mean_loss(engine, one.rows, "rejected_ids", "rejected_labels")
        return loss, [chosen < rejected for chosen, rejected in zip(losses, other, strict=True)]
    if not one.records:
        return loss, []
    prompts = [engine.encode(name, record) for record in one.records]  # each with the answerer's own template
    answers = batch.greedy_texts(engine, name, prompts, ANSWER)
    return loss, [is_right(answer, record["output"]) for answer, record in zip(answers, one.records, strict=True)]


def supervised(labels: list[int]) -> int:
    """How many tokens of a row are predicted."""
    return sum(label != dataset.IGNORED for label in labels[1:])


def is_right(answer: str, reference: str) -> bool:
    """True if an answer equals the reference except for punctuation and spaces, or ends with the number that it is."""
    number = final_number(reference) if not plain(reference).strip("0123456789一二三四五六七八九十百千万零两") else None
    return plain(answer) == plain(reference) or (number is not None and final_number(answer) == number)


class Chain(NamedTuple):
    """The `engine` with all steps of a chain, the answerers' names of base and steps, and what is measured."""

    engine: Engine
    systems: dict[str, str]
    data: list[HeldOut]


def prepare(base_model: str, folders: dict[str, Path], held_out: Sequence[str], load_8bit: bool) -> Chain:
    """The chain of the steps in `folders`, ready to be measured. Raises UserError if base, adapters or records cannot be
    used."""
    named = named_files(held_out, list(folders))
    engine = load_engine(base_model, list(folders.values()), load_8bit)
    systems = dict(zip([BASE, *folders], (one.name for one in engine.answerers), strict=True))
    return Chain(engine, systems, held_out_records(engine, {systems[step]: path for step, path in named.items()}))


def matrix(chain: Chain) -> list[Table]:
    """The two tables, with a row for each step's held-out records and a column for the base and each step; none if no step
    has such records."""
    engine, systems, data = chain
    losses: list[Row] = []
    rights: list[Row] = []
    names = {own: step for step, own in systems.items()}
    for one in data:
        found = {
            step: measure(engine, own, one) for step, own in progress(systems.items(), desc=f"{names[one.step]}'s records")
        }
        label, count = f"{names[one.step]}'s records", len(one.rows)
        losses.append(Row(label, count, {step: loss for step, (loss, _) in found.items()}))
        values: Values = {step: 100 * sum(right) / len(right) if right else None for step, (_, right) in found.items()}
        if any(value is not None for value in values.values()):
            rights.append(Row(label, count, values))
    tables = [Table(LOSS, list(systems), losses, digits=3, marked=False)] if losses else []
    tables += [Table(RIGHT, list(systems), rights)] if rights else []
    return [one.telling(f"own templates, dtype {engine.placement.numbers}") for one in tables]
