"""data/<set>/prepare.py: raw files in their real shapes, oddities included; what comes out, is said, stays after a kill."""

import collections
import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.files import locked
from utils.records import Dirty

ROOT = Path(__file__).parent.parent
SETS = ("alpaca_gpt4", "firefly", "COIG", "psyQA", "belle", "baize", "couplets")


def lines(items, **options):
    return "".join(json.dumps(item, ensure_ascii=False, **options) + "\n" for item in items)


def records_in(path):
    """The records of a prepared file; checks that it is written as the project writes records."""
    text = path.read_text("utf-8")
    found = json.loads(text)
    assert text == json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    return found


def record(instruction, output, given="", **more):
    return {"instruction": instruction, "input": given, "output": output, **more}


@pytest.fixture
def prepare(script, tmp_path):
    """Runs a set's prepare.py on what is written to `raw`, into `out`: `prepare("firefly", "--parts", 3)`."""

    def run(name, *options, raw=None, **env):
        raw = raw or tmp_path / "raw"
        return script(f"data/{name}/prepare.py", "--raw", raw, "--output_dir", tmp_path / "out", *options, **env)

    return run


# ---- Firefly


def firefly_items(count=500, seed=0):
    """Mixed kinds of very different frequency, lengths that vary."""
    draw = random.Random(seed)
    kinds = draw.choices(["NLI", "Couplet", "BELLE", "ProseGeneration", "Program"], [30, 20, 40, 2, 1], k=count)
    return [
        {"kind": kind, "input": f"问{number}\n" * draw.randint(1, 9), "target": '答😀"\\\t' * draw.randint(1, 50)}
        for number, kind in enumerate(kinds)
    ]


def cut(items, parts):
    """Each kind's n records, in order, in runs of ceil(n / parts): all in memory."""
    totals = collections.Counter(item["kind"] for item in items)
    seen = collections.Counter()
    found = [[] for _ in range(parts)]
    for item in items:
        kind = item["kind"]
        found[seen[kind] // math.ceil(totals[kind] / parts)].append(record(item["input"], item["target"]))
        seen[kind] += 1
    return found


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_firefly_parts_hold_each_kind_in_proportion_and_in_order(prepare, tmp_path, parts):
    items = firefly_items()
    (tmp_path / "raw").write_text(lines(items))
    said = prepare("firefly", "--parts", parts).ok
    assert [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(parts)] == cut(items, parts)
    assert len(list((tmp_path / "out").iterdir())) == parts
    totals = collections.Counter(item["kind"] for item in items)
    for kind, total in totals.items():
        (row,) = re.findall(rf"^{kind} +([\d,]+) = ([\d, +]+)$", said, re.MULTILINE)
        assert int(row[0].replace(",", "")) == total == sum(int(n.replace(",", "")) for n in row[1].split(" + "))
    assert f"{len(items):,} records of {len(totals)} kinds; the parts' totals are verified" in said


def test_firefly_with_fewer_records_than_parts(prepare, tmp_path):
    items = [{"kind": "NLI", "input": "a", "target": "b"}, {"kind": "NLI", "input": "c", "target": "d"}]
    (tmp_path / "raw").write_text(lines(items))
    prepare("firefly").ok  # noqa: B018 (checks the status)
    found = [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(5)]
    assert found == [[record("a", "b")], [record("c", "d")], [], [], []]


def test_firefly_gzipped_with_byte_order_mark_and_crlf_in_the_default_folder(script, tmp_path):
    items = firefly_items(60)
    raw = tmp_path / "downloads" / "firefly-train-1.1M.jsonl.gz"
    raw.parent.mkdir()
    raw.write_bytes(gzip.compress(("\ufeff" + lines(items).replace("\n", "\r\n")).encode()))
    for environment, folder in ({}, tmp_path / "datasets"), ({"DATA_DIR": str(tmp_path / "data")}, tmp_path / "data"):
        script("data/firefly/prepare.py", "--raw", "downloads", "--strict", cwd=tmp_path, **environment).ok  # noqa: B018
        assert [records_in(folder / "firefly" / f"firefly-train-{part}.json") for part in range(5)] == cut(items, 5)


def test_firefly_dirty_records(prepare, tmp_path):
    good = firefly_items(40)
    bad = [
        b'{"input": "x", "target": "y"}',
        b'{"kind": 3, "input": "x", "target": "y"}',
        b'{"kind": "NLI", "target": "y"}',
        b'{"kind": "NLI", "input": "x", "target": ""}',
        b'{"kind": "NLI", "input": "x", "target": "\\udc00"}',
        b'{"kind": "NLI", "input": "x',
        b"\xd6\xd0\xce\xc4",
        b"[]",
    ]
    (tmp_path / "raw").write_bytes(b"\n".join([*(json.dumps(item).encode() for item in good), *bad, bad[0]]) + b"\n")
    said = prepare("firefly").ok
    assert [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(5)] == cut(good, 5)
    for count, cause, line in [
        (2, "kind is missing", 41),
        (1, "kind is no text", 42),
        (1, "instruction is missing", 43),
        (1, "output is empty", 44),
        (1, "a lone surrogate", 45),
        (1, "not JSON", 46),
        (1, "not UTF-8", 47),
        (1, "a list, not an object", 48),
    ]:
        assert f"{tmp_path / 'raw'}: {count} dropped, 40 kept: {cause}; first: {tmp_path / 'raw'}, line {line}: " in said
    (tmp_path / "out" / "firefly-train-0.json").unlink()
    assert "line 41: kind is missing" in prepare("firefly", "--strict").error
    assert not (tmp_path / "out" / "firefly-train-0.json").exists()


def test_firefly_dialogues(prepare, tmp_path):
    rounds = [{"human": "甲", "assistant": "乙"}, {"human": "丙", "assistant": "丁"}]
    items = [
        {"conversation_id": 1, "category": "Brainstorming", "conversation": rounds},
        {"conversation_id": 2, "category": "Brainstorming", "conversation": rounds[:1]},
        {"conversation_id": 3, "category": "Brainstorming", "conversation": [*rounds, {"human": "戊"}]},
        {"conversation_id": 4, "category": "Brainstorming", "conversation": "甲"},
    ]
    (tmp_path / "raw").write_text(lines(items))
    said = prepare("firefly", "--parts", 1).ok
    assert records_in(tmp_path / "out" / "firefly-train-0.json") == [
        record("丙", "丁", history=[["甲", "乙"]]),
        record("甲", "乙"),
    ]
    assert "1 dropped, 2 kept: output is missing" in said
    assert "1 dropped, 2 kept: conversation is not a list of rounds" in said


def test_what_files_hold_cannot_steer_the_terminal(prepare, tmp_path):
    items = [{"kind": "\x1b[31mNLI", "input": "a", "target": "b"}]
    (tmp_path / "raw").write_text(lines(items))
    assert "\\x1b[31mNLI 1 = 1" in re.sub(" +", " ", prepare("firefly", "--parts", 1).ok)
    (tmp_path / "raw").write_text(lines([{"\x1b[31m": 1}]))
    assert "it has \\x1b[31m and lacks" in prepare("firefly").error
    raw = tmp_path / "counterfactural_correction_multi_round_chat.tar"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in ("\x1b[31m\udcff.json", b"{}"), ("b.json", json.dumps({"round_0": response("a", "b")}).encode()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    raw.write_bytes(content.getvalue())
    assert "member \\x1b[31m\\udcff.json" in prepare("COIG", raw=raw).ok


def test_dedupe_drops_the_same_record_once_more(prepare, tmp_path):
    items = firefly_items(30)
    (tmp_path / "raw").write_text(lines(items[:20] + items))
    said = prepare("firefly", "--dedupe").ok
    assert [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(5)] == cut(items, 5)
    assert f"20 dropped, 30 kept: the same as an earlier record; first: {tmp_path / 'raw'}, line 21: " in said
    assert "line 21: the same as an earlier record" in prepare("firefly", "--dedupe", "--strict").error


def test_memory_does_not_grow_with_the_file(tmp_path):
    program = (
        "import re, runpy, sys\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
    ).replace("sys.argv[0]", repr(str(ROOT / "data/firefly/prepare.py")))
    peaks = []
    for count in (2_000, 40_000):
        (tmp_path / "raw").write_text(lines(firefly_items(count)))
        command = [sys.executable, "-c", program, "--raw", tmp_path / "raw", "--output_dir", tmp_path / "out", "--dedupe"]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
    assert (tmp_path / "raw").stat().st_size > 15 << 20
    assert peaks[1] - peaks[0] < 15, peaks


# ---- COIG

EXAM = [
    (
        {
            "textbox_q_instruction": "选出正确的一项",
            "textbox_q_context": "材料",
            "textbox_question": "题目",
            "textbox_answer": "B",
            "textbox_answer_analysis": "解析",
            "subject": "地理",
        },
        record("选出正确的一项", "解析", "材料\n题目"),
    ),
    ({"textbox_q_instruction": "答", "textbox_question": "题", "textbox_answer": "甲"}, record("答", "甲", "题")),
    (
        {
            "textbox_q_instruction": "答",
            "textbox_q_context": "[]",
            "textbox_question": "题",
            "textbox_answer": "甲",
            "textbox_answer_analysis": "null",
        },
        record("答", "甲", "题"),
    ),
    (
        {
            "textbox_q_instruction": "答",
            "textbox_q_context": [],
            "textbox_question": "题",
            "textbox_answer": "甲",
            "textbox_answer_analysis": ["一", "二"],
        },
        record("答", "一\n二", "题"),
    ),
    ({"textbox_q_instruction": "答", "textbox_question": "题", "textbox_answer": "[]"}, None),
    ({"textbox_q_instruction": "答", "textbox_question": None, "textbox_answer": "甲"}, None),
    ({"textbox_q_instruction": "答", "textbox_q_context": {"a": 1}, "textbox_question": "题", "textbox_answer": "甲"}, None),
]
TRANSLATED = [
    (
        {"instruction": "a", "input": "b", "output": "c", "trans_instruction": "甲", "trans_input": "乙", "trans_output": "丙"},
        record("甲", "丙", "乙"),
    ),
    ({"trans_instruction": "甲", "trans_input": "", "trans_output": "丙"}, record("甲", "丙")),
    ({"instruction": "a", "input": "b", "output": "c", "trans_instruction": "甲", "trans_output": None}, None),
]
LEETCODE_MORE = {"task_type": "code", "program_lang": "python", "task_name_in_eng": "two-sum"}
LEETCODE = [
    (
        {
            "instruction": "写",
            "input": "题目：['第一段', \"第二'段\"]",
            "output": "['def f():\\n    pass', '说明']",
            **LEETCODE_MORE,
        },
        record("写", "def f():\n    pass\n\n说明", "题目：\n第一段\n\n第二'段"),
    ),
    (
        {"instruction": "写", "input": "", "output": "a[0] = [1, 2]", **LEETCODE_MORE},
        record("写", "a[0] = [1, 2]"),
    ),
    ({"instruction": "写", "input": "[1, 2]", "output": "[", **LEETCODE_MORE}, record("写", "[", "[1, 2]")),
]


def response(question, answer, fence="{}"):
    return {"response": fence.format(json.dumps({"Q": question, "A": answer}, ensure_ascii=False)).replace("~", "`")}


ROUNDS = [
    (
        {
            "entity": "月球",
            "round_0": response("甲", "乙"),
            "round_1": response("丙", "丁", "~~~json\n{}\n~~~"),
            "round_10": response("末问", "末答"),
            **{f"round_{number}": response(f"问{number}", f"答{number}") for number in range(2, 10)},
        },
        record("末问", "末答", history=[["甲", "乙"], ["丙", "丁"], *([f"问{n}", f"答{n}"] for n in range(2, 10))]),
    ),
    ({"round_0": response("甲", "乙", "~~~\n{}~~~ ")}, record("甲", "乙")),
    ({"round_0": response("甲", "乙"), "round_2": response("丙", "丁")}, record("丙", "丁", history=[["甲", "乙"]])),
    ({"round_0": response("甲", ["乙"])}, None),
    ({"round_0": {"response": '{"Q": "甲", "A": '}}, None),
    ({"round_0": {"response": "[]"}}, None),
    ({"round_0": {"response": {"Q": "甲", "A": "乙"}}}, None),
    ({"round_0": "甲"}, None),
    ({"round_0": response("甲", "")}, None),
    ({"round_0": response("甲", "乙"), "round_1": response(3, "丁")}, None),
]


def archive(items, mode="w:gz"):
    """A tar archive as the real one: a folder, one JSON file an item, not in the order of their names; and macOS's leavings."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        folder = tarfile.TarInfo("chat")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, item in enumerate(items):
            for name, data in (f"chat/{-number}.json", json.dumps(item).encode()), (f"chat/._{-number}.json", b"\0\5\26"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


COIG = {
    "human_value_alignment_instructions_part1.json": [
        ({"instruction": "甲", "input": "乙", "output": "丙"}, record("甲", "丙", "乙"))
    ],
    "human_value_alignment_instructions_part2.json": EXAM,
    "translated_instructions.jsonl": TRANSLATED,
    "exam_instructions.jsonl": EXAM,
    "leetcode_instructions.jsonl": LEETCODE,
    "counterfactural_correction_multi_round_chat.tar.gz": ROUNDS,
}


def write_coig(folder):
    folder.mkdir()
    for name, pairs in COIG.items():
        items = [item for item, _ in pairs]
        if name.endswith("part1.json"):
            (folder / name).write_text("\ufeff" + json.dumps(items, ensure_ascii=False, indent=2), "utf-8")
        elif name.endswith(".gz"):
            (folder / name).write_bytes(archive(items))
        else:
            (folder / name).write_text("\ufeff" + lines(items), "utf-8")


def expected(pairs):
    return [found for _, found in pairs if found]


def test_coig_all_six_files(prepare, tmp_path):
    write_coig(tmp_path / "raw")
    said = prepare("COIG").ok
    for name, pairs in COIG.items():
        found = records_in(tmp_path / "out" / f"{name.partition('.')[0]}.json")
        assert found == expected(pairs), name
    for cause in (
        "output is missing",
        "textbox_question is missing",
        "an exam field is no text",
        "a round whose Q or A is missing or no text",
        "a round's response is not JSON",
        "a round without response",
    ):
        assert cause in said
    tar = tmp_path / "raw" / "counterfactural_correction_multi_round_chat.tar.gz"
    assert f"1 mended, 3 kept: a round is missing, the others follow one another; first: {tar}, member chat/-2.json: " in said


@pytest.mark.parametrize("name", COIG)
def test_coig_one_file_and_strict(prepare, tmp_path, name):
    write_coig(tmp_path / "all")
    prepare("COIG", raw=tmp_path / "all" / name).ok  # noqa: B018
    out = tmp_path / "out" / f"{name.partition('.')[0]}.json"
    assert [file for file in (tmp_path / "out").iterdir()] == [out]
    assert records_in(out) == expected(COIG[name])
    strict = prepare("COIG", "--strict", raw=tmp_path / "all" / name)
    if len(expected(COIG[name])) < len(COIG[name]):
        assert "leave --strict out" in strict.error
    else:
        assert strict.ok


def test_coig_folder_with_some_of_the_files(prepare, tmp_path):
    write_coig(tmp_path / "raw")
    for name in COIG:
        if not name.startswith("translated"):
            (tmp_path / "raw" / name).unlink()
    said = prepare("COIG").ok
    assert "not there, and left out: human_value_alignment_instructions_part1, " in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["translated_instructions.json"]


def test_coig_archive_that_is_cut_off_or_none(prepare, tmp_path):
    raw = tmp_path / "counterfactural_correction_multi_round_chat.tar.gz"
    whole = archive([item for item, _ in ROUNDS] * 50)
    raw.write_bytes(whole[: len(whole) // 2])
    assert "cut off or damaged" in prepare("COIG", raw=raw).error
    raw.write_bytes(gzip.compress(b"no archive at all" * 100))
    assert "no tar archive" in prepare("COIG", raw=raw).error
    assert not (tmp_path / "out").exists()


def test_coig_uncompressed_archive(prepare, tmp_path):
    raw = tmp_path / "counterfactural_correction_multi_round_chat.tar"
    raw.write_bytes(archive([item for item, _ in ROUNDS], "w"))
    prepare("COIG", raw=raw).ok  # noqa: B018
    assert records_in(tmp_path / "out" / "counterfactural_correction_multi_round_chat.json") == expected(ROUNDS)


# ---- PsyQA


def psyqa(question, description, *answers):
    return {
        "question": question,
        "description": description,
        "keywords": "一,二",
        "answers": [{"answer_text": text, "has_label": False, "labels_sequence": None} for text in answers],
        "questionID": 7,
    }


def test_psyqa_six_variants(prepare, tmp_path):
    items = [
        psyqa("问一", "述一", "甲", "乙", "丙"),
        psyqa("问二", "", "丁"),
        psyqa("问三", "述三", "", "戊"),
        psyqa("问四", None, "己"),
        psyqa("问五", "述五"),
        psyqa("", "述六", "庚"),
        psyqa("问七", "述七", 3, "辛"),
        psyqa("问八", 5, "壬"),
        {**psyqa("问九", "述九"), "answers": "癸"},
    ]
    text = json.dumps(items, ensure_ascii=False, indent=4).replace("\n", "\r\n")
    (tmp_path / "raw").write_bytes(text.encode())
    said = prepare("psyQA").ok
    pairs = [("问一", "述一", "甲"), ("问一", "述一", "乙"), ("问一", "述一", "丙"), ("问二", "", "丁"), ("问三", "述三", "戊")]
    pairs += [("问四", "", "己"), ("问七", "述七", "辛")]
    first = [pairs[0], pairs[3], pairs[5]]
    for variant, chosen in enumerate([pairs, first] * 3):
        joined = [(f"{question} {description}".strip(), "", answer) for question, description, answer in chosen]
        alone = [(question, "", answer) for question, _, answer in chosen]
        rows = [alone, alone, joined, joined, chosen, chosen][variant]
        found = records_in(tmp_path / "out" / f"psyqa-{variant}.json")
        assert found == [record(question, answer, given) for question, given, answer in rows], variant
    for cause in ("output is empty", "2 dropped, 7 kept: answers are missing", "instruction is empty", "output is a number"):
        assert cause in said
    assert "1 dropped, 7 kept: description is no text" in said


# ---- BELLE


def prepared(prepare, tmp_path, name, content, options=(), file="raw.json"):
    (tmp_path / file).write_text(content, "utf-8", newline="")
    ended = prepare(name, *options, raw=tmp_path / file)
    return records_in(tmp_path / "out" / "raw.json"), ended.ok


def test_belle_single_turn(prepare, tmp_path):
    items = [
        {"instruction": "加一\n“9点”\n", "input": "", "output": "\n\n“10点”"},
        {"instruction": "问\nHuman: 引文", "input": "材料", "output": "答"},
        {"instruction": "问", "input": "", "output": "\n"},
    ]
    found, said = prepared(prepare, tmp_path, "belle", lines(items))
    assert found == [record("加一\n“9点”", "“10点”"), record("问\nHuman: 引文", "答", "材料")]
    assert "1 dropped, 2 kept: output is empty" in said


def test_belle_older_fields(prepare, tmp_path):
    found, _ = prepared(prepare, tmp_path, "belle", lines([{"input": "问", "target": "\n答"}]))
    assert found == [record("问", "答")]


def test_belle_dialogues_in_one_text(prepare, tmp_path):
    def item(instruction, output="\n末答"):
        return {"instruction": instruction, "input": "", "output": output}

    items = [
        item("Human:甲\nAssistant:乙\n第二行\n\n第三行\nHuman:丙，他说Human:好\nAssistant:"),
        item("Human: 单问\nAssistant:\n"),
        item("Human:甲\nAssistant:乙\nHuman:丙"),
        item("Human:甲\nHuman:丙\nAssistant:"),
        item("Human:甲\nAssistant:\nHuman:丙\nAssistant:"),
        item("Human:甲\nAssistant:", ""),
    ]
    found, said = prepared(prepare, tmp_path, "belle", lines(items))
    assert found == [
        record("丙，他说Human:好", "末答", history=[["甲", "乙\n第二行\n\n第三行"]]),
        record("单问", "末答"),
    ]
    assert "1 dropped, 2 kept: a dialogue that does not end with Assistant:" in said
    assert "1 dropped, 2 kept: a dialogue whose turns are out of order" in said
    assert "1 dropped, 2 kept: history holds an empty turn" in said
    assert "1 dropped, 2 kept: output is empty" in said


def test_belle_conversations(prepare, tmp_path):
    turns = [{"from": role, "value": text} for role, text in zip(["human", "assistant"] * 2, "甲乙丙丁", strict=True)]
    items = [{"id": "1", "conversations": turns}, {"id": "2", "conversations": turns[1:]}]
    found, said = prepared(prepare, tmp_path, "belle", lines(items))
    assert found == [record("丙", "丁", history=[["甲", "乙"]])]
    assert "1 dropped, 1 kept: a dialogue whose turns are out of order" in said


# ---- baize


def test_baize(prepare, tmp_path):
    opening = "The conversation between human and AI assistant.\n"
    items = [
        {
            "topic": "t",
            "input": opening + "[|Human|] 甲\n[|AI|] 乙\n\n1. 一\n2. 二\n[|Human|] 丙 [|AI|] ?\n[|AI|] 丁\n[|Human|] ",
        },
        {"topic": "t", "input": opening + "[|Human|] 甲\n[|AI|] 乙"},
        {"topic": "t", "input": opening + "[|Human|] 甲\n[|AI|] 乙\n[|Human|] 丙"},
        {"topic": "t", "input": opening + "[|AI|] 乙\n[|Human|] "},
        {"topic": "t", "input": opening + "[|Human|] 甲\n[|AI|] \n[|Human|] 丙\n[|AI|] 丁\n[|Human|] "},
        {"topic": "t", "input": opening},
        {"topic": "t", "input": None},
    ]
    found, said = prepared(prepare, tmp_path, "baize", json.dumps(items))
    assert found == [
        record("丙 [|AI|] ?", "丁", history=[["甲", "乙\n\n1. 一\n2. 二"]]),
        record("甲", "乙"),
    ]
    for cause in (
        "output is missing",
        "a dialogue whose turns are out of order",
        "history holds an empty turn",
        "a dialogue without turns",
        "input is missing or no text",
    ):
        assert f"1 dropped, 2 kept: {cause}" in said


def test_baize_alpaca_file_in_alpaca_format(prepare, tmp_path):
    found, _ = prepared(prepare, tmp_path, "baize", json.dumps([{"instruction": "a", "input": "b", "output": "c"}]))
    assert found == [record("a", "c", "b")]


# ---- Alpaca-GPT4


def test_alpaca_gpt4_and_truncated_answers(prepare, tmp_path):
    items = [
        record("一", "短，没有句号"),
        record("二", "长" * 200 + "。"),
        record("三", "长" * 201),
        record("四", "长" * 201 + "，"),
        record("五", "长" * 201 + "」\n"),
        record("六", "x" * 201 + "```"),
        record("七", "长" * 200),
    ]
    content = json.dumps(items, ensure_ascii=False, indent=4)
    found, said = prepared(prepare, tmp_path, "alpaca_gpt4", content)
    assert found == items
    assert "dropped" not in said
    found, said = prepared(prepare, tmp_path, "alpaca_gpt4", content, ["--drop_truncated"])
    assert [item["instruction"] for item in found] == ["一", "二", "五", "六", "七"]
    assert "2 dropped, 5 kept: output looks cut off" in said


# ---- Couplets


def write_couplets(folder, train, test):
    for name, pairs in (("train", train), ("test", test)):
        (folder / name).mkdir(parents=True)
        for half, file in enumerate(("in.txt", "out.txt")):
            text = "\n".join(" ".join(pair[half]) + " " for pair in pairs)
            (folder / name / file).write_text(text, "utf-8")


TRAIN = [("晚风摇树树还挺", "晨露润花花更红"), ("天，地", "日，月"), ("一", "二三"), ("晚风摇树树还挺", "晨露润花花更红")]
TEST = [("新居", "宏图")]


def test_couplets(prepare, tmp_path):
    write_couplets(tmp_path / "raw", TRAIN, TEST)
    said = prepare("couplets").ok
    train = [record(*pair) for pair in (TRAIN[0], TRAIN[1], TRAIN[3])]
    test = [record(*TEST[0])]
    assert records_in(tmp_path / "out" / "couplet-0.json") == train
    assert records_in(tmp_path / "out" / "couplet-1.json") == test
    assert records_in(tmp_path / "out" / "couplet-all.json") == train + test
    assert f"1 dropped, 3 kept: halves of different length; first: {tmp_path}/raw/train/in.txt, line 3" in said
    prepare("couplets", "--dedupe", "--instruction", "对下联").ok  # noqa: B018
    assert records_in(tmp_path / "out" / "couplet-0.json") == [record("对下联", second, first) for first, second in TRAIN[:2]]


def test_couplets_in_the_folder_that_the_archive_makes(prepare, tmp_path):
    write_couplets(tmp_path / "raw" / "couplet", TRAIN, TEST)
    prepare("couplets").ok  # noqa: B018
    assert len(records_in(tmp_path / "out" / "couplet-all.json")) == 4


def test_couplets_of_a_tsv_file(prepare, tmp_path):
    (tmp_path / "raw").write_text("\ufeff晚风，树\t晨露，花\r\n一\t二三\n没有制表符\n", "utf-8", newline="")
    said = prepare("couplets").ok
    assert records_in(tmp_path / "out" / "couplet-all.json") == [record("晚风，树", "晨露，花")]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["couplet-all.json"]
    assert "1 dropped, 1 kept: halves of different length" in said
    assert "1 dropped, 1 kept: not two halves with a tab between them" in said


def test_couplets_whose_files_do_not_match(prepare, tmp_path):
    write_couplets(tmp_path / "raw", TRAIN, TEST)
    out = tmp_path / "raw" / "train" / "out.txt"
    out.write_text("晨 露\n", "utf-8")
    assert f"{out}: ends before line 2" in prepare("couplets").error
    out.unlink()
    assert f"{out}: no such file" in prepare("couplets").error
    half = out.with_name("in.txt")
    assert f"{half}: holds one half of each couplet; name the folder" in prepare("couplets", raw=half).error
    with tarfile.open(tmp_path / "couplet.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "raw", "couplet")
    assert "couplet.tar.gz: is an archive; unpack it" in prepare("couplets", raw=tmp_path / "couplet.tar.gz").error
    assert not (tmp_path / "out").exists()


# ---- All sets: what the READMEs show, wrong files, bad input, kills


@pytest.mark.parametrize("name", SETS)
def test_readme_example_is_what_comes_out(prepare, tmp_path, name):
    text = (ROOT / "data" / name / "README.md").read_text("utf-8")
    example = text.partition("## 例子")[2].partition("## English")[0]
    blocks = re.findall(r"（`([^`]+)`[^\n]*\n\n```(?:json|text)\n(.*?)\n```", example, re.DOTALL)
    *raw, (output, shown) = blocks
    for file, content in raw:
        path = tmp_path / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        is_array = file.endswith(".json") and name in ("psyQA", "baize", "alpaca_gpt4")
        path.write_text(f"[{content}]" if is_array else f"{content}\n", "utf-8")
    if name == "couplets":
        (tmp_path / "raw" / "test").mkdir()
        for file in ("in.txt", "out.txt"):
            (tmp_path / "raw" / "test" / file).write_text("天 ", "utf-8")
    prepare(name).ok  # noqa: B018
    assert records_in(tmp_path / "out" / output)[0] == json.loads(shown)


def sample(name, folder):
    """A small good raw file (or folder) of a set."""
    if name == "couplets":
        write_couplets(folder / "couplets", TRAIN, TEST)
        return folder / "couplets"
    contents = {
        "alpaca_gpt4": ("alpaca_gpt4_data_zh.json", json.dumps([record("a", "b")])),
        "firefly": ("firefly-train-1.1M.jsonl", lines(firefly_items(20))),
        "COIG": ("exam_instructions.jsonl", lines([EXAM[0][0]])),
        "psyQA": ("PsyQA_full.json", json.dumps([psyqa("问", "述", "答")])),
        "belle": ("multiturn_chat_0.8M.json", lines([{"id": "1", "conversations": []}])),
        "baize": ("quora_chat_data.json", json.dumps([{"topic": "t", "input": "[|Human|] a\n[|AI|] b\n[|Human|] "}])),
    }
    file, content = contents[name]
    (folder / file).write_text(content)
    return folder / file


TITLES = {"alpaca_gpt4": "Alpaca-GPT4", "firefly": "Firefly", "psyQA": "PsyQA", "belle": "BELLE", "couplets": "Couplets"}


@pytest.mark.parametrize("other", [name for name in SETS if name not in ("couplets", "alpaca_gpt4")])
@pytest.mark.parametrize("name", SETS)
def test_file_of_another_set_is_recognised(prepare, tmp_path, name, other):
    if name == other:
        return
    error = prepare(name, raw=sample(other, tmp_path)).error
    assert f"this looks like {TITLES.get(other, other)}, not {TITLES.get(name, name)}: it has " in error
    assert not (tmp_path / "out").exists()


def test_wrong_set_says_what_it_has_and_lacks(prepare, tmp_path):
    error = prepare("psyQA", raw=sample("COIG", tmp_path)).error
    assert (
        "looks like COIG, not PsyQA: it has textbox_answer, textbox_question and lacks answers, description, question;" in error
    )
    (tmp_path / "raw").write_text(lines([{"prompt": "a", "completion": "b"}]))
    error = prepare("psyQA").error
    assert "this is not PsyQA: it has completion, prompt and lacks answers, description, question;" in error


@pytest.mark.parametrize(
    ("called", "doubt"),
    [
        ("Belle_open_source_1M.json", "it is called like a file of BELLE"),
        ("human_value_alignment_instructions_part1.json", "it is called like a file of COIG"),
        ("mine.json", "its name does not tell"),
        ("alpaca_gpt4_data_zh.json", ""),
    ],
)
def test_sets_whose_fields_are_the_same(prepare, tmp_path, called, doubt):
    """Only their names tell them apart; what a name says is said, and the file is taken as the user has it."""
    (tmp_path / called).write_text(json.dumps([record("问", "答")]))
    said = prepare("alpaca_gpt4", raw=tmp_path / called).ok
    notice = f"taken for Alpaca-GPT4, as asked; BELLE and COIG and baize have the same fields, and {doubt}"
    assert (notice in said) if doubt else ("taken for" not in said)
    assert records_in(tmp_path / "out" / called) == [record("问", "答")]


def test_dialogues_of_belle_are_no_single_turns_of_another_set(prepare, tmp_path):
    """Their fields are those of Alpaca-GPT4; read as such, a whole dialogue would be one instruction."""
    raw = tmp_path / "multiturn_chat_0.8M.json"
    raw.write_text(lines([record("Human:问一\nAssistant:答一\nHuman:问二\nAssistant:", "答二")]))
    error = prepare("alpaca_gpt4", raw=raw).error
    assert "looks like BELLE, not Alpaca-GPT4: it has input, instruction, output (a dialogue that begins with Human:)" in error
    assert prepare("belle", raw=raw).ok
    assert records_in(tmp_path / "out" / raw.name) == [record("问二", "答二", history=[["问一", "答一"]])]


def test_files_of_an_earlier_run_are_named(prepare, tmp_path):
    """Those to be replaced, and parts beyond the new number, which would be trained on a second time."""
    (tmp_path / "raw").write_text(lines(firefly_items(60)))
    assert "earlier run" not in prepare("firefly").ok
    raw = tmp_path / "out" / "firefly-train-1.1M.jsonl"  # no part, whatever its name
    raw.write_text(lines(firefly_items(60)))
    said = prepare("firefly", "--parts", 3, raw=raw).ok
    names = [f"firefly-train-{part}.json" for part in range(5)]
    assert f"will be replaced, as an earlier run wrote them: {', '.join(names[:3])}\n" in said
    assert f"stay from an earlier run, and do not go with what is written now: {', '.join(names[3:])}; delete them" in said
    assert len(records_in(tmp_path / "out" / names[4])) > 0


def test_couplets_of_an_earlier_run_are_named(prepare, tmp_path):
    (tmp_path / "raw").write_text("春\t秋\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "couplet-1.json").write_text("[]")
    assert "do not go with what is written now: couplet-1.json; delete them" in prepare("couplets").ok


def test_mostly_dirty_file_is_still_of_its_set(prepare, tmp_path):
    (tmp_path / "raw").write_text(lines([{"input": "a", "target": "b"}] * 5 + firefly_items(2)))
    assert "5 dropped, 2 kept: kind is missing" in prepare("firefly").ok


def broken(tmp_path, kind):
    """A raw path that no prepare.py can read."""
    raw = tmp_path / "bad" / "raw.json"
    raw.parent.mkdir()
    if kind == "link":
        raw.symlink_to("gone")
    elif kind == "empty folder":
        raw.mkdir()
    elif kind != "missing":
        contents = {
            "empty": b"",
            "blank": b"\n \n",
            "binary": bytes(range(256)) * 10,
            "UTF-16": '[{"kind": "a"}]'.encode("utf-16"),
            "empty array": b"[]",
            "cut off": b'[{"instruction": "a", "input": "", "output": "b"}, {"instr',
            "cut off gzip": gzip.compress(lines(firefly_items(50)).encode())[:300],
            "numbers": b"[1, 2, 3]",
            "deep": b"[" * 100_000,
            "text": "只是文字\n".encode(),
        }
        raw.write_bytes(contents[kind])
    return raw


BAD = [
    "missing",
    "link",
    "empty folder",
    "empty",
    "blank",
    "binary",
    "UTF-16",
    "empty array",
    "cut off",
    "cut off gzip",
    "numbers",
]


@pytest.mark.parametrize("kind", [*BAD, "deep", "text"])
@pytest.mark.parametrize("name", SETS)
def test_bad_input_is_one_line_and_leaves_nothing(prepare, tmp_path, name, kind):
    raw = broken(tmp_path, kind)
    error = prepare(name, raw=raw).error
    assert str(raw) in error
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".run")) == ["bad"]


@pytest.mark.parametrize("name", SETS)
def test_outputs_that_cannot_be_written(script, tmp_path, name):
    raw = sample(name, tmp_path)
    if name == "belle":
        raw.write_text(lines([record("a", "b")]))
    prepare = f"data/{name}/prepare.py"
    (tmp_path / "file").write_text("")
    assert (
        "is not a folder; give another --output_dir" in script(prepare, "--raw", raw, "--output_dir", tmp_path / "file").error
    )
    under = script(prepare, "--raw", raw, "--output_dir", tmp_path / "file" / "sub" / "sub").error
    assert f"{tmp_path / 'file'}: is not a folder" in under
    with locked(tmp_path / "out"):
        assert "in use by process" in script(prepare, "--raw", raw, "--output_dir", tmp_path / "out").error
    assert not (tmp_path / "out").exists()
    assert script(prepare, "--raw", raw, "--output_dir", tmp_path / "out").ok


@pytest.mark.parametrize("name", ["alpaca_gpt4", "baize", "belle"])
def test_raw_file_is_never_overwritten(script, tmp_path, name):
    raw = sample(name, tmp_path)
    if name == "belle":
        raw.write_text(lines([record("a", "b")]))
    before = raw.read_bytes()
    assert (
        "is the raw file itself; give another --output_dir"
        in script(f"data/{name}/prepare.py", "--raw", raw, "--output_dir", tmp_path).error
    )
    assert raw.read_bytes() == before


@pytest.mark.parametrize(("name", "stem"), [("COIG", "translated_instructions"), ("firefly", "firefly-train-1.1M")])
def test_two_raw_files_of_one_name(prepare, tmp_path, name, stem):
    (tmp_path / "raw").mkdir()
    for ending in ("json", "jsonl.gz"):
        (tmp_path / "raw" / f"{stem}.{ending}").write_text(lines([TRANSLATED[0][0]]))
    assert f"holds {stem}.json and {stem}.jsonl.gz, which are the same file twice; name one of them" in prepare(name).error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SETS)
def test_wrong_options(script, name):
    """Pitfall 13."""
    prepare = f"data/{name}/prepare.py"
    assert "--raw: missing" in script(prepare).error
    assert "--ouput_dir: no such option; did you mean --output_dir?" in script(prepare, "--raw", "x", "--ouput_dir", "y").error
    assert "--strict maybe: not true or false" in script(prepare, "--raw", "x", "--strict", "maybe").error


def test_runs_from_any_folder_by_its_docstring(script, tmp_path):
    for name in SETS:
        help = script(f"data/{name}/prepare.py", "--help", cwd=tmp_path).ok
        assert f"python data/{name}/prepare.py --raw" in help


@pytest.mark.parametrize("name", ["firefly", "psyQA", "couplets"])
def test_killed_at_any_moment_and_started_again(script, tmp_path, name):
    raw = tmp_path / "raw"
    if name == "couplets":
        write_couplets(raw, TRAIN * 3_000, TEST)
    elif name == "firefly":
        raw.write_text(lines(firefly_items(6_000)))
    else:
        raw.write_text(json.dumps([psyqa(f"问{number}", "述", "甲" * 50, "乙") for number in range(2_000)]))
    arguments = (f"data/{name}/prepare.py", "--raw", raw, "--output_dir")
    start = time.time()
    assert script(*arguments, tmp_path / "whole").ok
    seconds = time.time() - start
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    draw = random.Random(name)
    for _ in range(6):
        running = script.start(*arguments, tmp_path / "killed")
        time.sleep(draw.uniform(0, seconds))
        running.kill()
        os.waitpid(running.pid, 0)
        if (tmp_path / "killed").exists():
            for file in (tmp_path / "killed").glob("*.json"):
                assert file.read_bytes() == whole[file.name]
    assert script(*arguments, tmp_path / "killed").ok
    assert {file.name: file.read_bytes() for file in (tmp_path / "killed").iterdir()} == whole


def module(name):
    """A prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


KEYS = re.findall(
    r"\w+",
    "kind input target category conversation textbox_q_instruction textbox_q_context textbox_question textbox_answer "
    "textbox_answer_analysis trans_instruction trans_input trans_output instruction output task_type round_0 round_1 response "
    "topic conversations messages history system human assistant from value Q A",
)
TEXTS = st.sampled_from(
    [
        "",
        "a",
        "[",
        "['a']",
        "[[",
        "null",
        "Human:a\nAssistant:",
        "Human:",
        "[|Human|] a\n[|AI|] b",
        '{"Q": "a", "A": "b"}',
        "human",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=10,
)
MODULES = {name: module(name) for name in ("alpaca_gpt4", "firefly", "COIG", "belle", "baize")}
CONVERTERS = [
    MODULES["alpaca_gpt4"].whole,
    MODULES["firefly"].single,
    MODULES["firefly"].turns,
    MODULES["COIG"].exam,
    MODULES["COIG"].translated,
    MODULES["COIG"].leetcode,
    MODULES["COIG"].rounds,
    MODULES["belle"].single_or_dialogue,
    MODULES["belle"].older,
    MODULES["baize"].turns,
]


@pytest.mark.parametrize("convert", CONVERTERS, ids=lambda convert: f"{convert.__module__}.{convert.__name__}")
@settings(max_examples=150, deadline=None)
@given(item=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=10))
def test_converters_give_a_record_or_say_why_not(convert, item):
    try:
        found = convert(item)
    except Dirty as dirt:
        assert str(dirt)
    else:
        assert isinstance(found, (dict, tuple))


def test_benchmark_runs_and_finds_the_plain_recipes_files_equal():
    command = [sys.executable, ROOT / "benchmarks" / "data.py", "--share", "0.001", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] is True
    assert "ours / reading, time" in found["ratios"]
