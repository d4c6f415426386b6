"""Write PsyQA, psychological questions with long answers, in six variants of the record format.

    python data/psyQA/prepare.py --raw downloads/PsyQA_full.json

Out come psyqa-0.json to psyqa-5.json: even numbers hold all answers, odd ones each question's first; 0 and 1 have the question
only, 2 and 3 the question and its description, 4 and 5 the description as input.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.console import say
from utils.datasets.file_formats import read_items
from utils.datasets.item_formats import InvalidRecord
from utils.datasets.items import Item, UnreadableItem
from utils.datasets.preparing import PrepareOptions, cleaned, find_raw, output_files, recognize
from utils.datasets.record_writer import writers
from utils.datasets.records import Record


def main(options: PrepareOptions) -> None:
    raw = find_raw(options.raw, "PsyQA")[0]
    recognize(raw, "PsyQA")
    names = [f"psyqa-{variant}.json" for variant in range(6)]
    with output_files(options, "psyQA", names, [raw]) as outputs, writers(outputs) as variants:
        for item, record in itertools.chain.from_iterable(cleaned(raw, answered, options, answers(raw))):
            for variant, variation in enumerate(variations(record)):
                if variant % 2 == 0 or item["first"]:
                    variants[variant].write([variation])
    for output, writer in zip(outputs, variants, strict=True):
        say(f"{output}: {writer.count:,} records")


def answers(raw: Path) -> Iterator[Item]:
    """One item per answer: its question, description and text, and whether it is the first."""
    for line, item in read_items(raw):
        texts = item.get("answers") if isinstance(item, dict) else None
        if not isinstance(texts, list) or not texts:
            yield line, item if isinstance(item, UnreadableItem) else UnreadableItem("answers are missing", item)
            continue
        for index, answer in enumerate(texts):
            text = answer.get("answer_text") if isinstance(answer, dict) else None
            yield (
                line,
                {"first": index == 0, "answer_text": text, **{key: item.get(key) for key in ("question", "description")}},
            )


def answered(item: dict) -> dict:
    """The answer as a record, with the description as input. Raises InvalidRecord if the description is not text."""
    if not isinstance(item["description"] or "", str):
        raise InvalidRecord("description is not text")
    return {"instruction": item["question"], "input": item["description"], "output": item["answer_text"]}


def variations(record: Record) -> Iterator[Record]:
    """The record without, with joined, and with separate description, each twice: for all answers, and for first ones."""
    question, description = record["instruction"], record["input"]
    joined = f"{question} {description}" if description.strip() else question
    for instruction, given in ((question, ""), (joined, ""), (question, description)):
        made: Record = {"instruction": instruction, "input": given, "output": record["output"]}
        yield from [made, made]


if __name__ == "__main__":
    run(main, PrepareOptions)
