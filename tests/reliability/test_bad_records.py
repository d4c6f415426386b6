"""Files that are read well, and hold no record that could be used: the line says why, and how many.

How each cause is counted among good records is tested in tests/datasets/test_records.py.
"""

import json

import pytest
from cases import has

DEEP = "[" * 800 + "]" * 800
LONG = "长" * 100_000  # more than a model's window has tokens
HUGE = "长" * 3_500_000  # over 10 MB as UTF-8
RECORDS = {  # what is wrong -> the file's text, and why no record can be used
    "null": ("[null]", "null, not an object: 1"),
    "numbers": ("[1, 2.5]", "a number, not an object: 2"),
    "lists": ('[["a", "b"]]', "a list, not an object: 1"),
    "no field known": ('[{"ask": "a", "say": "b"}]', "instruction is missing: 1"),
    "fields in another case": ('[{"Instruction": "a", "Output": "b"}]', "instruction is missing: 1"),
    "an instruction of null": ('[{"instruction": null, "output": "b"}]', "instruction is missing: 1"),
    "an instruction of 5": ('[{"instruction": 5, "output": "b"}]', "instruction is a number: 1"),
    "an instruction of 10^400": (f'[{{"instruction": 1{"0" * 400}, "output": "b"}}]', "instruction is a number: 1"),
    "an instruction of NaN": ('[{"instruction": NaN, "output": "b"}]', "instruction is a number: 1"),
    "an instruction of true": ('[{"instruction": true, "output": "b"}]', "instruction is true or false: 1"),
    "an instruction of texts": ('[{"instruction": ["a"], "output": "b"}]', "instruction is a list: 1"),
    "an instruction in an object": ('[{"instruction": {"zh": "a"}, "output": "b"}]', "instruction is an object: 1"),
    "an instruction of spaces": ('[{"instruction": " \\n", "output": "b"}]', "instruction is empty: 1"),
    "an input of 5": ('[{"instruction": "a", "input": 5, "output": "b"}]', "input is a number: 1"),
    "an output of a list": ('[{"instruction": "a", "output": ["b"]}]', "output is a list: 1"),
    "half a character": ('[{"instruction": "\\ud83d", "output": "b"}]', "a lone surrogate: 1"),
    "half a character in a key": ('[{"instruction": "a", "output": "b", "\\ud83d": 1}]', "a lone surrogate: 1"),
    "half a character in its history": (
        '[{"instruction": "a", "output": "b", "history": [["c", "\\udc00"]]}]',
        "a lone surrogate: 1",
    ),
    "a history of a text": ('[{"instruction": "a", "output": "b", "history": "c"}]', "history is not a list: 1"),
    "a history of triples": ('[{"instruction": "a", "output": "b", "history": [["c", "d", "e"]]}]', "pairs of texts: 1"),
    "a history of numbers": ('[{"instruction": "a", "output": "b", "history": [[1, 2]]}]', "pairs of texts: 1"),
    "a history of depth": (f'[{{"instruction": "a", "output": "b", "history": {DEEP}}}]', "pairs of texts: 1"),
    "a system text of 5": ('[{"instruction": "a", "output": "b", "system": 5}]', "system is a number: 1"),
    "a dialogue without turns": ('[{"conversations": []}]', "a dialogue without turns: 1"),
    "a dialogue of nobody": ('[{"messages": [{"role": "nobody", "content": "a"}]}]', "unknown role 'nobody': 1"),
    "a dialogue out of order": ('[{"conversations": [{"from": "gpt", "value": "a"}]}]', "turns are out of order: 1"),
    "a dialogue of pictures": (
        '[{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}]',
        "parts that are not text: 1",
    ),
    "two causes": ('[null, {"instruction": 5, "output": "b"}, null]', "null, not an object: 2, instruction is a number: 1"),
}
WITHOUT_ANSWERS = {
    "an output of null": ('[{"instruction": "a", "output": null}]', "output is missing: 1"),
    "an output of nothing": ('[{"instruction": "a", "output": ""}]', "output is empty: 1"),
    "texts alone": ('["a", "b"]', "output is missing: 2"),
}


@pytest.mark.parametrize("what", [*RECORDS, *WITHOUT_ANSWERS])
def test_nothing_to_train_on(refused, tmp_path, what):
    text, cause = (RECORDS | WITHOUT_ANSWERS)[what]
    (tmp_path / "bad.json").write_text(text)
    line = refused("finetune.py", "--data_path {tmp}/bad.json")
    has(line, ("bad.json: no record in it can be used", cause, "see data/README.md"))


@pytest.mark.parametrize("what", RECORDS)
def test_nothing_to_answer(refused, tmp_path, what):
    text, cause = RECORDS[what]
    (tmp_path / "bad.json").write_text(text)
    has(refused("generate.py", "--test_input_path {tmp}/bad.json"), ("bad.json: no record in it can be used", cause, "see"))


@pytest.mark.parametrize("what", RECORDS)
def test_nothing_to_compare(refused, tmp_path, what):
    text, cause = RECORDS[what]
    (tmp_path / "bad.json").write_text(text)
    has(refused("judge.py", "--answers three={tmp}/bad.json"), ("bad.json: no record in it can be used", cause, "see"))


def placed(text):
    """A long text in each place that a record has for it."""
    return {
        "an instruction": {"instruction": text, "output": "b"},
        "an input": {"instruction": "a", "input": text, "output": "b"},
        "a system text": {"instruction": "a", "system": text, "output": "b"},
        "an earlier turn": {"instruction": "a", "history": [[text, "c"]], "output": "b"},
    }


@pytest.mark.parametrize("place", ["finetune.py --data_path", "generate.py --test_input_path", "judge.py --answers three="])
@pytest.mark.parametrize("what", [*placed(""), "an output"])
def test_megabytes_in_one_text(refused, tmp_path, place, what):
    record = (placed(HUGE) | {"an output": {"instruction": "a", "output": HUGE}})[what]
    (tmp_path / "huge.json").write_text(json.dumps([record], ensure_ascii=False))
    name, option = place.split(" ", 1)
    line = refused(name, f"{option}{'' if option.endswith('=') else ' '}{{tmp}}/huge.json")
    has(line, ("huge.json: no record in it can be used", "more than 1,000,000 characters: 1", "see"))


@pytest.mark.parametrize("what", placed(""))
def test_more_than_a_window_in_one_text(refused, tmp_path, what):
    """It is not a mistake in itself; here nothing of the answer is left to learn, and the model's window is too short."""
    (tmp_path / "long.json").write_text(json.dumps([placed(LONG)[what]], ensure_ascii=False))
    has(refused("generate.py", "--test_input_path {tmp}/long.json"), ("prompt 1: ", "the model's window is 2048", "shorten"))
    if what != "an earlier turn":  # whose own answer is learned
        line = refused("finetune.py", "--data_path {tmp}/long.json --val_set_size 0")
        has(line, ("--cutoff_len 256: leaves no answer in any of 1 records", "or more"))
