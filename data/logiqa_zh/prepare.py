"""Write the Chinese LogiQA, as AGIEval publishes it, as choice records.

python data/logiqa_zh/prepare.py --raw downloads/AGIEval/data/v1/logiqa-zh.jsonl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.datasets.choices import read_file
from utils.datasets.evaluation_sets import EvaluationOptions, raw_files, write

LICENCE = (
    "LogiQA is under CC BY-NC-SA 4.0 (lgw863/LogiQA-dataset), in the form of AGIEval: not for commercial use; "
    "cite Liu et al. 2020, arXiv:2007.08124"
)


def main(options: EvaluationOptions) -> None:
    """Read logiqa-zh.jsonl."""
    found = (
        one._replace(category="logiqa-zh", topic="逻辑推理")
        for file in raw_files(options.raw, "logiqa-zh.jsonl")
        for one in read_file(file)
    )
    write(options, "logiqa_zh", LICENCE, {"test": found})


if __name__ == "__main__":
    run(main, EvaluationOptions)
