"""Raw files of the data sets in their real shapes, with what must come of them, for the tests of data/<set>/prepare.py."""

import io
import json
import random
import tarfile

import pytest


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


@pytest.fixture(name="prepare")
def fixture_prepare(script, tmp_path):
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
        record("写", "def f():\n    pass\n\n说明", "题目：['第一段', \"第二'段\"]"),
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
    ({"round_1": response("甲", "乙")}, record("甲", "乙")),
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


# ---- PsyQA


def psyqa(question, description, *answers):
    return {
        "question": question,
        "description": description,
        "keywords": "一,二",
        "answers": [{"answer_text": text, "has_label": False, "labels_sequence": None} for text in answers],
        "questionID": 7,
    }


# ---- Couplets


def write_couplets(folder, train, test):
    for name, pairs in (("train", train), ("test", test)):
        (folder / name).mkdir(parents=True)
        for half, file in enumerate(("in.txt", "out.txt")):
            text = "\n".join(" ".join(pair[half]) + " " for pair in pairs)
            (folder / name / file).write_text(text, "utf-8")


TRAIN = [("晚风摇树树还挺", "晨露润花花更红"), ("天，地", "日，月"), ("一", "二三"), ("晚风摇树树还挺", "晨露润花花更红")]
TEST = [("新居", "宏图")]
