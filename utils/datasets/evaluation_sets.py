"""What the prepare.py scripts of evaluation sets share: options, subjects with names and groups, and writing."""

import atexit
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.cli import option
from utils.console import UserError, say
from utils.datasets.choices import Choice, as_record, read_file
from utils.datasets.record_writer import write_records
from utils.datasets.sources import check_exists
from utils.files import check_folder, locked

LARGEST, MOST_FILES = 2 * 10**9, 10_000  # bytes and files of an unpacked archive


@dataclasses.dataclass
class EvaluationOptions:
    """The options of every prepare.py of an evaluation set."""

    raw: str = option(help="the folder or zip archive of the downloaded files, or the file if the set is a single one")
    output_dir: str | None = option(
        None, "where the prepared files go; default: this set's folder under $DATA_DIR (./datasets)"
    )


def raw_files(raw: str, pattern: str) -> list[Path]:
    """The files that match a pattern in or below the folder `raw`, or else in the zip archives there; in the zip archive
    `raw`; or `raw` itself if it is another file. Raises UserError if there is none."""
    path = Path(raw)
    check_exists(path)
    if not path.is_dir() and not zipfile.is_zipfile(path):
        return [path]
    folders = [path] if path.is_dir() else [unpacked(path)]
    found = files_below(folders, pattern)
    if not found and path.is_dir():
        found = files_below(map(unpacked, sorted(path.glob("*.zip"))), pattern)
    if not found:
        raise UserError(f"{raw}: holds no {pattern}; name the folder into which you downloaded the set")
    return found


def files_below(folders: Iterable[Path], pattern: str) -> list[Path]:
    """The files that match a pattern, sorted, without those that macOS adds to archives."""
    found = sorted(file for folder in folders for file in folder.rglob(pattern))
    return [file for file in found if not file.name.startswith("._")]


@functools.cache
def unpacked(path: Path) -> Path:
    """A temporary folder with the contents of an archive, named like it and deleted when the program ends.

    Raises UserError if the archive is damaged, locked, or implausibly large.
    """
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [member.file_size for member in archive.infolist()]  # zipfile reads no more of a member than this
            if sum(sizes) > LARGEST or len(sizes) > MOST_FILES:
                much = f"{sum(sizes) / 1e9:.0f} GB in {len(sizes):,} files"
                raise UserError(f"{path}: would unpack to {much}, too much for an evaluation set; check the file")
            archive.extractall(folder / path.name)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); fetch it again, or unpack it yourself") from None
    return folder / path.name


def read_subjects(script: str) -> dict[str, dict[str, Any]]:
    """The subjects of a set, from the file beside its prepare.py: by name in the set, `topic` and `groups`."""
    return json.loads((Path(script).parent / "subjects.json").read_text("utf-8"))


def by_subject(files: Iterable[Path], subjects: Mapping[str, Mapping[str, Any]], ending: str = "") -> Iterator[Choice]:
    """The questions of files that are named by their subject and `ending`; those of unknown subjects, which are printed, have
    no group."""
    for file in files:
        name = file.name.partition(".")[0].removesuffix(ending)
        if name not in subjects:
            say(f"{file}: {name} is not a subject of this set; its questions are kept, without a group")
        known = subjects.get(name, {})
        for one in read_file(file):
            yield one._replace(category=name, topic=known.get("topic", ""), groups=tuple(known.get("groups", ())))


def write(
    options: EvaluationOptions, folder: str, licence: str, splits: Mapping[str, Iterable[Choice | dict[str, Any]]]
) -> None:
    """Write each split into a file of its name, in the set's folder under $DATA_DIR; print their sizes and the licence."""
    target = Path(options.output_dir or Path(os.environ.get("DATA_DIR") or "datasets", folder))
    check_folder(target)
    records = {name: [as_record(one) if isinstance(one, Choice) else one for one in split] for name, split in splits.items()}
    for name in [name for name, split in records.items() if not split]:
        raise UserError(f"{options.raw}: no question in it can be used for {name}.json; check the files, or fetch them again")
    with locked(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, split in records.items():
            write_records(target / f"{name}.json", split)
            subjects = len({record.get("category") for record in split})
            say(f"{target / name}.json: {len(split):,} questions in {subjects} subjects")
    say(f"licence: {licence}")
