"""The sets that data/ knows, as downloaded: their file names, and what their items look like."""

import re
from pathlib import Path
from typing import NamedTuple

# The sets' raw files, by their names without endings.
FILES = {
    "Alpaca-GPT4": ("alpaca_data_gpt4", "alpaca_gpt4_data", "alpaca_gpt4_data_zh"),
    "Firefly": ("firefly-train-1.1M",),
    "COIG": (
        "human_value_alignment_instructions_part1",
        "human_value_alignment_instructions_part2",
        "translated_instructions",
        "exam_instructions",
        "leetcode_instructions",
        "counterfactural_correction_multi_round_chat",
    ),
    "PsyQA": ("PsyQA_full",),
    "BELLE": ("Belle_open_source_0.5M", "Belle_open_source_1M", "train_2M_CN", "multiturn_chat_0.8M", "train_3.5M_CN"),
    "baize": ("quora_chat_data", "stackoverflow_chat_data", "alpaca_chat_data", "medical_chat_data"),
}


class Shape(NamedTuple):
    """A raw format: the sets that use it, the keys that all its items have, and the speaker that their instructions begin
    with ("": none)."""

    sets: tuple[str, ...]
    keys: frozenset[str]
    speaker: str


def shape(sets: str, keys: str, speaker: str = "") -> Shape:
    return Shape(tuple(sets.split(", ")), frozenset(keys.split()), speaker)


# Specific ones first: if an item has several shapes, the first counts. (A translated item may hold the English beside it.)
SHAPES = {
    "firefly": shape("Firefly", "kind input target"),
    "firefly dialogue": shape("Firefly", "conversation_id category conversation"),
    "exam": shape("COIG", "textbox_question textbox_answer"),
    "translated": shape("COIG", "trans_instruction trans_output"),
    "leetcode": shape("COIG", "instruction input output task_type program_lang"),
    "rounds": shape("COIG", "round_0"),
    "psyqa": shape("PsyQA", "question description answers"),
    "baize": shape("baize", "topic input"),
    "belle dialogue": shape("BELLE", "id conversations"),
    "belle turns": shape("BELLE", "instruction input output", speaker="Human:"),
    "alpaca": shape("Alpaca-GPT4, BELLE, COIG, baize", "instruction input output"),
    "belle target": shape("BELLE", "input target"),
}
FOLDERS = {"Alpaca-GPT4": "alpaca_gpt4", "Firefly": "firefly", "PsyQA": "psyQA", "BELLE": "belle"}
RECORDS = ("alpaca", "belle dialogue")  # shapes that are read as they are
CHOICES = ("choices", "options")  # the fields that list the choices of a question
COUPLETS = {"in.txt": "out.txt", "out.txt": "in.txt"}  # the first halves, and the second
SPEAKERS = re.compile(r"\s*Human[:：].*(?:^|\n)\s*Assistant[:：]", re.DOTALL)


def shape_of(item: dict) -> str | None:
    """The shape that an item has."""
    for name, shape in SHAPES.items():
        if shape.keys <= item.keys() and (not shape.speaker or begins_with(item["instruction"], shape.speaker)):
            return name
    return None


def begins_with(text: object, speaker: str) -> bool:
    """True for a text that begins with the speaker, with a colon of either width."""
    return str(text).lstrip().replace("：", ":", 1).startswith(speaker)


def prepared_by(item: dict) -> str | None:
    """The prepare.py that has to convert an item into records first; None for an item that already is a record."""
    name = shape_of(item)
    if name is None or name in RECORDS or (name in ("baize", "belle target", "psyqa") and "output" in item):
        return None
    if name == "belle turns" and not SPEAKERS.match(item["instruction"]):
        return None
    owner = SHAPES[name].sets[0]
    return f"data/{FOLDERS.get(owner, owner)}/prepare.py"


def has_choices(item: dict) -> bool:
    """True for an item whose answer names one of its choices, as in the evaluation sets."""
    beside = {"A", "B", "C"} <= {name.upper() for name in item}
    listed = any(isinstance(item.get(name), list) for name in CHOICES)
    return (beside or listed) and "output" not in item and bool({"answer", "Answer", "label"} & item.keys())


def is_half_of_couplets(file: Path) -> bool:
    """True for a file of first or second halves of couplets with the other halves beside it."""
    other = COUPLETS.get(file.name.lower().removesuffix(".gz"))
    return other is not None and any(file.parent.glob(f"{other}*"))
