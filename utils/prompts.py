"""Files of prompts to be answered, and the form that their answers are written in."""

from pathlib import Path
from typing import Any

from utils.console import UserError
from utils.formats import ENDINGS
from utils.records import read_records

Record = dict[str, Any]
RESULT = "test.json"


def read_prompts(paths: list[str]) -> list[Record]:
    """The prompts of files and folders, in order; of several files, each record has its file's name as `category`.

    A category that a record brings along is kept. Raises UserError where there is nothing to read or to answer.
    """
    if not paths:
        raise UserError("--test_input_path: missing; give a file of prompts, several parted by commas, or a folder")
    files = [file for path in paths for file in prompt_files(Path(path))]
    several = len(files) > 1 or Path(paths[0]).is_dir()
    records = []
    for file in files:
        found = list(read_records(file, need_output=False))
        if not found:
            raise UserError(f"{file}: holds no prompt that can be answered; a file is an array of texts or records")
        records += [({"category": file.stem} if several else {}) | record for record in found]
    return records


def prompt_files(path: Path) -> list[Path]:
    """The files that one path stands for: itself, or those of a folder by name."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS) and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path}: holds no file of prompts ({', '.join(ENDINGS)}); name a file, or such a folder")
    return files


def question(record: Record) -> Record:
    """A record as it is written before its answer is known; empty fields are left out."""
    asked = {"instruction": record["instruction"]}
    return asked | {key: record[key] for key in ("input", "history", "system", "category") if record.get(key)}


def answered(record: Record, output: str) -> Record:
    """A record as it is written with its answer."""
    asked = question(record)
    last = {"category": asked.pop("category")} if "category" in asked else {}
    return asked | {"output": output} | last
