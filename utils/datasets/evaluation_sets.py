"""What the prepare.py scripts of evaluation sets share: their options, subjects with names and groups, and the writing."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.cli import option
from utils.console import UserError, say
from utils.datasets.choices import Choice, as_record, read_file
from utils.datasets.records import write_records
from utils.datasets.sources import check_exists
from utils.files import check_folder, locked


@dataclasses.dataclass
class EvaluationOptions:
    """The options of every prepare.py of an evaluation set."""

    raw: str = option(help="the folder that holds the downloaded files, or the file where the set is a single one")
    output_dir: str | None = option(
        None, "where the prepared files go; default: this set's folder under $DATA_DIR (./datasets)"
    )


def raw_files(raw: str, pattern: str) -> list[Path]:
    """The files of a pattern in or below the folder `raw`; `raw` itself if it is a file. Raises UserError if none is there."""
    check_exists(Path(raw))
    found = sorted(Path(raw).rglob(pattern)) if Path(raw).is_dir() else [Path(raw)]
    if not found:
        raise UserError(f"{raw}: holds no {pattern}; name the folder that you downloaded the set to")
    return found


def read_subjects(script: str) -> dict[str, dict[str, Any]]:
    """The subjects of a set, from the file beside its prepare.py: by name in the set, `topic` and `groups`."""
    return json.loads((Path(script).parent / "subjects.json").read_text("utf-8"))


def by_subject(files: Iterable[Path], subjects: Mapping[str, Mapping[str, Any]], ending: str = "") -> Iterator[Choice]:
    """The questions of files that are named like their subjects, followed by `ending`; unknown subjects are printed, and have
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
    """Write each split as a file of its name, in the set's folder under $DATA_DIR; print their numbers and the licence."""
    target = Path(options.output_dir or Path(os.environ.get("DATA_DIR") or "datasets", folder))
    check_folder(target)
    records = {name: [as_record(one) if isinstance(one, Choice) else one for one in split] for name, split in splits.items()}
    with locked(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, split in records.items():
            write_records(target / f"{name}.json", split)
            subjects = len({record.get("category") for record in split})
            say(f"{target / name}.json: {len(split):,} questions in {subjects} subjects")
    say(f"licence: {licence}")
