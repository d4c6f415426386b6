"""utils/datasets/cleaning.py and data/clean.py: what goes, what is masked, and that every one of these is counted."""

import json
import random

import numpy as np
import psutil
import pytest

from utils.datasets.cleaning import (
    PERMUTATIONS,
    Contamination,
    candidates,
    is_id_number,
    language_of,
    mask_personal,
    normalized,
    shingles,
    signature,
    similarity,
)

POEM = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。请把这首诗翻译成现代汉语，并说说作者是谁。"
ID = "11010519491231002X"  # the example of GB 11643-1999


def masked(text):
    record, counts = mask_personal({"instruction": text, "input": "", "output": "", "history": [[text, "好"]]})
    assert record["history"] == [[record["instruction"], "好"]]
    return record["instruction"], {mask: count // 2 for mask, count in counts.items()}


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"我的身份证是{ID}。", "我的身份证是[身份证号]。"),
        (f"我的身份证是{ID.lower()}。", "我的身份证是[身份证号]。"),
        ("订单110105194912310021号", "订单110105194912310021号"),  # the check digit is wrong
        ("打13812345678，或+86 138-1234-5678", "打[电话]，或[电话]"),
        ("座机010-12345678", "座机[电话]"),
        ("请写信到zhang.san+a@mail.example.com.cn谢谢", "请写信到[邮箱]谢谢"),
        ("圆周率3.14159265358979，编号213812345678901", "圆周率3.14159265358979，编号213812345678901"),
        ("@某人，a@b", "@某人，a@b"),
    ],
)
def test_personal_numbers_are_masked_and_counted(text, expected):
    found, counts = masked(text)
    assert found == expected and sum(counts.values()) == found.count("[")


def test_the_check_digit_is_that_of_the_standard():
    assert is_id_number(ID) and not is_id_number(ID[:-1] + "1") and is_id_number("440524188001010014")


@pytest.mark.parametrize(
    "text, language",
    [("今天天气很好", "zh"), ("用 Python 写一个 hello world 程序", "zh"), ("The sky is blue.", "en"), ("Привет", "other"),
     ("㐀㐁㐂㒵", "zh"), ("Привет, hello world", "other"),
     ("123 + 456", "other"), ("", "other"), ("答：1234567890123456", "zh"), ("x = 1234567890", "en")],
)  # fmt: skip
def test_languages(text, language):
    assert language_of(text) == language


def test_similarity_is_the_share_of_common_runs():
    assert normalized("Ａb，c！ 1_") == "abc1"
    assert len(shingles("一二三四五六")) == 2 and len(shingles("一二")) == 1 and len(shingles("")) == 1
    assert similarity("一二三四五六七", "一二三四五六八") == pytest.approx(2 / 4)  # 一…五, 二…六 of four runs in all
    assert similarity(POEM, POEM.replace("，", " ")) == 1 and similarity(POEM, "今天天气很好，我们去公园。") == 0


def test_signatures_estimate_the_share():
    one, other = POEM * 3, POEM * 3 + "此外再写一首类似的五言绝句，题目自拟，注意平仄与押韵。"
    assert np.mean(signature(one) == signature(other)) == pytest.approx(similarity(one, other), abs=0.2)
    assert signature(one).dtype == np.uint32 and signature(one).shape == (PERMUTATIONS,)


def test_pairs_that_share_a_band_are_found_with_the_first_of_them(tmp_path, monkeypatch):
    numbers = random.Random(0)
    texts = ["".join(chr(numbers.randint(0x4E00, 0x9FFF)) for _ in range(80)) for _ in range(200)]
    texts += [text[:70] + "改" + text[71:] for text in texts[:20]] + texts[:1]
    (tmp_path / "signatures").write_bytes(b"".join(signature(text).tobytes() for text in texts))
    found = set(candidates(tmp_path / "signatures"))
    assert {(0, 220), *((number, 200 + number) for number in range(20))} <= found and len(found) < 60
    assert all(earlier < later for earlier, later in found)
    monkeypatch.setattr("utils.datasets.cleaning.PIECE", 64)  # fewer than there are
    assert set(candidates(tmp_path / "signatures")) == found


def test_contamination_is_a_shared_run_or_a_whole_short_question():
    index = Contamination(["请问“欲穷千里目”后面接哪一句？", "你是谁？"], 8)
    record = {"instruction": "背诗", "input": "", "output": "欲穷千里目，后面接哪一句，你知道吗"}
    assert index.hit(record) == "请问“欲穷千里目”后面接哪一句？"
    assert index.hit(record | {"output": "欲穷千里目，更上一层楼"}) is None  # five in a row, not eight
    assert index.hit({"instruction": "你是谁", "output": "我是梦想家"}) == "你是谁？"
    assert index.hit({"instruction": "你是谁的助手", "output": "你是谁"}) is None
    assert index.hit({"instruction": "你是谁", "output": "我", "history": [["你好", "好"]]}) == "你是谁？"
    assert index.hit({"instruction": "你好", "output": "好", "history": [["你是谁", "我"]]}) is None
    assert index.hit({"instruction": "你好", "output": "好", "history": [["欲穷千里目，后面接哪一句", "我"]]})
    assert Contamination(["甲乙丙丁戊", "甲乙丙丁己"], 4).hit({"instruction": "甲乙丙丁", "output": ""}) == "甲乙丙丁戊"


def test_the_script_drops_masks_counts_and_can_be_repeated(script, tmp_path):
    records = [
        {"instruction": "介绍北京", "input": "", "output": f"北京是&quot;首都，电话13812345678。{POEM}"},
        {"instruction": "介绍北京", "input": "", "output": f"北京是首都，电话13812345678。{POEM}！"},
        {"instruction": "Say hello", "input": "", "output": "hello, my friend"},
        {"instruction": "考题：一加一等于几，请写出计算的过程", "input": "", "output": "一加一等于二"},
        {"instruction": "空", "input": "", "output": "好"},
        *({"instruction": f"考题：一加一等于几，请写出计算的过程{end}", "input": "", "output": "二二"} for end in "甲乙丙"),
        {"instruction": "太长", "input": "13812345678" + "长" * 300, "output": "长短"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    asked = {"instruction": "一加一等于几？", "input": "请写出计算"}  # of eleven characters that count
    (tmp_path / "test.json").write_text(json.dumps([asked]), "utf-8")
    data, clean = tmp_path / "data.json", tmp_path / "clean.json"
    argv = ["--data_path", data, "--output_path", clean, "--against", tmp_path / "test.json",
            "--languages", "zh", "--ngram", 11, "--fix_texts", "entities", "--least_characters", 2,
            "--most_characters", 200]  # fmt: skip
    out = script("data/clean.py", *argv).ok()
    kept = json.loads((tmp_path / "clean.json").read_text("utf-8"))
    assert [record["output"][:14] for record in kept] == ['北京是"首都，电话[电话]。']
    report = json.loads((tmp_path / "clean.report.json").read_text("utf-8"))
    asked = [{"record": records[place]["instruction"], "test question": "一加一等于几？\n请写出计算"} for place in (3, 5, 6, 7)]
    causes = {
        "shares text with a test question": asked,
        "answer in another language (en)": ["hello, my friend"],
        "answer shorter than --least_characters": ["空"],
        "longer than --most_characters": ["太长"],
        "near-duplicate of an earlier record": [["介绍北京", "介绍北京"]],
    }
    assert report["options"]["most_characters"] == 200 and report | {"options": 0} == {
        "options": 0, "read": 9, "kept": 1, "dropped": {cause: len(examples) for cause, examples in causes.items()},
        "masked": {"[电话]": 2}, "examples": causes,
    }  # fmt: skip
    said = [f"dropped: {cause}: {len(examples)}" for cause, examples in causes.items()]
    assert [line for line in out.splitlines() if line.startswith("dropped")] == said
    shown = [f"  {json.dumps(example, ensure_ascii=False)}" for examples in causes.values() for example in examples[:3]]
    assert [line for line in out.splitlines() if line.startswith("  ")] == shown
    assert out.splitlines()[-2:] == ["masked: [电话]: 2", f"{clean}: 1 of 9 records"] and "1 test questions to compare" in out
    left = {file.name for file in tmp_path.iterdir() if not file.name.startswith(".run")}
    assert left == {"data.json", "test.json", "clean.json", "clean.report.json"}
    assert "already exists; give --overwrite" in script("data/clean.py", *argv).error
    assert "swap them" in script("data/clean.py", *argv[:-1], 1, "--overwrite").error
    assert "is a folder; name a file" in script("data/clean.py", *argv, "--output_path", tmp_path, "--overwrite").error
    (tmp_path / "link.json").symlink_to(data)
    for same in (data, tmp_path / "link.json"):
        assert "is also an input" in script("data/clean.py", *argv[:2], "--output_path", same, "--overwrite").error
    data.write_text(
        json.dumps([records[1], records[1], records[1] | {"output": records[1]["output"].removesuffix("！")}]), "utf-8"
    )
    script("data/clean.py", *argv[:4], "--against", "[]", "--near_duplicates", 1, "--overwrite").ok()
    assert len(json.loads(clean.read_text("utf-8"))) == 1, "punctuation makes no difference"


def test_its_workers_end_with_it_even_if_it_is_killed(script, tmp_path):
    lines = [json.dumps({"instruction": f"第{n}问", "output": f"{n}答" * 50}, ensure_ascii=False) for n in range(20_000)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), "utf-8")
    running = script.start("data/clean.py", "--data_path", tmp_path / "data.jsonl", "--output_path", tmp_path / "clean.json")
    running.wait_until(psutil.Process(running.pid).children)
    workers = psutil.Process(running.pid).children()
    running.kill()
    running.wait()
    assert not psutil.wait_procs(workers, timeout=60)[1]
