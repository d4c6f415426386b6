"""data/<set>/prepare.py, set by set: raw files in their real shapes, oddities included, and what comes out and is said."""

import collections
import gzip
import json
import math
import re

import pytest
from raw_sets import (
    COIG,
    ROUNDS,
    archive,
    firefly_items,
    lines,
    psyqa,
    record,
    records_in,
    write_coig,
)


def prepared(prepare, tmp_path, name, content, options=(), file="raw.json"):
    (tmp_path / file).write_text(content, "utf-8", newline="")
    ended = prepare(name, *options, raw=tmp_path / file)
    return records_in(tmp_path / "out" / "raw.json"), ended.ok()


# ---- Firefly


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
    said = prepare("firefly", "--parts", parts).ok()
    assert [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(parts)] == cut(items, parts)
    assert len(list((tmp_path / "out").iterdir())) == parts
    totals = collections.Counter(item["kind"] for item in items)
    for kind, total in totals.items():
        (row,) = re.findall(rf"^{kind} +([\d,]+) = ([\d, +]+)$", said, re.MULTILINE)
        assert int(row[0].replace(",", "")) == total == sum(int(n.replace(",", "")) for n in row[1].split(" + "))
    assert f"{len(items):,} records of {len(totals)} kinds; the parts' totals add up to these, as verified" in said
    named = re.findall(r"^(\w+) +[\d,]+ = ", said, re.MULTILINE)
    assert [totals[kind] for kind in named] == sorted(totals.values(), reverse=True)


def test_firefly_says_how_many_kinds_a_part_has_and_cuts_into_no_more_than_a_hundred(prepare, tmp_path):
    items = [{"kind": kind, "input": f"{n}", "target": "答"} for n, kind in enumerate("aaab")]
    (tmp_path / "raw").write_text(lines(items))
    said = prepare("firefly", "--parts", 2).ok()
    told = (
        f"{tmp_path}/out/firefly-train-{part}.json: {count}"
        for part, count in enumerate(("3 records of 2 kinds", "1 records of 1 kinds"))
    )
    assert all(f"{line}\n" in said for line in told)
    assert "--parts 101" in prepare("firefly", "--parts", 101).error


def test_firefly_shares_go_on_where_the_index_is_read_in_parts(prepare, tmp_path):
    items = [{"kind": "ab"[number % 3 == 0], "input": f"{number}", "target": "答"} for number in range(9000)]  # 8192 at a time
    (tmp_path / "raw").write_text(lines(items))
    prepare("firefly", "--parts", 2).ok()
    assert [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(2)] == cut(items, 2)


def test_firefly_with_fewer_records_than_parts(prepare, tmp_path):
    items = [{"kind": "NLI", "input": "a", "target": "b"}, {"kind": "NLI", "input": "c", "target": "d"}]
    (tmp_path / "raw").write_text(lines(items))
    prepare("firefly").ok()
    found = [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(5)]
    assert found == [[record("a", "b")], [record("c", "d")], [], [], []]


def test_firefly_gzipped_with_byte_order_mark_and_crlf_in_the_default_folder(script, tmp_path):
    items = firefly_items(60)
    raw = tmp_path / "downloads" / "firefly-train-1.1M.jsonl.gz"
    raw.parent.mkdir()
    raw.write_bytes(gzip.compress(("\ufeff" + lines(items).replace("\n", "\r\n")).encode()))
    for environment, folder in ({}, tmp_path / "datasets"), ({"DATA_DIR": str(tmp_path / "data")}, tmp_path / "data"):
        script("data/firefly/prepare.py", "--raw", "downloads", "--strict", cwd=tmp_path, **environment).ok()
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
        b"\xff\xfe\xff",
        b"[]",
    ]
    (tmp_path / "raw").write_bytes(b"\n".join([*(json.dumps(item).encode() for item in good), *bad, bad[0]]) + b"\n")
    said = prepare("firefly").ok()
    assert [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(5)] == cut(good, 5)
    for count, cause, line in [
        (2, "kind is missing", 41),
        (1, "kind is not text", 42),
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
    said = prepare("firefly", "--parts", 1).ok()
    assert records_in(tmp_path / "out" / "firefly-train-0.json") == [
        record("丙", "丁", history=[["甲", "乙"]]),
        record("甲", "乙"),
    ]
    assert "1 dropped, 2 kept: output is missing" in said
    assert "1 dropped, 2 kept: conversation is not a list of rounds" in said


def test_dedupe_drops_the_same_record_once_more(prepare, tmp_path):
    items = firefly_items(30)
    (tmp_path / "raw").write_text(lines(items[:20] + items))
    said = prepare("firefly", "--dedupe").ok()
    assert [records_in(tmp_path / "out" / f"firefly-train-{part}.json") for part in range(5)] == cut(items, 5)
    assert f"20 dropped, 30 kept: the same as an earlier record; first: {tmp_path / 'raw'}, line 21: " in said
    assert "line 21: the same as an earlier record" in prepare("firefly", "--dedupe", "--strict").error


# ---- COIG


def expected(pairs):
    return [found for _, found in pairs if found]


def test_coig_all_six_files(prepare, tmp_path):
    write_coig(tmp_path / "raw")
    said = prepare("COIG").ok()
    for name, pairs in COIG.items():
        found = records_in(tmp_path / "out" / f"{name.partition('.')[0]}.json")
        assert found == expected(pairs), name
    for cause in (
        "output is missing",
        "textbox_question is missing",
        "an exam field is not text",
        "a round whose Q or A is missing or no text",
        "a round's response is not JSON",
        "a round without response",
    ):
        assert cause in said
    tar = tmp_path / "raw" / "counterfactural_correction_multi_round_chat.tar.gz"
    assert f"2 repaired, 4 kept: a round is missing, the others follow one another; first: {tar}, member chat/-2.json: " in said


@pytest.mark.parametrize("name", COIG)
def test_coig_one_file_and_strict(prepare, tmp_path, name):
    write_coig(tmp_path / "all")
    prepare("COIG", raw=tmp_path / "all" / name).ok()
    out = tmp_path / "out" / f"{name.partition('.')[0]}.json"
    assert [file for file in (tmp_path / "out").iterdir()] == [out]
    assert records_in(out) == expected(COIG[name])
    strict = prepare("COIG", "--strict", raw=tmp_path / "all" / name)
    if len(expected(COIG[name])) < len(COIG[name]):
        assert "leave --strict out" in strict.error
    else:
        assert strict.ok()


def test_coig_folder_with_some_of_the_files(prepare, tmp_path):
    write_coig(tmp_path / "raw")
    for name in COIG:
        if not name.startswith("translated"):
            (tmp_path / "raw" / name).unlink()
    said = prepare("COIG").ok()
    assert "missing, and left out: human_value_alignment_instructions_part1, " in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["translated_instructions.json"]


def test_coig_archive_that_is_cut_off_or_none(prepare, tmp_path):
    raw = tmp_path / "counterfactural_correction_multi_round_chat.tar.gz"
    whole = archive([item for item, _ in ROUNDS] * 50)
    raw.write_bytes(whole[: len(whole) // 2])
    assert "cut off or damaged" in prepare("COIG", raw=raw).error
    raw.write_bytes(gzip.compress(b"no archive at all" * 100))
    assert "not a tar archive" in prepare("COIG", raw=raw).error
    assert not (tmp_path / "out").exists()


def test_coig_uncompressed_archive(prepare, tmp_path):
    raw = tmp_path / "counterfactural_correction_multi_round_chat.tar"
    raw.write_bytes(archive([item for item, _ in ROUNDS], "w"))
    prepare("COIG", raw=raw).ok()
    assert records_in(tmp_path / "out" / "counterfactural_correction_multi_round_chat.json") == expected(ROUNDS)


# ---- PsyQA


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
    said = prepare("psyQA").ok()
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
    assert "1 dropped, 7 kept: description is not text" in said


# ---- BELLE


def test_belle_single_turn(prepare, tmp_path):
    items = [
        {"instruction": "加一\n“9点”\n", "input": "", "output": "\n\n“10点”"},
        {"instruction": "问\nHuman: 引文", "input": "材料", "output": "\n  缩进的答 \n"},
        {"instruction": "问", "input": "", "output": "\n"},
    ]
    found, said = prepared(prepare, tmp_path, "belle", lines(items))
    assert found == [record("加一\n“9点”", "“10点”"), record("问\nHuman: 引文", "  缩进的答", "材料")]
    assert "1 dropped, 2 kept: output is empty" in said


def test_belle_older_fields(prepare, tmp_path):
    found, _ = prepared(prepare, tmp_path, "belle", lines([{"input": "问", "target": "\n答"}]))
    assert found == [record("问", "答")]


def test_most_of_the_first_items_say_what_a_file_is(prepare, tmp_path):
    items = [{"input": "旧", "target": "答"}, *({"instruction": f"问{n}", "input": "", "output": "答"} for n in range(2))]
    found, said = prepared(prepare, tmp_path, "belle", lines(items))
    assert found == [record("问0", "答"), record("问1", "答")] and "1 dropped, 2 kept" in said


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
        item("Human:甲 Assistant:乙\nHuman:丙\nAssistant:"),
        item("Human:甲\nAssistant:") | {"input": "材料"},
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
    assert "1 dropped, 2 kept: a speaker's mark inside a turn" in said
    assert "1 dropped, 2 kept: a dialogue with an input beside it" in said


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
            "input": opening + "[|Human|] 甲\n[|AI|] 乙\n\n1. 一\n2. 二\n[|Human|] 丙\n[|AI|] 丁\n[|Human|] ",
        },
        {"topic": "t", "input": opening + "[|Human|] 甲 [|AI|] ?\n[|AI|] 乙\n[|Human|] 丙\n[|AI|] 丁\n[|Human|] "},
        {"topic": "t", "input": opening + "[|Human|] 甲\n[|AI|] 乙"},
        {"topic": "t", "input": opening + "[|Human|] 甲\n[|AI|] 乙\n[|Human|] 丙"},
        {"topic": "t", "input": opening + "[|AI|] 乙\n[|Human|] "},
        {"topic": "t", "input": opening + "[|Human|] 甲\n[|AI|] \n[|Human|] 丙\n[|AI|] 丁\n[|Human|] "},
        {"topic": "t", "input": opening},
        {"topic": "t", "input": None},
    ]
    found, said = prepared(prepare, tmp_path, "baize", json.dumps(items))
    assert found == [
        record("丙", "丁", history=[["甲", "乙\n\n1. 一\n2. 二"]]),
        record("甲", "乙"),
    ]
    for cause in (
        "a speaker's mark inside a turn",
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
    items = [record(sign, "长" * 201 + sign) for sign in "。！？…—.!?\"'”’」』）)】]》>}`|~*、，：；,:;"]
    found, _ = prepared(prepare, tmp_path, "alpaca_gpt4", json.dumps(items), ["--drop_truncated"])
    assert "".join(item["instruction"] for item in found) == "。！？…—.!?\"'”’」』）)】]》>}`|~*"


# ---- Couplets
