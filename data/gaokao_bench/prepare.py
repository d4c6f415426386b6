"""Write the objective questions of GAOKAO-Bench, 2010 to 2022, as choice records.

python data/gaokao_bench/prepare.py --raw downloads/GAOKAO-Bench/Data/Objective_Questions
"""

import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
NUMBERS = (  # before a question: `1.` (no decimal, but a year may follow), or bare where a line begins; or `（1）`
    re.compile(r"(?<![\d.．])(\d+)[ \t]*[.．、](?!\d(?!\d{3}))|^[ \t]*(\d+)(?![\d.．])", re.M),
    re.compile(r"[(（]\s*(\d+)\s*[)）]"),
)
BLANK = re.compile(r"(?<![^\s_])(\d+)(?![^\s_])")
LETTER = re.compile(r"(?<![A-Za-zＡ-Ｚ\\$])(?:[(（]\s*([A-GＡ-Ｇ])\s*[)）]|([A-GＡ-Ｇ])\s*[.．、])")


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
            found = separated(item)
        except InvalidRecord as error:
            given = item.get("answer") if isinstance(item, dict) else None
            dropped[str(error)] += len(given) if given and isinstance(given, list) else 1
            continue
        for one in found:
            try:
                if not one["choices"]:
                    raise InvalidRecord("its choices cannot be separated")
                yield as_choice(one)._replace(category=name, topic=TOPICS.get(name, ""))
                kept += 1
            except InvalidRecord as error:
                dropped[str(error)] += 1
    for cause, count in dropped.most_common():
        say(f"{file}: {count} of {kept + dropped.total()} questions dropped: {cause}")


def separated(item: Any) -> list[dict[str, Any]]:
    """The questions of an item, which has them in one text with their choices; those whose choices cannot be separated have
    none. Raises InvalidRecord.

    Several questions about one text have that text before each. Five blanks of a text may share seven choices.
    """
    if not (isinstance(item, dict) and isinstance(item.get("question"), str) and item.get("answer")):
        raise InvalidRecord("question or answer is missing")
    text, answers = item["question"], item["answer"]
    if not isinstance(answers, list):
        raise InvalidRecord("answer is not a list")
    if len(answers) == 1:
        stem, choices = taken_apart(text[match.end() if (match := NUMBER.match(text)) else 0 :], "ABCD")
        return [{"instruction": stem, "choices": choices, "answer": answers[0]}]
    passage, choices = taken_apart(text, "ABCDEFG")
    if choices:
        numbers = blanks(passage, len(answers))
        asked = [{"passage": passage, "instruction": f"{number}.", "choices": choices} for number in numbers]
    else:
        starts = beginnings(text, len(answers))
        passage = text[: starts[0]].strip()
        pieces = [taken_apart(text[start:end], "ABCD") for start, end in itertools.pairwise([*starts, len(text)])]
        asked = [{"passage": passage, "instruction": stem, "choices": choices} for stem, choices in pieces]
    return [one | {"answer": right} for one, right in zip(asked, answers, strict=True)]


def lettered(text: str, letters: str) -> list[tuple[str, int, int]]:
    """The letters that may begin a choice, with where their marks begin and end."""
    found = [(unicodedata.normalize("NFKC", mark[1] or mark[2]), *mark.span()) for mark in LETTER.finditer(text)]
    return [mark for mark in found if mark[0] in letters]


def taken_apart(text: str, letters: str) -> tuple[str, list[str]]:
    """The question and the choices of a text that ends with one for each letter; no choices if it does not."""
    marks = lettered(text, letters + "E")[-len(letters) :]
    if "".join(letter for letter, _, _ in marks) != letters:
        return text.strip(), []
    edges = [*(start for _, start, _ in marks[1:]), len(text)]
    return text[: marks[0][1]].strip(), [text[end:edge].strip() for (_, _, end), edge in zip(marks, edges, strict=True)]


def beginnings(text: str, count: int) -> list[int]:
    """Where `count` questions begin: at numbers that follow each other, with one A after each. Raises InvalidRecord."""
    firsts = [start for letter, start, _ in lettered(text, "A")]
    found = []
    for form in NUMBERS:
        places: dict[int, list[int]] = {}
        for match in form.finditer(text):
            places.setdefault(int(match[match.lastindex or 0]), []).append(match.start())
        found += [starts for number in places if (starts := row(places, firsts, range(number, number + count)))]
    if len(found) != 1:
        raise InvalidRecord("it is unclear where its questions begin")
    return found[0]


def row(places: Mapping[int, list[int]], firsts: Sequence[int], numbers: range) -> list[int]:
    """Where the questions with these numbers begin: each number once between the A before it and its own, save that the text
    before the first may hold its number, too; nothing if it is not so."""
    starts: list[int] = []
    for number in reversed(numbers):
        before = [-1, *(place for place in firsts if not starts or place < starts[0])]
        near = [place for place in places.get(number, []) if len(before) > 1 and before[-2] < place < before[-1]]
        if not near or (len(near) > 1 and number > numbers[0]):
            return []
        starts.insert(0, near[-1])
    return starts


def blanks(passage: str, count: int) -> range:
    """The numbers of the blanks in a text. Raises InvalidRecord."""
    numbers = [int(number) for number in BLANK.findall(passage)]
    runs = [
        range(n, n + count) for n in numbers if [one for one in numbers if n <= one < n + count] == list(range(n, n + count))
    ]
    if len(runs) != 1:
        raise InvalidRecord("its blanks cannot be told")
    return runs[0]


if __name__ == "__main__":
    run(main, EvaluationOptions)
