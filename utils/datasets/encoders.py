"""How records of each stage become rows of ids and labels."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.documents import read_documents
from utils.datasets.encoding import (
    IGNORED,
    EncodedRecord,
    encode,
    encode_documents,
    encode_last_answers,
    encode_prompt,
    where_rendered,
)
from utils.datasets.preferences import read_judged, read_pairs
from utils.datasets.records import Record, read_records
from utils.datasets.stages import LABELLED, PREFERENCE, REWARD, TEXT
from utils.datasets.templates import Prompter

NUMBER, LIST = datasets.Value("int32"), datasets.Sequence(datasets.Value("int32"))
COLUMNS = datasets.Features(
    {"input_ids": LIST, "labels": LIST}
    | dict.fromkeys(("full_length", "answer_tokens", "supervised", "raw_answers"), NUMBER)
    | {"refused": datasets.Value("string")}
)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How records become ids and labels; `tokenizer_hash` stands for the tokenizer's files."""

    features: ClassVar[datasets.Features] = COLUMNS
    kind: ClassVar[tuple[str, ...]] = ()
    prompter: Prompter | ChatPrompter
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    cutoff_len: int
    train_on_inputs: bool

    @property
    def made_of(self) -> list[Any]:
        """What the rows depend on besides the file's content."""
        return [*self.kind, self.prompter.texts, self.tokenizer_hash, self.cutoff_len, self.train_on_inputs]

    def read(self, file: Path) -> Iterator[Record]:
        """The records of a file."""
        return read_records(file, carries=self.prompter.carries)

    def __call__(self, records: list[Record]) -> pa.Table:
        """Encode records in one call to the tokenizer; one row each."""
        return as_table(where_rendered(self.encode, records))

    def encode(self, records: list[Record]) -> list[EncodedRecord]:
        """Encode records. Raises UserError if the chat template refuses one."""
        return encode(records, self.prompter, self.tokenizer, self.cutoff_len, self.train_on_inputs)

    def encode_last(self, records: list[Record]) -> list[EncodedRecord]:
        """Encode records of which only the last answer is learned; raises as above."""
        return encode_last_answers(records, self.prompter, self.tokenizer, self.cutoff_len)


@dataclasses.dataclass(frozen=True)
class DocumentEncoder:
    """How documents of raw text become ids and labels; one row for each piece of at most `cutoff_len` tokens."""

    features = COLUMNS
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    cutoff_len: int

    @property
    def made_of(self) -> list[Any]:
        """What the rows depend on besides the file's content."""
        return ["documents", self.tokenizer_hash, self.cutoff_len]

    def read(self, file: Path) -> Iterator[str]:
        """The documents of a file."""
        return read_documents(file)

    def __call__(self, texts: list[str]) -> pa.Table:
        """Encode documents in one call to the tokenizer."""
        return as_table(encode_documents(texts, self.tokenizer, self.cutoff_len))


@dataclasses.dataclass(frozen=True)
class PairEncoder(Encoder):
    """How pairs become ids and labels: those of the chosen answer, and `rejected_ids` and `rejected_labels`."""

    features = datasets.Features(COLUMNS | {"rejected_ids": LIST, "rejected_labels": LIST})
    kind = ("pairs",)

    def read(self, file: Path) -> Iterator[Any]:
        """The pairs of a file."""
        return read_pairs(file)

    def __call__(self, pairs: list[Any]) -> pa.Table:
        """Encode pairs; each counts as one supervised token, and is as long as the longer of its sequences."""
        sides = [where_rendered(self.encode_last, [pair[side] for pair in pairs]) for side in (0, 1)]
        both = list(zip(*sides, strict=True))
        return as_table(
            sides[0],
            self.features,
            full_length=[max(one.full_length for one in pair) for pair in both],
            answer_tokens=[min(one.answer_tokens for one in pair) for pair in both],
            supervised=[1] * len(both),
            raw_answers=[sum(one.raw_answers for one in pair) for pair in both],
            refused=[chosen.refused or rejected.refused for chosen, rejected in both],
            rejected_ids=lists([rejected.input_ids for rejected in sides[1]]),
            rejected_labels=lists([rejected.labels for rejected in sides[1]]),
        )


@dataclasses.dataclass(frozen=True)
class JudgedEncoder(Encoder):
    """How labelled answers become ids and labels; each counts as one supervised token, with its label as `good`."""

    features = datasets.Features(COLUMNS | {"good": datasets.Value("bool")})
    kind = ("judged",)

    def read(self, file: Path) -> Iterator[Any]:
        """The labelled answers of a file."""
        return read_judged(file)

    def __call__(self, judged: list[Any]) -> pa.Table:
        """Encode labelled answers."""
        encoded = where_rendered(self.encode_last, [one.record for one in judged])
        return as_table(encoded, self.features, supervised=[1] * len(judged), good=[one.good for one in judged])


@dataclasses.dataclass(frozen=True)
class QuestionEncoder(Encoder):
    """How questions become prompt ids, to be answered in at most `room` tokens; a row carries its `record` as JSON."""

    features = datasets.Features(COLUMNS | {"record": datasets.Value("string")})
    room: int = 0

    @property
    def made_of(self) -> list[Any]:
        """What the rows depend on besides the file's content."""
        return ["questions", self.room, *super().made_of]

    def read(self, file: Path) -> Iterator[Record]:
        """The questions of a file."""
        return read_records(file, need_output=False, carries=self.prompter.carries)

    def __call__(self, records: list[Record]) -> pa.Table:
        """Encode questions; a row carries its record."""
        texts = [json.dumps(record, ensure_ascii=False) for record in records]
        return as_table(where_rendered(self.encode, records), self.features, record=texts)

    def encode(self, records: list[Record]) -> list[EncodedRecord]:
        """Encode questions; one that leaves no room for an answer within the cutoff has no `answer_tokens`. Raises as above."""
        prompts = [encode_prompt(record, self.prompter, self.tokenizer) for record in records]
        lengths = [len(ids) + self.room for ids in prompts]
        rooms = [self.room if length <= self.cutoff_len else 0 for length in lengths]
        parts = zip(prompts, lengths, rooms, strict=True)
        return [EncodedRecord(ids, [IGNORED] * len(ids), length, room) for ids, length, room in parts]


def make_encoder(
    stage: str,
    prompter: Prompter | ChatPrompter,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_hash: str,
    cutoff_len: int,
    train_on_inputs: bool,
    room: int = 0,
) -> Encoder | DocumentEncoder:
    """How the records of a stage become ids and labels; `room`: tokens for an answer, if answers are sampled."""
    if stage == TEXT:
        return DocumentEncoder(tokenizer, tokenizer_hash, cutoff_len)
    how = (prompter, tokenizer, tokenizer_hash, cutoff_len, train_on_inputs)
    if stage == REWARD:
        return QuestionEncoder(*how, room)
    return {PREFERENCE: PairEncoder, LABELLED: JudgedEncoder}.get(stage, Encoder)(*how)


def as_table(encoded: list[EncodedRecord], features: datasets.Features = COLUMNS, **other: Any) -> pa.Table:
    """Encoded records as rows; `other` columns are added, or replace those of the same name."""
    columns = {
        "input_ids": lists([one.input_ids for one in encoded]),
        "labels": lists([one.labels for one in encoded]),
        "full_length": [one.full_length for one in encoded],
        "answer_tokens": [one.answer_tokens for one in encoded],
        "supervised": [len(labels) - labels.count(IGNORED) for labels in (one.labels[1:] for one in encoded)],
        "raw_answers": [one.raw_answers for one in encoded],
        "refused": [one.refused for one in encoded],
    }
    return pa.table(columns | other, schema=features.arrow_schema)


def lists(rows: list[list[int]]) -> pa.ListArray:
    """Lists of numbers as a column, skipping pyarrow's type inference for each number."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.fromiter(itertools.chain.from_iterable(rows), np.int32, ends[-1]))
