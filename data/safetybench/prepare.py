"""Write SafetyBench's Chinese questions as choice records, with one subject for each kind of harm.

python data/safetybench/prepare.py --raw downloads/SafetyBench/opensource_data
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.console import UserError, say
from utils.datasets.choices import Choice, as_choice
from utils.datasets.evaluation_sets import EvaluationOptions, files_below, raw_files, write
from utils.datasets.item_formats import InvalidRecord
from utils.files import read_json

LICENCE = "SafetyBench is under the MIT licence (thu-coai/SafetyBench); cite Zhang et al. 2023, arXiv:2309.07045"


EXAMPLES = "https://huggingface.co/datasets/thu-coai/SafetyBench/resolve/main/dev_zh.json"


def main(options: EvaluationOptions) -> None:
    """Read test_zh.json, or else its subset, with the answers, and the worked examples of dev_zh.json if they are there."""
    path = raw_files(options.raw, "test_zh*.json")[0]
    folders = [path.parent, *([Path(options.raw)] if Path(options.raw).is_dir() else [])]
    answers = path.name.replace("test_", "test_answers_")
    if not (right := files_below(folders, answers)):
        raise UserError(f"{path.with_name(answers)}: is missing; also fetch it from opensource_data of thu-coai/SafetyBench")
    splits = {"test": questions(path, right[0])}
    if examples := files_below(folders, "dev_zh.json"):
        splits["dev"] = worked(examples[0])
    else:
        say(f"{path.with_name('dev_zh.json')}: is missing, so that there are no examples for --shots; it is at {EXAMPLES}")
    write(options, "safetybench", LICENCE, splits)


def questions(path: Path, answers: Path) -> Iterator[Choice]:
    """The questions with their right choices, which are in a separate file by the questions' ids."""
    items, right = read_json(path), read_json(answers)
    if not isinstance(items, list) or not isinstance(right, dict):
        raise UserError(f"{path}: is not SafetyBench's {path.name} with its answers; fetch both again")
    known = [right.get(str(item.get("id"))) if isinstance(item, dict) else None for item in items]
    places = [one.get("answer") if isinstance(one, dict) else one for one in known]
    yield from usable(
        path, [{**item, "answer": place} if isinstance(item, dict) else item for item, place in zip(items, places, strict=True)]
    )


def worked(path: Path) -> Iterator[Choice]:
    """The worked examples, which are in lists by their kind of harm."""
    kinds = read_json(path)
    if not (isinstance(kinds, dict) and all(isinstance(items, list) for items in kinds.values())):
        raise UserError(f"{path}: is not SafetyBench's dev_zh.json, with a list of examples for each category; fetch it again")
    yield from usable(
        path, [{**one, "category": kind} if isinstance(one, dict) else one for kind, items in kinds.items() for one in items]
    )


def usable(path: Path, items: Sequence[Any]) -> Iterator[Choice]:
    """The items of a file as questions; those that cannot be are counted by cause."""
    dropped: Counter[str] = Counter()
    for item in items:
        try:
            yield as_choice(item)._replace(category=str(item.get("category", "")), groups=("SafetyBench",))
        except InvalidRecord as error:
            dropped[str(error)] += 1
    for cause, count in dropped.most_common():
        say(f"{path}: {count} of {len(items)} questions dropped: {cause}")


if __name__ == "__main__":
    run(main, EvaluationOptions)
