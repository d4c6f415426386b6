"""Write CMATH, Chinese arithmetic problems of six school years, as prompts whose reference is a number.

    python data/cmath/prepare.py --raw downloads/cmath/datasets/cmath_dev.jsonl

Answer them with generate.py, and compare with judge.py --metrics, which counts exact numbers by school year.
"""

import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.console import UserError, say
from utils.datasets.evaluation_sets import EvaluationOptions, raw_files, write
from utils.datasets.file_formats import read_items
from utils.evaluation.metrics import NUMBER

LICENCE = "CMATH is under CC BY 4.0 (XiaoMi/cmath); cite Wei et al. 2023, arXiv:2306.16636"


def main(options: EvaluationOptions) -> None:
    """Read cmath_dev.jsonl."""
    write(options, "cmath", LICENCE, {"test": prompts(raw_files(options.raw, "cmath_dev.jsonl")[0])})


def prompts(path: Path) -> Iterator[dict[str, Any]]:
    """The problems with a question, an answer and a school year; the others are counted."""
    kept = dropped = 0
    for _, item in read_items(path):
        fields = [item.get(name) for name in ("input", "golden", "grade")] if isinstance(item, dict) else [None]
        filled = all(isinstance(field, (str, int, float)) and str(field).strip() for field in fields)
        reference = unicodedata.normalize("NFKC", str(fields[1])).strip() if filled else ""
        if not NUMBER.fullmatch(reference):
            dropped += 1
            continue
        kept += 1
        found = {"instruction": str(fields[0]), "input": "", "output": "", "category": f"grade {fields[2]}"}
        yield found | {"reference": reference}
    if dropped:
        say(f"{path}: {dropped} of {kept + dropped} items dropped: input, grade or a number as golden is missing")
    if not kept:
        raise UserError(f"{path}: holds no CMATH problem; name its cmath_dev.jsonl")


if __name__ == "__main__":
    run(main, EvaluationOptions)
