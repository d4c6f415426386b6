"""Write Alpaca-GPT4, English or Chinese, in the record format.

    python data/alpaca_gpt4/prepare.py --raw downloads/alpaca_gpt4_data_zh.json

What comes out keeps the raw file's name: alpaca_data_gpt4.json or alpaca_gpt4_data.json, alpaca_gpt4_data_zh.json.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import option, run
from utils.datasets.item_formats import InvalidRecord, as_record
from utils.datasets.preparing import PrepareOptions, convert_each

LONG = 200  # characters; shorter answers may well be words or numbers without a full stop
CLOSING = tuple("。！？…—.!?\"'”’」』）)】]》>}`|~*")


@dataclasses.dataclass
class Options(PrepareOptions):
    drop_truncated: bool = option(
        False, f"drop answers that look cut off: over {LONG} characters, and no closing punctuation at the end"
    )


def main(options: Options) -> None:
    convert = whole if options.drop_truncated else as_record
    convert_each("Alpaca-GPT4", "alpaca_gpt4", {"alpaca": convert}, options)


def whole(item: dict) -> dict:
    """The item's record. Raises InvalidRecord if its answer looks cut off."""
    record = as_record(item)
    output = record.get("output")
    if isinstance(output, str) and len(output) > LONG and not output.rstrip().endswith(CLOSING):
        raise InvalidRecord("output looks cut off")
    return record


if __name__ == "__main__":
    run(main, Options)
