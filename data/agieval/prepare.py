"""Write the Chinese parts of AGIEval that have choices: Gaokao, LogiQA and the national judicial examination.

python data/agieval/prepare.py --raw downloads/AGIEval/data/v1
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.console import UserError, say
from utils.datasets.choices import Choice, read_file
from utils.datasets.evaluation_sets import EvaluationOptions, raw_files, write

LICENCE = (
    "AGIEval is under the MIT licence (ruixiangcui/AGIEval), its parts under those of their sources: see its data/v1/LICENSE; "
    "cite Zhong et al. 2023, arXiv:2304.06364"
)
TOPICS = {
    "gaokao-chinese": "高考语文", "gaokao-english": "高考英语", "gaokao-geography": "高考地理", "gaokao-history": "高考历史",
    "gaokao-biology": "高考生物", "gaokao-chemistry": "高考化学", "gaokao-physics": "高考物理", "gaokao-mathqa": "高考数学",
    "logiqa-zh": "逻辑推理", "jec-qa-kd": "司法考试知识", "jec-qa-ca": "司法考试案例",
}  # fmt: skip
GROUPS = {"gaokao": "Gaokao", "logiqa": "LogiQA", "jec": "JEC-QA"}
WITHOUT_CHOICES = "gaokao-mathcloze"


def main(options: EvaluationOptions) -> None:
    """Read the available parts, one JSON Lines file each."""
    write(options, "agieval", LICENCE, {"test": questions([file for file in raw_files(options.raw, "*.jsonl")])})


def questions(files: list[Path]) -> Iterator[Choice]:
    """The questions of the known files; prints which are left out or missing."""
    by_name = {file.stem: file for file in files}
    if not TOPICS.keys() & by_name.keys():
        raise UserError(f"{files[0].parent}: holds none of {', '.join(TOPICS)}; name the folder data/v1 of AGIEval")
    missing = [name for name in TOPICS if name not in by_name]
    if missing:
        say(f"{files[0].parent}: missing, and left out: {', '.join(missing)}")
    if WITHOUT_CHOICES in by_name:
        say(f"{by_name[WITHOUT_CHOICES]}: left out, its questions have no choices")
    for name, topic in TOPICS.items():
        for one in read_file(by_name[name]) if name in by_name else ():
            yield one._replace(category=name, topic=topic, groups=(GROUPS[name.partition("-")[0]],))


if __name__ == "__main__":
    run(main, EvaluationOptions)
