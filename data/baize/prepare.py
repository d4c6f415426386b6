"""Write baize's dialogues in the record format.

    python data/baize/prepare.py --raw downloads/baize

What comes out keeps the raw files' names: quora_chat_data.json, stackoverflow_chat_data.json and so on.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.datasets.item_formats import InvalidRecord, as_record, dialogue
from utils.datasets.preparing import PrepareOptions, convert_each

SPEAKER = re.compile(r"(?:^|\n)\[\|(Human|AI)\|\]\s?")
MARK = re.compile(r"\[\|(?:Human|AI)\|\]")
ROLES = {"Human": "user", "AI": "assistant"}


def main(options: PrepareOptions) -> None:
    convert_each("baize", "baize", {"baize": turns, "alpaca": as_record}, options)


def turns(item: dict) -> dict:
    """The dialogue in `input`, without the sentence before it and the empty turn after it. Raises InvalidRecord."""
    text = item.get("input")
    if not isinstance(text, str):
        raise InvalidRecord("input is missing or no text")
    pieces = SPEAKER.split(text)
    found = [(ROLES[speaker], words.strip()) for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True)]
    if found and found[-1] == ("user", ""):
        found.pop()
    if any(MARK.search(words) for _, words in found):
        raise InvalidRecord("a speaker's mark inside a turn")
    return dialogue(found)


if __name__ == "__main__":
    run(main, PrepareOptions)
