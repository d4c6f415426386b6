"""Tables: the published marks out of the published totals, ties, missing values, and all three formats."""

import csv
import dataclasses
import io
import json

from utils.evaluation.tables import Row, Table, as_json, comma_separated, gains, markdown, marks

PUBLISHED = """\
| 知识问答 | 10 | 65 | 64 | 63 | 67* | **89** |
| 翻译 | 10 | 79 | 81 | 82 | 89* | **91** |
| 文本生成 | 10 | 65 | 73* | 63 | 71 | **92** |
| 情感分析 | 10 | 88* | **91** | 88* | 85 | 71 |
| 阅读理解 | 10 | 75 | 77 | 76 | 85* | **91** |
| 中文特色 | 10 | 82* | **83** | 82* | 40 | 68 |
| 代码生成 | 10 | 72 | 74 | 75* | 73 | **96** |
| 伦理、拒答类 | 10 | 71* | 70 | 67 | 71* | **94** |
"""
CATEGORIES = ["01qa", "02translate", "03generate", "04analyse", "05understanding", "06chinese", "07code", "08alignment"]
SYSTEMS = ["D13b-1-3-1", "D13b-2-2-2", "D13b-2-3", "D7b-4-1", "ChatGPT"]


def published() -> Table:
    rows = []
    for category, line in zip(CATEGORIES, PUBLISHED.splitlines(), strict=True):
        numbers = [float(cell.strip(" *")) for cell in line.split("|")[3:-1]]
        rows.append(Row(category, 10, dict(zip(SYSTEMS, numbers, strict=True))))
    return Table("GPT-3.5", SYSTEMS, rows)


def test_published_totals_give_the_published_marks():
    head = "| 类别 | 样本数 | " + " | ".join(SYSTEMS) + " |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    assert markdown(published()) == head + PUBLISHED


def test_equal_values_share_a_mark():
    assert marks({"a": 5, "b": 5, "c": 4, "d": 4, "e": 3}) == (["a", "b"], ["c", "d"])
    assert marks({"a": 5, "b": 5}) == (["a", "b"], [])
    assert marks({"a": None, "b": 1}) == (["b"], [])
    assert marks({"a": None}) == ([], [])


def test_what_looks_equal_is_equal():
    assert marks({"a": 80.04, "b": 79.96, "c": 79.94}) == (["a", "b"], ["c"])
    table = Table("t", ["a", "b"], [Row("x", 3, {"a": 80.04, "b": 79.96})])
    assert "| x | 3 | **80** | **80** |" in markdown(table)


def test_a_missing_value_is_a_dash():
    table = Table("t", ["a", "b"], [Row("x", 3, {"a": None, "b": 66.6667})])
    assert "| x | 3 | — | **66.7** |" in markdown(table)
    assert next(csv.DictReader(io.StringIO(comma_separated([table]))))["a"] == ""
    assert as_json(table)["rows"][0]["values"] == {"a": None, "b": 66.6667}


def test_csv_and_json_hold_the_marks():
    rows = list(csv.DictReader(io.StringIO(comma_separated([published()]))))
    assert [row["category"] for row in rows] == CATEGORIES
    assert rows[3]["ChatGPT"] == "71" and rows[3]["best"] == "D13b-2-2-2" and rows[3]["second"] == "D13b-1-3-1; D13b-2-3"
    found = json.loads(json.dumps(as_json(published()), ensure_ascii=False))
    assert found["rows"][7]["best"] == ["ChatGPT"] and found["rows"][7]["second"] == ["D13b-1-3-1", "D7b-4-1"]
    plain = as_json(dataclasses.replace(published(), marked=False))  # if more is not better, nothing is best
    assert plain["rows"][7] == {key: found["rows"][7][key] for key in ("category", "label", "samples", "values")}
    assert published().telling("").title == "GPT-3.5" and published().telling("how").title == "GPT-3.5 · how"
    labels = ["数学推理", "多轮对话", "mine"]
    assert [Row(name, 1, {}).label for name in ("09math", "10dialogue", "mine")] == labels


def test_csv_has_the_limits_of_each_system_that_has_an_interval_somewhere():
    first = Table("one", ["a", "b"], [Row("x", 2, {"a": 50, "b": 25}, {"a": (12.5, 87.5)}), Row("y", 1, {"a": 1, "b": None})])
    second = Table("two", ["c"], [Row("x", 3, {"c": 75}, {"c": (50.0, 80.0)})])
    assert comma_separated([first, second]).splitlines() == [
        "table,category,label,samples,a,b,c,best,second,a low,a high,c low,c high",
        "one,x,x,2,50,25,,a,b,12.5,87.5,,",
        "one,y,y,1,1,,,a,,,,,",
        "two,x,x,3,,,75,c,,,,50,80",
    ]


def test_gains_are_told_from_the_last_step_with_a_value():
    rows = [Row("a", 10, {"f1": 60.0, "f2": 65.25, "f3": 61.25}), Row("b", 10, {"f1": 5.0, "f2": None, "f3": 5.0})]
    text = gains(Table("t", ["f1", "f2", "f3"], rows))
    assert "| a | 10 | 60 | 65.2 (+5.2) | 61.2 (−4) |" in text
    assert "| b | 10 | 5 | — | 5 (±0) |" in text


def test_a_bar_in_a_name_does_not_break_the_table():
    assert "| a\\|b c |" in markdown(Table("t", ["a|b\nc"], [Row("x", 1, {"a|b\nc": 1.0})]))
