"""Write the objective questions of GAOKAO-Bench, 2010 to 2022, as choice records.

python data/gaokao_bench/prepare.py --raw downloads/GAOKAO-Bench/Data/Objective_Questions
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.console import UserError, say
from utils.datasets.choices import Choice, as_choice
from utils.datasets.evaluation_sets import EvaluationOptions, raw_files, write
from utils.datasets.item_formats import InvalidRecord
from utils.files import read_json

LICENCE = "GAOKAO-Bench is under Apache-2.0 (OpenLMLab/GAOKAO-Bench); cite Zhang et al. 2023, arXiv:2305.12474"
TOPICS = {
    "Biology": "高考生物", "Chemistry": "高考化学", "Chinese_Lang_and_Usage": "高考语文",
    "Chinese_Modern_Lit": "高考现代文阅读",
    "English": "高考英语", "English_Fill_in_Blanks": "高考英语完形填空", "English_Reading_Comp": "高考英语阅读",
    "English_Cloze_Test": "高考英语七选五", "Geography": "高考地理", "History": "高考历史", "Math_I": "高考理科数学",
    "Math_II": "高考文科数学", "Physics": "高考物理", "Political_Science": "高考政治",
}  # fmt: skip
FILE = re.compile(r"20\d\d-20\d\d_(\w+?)(?:_MCQs)?")
NUMBER = re.compile(r"\s*\d+\s*[.．、]\s*(?:[(（]\s*\d+\s*分\s*[)）])?\s*")
NUMBERED = re.compile(r"^[ \t（(]*\d+[ \t]*[.．、)）]", re.M)
LETTER = re.compile(r"(?<![A-Za-z\\$])([A-D])\s*[.．、]")


def main(options: EvaluationOptions) -> None:
    """Read the files of the years and subjects; other files beside them are skipped."""
    files = {match[1]: file for file in raw_files(options.raw, "*.json") if (match := FILE.fullmatch(file.stem))}
    if not files:
        raise UserError(f"{options.raw}: holds no file like 2010-2022_Biology_MCQs.json; name the folder Objective_Questions")
    write(options, "gaokao_bench", LICENCE, {"test": (one for name, file in files.items() for one in questions(name, file))})


def questions(name: str, file: Path) -> Iterator[Choice]:
    """The questions of a file; texts whose questions and choices cannot be separated are counted by cause."""
    if name not in TOPICS:
        say(f"{file}: {name} is not a subject of GAOKAO-Bench; its questions are kept under that name")
    held = read_json(file)
    items = held.get("example") if isinstance(held, dict) else None
    if not isinstance(items, list):
        raise UserError(f"{file}: has no list of questions under example; fetch it again")
    dropped: Counter[str] = Counter()
    kept = 0
    for item in items:
        try:
            found = [as_choice(one)._replace(category=name, topic=TOPICS.get(name, "")) for one in separated(item)]
        except InvalidRecord as error:
            dropped[str(error)] += 1
            continue
        kept += len(found)
        yield from found
    for cause, count in dropped.most_common():
        say(f"{file}: {count} of {len(items)} texts dropped: {cause}; {kept} questions kept")


def separated(item: Any) -> list[dict[str, Any]]:
    """The questions of an item, which has them in one text with their choices A to D. Raises InvalidRecord.

    Several questions about one text have that text before each; a question begins with its number.
    """
    if not (isinstance(item, dict) and isinstance(item.get("question"), str) and isinstance(item.get("answer"), list)):
        raise InvalidRecord("question or answer is missing")
    text = item["question"]
    marks = list(LETTER.finditer(text))
    letters, count = "".join(mark[1] for mark in marks), len(item["answer"])
    if count == 1:
        marks = marks[max(letters.rfind("ABCD"), 0) :]
    if "".join(mark[1] for mark in marks) != "ABCD" * count:
        raise InvalidRecord("its choices A to D cannot be separated")
    passage, start = "", 0
    found = []
    for number, right in enumerate(item["answer"]):
        four = marks[4 * number : 4 * number + 4]
        stem = text[start : four[0].start()]
        if count > 1 and number == 0:
            begin = max((match.start() for match in NUMBERED.finditer(stem)), default=len(stem))
            passage, stem = stem[:begin].strip(), stem[begin:]
        start = len(text)
        if number + 1 < count:
            following = NUMBERED.search(text, four[3].end(), marks[4 * number + 4].start())
            start = following.start() if following else -1
        if not stem or start < 0:
            raise InvalidRecord("it is unclear where its questions begin")
        edges = [*(mark.start() for mark in four[1:]), start]
        choices = [text[mark.end() : edge].strip() for mark, edge in zip(four, edges, strict=True)]
        stem = NUMBER.sub("", stem, count=1) if count == 1 else stem
        found.append({"passage": passage, "instruction": stem.strip(), "choices": choices, "answer": right})
    return found


if __name__ == "__main__":
    run(main, EvaluationOptions)
