"""The answers of several systems to the same prompts: read, aligned, and completed with category and reference."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from utils.console import UserError, say
from utils.datasets.prompts import RESULT, Record, result_files
from utils.datasets.records import read_records
from utils.datasets.templates import split_thinking
from utils.evaluation.intervals import Interval, of_mean
from utils.evaluation.tables import Row, Table, Values
from utils.files import read_json, sha256
from utils.inference.answer_file import made_path

ALL = "all"  # the category of prompts that have none
SAMPLE = "#"  # between the name of a system and the number of its sample
T = TypeVar("T")


def answer_files(answers: list[str]) -> dict[str, Path]:
    """The files of `NAME=PATH` pairs, by name; a folder stands for the answers in it. If a name is given again, or has answers
    of several seeds, these are further samples of the same system, `f1#2`. Raises UserError."""
    files: dict[str, Path] = {}
    for pair in answers:
        name, equals, path = pair.partition("=")
        name = name.strip()
        if not equals or not name or not path:
            raise UserError(f"--answers {pair}: not NAME=PATH; write it like --answers f1=output/f1/{RESULT}")
        if SAMPLE in name:
            raise UserError(f"--answers {pair}: {SAMPLE} is for further samples of a system; choose a name without it")
        found = result_files(Path(path)) if Path(path).is_dir() else [Path(path)]
        if not found:
            raise UserError(f"--answers {pair}: this folder holds no {RESULT}; make it with generate.py --is_ui False")
        for file in found:
            number = sum(known.partition(SAMPLE)[0] == name for known in files)
            files[f"{name}{SAMPLE}{number + 1}" if number else name] = file
    return files


def side_by_side(files: dict[str, Path]) -> tuple[list[Record], dict[str, list[str]]]:
    """The prompts, in the order of the first file, and each system's answers in that order.

    Raises UserError if a file cannot be read, holds no answers, or holds other prompts than the first.
    """
    prompts: list[Record] = []
    answers: dict[str, list[str]] = {}
    first: Path | None = None
    for name, path in files.items():
        found = numbered(list(read_records(path, need_output=False)))
        if not found:
            raise UserError(f"{path}: holds no answers; make it with generate.py --is_ui False --test_input_path …")
        if first is None:
            first, order = path, found
            prompts = [
                cast(Record, {key: value for key, value in record.items() if key != "output"}) for record in found.values()
            ]
        check_same(order, found, first, path)
        parts = [split_thinking(found[key]["output"]) for key in order]
        answers[name] = [reply for _, reply in parts]
        if thoughtful := sum(bool(thought) for thought, _ in parts):
            say(f"{path}: {thoughtful} of {len(found)} answers begin with thoughts, which are ignored")
        empty = sum(not answer.strip() for answer in answers[name])
        if empty == len(found):
            raise UserError(f"{path}: holds prompts without outputs; name the file with the answers ({RESULT})")
        if empty:
            say(f"{path}: {empty} of {len(found)} answers are empty")
    return prompts, answers


def how_answered(files: dict[str, Path]) -> str:
    """The template and dtype with which the answers were made, as recorded beside their files; only once if they are the same
    for all systems."""
    found = {name: template_and_dtype(path) for name, path in files.items()}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{name}: {how}" for name, how in found.items())


def template_and_dtype(path: Path) -> str:
    """The record beside one answer file; ignored if it belongs to another version of the file."""
    made = read_json(made_path(path)) if made_path(path).is_file() else {}
    if not isinstance(made, dict) or not isinstance(made.get("template"), str) or made.get("sha256") != sha256(path):
        return "template and dtype not recorded"
    return f"template {made['template']}, dtype {made.get('dtype')}"


def numbered(records: list[Record]) -> dict[tuple[str, int], Record]:
    """Records by what they ask, numbered if several ask the same."""
    found: dict[tuple[str, int], Record] = {}
    times: dict[str, int] = {}
    for record in records:
        asked = key_of(record)
        times[asked] = times.get(asked, 0) + 1
        found[asked, times[asked]] = record
    return found


def key_of(record: Record) -> str:
    """What a record asks, as one text."""
    return json.dumps([record["instruction"], record.get("input") or "", record.get("history") or []], ensure_ascii=False)


def check_same(one: dict, other: dict, first: Path, path: Path) -> None:
    """Raises UserError, naming prompts that only one of two files holds."""
    differences = []
    for records, rest, file in ((one, other, first), (other, one, path)):
        if only := records.keys() - rest.keys():
            shown = [records[key]["instruction"][:40] for key in records if key in only][:3]
            more = f" and {len(only) - 3} more" if len(only) > 3 else ""
            differences.append(f"only in {file}: {', '.join(repr(text) for text in shown)}{more}")
    if differences:
        raise UserError(
            f"{path}: its prompts are not those of {first} ({'; '.join(differences)}); answer the same prompts with both"
        )


def add_references(prompts: list[Record], known: list[Record]) -> list[Record]:
    """Prompts, completed with the category and reference of equal prompts in `known` if they have none."""
    by_key = {key_of(record): record for record in reversed(known)}
    completed: list[Record] = []
    for record in prompts:
        twin: Mapping[str, Any] = by_key.get(key_of(record), {})
        added = {key: twin[key] for key in ("category", "reference") if key in twin}
        completed.append(cast(Record, {"category": ALL} | added | record))
    return completed


def grouped(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    """Items by their keys, in order of first appearance."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def by_category(records: list[Record]) -> dict[str, list[int]]:
    """The positions of the records of each category."""
    return grouped(range(len(records)), lambda place: records[place]["category"])


def samples(systems: list[str]) -> dict[str, list[str]]:
    """Systems grouped by name: `f1`, `f1#2`, … are samples of `f1`."""
    found: dict[str, list[str]] = {}
    for system in systems:
        name, mark, number = system.rpartition(SAMPLE)
        found.setdefault(name if mark and number.isdigit() and name in systems else system, []).append(system)
    return found


def over_samples(table: Table) -> Table:
    """The table with one column for each system: if it has several samples, their mean and Student's interval over them;
    unchanged if no system has several."""
    groups = samples(table.systems)
    if len(groups) == len(table.systems):
        return table
    rows = []
    for row in table.rows:
        values: Values = {}
        doubt: dict[str, Interval | None] = {}
        for name, systems in groups.items():
            known = [value for value in map(row.values.get, systems) if value is not None]
            values[name] = statistics.fmean(known) if known else None
            doubt[name] = of_mean(known) if len(systems) > 1 else row.intervals.get(name)
        rows.append(Row(row.category, row.samples, values, doubt))
    counts = ", ".join(f"{name} of {len(systems)} samples" for name, systems in groups.items() if len(systems) > 1)
    title = f"{table.title}, mean and interval over samples: {counts}"
    return dataclasses.replace(table, title=title, systems=list(groups), rows=rows)
