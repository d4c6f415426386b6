"""Write SafetyBench's Chinese questions as choice records, with one subject for each kind of harm.

python data/safetybench/prepare.py --raw downloads/SafetyBench/opensource_data
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.console import UserError, say
from utils.datasets.choices import Choice, as_choice
from utils.datasets.evaluation_sets import EvaluationOptions, raw_files, write
from utils.datasets.item_formats import InvalidRecord
from utils.files import read_json

LICENCE = "SafetyBench is under the MIT licence (thu-coai/SafetyBench); cite Zhang et al. 2023, arXiv:2309.07045"


def main(options: EvaluationOptions) -> None:
    """Read test_zh.json and test_answers_zh.json."""
    write(options, "safetybench", LICENCE, {"test": questions(raw_files(options.raw, "test_zh.json")[0])})


def questions(path: Path) -> Iterator[Choice]:
    """The questions with their right choices, which are in a separate file by the questions' ids."""
    answers = path.with_name("test_answers_zh.json")
    if not answers.is_file():
        raise UserError(f"{answers}: is missing; also fetch it from opensource_data of thu-coai/SafetyBench")
    items, right = read_json(path), read_json(answers)
    if not isinstance(items, list) or not isinstance(right, dict):
        raise UserError(f"{path}: is not SafetyBench's test_zh.json with its answers; fetch both again")
    dropped: Counter[str] = Counter()
    for item in items:
        known = right.get(str(item.get("id"))) if isinstance(item, dict) else None
        place = known.get("answer") if isinstance(known, dict) else known
        try:
            yield as_choice({**item, "answer": place})._replace(category=str(item.get("category", "")), groups=("SafetyBench",))
        except (InvalidRecord, TypeError) as error:
            dropped[str(error) if isinstance(error, InvalidRecord) else "not an object"] += 1
    for cause, count in dropped.most_common():
        say(f"{path}: {count} of {len(items)} questions dropped: {cause}")


if __name__ == "__main__":
    run(main, EvaluationOptions)
