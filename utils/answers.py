"""The answers of several systems to the same prompts: read, put side by side, given category and reference."""

import json
from pathlib import Path

from utils.console import UserError, say
from utils.prompts import RESULT, Record
from utils.records import read_records

ALL = "all"  # the category of prompts that have none


def answer_files(answers: list[str]) -> dict[str, Path]:
    """The files of `NAME=PATH` pairs, by name; a folder stands for its test.json. Raises UserError."""
    files: dict[str, Path] = {}
    for pair in answers:
        name, equals, path = pair.partition("=")
        name = name.strip()
        if not equals or not name or not path:
            raise UserError(f"--answers {pair}: not NAME=PATH; write it like --answers f1=output/f1/{RESULT}")
        if name in files:
            raise UserError(f"--answers {pair}: the name {name} is given twice; give each system a name of its own")
        files[name] = Path(path) / RESULT if Path(path).is_dir() else Path(path)
    return files


def side_by_side(files: dict[str, Path]) -> tuple[list[Record], dict[str, list[str]]]:
    """The prompts, in the order of the first file, and each system's answers in that order.

    Raises UserError where a file cannot be read, holds no answers, or holds other prompts than the first.
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
            prompts = [{key: value for key, value in record.items() if key != "output"} for record in found.values()]
        check_same(order, found, first, path)
        answers[name] = [found[key]["output"] for key in order]
        empty = sum(not answer.strip() for answer in answers[name])
        if empty == len(found):
            raise UserError(f"{path}: holds prompts, and no output to any; name the file with the answers ({RESULT})")
        if empty:
            say(f"{path}: {empty} of {len(found)} answers are empty")
    return prompts, answers


def numbered(records: list[Record]) -> dict[tuple[str, int], Record]:
    """Records by what they ask, and the how many-th time they ask it."""
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
    """Raises UserError that names the prompts which only one of two files holds."""
    told = []
    for only, file in ((one.keys() - other.keys(), first), (other.keys() - one.keys(), path)):
        if only:
            records = one if file is first else other
            shown = [records[key]["instruction"][:40] for key in records if key in only][:3]
            more = f" and {len(only) - 3} more" if len(only) > 3 else ""
            told.append(f"only in {file}: {', '.join(repr(text) for text in shown)}{more}")
    if told:
        raise UserError(f"{path}: its prompts are not those of {first} ({'; '.join(told)}); answer the same prompts with both")


def complete(prompts: list[Record], known: list[Record]) -> list[Record]:
    """Prompts with the category and reference that equal prompts in `known` have, where they have none of their own."""
    by_key = {key_of(record): record for record in reversed(known)}
    completed = []
    for record in prompts:
        twin = by_key.get(key_of(record), {})
        added = {key: twin[key] for key in ("category", "reference") if key in twin}
        completed.append({"category": ALL} | added | record)
    return completed


def by_category(records: list[Record]) -> dict[str, list[int]]:
    """The positions of the records of each category, in the order of their first."""
    members: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        members.setdefault(record["category"], []).append(position)
    return members
