"""utils/datasets/item_formats.py: fields under other names, fields that change what is learned, fields that nothing reads."""

import json

import pytest
from record_files import RECORDS, as_lines

from utils.console import UserError, say_once
from utils.datasets.records import read_records

ANSWER = {"instruction": "问", "input": "", "output": "答"}
READ = {
    "prompt and completion": ({"prompt": "问", "completion": "答"}, ANSWER),
    "query and response": ({"query": "问", "response": "答"}, ANSWER),
    "question and answer": ({"question": "问", "answer": "答"}, ANSWER),
    "dolly": ({"instruction": "问", "context": "材料", "response": "答"}, ANSWER | {"input": "材料"}),
    "context": (ANSWER | {"context": "材料"}, ANSWER | {"input": "材料"}),
    "the same material twice": (ANSWER | {"context": "材料", "input": "材料"}, ANSWER | {"input": "材料"}),
    "names of BELLE": (ANSWER | {"class": "甲", "std_answer": "乙"}, ANSWER | {"category": "甲", "reference": "乙"}),
    "rounds": (
        {"conversation": [{"system": "护士", "input": "甲", "output": "乙"}, {"input": "问", "output": "答"}]},
        ANSWER | {"history": [["甲", "乙"]], "system": "护士"},
    ),
    "prompt of turns": (
        {"prompt": [{"role": "user", "content": "问"}], "completion": [{"role": "assistant", "content": "答"}]},
        ANSWER,
    ),
    "prompt beside messages": (
        {"prompt": "问", "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        ANSWER,
    ),
    "turns as JSON": ({"messages": '[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]'}, ANSWER),
    "keys of OpenAI in conversations": (
        {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        ANSWER,
    ),
    "parts with value": (
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "问"}]}, {"role": "assistant", "content": "答"}]},
        ANSWER,
    ),
    "odd history and input": (ANSWER | {"history": "[]", "input": []}, ANSWER),
    "history as JSON": (ANSWER | {"history": '[["甲", "乙"]]'}, ANSWER | {"history": [["甲", "乙"]]}),
}
THOUGHTFUL = ANSWER | {"output": "<think>\n想\n</think>\n\n答"}


def asked(question, answer):
    """A dialogue of one question and its answer, with these fields."""
    return {"messages": [question, answer]}


READ["thoughts beside an answer that has them"] = THOUGHTFUL | {"reasoning_content": "想"}, THOUGHTFUL
for name in ("system", "system_prompt", "meta_instruction", "system_message"):
    READ[name] = ANSWER | {name: "护士"}, ANSWER | {"system": "护士"}
for name in ("reasoning_content", "reasoning", "thinking"):
    READ[name] = asked({"role": "user", "content": "问"}, {"role": "assistant", "content": "答", name: "想"}), THOUGHTFUL
for name in ("human", "user"):
    READ[f"{name} asks"] = asked({"from": name, "value": "问"}, {"from": "gpt", "value": "答"}), ANSWER
for name in ("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"):
    READ[f"{name} answers"] = asked({"from": "user", "value": "问"}, {"from": name, "value": "答"}), ANSWER
for name in ("system", "developer"):
    first = {"role": name, "content": "护士"}
    READ[f"{name} begins"] = (
        {"messages": [first, *asked({"from": "user", "value": "问"}, {"from": "gpt", "value": "答"})["messages"]]},
        ANSWER | {"system": "护士"},
    )
for one, other in (("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("prompt", "response")):
    READ[f"rounds of {one} and {other}"] = {"conversation": [{one: "问", other: "答"}]}, ANSWER


@pytest.mark.parametrize("name", READ)
def test_fields_under_other_names(tmp_path, name):
    item, expected = READ[name]
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([item]), "utf-8")
    assert list(read_records(path, strict=True)) == [expected]


def two(first=None, second=None, question=None):
    """A dialogue of two answers, with fields for each of them, and for the first question."""
    turns = [{"from": "human", "value": "一"} | (question or {}), {"from": "gpt", "value": "二"} | (first or {})]
    return {"conversations": [*turns, {"from": "human", "value": "三"}, {"from": "gpt", "value": "四"} | (second or {})]}


FLAGS = [
    *((two({name: 0}), [False, True]) for name in ("learn", "loss", "weight", "train", "train_on_turn", "output_with_loss")),
    (two({"train": False}, {"loss": True}), [False, True]),
    *((two(None, {name: 1}), [True, False]) for name in ("mask", "masked")),
    (two({"weight": 1.0}, {"loss": True}), None),
    (two() | {"loss": [False, True]}, [False, True]),
    (two({"weight": 0}) | {"loss": [1, 1.0]}, [False, True]),
    ({"instruction": "三", "output": "四", "history": [["一", "二"]], "learn": [False, True]}, [False, True]),
]


@pytest.mark.parametrize(("item", "learn"), FLAGS)
def test_answers_that_are_not_to_be_learned(tmp_path, item, learn):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([item]), "utf-8")
    (record,) = read_records(path, strict=True)
    assert record == {"instruction": "三", "input": "", "output": "四", "history": [["一", "二"]]} | (
        {"learn": learn} if learn else {}
    )


DROPPED = [
    (ANSWER | {"weight": 0}, "no answer in it is to be learned"),
    (two({"loss": False}, {"loss": False}), "no answer in it is to be learned"),
    (two({"weight": 0.5}), "weight is 0.5: only 0 and 1"),
    (two({"weight": "0"}), "weight is 0: only 0 and 1"),
    (two() | {"loss": [True]}, "loss has 1 entries for 2 answers"),
    *((ANSWER | label, "label is false") for label in ({"label": False}, {"kto_tag": False}, {"label": "FALSE"})),
    *((two({name: [{"name": "f"}]}), "tool calls") for name in ("tool_calls", "function_call")),
    *((two({"from": role}), "tool calls") for role in ("tool", "function", "observation", "function_call", "tool_call")),
    *((two({"from": role}), "tool calls") for role in ("ipython", "tool_response", "function_response")),
    *((two() | {name: ["a"]}, f"it has {name}") for name in ("images", "image", "videos", "video", "audios", "audio")),
    (two(question={"image": "a.png"}), "parts that are not text"),
    (ANSWER | {"context": "一", "input": "二"}, "both input and context are given"),
    ({"prompt": "一", "query": "二", "response": "三"}, "both prompt and query are given"),
    (ANSWER | {"system": "一", "system_prompt": "二"}, "two system texts"),
]


@pytest.mark.parametrize(("item", "cause"), DROPPED)
def test_records_that_would_be_learned_wrongly_are_dropped(tmp_path, capsys, item, cause):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([item, RECORDS[0]]), "utf-8")
    assert list(read_records(path)) == RECORDS[:1]
    assert "1 dropped, 1 kept: " in (said := capsys.readouterr().out)
    assert cause in said


def test_records_in_an_object_beside_other_things(tmp_path, capsys):
    say_once.cache_clear()
    path = tmp_path / "a.json"
    for beside in ({"version": "1"}, {"test": RECORDS[:1]}):
        path.write_text(json.dumps(beside | {"data": RECORDS}))
        assert list(read_records(path)) == RECORDS
        assert f"the records in data are read, not what is beside them: {next(iter(beside))}" in capsys.readouterr().out
    turns = [{"from": "human", "value": "一"}, {"from": "gpt", "value": "二"}]
    path.write_text(json.dumps([{"id": "1", "items": turns}]))
    assert list(read_records(path)) == [{"instruction": "一", "input": "", "output": "二"}]


@pytest.mark.parametrize(
    "beside",
    [{"choices": ["1", "2"], "answer": "B"}, {"A": "1", "B": "2", "C": "3", "Answer": "B"},
     {"a": "1", "b": "2", "c": "3", "answer": "B"}, {"options": ["1", "2"], "label": "B"}],
)  # fmt: skip
def test_questions_with_choices_are_not_learned_without_them(tmp_path, beside):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question": "1+1"} | beside]))
    with pytest.raises(UserError, match="holds multiple-choice questions"):
        list(read_records(path))
    assert len(list(read_records(path, need_output=False))) == 1


RAW = {
    "firefly": {"kind": "NLI", "input": "问", "target": "中立"},
    "COIG": {"instruction": "Name.", "input": "", "output": "Red.", "trans_instruction": "说", "trans_output": "红"},
    "psyQA": {"question": "问", "description": "述", "answers": [{"answer_text": "答"}]},
    "belle": {"instruction": "Human：天\nAssistant：", "input": "", "output": "答"},
    "baize": {"topic": "t", "input": "[|Human|] 一\n[|AI|] 二\n[|Human|] "},
}


@pytest.mark.parametrize("name", RAW)
def test_a_set_as_it_is_downloaded_is_refused_by_name(tmp_path, capsys, name):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([RAW[name]] * 3), "utf-8")
    with pytest.raises(UserError, match=f"first run python data/{name}/prepare.py --raw {path}"):
        list(read_records(path))
    path.write_text(as_lines([*RECORDS, RAW[name]]), "utf-8")
    assert list(read_records(path)) == RECORDS
    assert f"1 dropped, 3 kept: an item of a raw downloaded set, for data/{name}/prepare.py" in capsys.readouterr().out


def test_a_reference_or_category_may_be_a_number_and_is_counted_as_unused_if_it_is_neither_text_nor_number(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps([{"instruction": "1+4", "output": "5", "reference": value, "category": 3} for value in (5, ["a"])])
    )
    first, second = read_records(path)
    assert (first["reference"], first["category"]) == ("5", "3") and "reference" not in second
    assert "unused fields, with the number of records that have them: reference (1)\n" in capsys.readouterr().out


def test_fields_that_nothing_reads_are_named_once_with_their_count(tmp_path, capsys):
    items = [
        two({"name": "x", "trainable": False}, question={"loss": True})
        | {"id": number, "empty": None, "tools": [{"name": "f"}], "\x1b[31mred": 1}
        for number in range(1, 40)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(items))
    assert len(list(read_records(path))) == 39
    said = [line for line in capsys.readouterr().out.splitlines() if "unused" in line]
    assert said == [
        f"{path}: unused fields, with the number of records that have them: "
        "id (39), tools (39), \\x1b[31mred (39), loss (of a question) (39), name (in turns) (39), trainable (in turns) (39)"
    ]
    for count, more in ((12, ""), (13, ", and 1 more")):
        path.write_text(json.dumps([ANSWER | {f"x{number}": 1 for number in range(count)}]))
        assert len(list(read_records(path))) == 1
        assert capsys.readouterr().out.endswith(f": {', '.join(f'x{number} (1)' for number in range(12))}{more}\n")
