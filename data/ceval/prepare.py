"""Write C-Eval as choice records: test.json from its validation part, and dev.json with the worked examples.

    python data/ceval/prepare.py --raw downloads/ceval-exam.zip

The right answers of C-Eval's test part are not published; --split test reads only questions that have one.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import option, run
from utils.datasets.evaluation_sets import EvaluationOptions, by_subject, raw_files, read_subjects, write

LICENCE = "C-Eval is under CC BY-NC-SA 4.0 (hkust-nlp/ceval): not for commercial use; cite Huang et al. 2023, arXiv:2305.08322"


@dataclasses.dataclass
class Options(EvaluationOptions):
    """The options of this script."""

    split: str = option("val", "the part to score on", choices=("val", "test"))


def main(options: Options) -> None:
    """Read dev/*_dev.csv and val/*_val.csv, one file per subject, in a folder or in the downloaded archive."""
    subjects = read_subjects(__file__)
    parts = {"test": options.split, "dev": "dev"}
    splits = {
        name: by_subject(raw_files(options.raw, f"{part}/*_{part}.csv"), subjects, f"_{part}") for name, part in parts.items()
    }
    write(options, "ceval", LICENCE, splits)


if __name__ == "__main__":
    run(main, Options)
