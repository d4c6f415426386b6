"""prepare.py of the evaluation sets: files in their published shapes, with questions written for these tests."""

import csv
import json
import re
import shutil

import pytest
from raw_sets import lines, records_in

from utils.datasets.choices import read_choices

COLUMNS = ["", "Question", "A", "B", "C", "D", "Answer"]


def write_csv(path, rows, header):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_cmmlu(prepare, tmp_path):
    for split, answer in (("dev", "B"), ("test", "C")):
        write_csv(tmp_path / f"raw/{split}/anatomy.csv", [[0, "心脏有几个腔？", 2, 3, 4, 5, answer]], COLUMNS)
        write_csv(tmp_path / f"raw/{split}/alchemy.csv", [[0, "点什么成金？", "石", "木", "水", "木", "A"]] * 2 +
                  [[1, "点什么成金？", "石", "木", "水", "火", "Ａ．"]], COLUMNS)  # fmt: skip
    said = prepare("cmmlu").ok()
    first, other = sorted(records_in(tmp_path / "out/test.json"), key=lambda record: record["category"], reverse=True)
    assert first == {
        "instruction": "心脏有几个腔？", "choices": ["2", "3", "4", "5"], "answer": "C", "category": "anatomy",
        "topic": "解剖学", "groups": ["STEM"],
    }  # fmt: skip
    assert "groups" not in other and "alchemy is not a subject of this set; its questions are kept, without a group" in said
    assert "2 of 3 questions dropped: a choice occurs twice" in said
    assert records_in(tmp_path / "out/dev.json")[1]["answer"] == "B" and "CC BY-NC-SA 4.0" in said
    assert [one.category for one in read_choices([str(tmp_path / "out/test.json")])] == ["alchemy", "anatomy"]


def test_ceval(prepare, tmp_path):
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split in ("dev", "val"):
        write_csv(tmp_path / f"raw/{split}/law_{split}.csv", [[0, "谁立法？", "甲", "乙", "丙", "丁", "A", "因为"]], header)
    write_csv(tmp_path / "raw/test/law_test.csv", [[0, "谁？", "甲", "乙", "丙", "丁"]], header[:-2])
    said = prepare("ceval").ok()
    (record,) = records_in(tmp_path / "out/test.json")
    assert record["category"] == "law" and record["topic"] == "法学" and record["groups"] == ["Humanities"] and said
    assert "the right choice is missing" in prepare("ceval", "--split", "test").out


def test_archives_are_read_as_they_are(prepare, tmp_path):
    """As folders would be, by their name or in a folder; one that is damaged or locked is one line, and nothing is written."""
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split in ("dev", "val"):
        write_csv(tmp_path / f"plain/{split}/law_{split}.csv", [[0, "谁立法？", "甲", "乙", "丙", "丁", "A", ""]], header)
    (tmp_path / "plain/val/._law_val.csv").write_bytes(b"\x00\x05\x16\x07")
    shutil.make_archive(str(tmp_path / "raw/ceval-exam"), "zip", tmp_path / "plain")
    for raw in ("raw", "raw/ceval-exam.zip"):
        prepare("ceval", "--raw", tmp_path / raw).ok()
        assert [record["instruction"] for record in records_in(tmp_path / "out/test.json")] == ["谁立法？"]
        shutil.rmtree(tmp_path / "out")
    whole = (tmp_path / "raw/ceval-exam.zip").read_bytes()
    locked = bytearray(whole)
    for place in (6, *(found.start() + 8 for found in re.finditer(b"PK\x01\x02", whole))):
        locked[place] |= 1  # the flag of an encrypted member
    for broken, why in ((whole[:100], "zip archive"), (whole[:60] + b"x" * 20 + whole[80:], "unpacked"), (locked, "unpacked")):
        (tmp_path / "raw/ceval-exam.zip").write_bytes(broken)
        assert why in prepare("ceval", "--raw", tmp_path / "raw/ceval-exam.zip").error and not (tmp_path / "out").exists()


def test_agieval_and_logiqa(prepare, tmp_path):
    item = {"passage": "甲在乙左。", "question": "谁在右？", "options": ["(Ａ)甲", "（B）乙"], "label": "ｂ", "answer": None}
    several = {
        "passage": None,
        "question": "哪些？",
        "options": ["(A)甲", "(B)乙", "(C)丙"],
        "label": ["A", "C"],
        "answer": None,
    }
    (tmp_path / "raw").mkdir()
    for name, items in (
        ("logiqa-zh", [item]),
        ("jec-qa-ca", [several]),
        ("gaokao-mathcloze", [{"question": "1+1=", "answer": "2"}]),
    ):
        (tmp_path / f"raw/{name}.jsonl").write_text(lines(items), "utf-8")
    said = prepare("agieval").ok()
    first, second = records_in(tmp_path / "out/test.json")
    assert first["instruction"] == "甲在乙左。\n谁在右？" and first["answer"] == "B" and first["groups"] == ["LogiQA"]
    assert second["answer"] == "AC" and second["category"] == "jec-qa-ca"
    assert "missing, and left out: gaokao-chinese" in said and "left out, its questions have no choices" in said
    assert "CC BY-NC-SA" in prepare("logiqa_zh").ok()
    assert records_in(tmp_path / "out/test.json")[0]["topic"] == "逻辑推理"


def test_gaokao_bench_takes_one_text_apart(prepare, tmp_path):
    one = {"question": "1．（4分）下列说法正确的是（ ）\nA．水往高处流  B．水往低处流\nC. 水不流  D. 没有水\n", "answer": ["B"]}
    text = "小明去上学。\n他走路。\n1. 小明去哪？\nA. 上学\nB. 回家\nC. 上街\nD. 不去\n"
    text += "2. 他怎么\n去？\nA. 走路 B. 坐车 C. 骑车 D. 飞\n"
    both = {"question": text, "answer": ["A", "A"]}
    seven = {"question": "A. 一 B. 二 C. 三 D. 四 E. 五", "answer": ["E", "A"]}
    items = {"keywords": "x", "example": [one, both, seven, {"question": "无"}]}
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/2010-2022_Biology_MCQs.json").write_text(json.dumps(items, ensure_ascii=False), "utf-8")
    (tmp_path / "raw/gpt_2010-2022_Biology_MCQs.json").write_text("{}", "utf-8")
    said = prepare("gaokao_bench").ok()
    first, second, third = records_in(tmp_path / "out/test.json")
    assert first["instruction"] == "下列说法正确的是（ ）"
    assert first["choices"] == ["水往高处流", "水往低处流", "水不流", "没有水"] and first["category"] == "Biology"
    assert second["instruction"] == "小明去上学。\n他走路。\n1. 小明去哪？" and second["choices"][3] == "不去"
    assert third["instruction"] == "小明去上学。\n他走路。\n2. 他怎么\n去？" and third["choices"] == [
        "走路",
        "坐车",
        "骑车",
        "飞",
    ]
    assert "1 of 4 texts dropped: its choices A to D cannot be separated; 3 questions kept" in said
    assert "1 of 4 texts dropped: question or answer is missing; 3 questions kept" in said and "Apache-2.0" in said


def test_cmath_has_numbers_as_references(prepare, tmp_path):
    items = [{"grade": 2, "input": "3个2是多少？", "golden": "６", "reasoning_step": 1}, {"grade": 2, "input": "几？"}]
    items += [{"grade": 2, "input": "几？", "golden": wrong} for wrong in ("不知道", float("nan"), "约12")]
    (tmp_path / "raw").write_text(lines(items), "utf-8")
    said = prepare("cmath").ok()
    assert records_in(tmp_path / "out/test.json") == [
        {"instruction": "3个2是多少？", "input": "", "output": "", "category": "grade 2", "reference": "6"}
    ]
    assert "4 of 5 items dropped: input, grade or a number as golden is missing" in said and "CC BY 4.0" in said


def test_safetybench_has_its_answers_in_another_file(prepare, tmp_path):
    items = [{"id": n, "category": f"害{n}", "question": "问", "options": ["甲", "乙" if n else "甲"]} for n in range(4)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/test_zh.json").write_text(json.dumps(items), "utf-8-sig")
    assert "is missing; also fetch it" in prepare("safetybench").error
    write_answers = (tmp_path / "raw/test_answers_zh.json").write_text
    write_answers(json.dumps({"0": {"answer": 0}, "1": {"answer": 1}, "2": 0}), "utf-8")
    said = prepare("safetybench").ok()
    found = records_in(tmp_path / "out/test.json")
    assert [(one["category"], one["answer"], one["groups"]) for one in found] == [
        ("害1", "B", ["SafetyBench"]),
        ("害2", "A", ["SafetyBench"]),
    ]
    assert "1 of 4 questions dropped: a choice occurs twice" in said and "MIT" in said
    assert "1 of 4 questions dropped: the right choice is missing" in said


@pytest.mark.parametrize("name", ["cmmlu", "ceval", "agieval", "gaokao_bench", "cmath", "logiqa_zh"])
def test_a_folder_without_the_set_is_one_line(prepare, tmp_path, name):
    (tmp_path / "raw").mkdir()
    assert f"{tmp_path}/raw: holds no" in prepare(name).error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("safetybench", {"test_zh.json": "[null]", "test_answers_zh.json": "{}"}),
        ("safetybench", {"test_zh.json": "[]", "test_answers_zh.json": "{}"}),
        ("gaokao_bench", {"2010-2022_Biology_MCQs.json": '{"example": [null]}'}),
        ("code", {"mbpp.jsonl": '{"text": "add", "test_list": []}'}),  # any answer would pass
        ("code", {"HumanEval.jsonl": '{"prompt": "def f():", "entry_point": "f", "test": " "}'}),
        ("cmath", {"cmath_dev.jsonl": '{"input": "几？", "golden": NaN, "grade": 1}'}),
        ("logiqa_zh", {"logiqa-zh.jsonl": '{"question": "谁？", "options": ["(A)甲", "(B)乙"], "label": NaN}'}),
        ("logiqa_zh", {"logiqa-zh.jsonl": '{"question": "谁？", "options": ["(A)甲", "(B)乙"], "label": 1e999}'}),
    ],
)
def test_a_set_without_a_usable_question_is_one_line_and_nothing_is_written(prepare, tmp_path, name, files):
    (tmp_path / "raw").mkdir()
    for file, text in files.items():
        (tmp_path / "raw" / file).write_text(text, "utf-8")
    raw = ["--raw", tmp_path / "raw" / next(iter(files))] if name == "code" else []
    assert "; " in prepare(name, *raw).error and not (tmp_path / "out").exists()
