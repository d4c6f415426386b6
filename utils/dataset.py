"""Encoded records on disk, memory-mapped: encoded once, kept by what they were made of, split by a seed."""

import atexit
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from utils.console import UserError, progress, say
from utils.encoding import IGNORED, encode
from utils.files import digest, replacing
from utils.prompter import Prompter

CHUNK = 1000  # records encoded in one call to the tokenizer
FORMAT = 1  # of the files below; a new number leaves the old files unread
NUMBER, LIST = datasets.Value("int32"), datasets.Sequence(datasets.Value("int32"))
COLUMNS = datasets.Features(
    {"input_ids": LIST, "labels": LIST, "full_length": NUMBER, "answer_tokens": NUMBER, "supervised": NUMBER}
)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How records become ids and labels; `tokenizer_hash` stands for the tokenizer's files."""

    prompter: Prompter
    tokenizer: PreTrainedTokenizerBase
    tokenizer_hash: str
    cutoff_len: int
    train_on_inputs: bool

    def rows(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, list]]:
        """Encode records in chunks; each chunk as columns."""
        records = iter(records)
        while chunk := list(itertools.islice(records, CHUNK)):
            rows: dict[str, list] = {name: [] for name in COLUMNS}
            for one in encode(chunk, self.prompter, self.tokenizer, self.cutoff_len, self.train_on_inputs):
                rows["input_ids"].append(one.input_ids)
                rows["labels"].append(one.labels)
                rows["full_length"].append(one.full_length)
                rows["answer_tokens"].append(one.answer_tokens)
                rows["supervised"].append(sum(label != IGNORED for label in one.labels[1:]))
            yield rows


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
    encoder: Encoder, hashes: dict[str, str], data_path: str, read: Callable[[], Iterable[dict[str, Any]]], keep: bool
) -> datasets.Dataset:
    """The table of all records, from the cache where the same data were encoded in the same way before.

    `hashes` are those of the files that `data_path` stands for: changed files, template, tokenizer or cutoff make
    another table. `read` gives the records where they must be encoded; the table is not kept unless `keep`.
    """
    made_of = [FORMAT, data_path, hashes, encoder.prompter.texts, encoder.tokenizer_hash]
    made_of += [encoder.cutoff_len, encoder.train_on_inputs]
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "dreamergpt" / f"{digest(made_of)}.arrow"
    path = cached if keep or cached.is_file() else temporary_folder() / cached.name
    if path.is_file():
        say(f"encoded records found in {path}")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = progress(desc="encoding", unit=" records")
        with replacing(path) as aside, ArrowWriter(path=str(aside), features=COLUMNS) as writer, bar:
            for rows in encoder.rows(read()):
                writer.write_batch(rows)
                bar.update(len(rows["input_ids"]))
            writer.finalize()
    return datasets.Dataset.from_file(str(path))


def temporary_folder() -> Path:
    """A new folder that goes when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="dreamergpt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def usable(table: datasets.Dataset, cutoff_len: int) -> np.ndarray:
    """The numbers of the records with something of an answer left to learn; says what was cut and dropped.

    Raises UserError where none is left.
    """
    lengths, answers = column(table, "full_length"), column(table, "answer_tokens")
    keeps95, keeps99 = lengths_that_keep(lengths)
    cut, kept = int((lengths > cutoff_len).sum()), np.flatnonzero(answers > 0)
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

    Raises UserError where nothing would be left to train on.
    """
    count = round(val_set_size * len(numbers)) if isinstance(val_set_size, float) else val_set_size
    if count >= len(numbers):
        raise UserError(
            f"--val_set_size {val_set_size}: takes {count} of the {len(numbers)} records and leaves none to train on; "
            "give fewer, or a fraction such as 0.1"
        )
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed)).numpy()
    return numbers[np.sort(order[count:])], numbers[np.sort(order[:count])]
