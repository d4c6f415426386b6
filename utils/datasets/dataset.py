"""Encoded records on disk, memory-mapped: encoded once, cached by what they were made from, split by a seed."""

import atexit
import collections
import itertools
import json
import multiprocessing
import os
import shutil
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

from utils.cli import end_with_parent
from utils.console import UserError, noting, progress, say
from utils.datasets.encoders import DocumentEncoder, Encoder
from utils.datasets.encoding import IGNORED
from utils.datasets.items import in_batches
from utils.datasets.sources import sources, validation_size, weighted
from utils.files import digest, replacing

CHUNK = 1000  # records encoded in one call to the tokenizer
FEW = 4  # fewer chunks are not worth starting processes for
FORMAT = 7  # of the cached files; a new number makes older files unused
THE_FILE = "{file}"  # in the cached notices: a copy of the file, elsewhere, has the same ones

worker_encoder: "Encoder | DocumentEncoder"  # set by start_worker in each worker process


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

    Another template, tokenizer or cutoff makes another table. A new table is cached only if `keep`, together with the
    notices of what was dropped or repaired, which are then printed again.
    """
    made_of = [FORMAT, file.suffixes, content, *encoder.made_of]
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "dreamergpt" / f"{digest(made_of)}.arrow"
    path = cached if cached.is_file() or (keep and can_keep(cached.parent)) else temporary_folder() / cached.name
    notices = path.with_suffix(".json")
    if path.is_file() and notices.is_file():
        say(f"{file}: its encoded records are already in {path}")
        for text in json.loads(notices.read_text("utf-8")):
            say(text.replace(THE_FILE, str(file)))
    else:
        bar = progress(desc=f"encoding {file.name}", unit=" records")
        with replacing(path) as aside, ArrowWriter(path=str(aside), features=encoder.features) as writer, bar, noting() as said:
            for rows in encode_chunks(encoder, in_batches(encoder.read(file), CHUNK)):
                writer.write_table(rows)
                bar.update(len(rows))
            writer.finalize()
            with replacing(notices) as noted:  # escaped: names and data may hold what is no character
                noted.write_text(json.dumps([text.replace(str(file), THE_FILE) for text in said]), "utf-8")
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


def encode_chunks(encoder: Encoder | DocumentEncoder, chunks: Iterator[list[Any]]) -> Iterator[pa.Table]:
    """The table of each chunk, in order; many chunks are encoded by one process per core, only a few of them ahead.

    1.33 times as fast as `Dataset.map(batched=True, num_proc=…)`, with 0.81 of its memory (benchmarks/encode.py).
    """
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
    """Make this process an encoder."""
    global worker_encoder
    worker_encoder = encoder
    end_with_parent()


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
