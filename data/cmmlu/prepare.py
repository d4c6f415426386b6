"""Write CMMLU as choice records: test.json, and dev.json with the worked examples of each subject.

python data/cmmlu/prepare.py --raw downloads/CMMLU/data
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.datasets.evaluation_sets import EvaluationOptions, by_subject, raw_files, read_subjects, write

LICENCE = "CMMLU is under CC BY-NC-SA 4.0 (haonan-li/CMMLU): not for commercial use; cite Li et al. 2023, arXiv:2306.09212"


def main(options: EvaluationOptions) -> None:
    """Read data/dev/*.csv and data/test/*.csv, one file per subject."""
    subjects = read_subjects(__file__)
    splits = {split: by_subject(raw_files(options.raw, f"{split}/*.csv"), subjects) for split in ("test", "dev")}
    write(options, "cmmlu", LICENCE, splits)


if __name__ == "__main__":
    run(main, EvaluationOptions)
