"""How many tokens are computed at once: as many as the options say, and fewer after memory has run out.

A step's loss does not depend on how its records are packed into micro-batches, so less memory makes it slower and
changes nothing else. Each rank has its own budget.
"""

from collections.abc import Sequence
from pathlib import Path

from utils.console import UserError
from utils.files import read_json, write_json
from utils.training.batching import pack_micro_batches


class Budget:
    """At most `tokens` in a micro-batch, padding included; initially `most`, which the options give."""

    def __init__(self, most: int):
        self.most = self.tokens = most

    def pack(self, records: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Split records, each known to fit in `most` tokens, into micro-batches that fit now; returns at least one."""
        return pack_micro_batches(records, lengths, self.tokens) or [[]]

    @property
    def is_reduced(self) -> bool:
        """True once memory has run out."""
        return self.tokens < self.most

    def reduce(self, records: int, length: int) -> str:
        """Halve the budget after memory ran out with `records` of `length` tokens; returns the notice to print.

        Raises UserError if that was a single record.
        """
        if records < 2:
            raise UserError(
                f"out of memory with a single record of {length} tokens; "
                "give --gradient_checkpointing True, a lower --cutoff_len, --load_8bit or --load_4bit"
            )
        self.tokens = min(self.tokens, records * length) // 2
        return f"out of memory with {records} records of {length} tokens at once; repeated with half as many, also from here on"

    def save(self, folder: Path, rank: int) -> None:
        """Keep a reduced budget in a checkpoint, so that a resumed run packs its records as this one would."""
        if self.is_reduced:
            write_json(folder / name(rank), self.tokens)

    def load(self, folder: Path, rank: int) -> None:
        """Restore the budget of a checkpoint, if it was reduced."""
        if (folder / name(rank)).is_file():
            self.tokens = min(self.most, int(read_json(folder / name(rank))))


def name(rank: int) -> str:
    """The file of a rank's budget in a checkpoint."""
    return f"micro_batch_tokens_{rank}.json"
