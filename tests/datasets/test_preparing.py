"""data/<set>/prepare.py, all sets alike: the READMEs, files of another set, bad input, what a kill leaves, memory."""

import gzip
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_sets import (
    EXAM,
    TEST,
    TRAIN,
    TRANSLATED,
    firefly_items,
    lines,
    psyqa,
    record,
    records_in,
    response,
    write_couplets,
)
from scripting import ROOT

from utils.datasets.item_formats import InvalidRecord
from utils.files import locked

SETS = ("alpaca_gpt4", "firefly", "COIG", "psyQA", "belle", "baize", "couplets")


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
    prepare(name).ok()
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
        ("Belle_open_source_1M.json", "it is named like a file of BELLE"),
        ("human_value_alignment_instructions_part1.json", "it is named like a file of COIG"),
        ("mine.json", "its name does not tell"),
        ("alpaca_gpt4_data_zh.json", ""),
    ],
)
def test_sets_whose_fields_are_the_same(prepare, tmp_path, called, doubt):
    """Only their names tell them apart; what a name says is said, and the file is taken as the user has it."""
    (tmp_path / called).write_text(json.dumps([record("问", "答")]))
    said = prepare("alpaca_gpt4", raw=tmp_path / called).ok()
    notice = f"taken for Alpaca-GPT4, as asked; BELLE and COIG and baize have the same fields, and {doubt}"
    assert (notice in said) if doubt else ("taken for" not in said)
    assert records_in(tmp_path / "out" / called) == [record("问", "答")]


def test_dialogues_of_belle_are_no_single_turns_of_another_set(prepare, tmp_path):
    """Their fields are those of Alpaca-GPT4; read as such, a whole dialogue would be one instruction."""
    raw = tmp_path / "multiturn_chat_0.8M.json"
    raw.write_text(lines([record("Human:问一\nAssistant:答一\nHuman:问二\nAssistant:", "答二")]))
    error = prepare("alpaca_gpt4", raw=raw).error
    assert "looks like BELLE, not Alpaca-GPT4: it has input, instruction, output (a dialogue that begins with Human:)" in error
    assert prepare("belle", raw=raw).ok()
    assert records_in(tmp_path / "out" / raw.name) == [record("问二", "答二", history=[["问一", "答一"]])]


def test_files_of_an_earlier_run_are_named(prepare, tmp_path):
    """Those to be replaced, and parts beyond the new number, which would be trained on a second time."""
    (tmp_path / "raw").write_text(lines(firefly_items(60)))
    assert "earlier run" not in prepare("firefly").ok()
    raw = tmp_path / "out" / "firefly-train-1.1M.jsonl"  # no part, whatever its name
    raw.write_text(lines(firefly_items(60)))
    said = prepare("firefly", "--parts", 3, raw=raw).ok()
    names = [f"firefly-train-{part}.json" for part in range(5)]
    assert f"files of an earlier run, replaced once the new ones are complete: {', '.join(names[:3])}\n" in said
    assert f"files of an earlier run that do not belong to the new ones: {', '.join(names[3:])}; delete them" in said
    assert len(records_in(tmp_path / "out" / names[4])) > 0


def test_couplets_of_an_earlier_run_are_named(prepare, tmp_path):
    (tmp_path / "raw").write_text("春\t秋\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "couplet-1.json").write_text("[]")
    assert "do not belong to the new ones: couplet-1.json; delete them" in prepare("couplets").ok()


def test_mostly_dirty_file_is_still_of_its_set(prepare, tmp_path):
    (tmp_path / "raw").write_text(lines([{"input": "a", "target": "b"}] * 5 + firefly_items(2)))
    assert "5 dropped, 2 kept: kind is missing" in prepare("firefly").ok()


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


def test_what_files_hold_cannot_steer_the_terminal(prepare, tmp_path):
    items = [{"kind": "\x1b[31mNLI", "input": "a", "target": "b"}]
    (tmp_path / "raw").write_text(lines(items))
    assert "\\x1b[31mNLI 1 = 1" in re.sub(" +", " ", prepare("firefly", "--parts", 1).ok())
    (tmp_path / "raw").write_text(lines([{"\x1b[31m": 1}]))
    assert "it has \\x1b[31m and lacks" in prepare("firefly").error
    raw = tmp_path / "counterfactural_correction_multi_round_chat.tar"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        good = json.dumps({"round_0": response("a", "b")}).encode()
        for name, data in ("\x1b[31m\udcff.json", b"{}"), ("b.json", good), ("._b.json", b"\0Mac"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("c.json")  # which is left out
        link.type, link.linkname = tarfile.SYMTYPE, "b.json"
        tar.addfile(link)
    raw.write_bytes(content.getvalue())
    assert "member \\x1b[31m\\udcff.json" in prepare("COIG", raw=raw).ok()


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
    assert script(prepare, "--raw", raw, "--output_dir", tmp_path / "out").ok()


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
        help = script(f"data/{name}/prepare.py", "--help", cwd=tmp_path).ok()
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
    assert script(*arguments, tmp_path / "whole").ok()
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
    assert script(*arguments, tmp_path / "killed").ok()
    assert {file.name: file.read_bytes() for file in (tmp_path / "killed").iterdir()} == whole


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


@settings(max_examples=150, deadline=None)
@given(item=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=10))
def test_converters_give_a_record_or_say_why_not(item):
    for convert in CONVERTERS:
        try:
            found = convert(item)
        except InvalidRecord as dirt:
            assert str(dirt)
        else:
            assert isinstance(found, (dict, tuple)), f"{convert.__module__}.{convert.__name__}"


@pytest.mark.slow
def test_benchmark_runs_and_finds_the_plain_recipes_files_equal():
    command = [sys.executable, ROOT / "benchmarks" / "data.py", "--share", "0.001", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] is True
    assert "ours / reading, time" in found["ratios"]
