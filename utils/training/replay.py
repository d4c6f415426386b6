"""Replay: some records of earlier steps are learned again, so that a new step does not make the adapter forget them."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from utils.console import UserError, say
from utils.datasets.dataset import encode_file, usable
from utils.datasets.encoders import DocumentEncoder, Encoder
from utils.files import sha256
from utils.lineage import parents_of


def parents_files(parent: dict[str, Any] | None, stage: str) -> Iterator[tuple[Path, str]]:
    """The data files of all earlier steps of the same stage, nearest first, each once, with its hash when it was learned."""
    seen: set[str] = set()
    parents = [parent] if parent else []
    for found in parents:
        step = found.get("lineage") or {}
        data = step.get("data") or {}
        if data.get("stage", stage) == stage:
            for name, content in data.get("files", {}).items():
                if content not in seen:
                    seen.add(content)
                    yield Path(name), content
        parents += parents_of(step)


def files_to_replay(parent: dict[str, Any] | None, stage: str) -> dict[str, str]:
    """The parents' data files of the same stage that are unchanged since they were learned, with their hashes.

    Others are left out, with a notice. Raises UserError if none is left.
    """
    usable_files: dict[str, str] = {}
    for file, content in parents_files(parent, stage):
        if file.is_file() and sha256(file) == content:
            usable_files[str(file)] = content
        else:
            why = "has changed since it was learned" if file.is_file() else "no longer exists"
            say(f"--replay: {file} {why}; its records are not replayed")
    if not usable_files:
        raise UserError(
            "--replay: no data file of an earlier step exists unchanged; "
            "give --resume_from_checkpoint and keep the files where its lineage.json names them, or leave the option out"
        )
    return usable_files


def with_replay(
    table: datasets.Dataset,
    train: np.ndarray,
    share: float,
    encoder: Encoder | DocumentEncoder,
    files: dict[str, str],
    seed: int,
) -> tuple[datasets.Dataset, np.ndarray, dict[str, Any]]:
    """Table and training numbers, with `share` times as many records drawn from `files`; and what the lineage records of them.

    They are drawn with `seed` from the usable records of all the files together.
    """
    tables: list[datasets.Dataset] = [table]
    numbers: list[np.ndarray] = []
    for name, content in files.items():
        found = encode_file(encoder, Path(name), content, keep=True)
        numbers.append(usable(found, np.arange(len(found)), encoder.cutoff_len) + sum(map(len, tables)))
        tables.append(found)
    earlier = np.concatenate(numbers)
    wanted = min(len(earlier), max(1, round(share * len(train))))
    drawn = np.array(sorted(random.Random(seed).sample(range(len(earlier)), wanted)))
    say(f"--replay {share:g}: {wanted:,} of {len(earlier):,} records of {', '.join(files)} are learned again")
    return datasets.concatenate_datasets(tables), np.concatenate([train, earlier[drawn]]), {"files": files, "records": wanted}
