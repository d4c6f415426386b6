"""prepare.py of the evaluation sets: files in their published shapes, with questions written for these tests."""

import csv
import json
import re
import shutil
import zipfile

import pytest
from raw_sets import lines, records_in

from data.agieval import prepare as agieval
from data.gaokao_bench import prepare as gaokao_bench
from utils.datasets.choices import read_choices

COLUMNS = ["", "Question", "A", "B", "C", "D", "Answer"]
ASKED = ("心脏有几个腔？", "肺有几叶？")


def write_csv(path, rows, header):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_cmmlu(prepare, tmp_path):
    for split, answer in (("dev", "B"), ("test", "C")):
        write_csv(tmp_path / f"raw/{split}/anatomy.csv", [[0, q, 2, 3, 4, 5, answer] for q in ASKED], COLUMNS)
        write_csv(tmp_path / f"raw/{split}/alchemy.csv", [[0, "点什么成金？", "石", "木", "水", "木", "A"]] * 2 +
                  [[1, "点什么成金？", "石", "木", "水", "火", "Ａ．"]], COLUMNS)  # fmt: skip
    said = prepare("cmmlu").ok()
    first, _, other = sorted(records_in(tmp_path / "out/test.json"), key=lambda record: record["category"], reverse=True)
    assert first == {
        "instruction": "心脏有几个腔？", "choices": ["2", "3", "4", "5"], "answer": "C", "category": "anatomy",
        "topic": "解剖学", "groups": ["STEM"],
    }  # fmt: skip
    assert "groups" not in other and "alchemy is not a subject of this set; its questions are kept, without a group" in said
    assert "2 of 3 questions dropped: a choice occurs twice" in said
    assert records_in(tmp_path / "out/dev.json")[1]["answer"] == "B"
    assert f"{tmp_path}/out/test.json: 3 questions in 2 subjects\n" in said and "\nlicence: CMMLU is under CC BY-NC-SA" in said
    assert [one.category for one in read_choices([str(tmp_path / "out/test.json")])] == ["alchemy", "anatomy", "anatomy"]


def test_ceval(script, prepare, tmp_path):
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split in ("dev", "val"):
        write_csv(tmp_path / f"raw/{split}/law_{split}.csv", [[0, "谁立法？", "甲", "乙", "丙", "丁", "A", "因为"]], header)
    write_csv(tmp_path / "raw/test/law_test.csv", [[0, "谁？", "甲", "乙", "丙", "丁"]], header[:-2])
    for environment, folder in (({}, "datasets"), ({"DATA_DIR": str(tmp_path / "data")}, "data")):
        script("data/ceval/prepare.py", "--raw", "raw", cwd=tmp_path, **environment).ok()
        (record,) = records_in(tmp_path / folder / "ceval/test.json")
        assert record["category"] == "law" and record["topic"] == "法学" and record["groups"] == ["Humanities"]
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
    many = tmp_path / "many.zip"
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(10_001):
            archive.writestr(str(number), "")
    assert f"{many}: would unpack to 0 GB in 10,001 files, too much" in prepare("ceval", "--raw", many).error
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


GAOKAO = """chinese 语文 english 英语 geography 地理 history 历史 biology 生物 chemistry 化学 physics 物理 mathqa 数学"""
BENCH = """Biology 生物 Chemistry 化学 Chinese_Lang_and_Usage 语文 Chinese_Modern_Lit 现代文阅读 English 英语
English_Fill_in_Blanks 英语完形填空 English_Reading_Comp 英语阅读 English_Cloze_Test 英语七选五 Geography 地理 History 历史
Math_I 理科数学 Math_II 文科数学 Physics 物理 Political_Science 政治"""


def test_subjects_are_called_what_they_are():
    called, others = GAOKAO.split(), {"logiqa-zh": "逻辑推理", "jec-qa-kd": "司法考试知识", "jec-qa-ca": "司法考试案例"}
    topics = {f"gaokao-{name}": f"高考{topic}" for name, topic in zip(called[::2], called[1::2], strict=True)}
    assert topics | others == agieval.TOPICS
    assert agieval.GROUPS == {"gaokao": "Gaokao", "logiqa": "LogiQA", "jec": "JEC-QA"}
    called = BENCH.split()
    assert {name: f"高考{topic}" for name, topic in zip(called[::2], called[1::2], strict=True)} == gaokao_bench.TOPICS


TOWN = "小明去上学。他走了1.5公里，36 分钟。\n"


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        ("1．（4分）正确的是（ ）\nA．上  B．下\nC. 左 D. 右\n", "B", [("正确的是（ ）", "上下左右")]),
        ("Ａ、上 Ｂ、下 （Ｃ）左 (D) 右", "A", []),  # no question
        ("从 A、B 两点看，是（ ）（Ａ）上（Ｂ）下（Ｃ）左（Ｄ）右", "A", [("从 A、B 两点看，是（ ）", "上下左右")]),
        (f"{TOWN}1. 去哪？\nA. 上\nB. 下\nC. 左\nD. 右\n2. 怎\n么？\nA. 走 B. 坐 C. 骑 D. 飞", "AD",
         [(f"{TOWN}1. 去哪？", "上下左右"), (f"{TOWN}2. 怎\n么？", "走坐骑飞")]),
        ("据此完成 9～10 题。 9．2010～2012 年（ ） A．上 B．下 C．左 D．右10．约 2.5 米（ ）A.走 B.坐 C.骑 D.飞", "AB",
         [("据此完成 9～10 题。\n9．2010～2012 年（ ）", "上下左右"), ("据此完成 9～10 题。\n10．约 2.5 米（ ）", "走坐骑飞")]),
        ("7．（9分）读。（1）何？ A．上 B．下 C．左 D．右 （2）孰？ A．走 B．坐 C．骑 D．飞", "CD",
         [("7．（9分）读。\n（1）何？", "上下左右"), ("7．（9分）读。\n（2）孰？", "走坐骑飞")]),
        ("从（ A、B、C和D）中选：I 36 the\n37 . I.D. cards\n36. A. a B. b C. c D. d\n37 A. e B. f C. g D. h", "AB",
         [("从（ A、B、C和D）中选：I 36 the\n37 . I.D. cards\n36.", "abcd"),
          ("从（ A、B、C和D）中选：I 36 the\n37 . I.D. cards\n37", "efgh")]),
        ("读。\n1. 甲？ A. 上 B. 下 C 左 D. 右\n2. 乙？ A. 走 B. 坐 C. 骑 D. 飞", "AB", [("读。\n2. 乙？", "走坐骑飞")]),
        ("读。\n1. 甲？ A. 上 B. 下 C. 左 D. 右\n乙？ A. 走 B. 坐 C. 骑 D. 飞", "AB", []),
        ("Fish __71__ is 8 or  72  it.\nA. 一\nB. 二\nC. 三\nD. 四\nE. 五\nF. 六\nG. 七", "GA",
         [("Fish __71__ is 8 or  72  it.\n71.", "一二三四五六七"), ("Fish __71__ is 8 or  72  it.\n72.", "一二三四五六七")]),
        ("Fish _ it.\nA. 一\nB. 二\nC. 三\nD. 四\nE. 五\nF. 六\nG. 七", "GA", []),
    ],
)  # fmt: skip
def test_gaokao_bench_takes_one_text_apart(prepare, tmp_path, text, answers, found):
    items = [
        {"question": text, "answer": list(answers)},
        {"question": "无"},
        {"question": "甲？A. 一 B. 二 C. 三 D. 四", "answer": "B"},
    ]
    items.append({"question": "甲？A. 一 B. 二 C. 三 D. 四", "answer": ["B"]})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/2010-2022_Biology_MCQs.json").write_text(json.dumps({"example": items}, ensure_ascii=False), "utf-8")
    (tmp_path / "raw/gpt_2010-2022_Biology_MCQs.json").write_text("{}", "utf-8")
    said = prepare("gaokao_bench").ok()
    *first, last = records_in(tmp_path / "out/test.json")
    assert [(one["instruction"], "".join(one["choices"])) for one in first] == found and last["answer"] == "B"
    assert "".join(one["answer"] for one in first) == answers[len(answers) - len(found) :]
    counts = [int(count) for count in re.findall(rf"(\d+) of {len(answers) + 3} questions dropped", said)]
    assert sum(counts) == len(answers) - len(found) + 2 and "Apache-2.0" in said


def test_cmath_has_numbers_as_references(prepare, tmp_path):
    items = [{"grade": 2, "input": "3个2是多少？", "golden": "６", "reasoning_step": 1}, {"grade": 2, "input": "几？"}]
    items += [{"grade": 2, "input": "几？", "golden": wrong} for wrong in ("不知道", float("nan"), "约12")]
    (tmp_path / "raw").write_text(lines(items), "utf-8")
    said = prepare("cmath").ok()
    assert records_in(tmp_path / "out/test.json") == [
        {"instruction": "3个2是多少？", "input": "", "output": "", "category": "grade 2", "reference": "6"}
    ]
    assert "4 of 5 items dropped: input, grade or a number as golden is missing" in said and "CC BY 4.0" in said


def test_mbpp_brings_what_its_tests_need(prepare, tmp_path):
    item = {"prompt": "Round.", "test_imports": ["import math"], "test_list": ["assert math.isclose(f(), 1)"]}
    whole = {"text": "Add.", "test_setup_code": "one = 1", "test_list": ["assert f(one) == 2", "assert f(2) == 3"]}
    (tmp_path / "raw").write_text(json.dumps([item, item | {"test_list": [" "]}, whole]), "utf-8")
    assert "1 of 3 items dropped" in prepare("code").ok()
    first, second = records_in(tmp_path / "out/mbpp.json")
    assert first["tests"] == "import math\n\nassert math.isclose(f(), 1)"
    tests = "assert f(one) == 2\nassert f(2) == 3"
    asked = f"Add.\n请写一个 Python 函数，只写代码，要能通过下面的测试：\n```python\n{tests}\n```"
    more = {"input": "", "output": "", "category": "mbpp", "prefix": "", "entry_point": "", "tests": f"one = 1\n{tests}"}
    assert second == {"instruction": asked} | more


def test_safetybench_has_its_answers_in_another_file(prepare, tmp_path):
    items = [{"id": n, "category": f"害{n}", "question": "问", "options": ["甲", "乙" if n else "甲"]} for n in range(4)]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/test_zh.json").write_text(json.dumps(items), "utf-8-sig")
    assert "test_answers_zh.json: is missing; also fetch it" in prepare("safetybench").error
    write_answers = (tmp_path / "raw/test_answers_zh.json").write_text
    write_answers(json.dumps({"0": {"answer": 0}, "1": {"answer": 1}, "2": 0}), "utf-8")
    said = prepare("safetybench").ok()
    assert "dev_zh.json: is missing, so that there are no examples for --shots" in said
    found = records_in(tmp_path / "out/test.json")
    assert [(one["category"], one["answer"], one["groups"]) for one in found] == [
        ("害1", "B", ["SafetyBench"]),
        ("害2", "A", ["SafetyBench"]),
    ]
    assert "1 of 4 questions dropped: a choice occurs twice" in said and "MIT" in said
    assert "1 of 4 questions dropped: the right choice is missing" in said


def test_safetybench_has_worked_examples_by_category_and_a_subset(prepare, tmp_path):
    example = {"question": "问", "options": ["甲", " 乙"], "answer": 1}
    for name, held in {
        "a/test_zh_subset": [{"id": 7, "category": "害", "question": "问", "options": ["甲", "乙"]}],
        "b/test_answers_zh_subset": {"7": {"category": "害", "answer": 1}},
        "c/dev_zh": {"害": [example], "恶": [example, example | {"answer": 2}, None]},
    }.items():
        (tmp_path / f"raw/{name}.json").parent.mkdir(parents=True)
        (tmp_path / f"raw/{name}.json").write_text(json.dumps(held), "utf-8")
    said = prepare("safetybench").ok()
    assert [one["answer"] for one in records_in(tmp_path / "out/test.json")] == ["B"]
    found = records_in(tmp_path / "out/dev.json")
    assert [(one["category"], one["answer"], one["choices"]) for one in found] == [(kind, "B", ["甲", "乙"]) for kind in "害恶"]
    assert "dev_zh.json: 1 of 4 questions dropped: the right choice is not among the choices" in said


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
