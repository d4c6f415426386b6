"""How many tokens are computed at once: as many as the options say, and fewer from where memory has ended on.

A step's loss does not depend on how its records are dealt into micro-batches, so that less memory makes it slower and
changes nothing else. Each rank has a budget of its own.
"""

from collections.abc import Sequence
from pathlib import Path

from utils.console import UserError
from utils.files import read_json, write_json
from utils.training.batching import pack_micro_batches


class Budget:
    """At most `tokens` in a micro-batch, with padding; at first what the options say, `most`."""

    def __init__(self, most: int):
        self.most = self.tokens = most

    def deal(self, records: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Records, known to fit into a micro-batch of `most` tokens each, as micro-batches that fit now; one at least."""
        return pack_micro_batches(records, lengths, self.tokens) or [[]]

    @property
    def is_reduced(self) -> bool:
        """True once memory has ended."""
        return self.tokens < self.most

    def reduce(self, records: int, length: int) -> str:
        """Halve it, after memory ended with so many `records` of `length` tokens; what is to be printed of that.

        Raises UserError if it was a single record.
        """
        if records < 2:
            raise UserError(
                f"out of memory with a single record of {length} tokens; "
                "give --gradient_checkpointing True, a lower --cutoff_len, --load_8bit or --load_4bit"
            )
        self.tokens = min(self.tokens, records * length) // 2
        return f"out of memory with {records} records of {length} tokens at once; done again with half as many, as from here on"

    def save(self, folder: Path, rank: int) -> None:
        """Keep a reduced budget in a checkpoint, so that a resumed run deals its records as this one would."""
        if self.is_reduced:
            write_json(folder / name(rank), self.tokens)

    def load(self, folder: Path, rank: int) -> None:
        """Take the budget of a checkpoint, if it was reduced."""
        if (folder / name(rank)).is_file():
            self.tokens = min(self.most, int(read_json(folder / name(rank))))


def name(rank: int) -> str:
    """The file of a rank's budget in a checkpoint."""
    return f"micro_batch_tokens_{rank}.json"
