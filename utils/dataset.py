"""Encoded records on disk, memory-mapped: encoded once, kept by what they were made of, split by a seed."""

import atexit
import collections
import ctypes
import dataclasses
import itertools
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from utils.console import UserError, progress, say
from utils.encoding import IGNORED, encode
from utils.files import digest, replacing
from utils.prompter import Prompter
from utils.records import read_records
from utils.sources import sources, validation_size, weighted

CHUNK = 1000  # records encoded in one call to the tokenizer
FEW = 4  # fewer chunks than this are not worth starting processes for
PR_SET_PDEATHSIG = 1  # prctl(2)
FORMAT = 2  # of the files below; a new number leaves the old files unread
NUMBER, LIST = datasets.Value("int32"), datasets.Sequence(datasets.Value("int32"))
COLUMNS = datasets.Features(
    {"input_ids": LIST, "labels": LIST, "full_length": NUMBER, "answer_tokens": NUMBER, "supervised": NUMBER}
)

worker_encoder: "Encoder"  # in a process that start_worker began


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How records become ids and labels; `tokenizer_hash` stands for the tokenizer's files."""

    prompter: Prompter
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    cutoff_len: int
    train_on_inputs: bool

    def __call__(self, records: list[dict[str, Any]]) -> pa.Table:
        """Encode records in one call to the tokenizer; a row each."""
        encoded = encode(records, self.prompter, self.tokenizer, self.cutoff_len, self.train_on_inputs)
        columns = {
            "input_ids": lists([one.input_ids for one in encoded]),
            "labels": lists([one.labels for one in encoded]),
            "full_length": [one.full_length for one in encoded],
            "answer_tokens": [one.answer_tokens for one in encoded],
            "supervised": [len(labels) - labels.count(IGNORED) for labels in (one.labels[1:] for one in encoded)],
        }
        return pa.table(columns, schema=COLUMNS.arrow_schema)


def lists(rows: list[list[int]]) -> pa.ListArray:
    """Lists of numbers as a column, without pyarrow's look at the kind of each number."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.fromiter(itertools.chain.from_iterable(rows), np.int32, ends[-1]))


class Encoded:
    """The encoded records `numbers` of a table; `dataset[i]` is {"input_ids", "labels", …}.

    `lengths` (`full_lengths`: before the cut) and `supervised` (labels that are predicted), a number a record, are
    known without reading the records.
    """

    def __init__(self, table: datasets.Dataset, numbers: Sequence[int] | np.ndarray, cutoff_len: int):
        self.table = table
        self.numbers = np.asarray(numbers, dtype=np.int64)
        self.full_lengths = column(table, "full_length")[self.numbers].tolist()
        self.lengths = np.minimum(self.full_lengths, cutoff_len).tolist()
        self.supervised = column(table, "supervised")[self.numbers].tolist()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table[int(self.numbers[index])]


def column(table: datasets.Dataset, name: str) -> np.ndarray:
    """One column of numbers: (records,) int32."""
    return table.data.column(name).to_numpy()


def encode_all(
    encoder: Encoder, data_path: str, hashes: dict[str, str], seed: int, keep: bool
) -> tuple[datasets.Dataset, np.ndarray]:
    """The table of all records in the files of `data_path`, and the numbers of those that its weights ask for.

    `seed` rules what a weight draws; `hashes` are those of the files; `keep`: see encode_file.
    Raises UserError where a file cannot be read, or the weights leave no record.
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


def encode_file(encoder: Encoder, file: Path, content: str, keep: bool) -> datasets.Dataset:
    """The table of a file's records, from the cache where the same `content` (a hash) was encoded in the same way before.

    Another template, tokenizer or cutoff makes another table. It is not kept for later unless `keep`.
    """
    made_of = [FORMAT, file.suffixes, content, encoder.prompter.texts, encoder.tokenizer_hash]
    made_of += [encoder.cutoff_len, encoder.train_on_inputs]
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "dreamergpt" / f"{digest(made_of)}.arrow"
    path = cached if keep or cached.is_file() else temporary_folder() / cached.name
    if path.is_file():
        say(f"{file}: its encoded records are found in {path}")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = progress(desc=f"encoding {file.name}", unit=" records")
        with replacing(path) as aside, ArrowWriter(path=str(aside), features=COLUMNS) as writer, bar:
            for rows in encode_chunks(encoder, chunks(read_records(file))):
                writer.write_table(rows)
                bar.update(len(rows))
            writer.finalize()
    return datasets.Dataset.from_file(str(path))


def chunks(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The records in lists of CHUNK."""
    while chunk := list(itertools.islice(records, CHUNK)):
        yield chunk


def encode_chunks(encoder: Encoder, chunks: Iterator[list[dict[str, Any]]]) -> Iterator[pa.Table]:
    """The table of each chunk, in order: many chunks by one process a core, and only a few of them ahead of their use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    first = list(itertools.islice(chunks, FEW))
    if len(first) < FEW or cores == 1:
        yield from map(encoder, itertools.chain(first, chunks))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    fork = multiprocessing.get_context("fork")
    waiting: collections.deque[Future[pa.Table]] = collections.deque()
    with ProcessPoolExecutor(cores, fork, initializer=start_worker, initargs=(encoder,)) as pool:
        for chunk in itertools.chain(first, chunks):
            waiting.append(pool.submit(encode_chunk, chunk))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def start_worker(encoder: Encoder) -> None:
    """Make this process one that encodes, and that ends with the program which started it, however that ends."""
    global worker_encoder
    worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def encode_chunk(records: list[dict[str, Any]]) -> pa.Table:
    """Encode records with the encoder of this process."""
    return worker_encoder(records)


def temporary_folder() -> Path:
    """A new folder that goes when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="dreamergpt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def usable(table: datasets.Dataset, numbers: np.ndarray, cutoff_len: int) -> np.ndarray:
    """Those of the records `numbers` with something of an answer left to learn; says what was cut and dropped.

    Raises UserError where none is left.
    """
    lengths, answers = column(table, "full_length")[numbers], column(table, "answer_tokens")[numbers]
    keeps95, keeps99 = lengths_that_keep(lengths)
    cut, kept = int((lengths > cutoff_len).sum()), numbers[answers > 0]
    if cut:
        say(
            f"--cutoff_len {cutoff_len} cuts {cut} of {len(lengths)} records ({len(lengths) - len(kept)} of them dropped: "
            f"nothing of the answer is left); {keeps95} would keep 95 % whole, {keeps99} would keep 99 %"
        )
    if not len(kept):
        raise UserError(f"--cutoff_len {cutoff_len}: leaves no answer in any of {len(lengths)} records; give {keeps95} or more")
    return kept


def lengths_that_keep(lengths: np.ndarray) -> tuple[int, int]:
    """The cutoff lengths that would keep 95 % and 99 % of the records whole."""
    return tuple(int(np.quantile(lengths, share, method="higher")) for share in (0.95, 0.99))  # type: ignore[return-value]


def split(numbers: np.ndarray, val_set_size: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the validation set, a count or a fraction of the records, and return (train, validation).

    A record that `numbers` holds more than once is drawn once, and is then not trained on at all.
    Raises UserError where nothing would be left to train on.
    """
    records = np.unique(numbers)
    count = validation_size(val_set_size, len(records))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).numpy()
    validation = records[np.sort(order[:count])]
    return numbers[~np.isin(numbers, validation)], validation
