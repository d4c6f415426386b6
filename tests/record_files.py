"""Records as files of each format, for the tests of reading them."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).parent.parent
RECORDS = [
    {"instruction": "写一句诗，\n要押韵", "input": "", "output": '床前"明月"光'},
    {"instruction": "翻译😀", "input": "good, morning", "output": "早上好\t\\"},
    {"instruction": "Say hi", "input": "", "output": "hi"},
]


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_csv(records, separator=","):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    rows = [separator.join(map(cell, record.values())) for record in records]
    return "\r\n".join([separator.join(records[0]), *rows]) + "\r\n"


def as_parquet(records, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path.read_bytes()


def huge(size):
    """A record of so many characters, of those that JSON escapes, too."""
    return {"instruction": "x", "input": "", "output": "".join(random.Random(0).choices('一二三\n"\\', k=size - 1))}
