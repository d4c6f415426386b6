"""Write BELLE's files, single turn and dialogue, in the record format.

    python data/belle/prepare.py --raw downloads/Belle_open_source_0.5M.json

What comes out keeps the raw file's name. A file of dialogues (`Human:` and `Assistant:` inside one text) is recognized.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.datasets.item_formats import InvalidRecord, as_record, dialogue
from utils.datasets.preparing import PrepareOptions, convert_each

SPEAKER = re.compile(r"(?:^|\n)(Human|Assistant)[:：]")
MARK = re.compile(r"\s(?:Human|Assistant)[:：]")
ROLES = {"Human": "user", "Assistant": "assistant"}


def main(options: PrepareOptions) -> None:
    converters = {
        "alpaca": single_or_dialogue,
        "belle turns": single_or_dialogue,
        "belle target": older,
        "belle dialogue": as_record,
    }
    convert_each("BELLE", "belle", converters, options)


def single_or_dialogue(item: dict) -> dict:
    """One turn or, if the instruction begins with a speaker, the dialogue in it; outer line breaks are removed."""
    record = as_record({key: trimmed(text) if isinstance(text, str) else text for key, text in item.items()})
    instruction = record.get("instruction")
    if isinstance(instruction, str) and (speaker := SPEAKER.match(instruction.lstrip())) and speaker[1] == "Human":
        if record.get("input"):
            raise InvalidRecord("a dialogue with an input beside it")
        return record | multi_turn(instruction.lstrip(), record.get("output"))
    return record


def trimmed(text: str) -> str:
    """A text without leading line breaks and trailing white space; the indentation of its first line is kept."""
    return text.rstrip().lstrip("\r\n")


def multi_turn(instruction: str, output: object) -> dict:
    """The dialogue in one text that ends with a bare `Assistant:`, which `output` follows. Raises InvalidRecord."""
    pieces = SPEAKER.split(instruction)
    turns = [
        (ROLES[speaker], trimmed(text.removeprefix(" "))) for speaker, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns[-1] != ("assistant", ""):
        raise InvalidRecord("a dialogue that does not end with Assistant:")
    if any(MARK.search(text) for _, text in turns):
        raise InvalidRecord("a speaker's mark inside a turn")
    return dialogue([*turns[:-1], ("assistant", output)])


def older(item: dict) -> dict:
    """A record of the files that name their fields `input` and `target`."""
    return single_or_dialogue({"instruction": item.get("input"), "input": "", "output": item.get("target")})


if __name__ == "__main__":
    run(main, PrepareOptions)
