"""Files of prompts to answer, and the form in which the answers are written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from utils.console import UserError, say
from utils.datasets.file_formats import ENDINGS
from utils.datasets.records import Record, read_records
from utils.datasets.sources import Source, is_hub_name, sources, weighted
from utils.datasets.templates import split_thinking
from utils.datasets.tool_calls import CARRIED, open_part
from utils.files import check_folder, check_free, check_names, read_json

RESULT = "test.json"


def read_prompts(paths: list[str], seed: int = 42) -> list[Record]:
    """The prompts of files, folders and hub names, in order; if there are several files, their names become `category`.

    A record's own category is kept; `seed` determines what a weight (`file:0.5`) draws. Raises UserError if there is
    nothing to read or to answer.
    """
    if not paths:
        raise UserError("--test_input_path: missing; give a file of prompts, several separated by commas, or a folder")
    found = [source for path in paths for source in prompt_sources(path)]
    check_names(*(str(file) for source in found for file in source.files))
    several = sum(len(source.files) for source in found) > 1 or Path(paths[0]).is_dir()
    records: list[Record] = []
    for position, source in enumerate(found):
        read = [
            cast(Record, ({"category": file.stem} if several else {}) | record)
            for file in source.files
            for record in read_records(file, need_output=False, carries=CARRIED)
        ]
        records += [read[number] for number in weighted(source, len(read), f"{seed} {position}")]
    if not records:
        raise UserError(f"--test_input_path {','.join(paths)}: the weights leave no prompt; give larger ones")
    return records


def prompt_sources(path: str) -> list[Source]:
    """What one path stands for: the files of a folder, sorted by name; any other path is read as a data path."""
    if not Path(path).is_dir():
        return sources(path)
    files = sorted(file for file in Path(path).iterdir() if file.name.endswith(ENDINGS) and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path}: holds no file of prompts ({', '.join(ENDINGS)}); name a file, or a folder with such files")
    return [Source(path, files, 1.0)]


def prompt_files(paths: Iterable[str]) -> list[Path]:
    """All files that the paths stand for."""
    return [file for path in paths for source in prompt_sources(path) for file in source.files]


def output_paths(lora_weights: list[str], output_path: str) -> list[Path]:
    """Where the answers of each adapter go: `test.json` beside its weights, or the one `output_path`.

    Raises UserError if answers would have no file of their own.
    """
    if output_path:
        if len(lora_weights) > 1:
            raise UserError(
                f"--output_path: one file for {len(lora_weights)} adapters; leave it out (each gets its own test.json)"
            )
        if Path(output_path).is_dir():
            raise UserError(f"--output_path {output_path}: is a folder; name a file in it, such as {output_path}/{RESULT}")
    elif not lora_weights:
        raise UserError("--output_path: missing; without --lora_weights there is no folder to put test.json into")
    else:
        for name in filter(is_hub_name, lora_weights):
            raise UserError(f"--lora_weights {name}: is on the hub, not a local folder; give --output_path for the answers")
    paths = [Path(output_path)] if output_path else [Path(folder) / RESULT for folder in lora_weights]
    for path in paths:
        check_folder(path.absolute().parent, "--output_path")
        check_free([path.with_suffix(".yaml")], "--output_path")
    return paths


def sample_path(path: Path, seed: str) -> Path:
    """Where the answers drawn with `seed` go: `test-1.json` beside `test.json`."""
    return path.with_name(f"{path.stem}-{seed}{path.suffix}")


def result_files(folder: Path) -> list[Path]:
    """The answers in a folder: its `test.json`, else those drawn with several seeds, in the order of the seeds."""
    whole = folder / RESULT
    drawn = [path for path in folder.glob(f"{whole.stem}-*{whole.suffix}") if path.stem.rpartition("-")[2].isdecimal()]
    if whole.is_file() and drawn:
        say(f"{whole}: is compared; the {len(drawn)} files beside it, drawn with --seeds, are not unless they are named")
    return [whole] if whole.is_file() else sorted(drawn, key=lambda path: int(path.stem.rpartition("-")[2]))


def check_output(path: Path, records: list[Record], overwrite: bool) -> None:
    """Raises UserError if `path` holds anything but answers to exactly these prompts, and must not be overwritten."""
    if not path.exists() or overwrite:
        return
    try:
        earlier = read_json(path)
        same = [as_asked(record) for record in earlier] == [as_asked(record) for record in records]
    except (UserError, TypeError, AttributeError):
        same = False
    if not same:
        raise UserError(f"{path}: holds answers to other prompts; give --overwrite, or another --output_path")


def as_asked(record: Record) -> Record:
    """A record in the form written to result files, without its answer; empty fields are left out."""
    kept = ("input", "history", "system", "tools", "category")
    asked: dict[str, Any] = {key: record.get(key) for key in ("instruction", *kept) if key == "instruction" or record.get(key)}
    if record.get("messages"):
        asked["messages"] = open_part(record["messages"])
    return cast(Record, asked)


def answered(record: Record, output: str) -> Record:
    """A record in the form written to result files, with its answer; thoughts, if any, go into `reasoning`."""
    asked: dict[str, Any] = dict(as_asked(record))
    last = {"category": asked.pop("category")} if "category" in asked else {}
    thought, answer = split_thinking(output)
    return cast(Record, asked | {"output": answer} | ({"reasoning": thought} if thought else {}) | last)
