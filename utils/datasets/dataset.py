"""Encoded records on disk, memory-mapped: encoded once, cached by what they were made from, split by a seed."""

import atexit
import collections
import ctypes
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from utils.console import UserError, progress, say
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
from utils.datasets.sources import sources, validation_size, weighted
from utils.datasets.stages import LABELLED, PREFERENCE, REWARD, TEXT
from utils.datasets.templates import Prompter
from utils.files import digest, replacing

CHUNK = 1000  # records encoded in one call to the tokenizer
FEW = 4  # fewer chunks are not worth starting processes for
PR_SET_PDEATHSIG = 1  # prctl(2)
FORMAT = 6  # of the cached files; a new number makes older files unused
NUMBER, LIST = datasets.Value("int32"), datasets.Sequence(datasets.Value("int32"))
COLUMNS = datasets.Features(
    {"input_ids": LIST, "labels": LIST}
    | dict.fromkeys(("full_length", "answer_tokens", "supervised", "raw_answers"), NUMBER)
    | {"refused": datasets.Value("string")}
)

worker_encoder: "Encoder | DocumentEncoder"  # set by start_worker in each worker process


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How records become ids and labels; `tokenizer_hash` stands for the tokenizer's files."""

    features = COLUMNS
    prompter: Prompter | ChatPrompter
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    cutoff_len: int
    train_on_inputs: bool

    @property
    def made_of(self) -> list[Any]:
        """What the rows depend on besides the file's content."""
        return [self.prompter.texts, self.tokenizer_hash, self.cutoff_len, self.train_on_inputs]

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

    @property
    def made_of(self) -> list[Any]:
        """What the rows depend on besides the file's content."""
        return ["pairs", *super().made_of]

    def read(self, file: Path) -> Iterator[Any]:
        """The pairs of a file."""
        return read_pairs(file)

    def __call__(self, pairs: list[Any]) -> pa.Table:
        """Encode pairs; each counts as one supervised token, and is as long as the longer of its sequences."""
        sides = [where_rendered(self.encode_last, [pair[side] for pair in pairs]) for side in (0, 1)]
        both = list(zip(*sides, strict=True))
        columns = {
            "input_ids": lists([chosen.input_ids for chosen in sides[0]]),
            "labels": lists([chosen.labels for chosen in sides[0]]),
            "full_length": [max(one.full_length for one in pair) for pair in both],
            "answer_tokens": [min(one.answer_tokens for one in pair) for pair in both],
            "supervised": [1] * len(both),
            "raw_answers": [sum(one.raw_answers for one in pair) for pair in both],
            "refused": [chosen.refused or rejected.refused for chosen, rejected in both],
            "rejected_ids": lists([rejected.input_ids for rejected in sides[1]]),
            "rejected_labels": lists([rejected.labels for rejected in sides[1]]),
        }
        return pa.table(columns, schema=self.features.arrow_schema)


@dataclasses.dataclass(frozen=True)
class JudgedEncoder(Encoder):
    """How labelled answers become ids and labels; each counts as one supervised token, with its label as `good`."""

    features = datasets.Features(COLUMNS | {"good": datasets.Value("bool")})

    @property
    def made_of(self) -> list[Any]:
        """What the rows depend on besides the file's content."""
        return ["judged", *super().made_of]

    def read(self, file: Path) -> Iterator[Any]:
        """The labelled answers of a file."""
        return read_judged(file)

    def __call__(self, judged: list[Any]) -> pa.Table:
        """Encode labelled answers."""
        table = as_table(where_rendered(self.encode_last, [one.record for one in judged]))
        ones = pa.array([1] * len(table), pa.int32())
        table = table.set_column(table.column_names.index("supervised"), "supervised", ones)
        columns = {name: table[name] for name in table.column_names} | {"good": [one.good for one in judged]}
        return pa.table(columns, schema=self.features.arrow_schema)


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
        table = as_table(where_rendered(self.encode, records))
        columns = {name: table[name] for name in table.column_names}
        columns["record"] = [json.dumps(record, ensure_ascii=False) for record in records]
        return pa.table(columns, schema=self.features.arrow_schema)

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


def as_table(encoded: list[EncodedRecord]) -> pa.Table:
    """Encoded records as rows."""
    columns = {
        "input_ids": lists([one.input_ids for one in encoded]),
        "labels": lists([one.labels for one in encoded]),
        "full_length": [one.full_length for one in encoded],
        "answer_tokens": [one.answer_tokens for one in encoded],
        "supervised": [len(labels) - labels.count(IGNORED) for labels in (one.labels[1:] for one in encoded)],
        "raw_answers": [one.raw_answers for one in encoded],
        "refused": [one.refused for one in encoded],
    }
    return pa.table(columns, schema=COLUMNS.arrow_schema)


def lists(rows: list[list[int]]) -> pa.ListArray:
    """Lists of numbers as a column, skipping pyarrow's type inference for each number."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.fromiter(itertools.chain.from_iterable(rows), np.int32, ends[-1]))


class EncodedDataset:
    """The encoded records `numbers` of a table; `dataset[i]` is {"input_ids", "labels", …}.

    `lengths` (`full_lengths`: before the cut) and `supervised` (predicted labels), one number per record, are known
    without reading the records. A pair is as long as both its sequences together, and carries its row of `reference`.
    """

    def __init__(self, table: datasets.Dataset, numbers: Sequence[int] | np.ndarray, cutoff_len: int):
        self.table, self.cutoff_len = table, cutoff_len
        self.numbers = np.asarray(numbers, dtype=np.int64)
        self.full_lengths = column(table, "full_length")[self.numbers].tolist()
        sequences = 2 if "rejected_ids" in table.column_names else 1
        self.lengths = (sequences * np.minimum(self.full_lengths, cutoff_len)).tolist()
        self.reference: np.ndarray | None = None
        self.supervised = column(table, "supervised")[self.numbers].tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[int(self.numbers[index])]
        return row if self.reference is None else row | {"reference": self.reference[index]}


class JudgedDataset(EncodedDataset):
    """Labelled answers; beside each, as `rejected_ids`, its question with the answer to another question.

    By these mismatched answers KTO measures how far the model has moved. The other question is that of the nearest earlier
    record with a different one, wrapping around at the beginning.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        length = question_length(row)
        question = row["input_ids"][:length]
        for back in range(1, len(self)):
            other = self.table[int(self.numbers[index - back])]
            start = question_length(other)
            if other["input_ids"][:start] != question:
                break
        else:
            other, start = row, length
        ids, labels = question + other["input_ids"][start:], [IGNORED] * length + other["labels"][start:]
        return row | {"rejected_ids": ids[: self.cutoff_len], "rejected_labels": labels[: self.cutoff_len]}


def question_length(row: dict[str, Any]) -> int:
    """The number of tokens before a row's first label."""
    return next((place for place, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))


def column(table: datasets.Dataset, name: str) -> np.ndarray:
    """One column of numbers: (records,) int32."""
    return table.data.column(name).to_numpy()


def encode_all(
    encoder: Encoder | DocumentEncoder, data_path: str, hashes: dict[str, str], seed: int, keep: bool
) -> tuple[datasets.Dataset, np.ndarray]:
    """The table of all records in the files of `data_path`, and the numbers of those that its weights ask for.

    `seed` determines what a weight draws; `hashes` are those of the files; `keep`: see encode_file.
    Raises UserError if a file cannot be read, or the weights leave no record.
    """
    tables: list[datasets.Dataset] = []
    numbers: list[np.ndarray] = []
    count = 0
    for position, source in enumerate(sources(data_path)):
        found = [encode_file(encoder, file, hashes[str(file)], keep) for file in source.files]
        size = sum(map(len, found))
        tables += found
        numbers.append(np.array(weighted(source, size, f"{seed} {position}"), dtype=np.int64) + count)
        count += size
    if not any(map(len, numbers)):
        raise UserError(f"{data_path}: the weights leave no record; give larger ones")
    return datasets.concatenate_datasets(tables), np.concatenate(numbers)


def encode_file(encoder: Encoder | DocumentEncoder, file: Path, content: str, keep: bool) -> datasets.Dataset:
    """The table of a file's records, from the cache if the same `content` (a hash) was encoded in the same way before.

    Another template, tokenizer or cutoff makes another table. A new table is cached only if `keep`.
    """
    made_of = [FORMAT, file.suffixes, content, *encoder.made_of]
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "dreamergpt" / f"{digest(made_of)}.arrow"
    path = cached if cached.is_file() or (keep and can_keep(cached.parent)) else temporary_folder() / cached.name
    if path.is_file():
        say(f"{file}: its encoded records are already in {path}")
    else:
        bar = progress(desc=f"encoding {file.name}", unit=" records")
        with replacing(path) as aside, ArrowWriter(path=str(aside), features=encoder.features) as writer, bar:
            for rows in encode_chunks(encoder, chunks(encoder.read(file))):
                writer.write_table(rows)
                bar.update(len(rows))
            writer.finalize()
    return datasets.Dataset.from_file(str(path))


def can_keep(folder: Path) -> bool:
    """Whether encoded records can be kept in this folder; if not (in a read-only home, say), this is printed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"{folder}: {error.strerror}; encoded records are not kept for later runs")
        return False
    if not os.access(folder, os.W_OK):
        say(f"{folder}: cannot be written to; encoded records are not kept for later runs")
        return False
    return True


def chunks(records: Iterator[Any]) -> Iterator[list[Any]]:
    """The records in lists of CHUNK."""
    while chunk := list(itertools.islice(records, CHUNK)):
        yield chunk


def encode_chunks(encoder: Encoder | DocumentEncoder, chunks: Iterator[list[Any]]) -> Iterator[pa.Table]:
    """The table of each chunk, in order; many chunks are encoded by one process per core, only a few of them ahead."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    first = list(itertools.islice(chunks, FEW))
    if len(first) < FEW or cores == 1:
        yield from map(encoder, itertools.chain(first, chunks))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already run in parallel
    fork = multiprocessing.get_context("fork")
    waiting: collections.deque[Future[pa.Table]] = collections.deque()
    with ProcessPoolExecutor(cores, fork, initializer=start_worker, initargs=(encoder,)) as pool:
        for chunk in itertools.chain(first, chunks):
            waiting.append(pool.submit(encode_chunk, chunk))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def start_worker(encoder: Encoder | DocumentEncoder) -> None:
    """Make this process an encoder that ends with its parent, however that ends."""
    global worker_encoder
    worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def encode_chunk(records: list[Any]) -> pa.Table:
    """Encode records with the encoder of this process."""
    return worker_encoder(records)


def temporary_folder() -> Path:
    """A new folder that is deleted when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="dreamergpt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def usable(table: datasets.Dataset, numbers: np.ndarray, cutoff_len: int) -> np.ndarray:
    """The records among `numbers` with some of an answer left to learn; prints what was cut and dropped, and why.

    Raises UserError if none is left.
    """
    refused = pc.not_equal(table.data.column("refused"), "").to_numpy()[numbers]
    if refused.any():
        why = table[int(numbers[refused][0])]["refused"]
        if refused.all():
            raise UserError(f"the chat template refuses all {len(numbers)} records; the first: {why}")
        say(f"{refused.sum()} of {len(numbers)} records dropped, since the chat template refuses them; the first: {why}")
        numbers = numbers[~refused]
    lengths, answers = column(table, "full_length")[numbers], column(table, "answer_tokens")[numbers]
    keeps95, keeps99 = lengths_that_keep(lengths)
    cut, kept = int((lengths > cutoff_len).sum()), numbers[answers > 0]
    if cut:
        say(
            f"--cutoff_len {cutoff_len} cuts {cut} of {len(lengths)} records ({len(lengths) - len(kept)} of them dropped: "
            f"nothing of their answers is left);  {keeps95} would keep 95 % uncut, {keeps99} would keep 99 %"
        )
    if raw := int(column(table, "raw_answers")[kept].sum()):
        say(f"{raw} answers are learned as the records have them, since the chat template writes them differently")
    if not len(kept):
        raise UserError(f"--cutoff_len {cutoff_len}: leaves no answer in any of {len(lengths)} records; give {keeps95} or more")
    return kept


def lengths_that_keep(lengths: np.ndarray) -> tuple[int, int]:
    """The cutoff lengths that would keep 95 % and 99 % of the records uncut."""
    return tuple(int(np.quantile(lengths, share, method="higher")) for share in (0.95, 0.99))  # type: ignore[return-value]


def split(numbers: np.ndarray, val_set_size: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the validation set, a count or a fraction of the records, and return (train, validation).

    A record that `numbers` holds more than once is drawn only once; a validation record is never trained on.
    Raises UserError if nothing would be left to train on.
    """
    records = np.unique(numbers)
    count = validation_size(val_set_size, len(records))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).numpy()
    validation = records[np.sort(order[:count])]
    return numbers[~np.isin(numbers, validation)], validation
