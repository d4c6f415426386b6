"""Folders that hold a dataset: as the Hugging Face hub lays it out, or as `save_to_disk` of datasets writes it."""

import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from utils.console import UserError, say
from utils.datasets.file_formats import ENDINGS
from utils.datasets.items import format_ending

INFO = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|.*_config|trainer_state|package|tokenizer.*|.*\.index|lineage|.*_(results|args|map|tokens))\.json"
)
WORDS = re.compile(r"[a-z]+")
SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(("test", "eval", "evaluation"), "test")
SPLITS |= dict.fromkeys(("valid", "validation", "val", "dev"), "validation")
COUNTING = {"part", "shard", "chunk", "of", "data", "file", "split", "default"}  # words that only number a file
PREFERRED = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # if a split has several formats


def saved_to_disk(folder: Path) -> list[Path] | None:
    """The Arrow files of a folder written by `save_to_disk`, if it has splits those of train; None for any other folder.

    Raises UserError if there are several splits and none is called train, or files are missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if "train" not in splits and len(splits) != 1:
            raise UserError(f"{folder}: holds the splits {listed(splits)} but no train; name the folder of one of them")
        chosen = "train" if "train" in splits else splits[0]
        say(f"{folder}: reading its split {chosen}{left_out([name for name in splits if name != chosen])}")
        return saved_to_disk(folder / chosen)
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    try:
        named = [one["filename"] for one in json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        named = []
    files = [folder / Path(name).name for name in named] or sorted(folder.glob("*.arrow"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(f"{folder}: written by save_to_disk, but lacks {listed(missing) or 'Arrow files'}; download it again")
    return files


def training_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a dataset's training split (all if no file names a split), each once, and all files of records.

    Hidden folders, checkpoints and files about the set are skipped; if a split is there in several formats, one is
    chosen, with a notice. Raises UserError if there are several sets of files to choose from.
    """
    files = [path for path in sorted(folder.rglob("*")) if is_of_records(path.relative_to(folder)) and path.is_file()]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(file.relative_to(folder)), []).append(file)
    chosen = by_split.get("train") or by_split.get("") or files
    chosen = without_copies(folder, chosen)
    groups = sorted({group_of(file.relative_to(folder)) for file in chosen}) if "train" in by_split else []
    if len(groups) > 1:
        raise UserError(
            f"{folder}: holds several training sets ({listed(groups)}); name the folder or the files of one of them"
        )
    return chosen, files


def is_of_records(path: Path) -> bool:
    """True for a path in a dataset that may hold records: not hidden, not in a checkpoint, not about the set."""
    hidden = any(part.startswith((".", "checkpoint", "__")) for part in path.parts)
    return not hidden and path.name.lower().endswith(ENDINGS) and not INFO.fullmatch(path.name.lower())


def split_of(path: Path) -> str:
    """The split that a file belongs to, by a word in its name or else its folders'; "" if none tells."""
    for part in reversed(path.parts):
        for word in WORDS.findall(part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def group_of(path: Path) -> str:
    """What distinguishes the files of one set from another's: folder and name without split, number and ending."""
    parts = [path.name.lower().split(".")[0], *(part.lower() for part in path.parts[:-1])]
    words = [[word for word in WORDS.findall(part) if word not in SPLITS and word not in COUNTING] for part in parts]
    name, *folders = ("-".join(found) for found in words)
    return "/".join(filter(None, (*folders, name))) or "data"


def without_copies(folder: Path, files: list[Path]) -> list[Path]:
    """The files; of those that are there in several formats only the first in `PREFERRED`. The others are printed."""
    names = {file.name.lower() for file in files}
    if len({format_ending(file) for file in files}) < 2 and not any(f"{name}.gz" in names for name in names):
        return files
    kept: dict[tuple, Path] = {}
    copies: list[Path] = []
    for file in sorted(files, key=lambda file: (PREFERRED.index(format_ending(file)), file.name.endswith(".gz"))):
        path = file.relative_to(folder)
        stem = re.sub(r"-\d+-of-\d+$", "", path.name.lower().removesuffix(".gz").rpartition(".")[0])
        first = kept.setdefault((path.parent, stem), file)
        plain = file.with_name(file.name.removesuffix(".gz"))
        if format_ending(first) != format_ending(file) or (plain != file and plain in files):
            copies.append(path)
        else:
            kept[path.parent, stem, file] = file
    if copies:
        say(f"{folder}: left out as copies in another format: {listed(map(str, copies))}")
    return sorted({*kept.values()})


@functools.cache
def files_in(name: str) -> list[Path]:
    """The files of records that a local folder stands for.

    Raises UserError if it has none of the layouts above, and nothing tells which of its files are meant.
    """
    folder = Path(name)
    if (main := folder / "refs" / "main").is_file():  # a repository in the hub's cache
        folder = folder / "snapshots" / main.read_text("utf-8").strip()
    if (found := saved_to_disk(folder)) is not None:
        return found
    chosen, files = training_files(folder)
    if not any(split_of(file.relative_to(folder)) for file in files):
        here = sorted(file for file in os.listdir(folder) if file.endswith(ENDINGS))
        raise UserError(f"{name}: is a folder; name files in it ({', '.join(here[:5]) or 'it holds no records'})")
    say(f"{name}: reading {len(chosen)} of its {len(files)} files: {listed(str(file.relative_to(folder)) for file in chosen)}")
    return chosen


def left_out(names: list[str]) -> str:
    """A note about splits that are not read."""
    return f", not {listed(names)}" if names else ""


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first few names."""
    first = list(names)
    return ", ".join(first[:most]) + (", …" if len(first) > most else "")
