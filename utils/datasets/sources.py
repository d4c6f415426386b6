"""What a `--data_path` stands for: files, datasets on the Hugging Face hub, or several of these with weights."""

import difflib
import functools
import itertools
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

from utils.console import UserError, reason, say
from utils.datasets.file_formats import ENDINGS, read_batches
from utils.datasets.folders import files_in, training_files
from utils.files import check_plain

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_INFO = ("dataset_info*.json", "dataset_dict.json", "state.json", ".*", "*/.*", "checkpoint*")  # files without records


class Source(NamedTuple):
    """One part of a data path: the files it stands for, and how much of them is wanted (1: all)."""

    name: str
    files: list[Path]
    weight: float


def sources(data_path: str) -> list[Source]:
    """The parts of a data path. Raises UserError if one is neither a file nor a hub name, or its weight is bad."""
    parts = [data_path] if os.path.exists(data_path) else [part.strip() for part in str(data_path).split(",")]
    return [source_of(part, data_path) for part in parts]


def data_files(data_path: str) -> list[Path]:
    """The files that a data path stands for (a hub name: its downloaded files). Raises UserError if one is missing."""
    return [file for source in sources(data_path) for file in source.files]


def weighted(source: Source, count: int, seed: str) -> list[int]:
    """The numbers of those of `count` records that a source's weight asks for; prints how many they are.

    A weight of 0.5 takes half of the records, drawn with `seed`, in order; 2 takes each twice; 1.5 takes each once, and half
    of them again.
    """
    whole, wanted = int(source.weight), round(source.weight * count)
    picked = [*range(count)] * whole + sorted(random.Random(seed).sample(range(count), wanted - whole * count))
    if source.weight != 1:
        say(f"{source.name}: weight {source.weight:g} makes {len(picked):,} of {count:,} records")
    return picked


def check_validation(val_set_size: int | float, files: list[Path]) -> None:
    """Raise UserError if files hold, good and bad together, no more records than are to be kept for validation.

    It reads no more than it must. `validation_size` checks again once the number of usable records is known.
    """
    if isinstance(val_set_size, float):
        if val_set_size >= 1:
            raise UserError(f"--val_set_size {val_set_size}: takes all records; give a fraction such as 0.1, or a whole number")
        return
    held = 0
    for batch in itertools.chain.from_iterable(map(read_batches, files)):
        held += len(batch)
        if held > val_set_size:
            return
    validation_size(val_set_size, held)


def validation_size(val_set_size: int | float, records: int) -> int:
    """How many of so many `records` are kept for validation. Raises UserError if none would be left to train on."""
    count = round(val_set_size * records) if isinstance(val_set_size, float) else val_set_size
    if count >= records:
        raise UserError(
            f"--val_set_size {val_set_size}: takes {count} of the {records} records and leaves none to train on; "
            "give fewer, or a fraction such as 0.1"
        )
    return count


def source_of(part: str, data_path: str) -> Source:
    name, colon, number = part.rpartition(":")
    if not part or os.path.exists(part) or not colon:
        return Source(part, files_of(part, data_path), 1.0)
    try:
        weight = float(number)
    except ValueError:
        if not os.path.exists(name):
            return Source(part, files_of(part, data_path), 1.0)
        weight = -1.0
    if not 0 < weight <= 1000:
        raise UserError(f"{part}: {number} is not a weight; write FILE:0.5, a number above 0 and at most 1000")
    return Source(name, files_of(name, data_path), weight)


def files_of(name: str, data_path: str) -> list[Path]:
    """The file of that name, or the files of that dataset on the hub."""
    if not name:
        raise UserError(f"{data_path!r}: names no file; write FILE, or FILE,FILE:0.5")
    if os.path.isdir(name):
        return files_in(name)
    if is_hub_name(name) and not name.endswith(ENDINGS):
        return hub_files(name)
    check_exists(Path(name))
    check_plain(name)
    return [Path(name)]


def is_hub_name(name: str) -> bool:
    """True if a name can only be one on the Hugging Face hub (`owner/name`): there is no local folder `owner`."""
    return bool(HUB_NAME.fullmatch(name)) and not os.path.exists(os.path.dirname(name))


def check_base_model(base_model: str) -> None:
    """Raise UserError if a base model's path is not a folder; a name may be one on the hub."""
    if base_model.startswith(("/", ".")) and not os.path.isdir(base_model):
        raise UserError(f"--base_model {base_model}: no such folder; check the path of the model")


def check_exists(path: Path) -> None:
    """Raise UserError, with the nearest name in its folder, if a file or folder is missing."""
    if os.path.exists(path):
        return
    if os.path.islink(path):
        raise UserError(f"{path}: is a broken link to {os.readlink(path)}; fix the link")
    names = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name, names, 1, 0.6)
    raise UserError(f"{path}: no such file; {f'did you mean {path.parent / near[0]}?' if near else 'check the path'}")


@functools.cache
def hub_files(name: str) -> list[Path]:
    """Fetch a dataset from the hub (or the local cache); returns its training files, or all if none is called that."""
    import huggingface_hub

    say(f"{name}: no such file; taken for a dataset on the Hugging Face hub")
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", allow_patterns=[f"*{ending}" for ending in ENDINGS], ignore_patterns=list(HUB_INFO)
        )
    except Exception as error:
        raise UserError(f"{name}: no such file, and not available from the hub ({reason(error)}); check the name") from None
    chosen, files = training_files(Path(folder))
    if not chosen:
        raise UserError(f"{name}: this dataset holds no {', '.join(ENDINGS)} file; name a file of records instead")
    names = ", ".join(str(file.relative_to(folder)) for file in chosen)
    say(f"{name}: reading {len(chosen)} of its {len(files)} files: {names}")
    return chosen
