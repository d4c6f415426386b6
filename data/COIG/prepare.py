"""Write COIG's six files in the record format.

    python data/COIG/prepare.py --raw downloads/COIG

What comes out keeps the raw files' names, with the ending .json (translated_instructions.jsonl: translated_instructions.json).
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.datasets.item_formats import InvalidRecord, as_record, dialogue
from utils.datasets.items import UnreadableItem
from utils.datasets.json_items import patient_loads
from utils.datasets.preparing import PrepareOptions, convert_each
from utils.datasets.records import Repaired

FENCE = re.compile(r"\s*```(?i:json)?(.*?)(?:```)?\s*", re.DOTALL)
ROUND = re.compile(r"round_(\d+)")


def main(options: PrepareOptions) -> None:
    converters = {"alpaca": as_record, "exam": exam, "translated": translated, "leetcode": leetcode, "rounds": rounds}
    convert_each("COIG", "COIG", converters, options)


def exam(item: dict) -> dict:
    """An exam question: context and question are the input, its analysis (else the bare answer) is the output."""
    context, question = text_in(item.get("textbox_q_context")), text_in(item.get("textbox_question"))
    if not question:
        raise InvalidRecord("textbox_question is missing")
    return {
        "instruction": item.get("textbox_q_instruction"),
        "input": f"{context}\n{question}" if context else question,
        "output": text_in(item.get("textbox_answer_analysis")) or text_in(item.get("textbox_answer")),
    }


def text_in(value: Any) -> str | None:
    """The text of an exam field, or None if it is missing, empty, "[]" or "null"."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if value is None or (isinstance(value, str) and value.strip() in ("", "[]", "null")):
        return None
    if not isinstance(value, str):
        raise InvalidRecord("an exam field is not text")
    return value


def translated(item: dict) -> dict:
    """The Chinese of an item that may hold the English beside it."""
    return {key: item.get(f"trans_{key}") for key in ("instruction", "input", "output")}


def leetcode(item: dict) -> dict:
    """A programming task; an input or output that is a Python list of texts becomes these, which is counted."""
    texts = {key: unlisted(item.get(key)) for key in ("input", "output")}
    lists = [key for key in texts if texts[key] != item.get(key)]
    return item | texts | ({"read_as": f"Python list in {' and '.join(lists)} read as its texts"} if lists else {})


def unlisted(text: Any) -> Any:
    """The texts of a Python list that is all of a text, separated by blank lines; other values unchanged."""
    try:
        parts = ast.literal_eval(text.strip()) if isinstance(text, str) and text.lstrip().startswith("[") else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        return text
    return "\n\n".join(parts)


def rounds(item: dict) -> dict | Repaired:
    """A dialogue of `round_0`, `round_1`, …, each the JSON of a question Q and an answer A. Raises InvalidRecord."""
    numbers = sorted(int(match[1]) for match in map(ROUND.fullmatch, item) if match)
    turns = []
    for number in numbers:
        question, answer = question_and_answer(item[f"round_{number}"])
        turns += [("user", question), ("assistant", answer)]
    record = dialogue(turns)
    gap = numbers != list(range(len(numbers)))
    return Repaired(record, "a round is missing, the others follow one another") if gap else record


def question_and_answer(round: Any) -> tuple[str, str]:
    """Q and A of a round `{"response": JSON text, perhaps in a fence}`. Raises InvalidRecord."""
    response = round.get("response") if isinstance(round, dict) else None
    if not isinstance(response, str):
        raise InvalidRecord("a round without response")
    fenced = FENCE.fullmatch(response)
    pair = patient_loads((fenced[1] if fenced else response).encode())
    if isinstance(pair, UnreadableItem) or not isinstance(pair, dict):
        raise InvalidRecord("a round's response is not JSON")
    if not (type(pair.get("Q")) is str and type(pair.get("A")) is str and pair["Q"].strip() and pair["A"].strip()):
        raise InvalidRecord("a round whose Q or A is missing or no text")
    return pair["Q"], pair["A"]


if __name__ == "__main__":
    run(main, PrepareOptions)
