"""Raw files of the seven data sets that no prepare.py can use; more in tests/datasets/test_preparing.py."""

import gzip
import io
import json
import tarfile

import pytest
from cases import has
from test_bad_files import make

DIALOGUE = "counterfactural_correction_multi_round_chat"
NAMES = {  # a file that each set knows by its name, and an item of it
    "alpaca_gpt4": ("alpaca_gpt4_data_zh.json", {"instruction": "a", "input": "", "output": "b"}),
    "baize": ("quora_chat_data.json", {"topic": "t", "input": "[|Human|] a\n[|AI|] b\n[|Human|] "}),
    "belle": ("Belle_open_source_0.5M.json", {"instruction": "a", "input": "", "output": "b"}),
    "COIG": ("exam_instructions.jsonl", {"textbox_q_instruction": "a", "textbox_question": "b", "textbox_answer": "c"}),
    "couplets": ("couplets.tsv", None),
    "firefly": ("firefly-train-1.1M.jsonl", {"kind": "NLI", "input": "a", "target": "b"}),
    "psyQA": ("PsyQA_full.json", {"question": "a", "description": "b", "answers": [{"answer_text": "c"}]}),
}
WITH_ITEMS = [name for name, (_, item) in NAMES.items() if item]
KINDS = ["a link to itself", "a pipe", "a socket", "an endless device", "memory"]
KINDS += ["a page of HTML", "a zip", "zeros", "gzipped nothing", "two lists", "Python, not JSON"]


def prepare(refused, name, options):
    """The line with which a set's prepare.py refuses."""
    return refused(f"data/{name}/prepare.py", f"--output_dir {{tmp}}/out {options}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_raw_file(refused, tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    raw = make(tmp_path / "raw.json", kind)
    has(prepare(refused, name, f"--raw {raw}"), ("raw.json", ";"))


@pytest.mark.parametrize("kind", ["a broken link", "a pipe", "empty", "a folder"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_whose_file_is_none(refused, tmp_path, name, kind):
    (tmp_path / "raw").mkdir()
    make(tmp_path / "raw" / NAMES[name][0], kind)
    has(prepare(refused, name, "--raw {tmp}/raw"), ("raw", ";"))


VALUES = {"null": None, "a number": 5, "a list": ["a"], "an object": {"a": "b"}, "nothing": ""}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", WITH_ITEMS)
def test_items_of_the_right_keys_with_wrong_values(refused, tmp_path, name, kind):
    file, item = NAMES[name]
    (tmp_path / file).write_text(json.dumps([dict.fromkeys(item, VALUES[kind])] * 3))
    has(prepare(refused, name, f"--raw {{tmp}}/{file}"), (f"{file}: no record in it can be used", ": 3)", "see data/README.md"))


@pytest.mark.parametrize("name", WITH_ITEMS)
def test_the_first_bad_item_ends_a_strict_run(refused, tmp_path, name):
    file, item = NAMES[name]
    (tmp_path / file).write_text("".join(json.dumps(one) + "\n" for one in (item, item, dict.fromkeys(item), item)))
    has(prepare(refused, name, f"--raw {{tmp}}/{file} --strict"), (f"{file}, line 3: ", "leave --strict out"))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("firefly", "--parts 0", ("--parts 0", "at least 1")),
        ("firefly", "--parts 101", ("--parts 101", "at most 100")),
        ("firefly", "--parts five", ("--parts five", "whole number")),
        ("firefly", "--kinds NLI", ("--kinds", "--help")),
        ("couplets", "--instruktion 对下联", ("--instruktion", "--instruction")),
        ("alpaca_gpt4", "--drop_truncated perhaps", ("--drop_truncated perhaps", "true or false")),
        ("belle", "--dedupe twice", ("--dedupe twice", "true or false")),
        ("baize", "--raw ''", ("--raw", "missing")),
        ("COIG", "--output_dir {data}", ("data.json: is not a folder", "give another --output_dir")),
        ("psyQA", "--output_dir {data}/a/b", ("data.json: is not a folder", "give another --output_dir")),
        ("psyQA", "--output_dir /proc/none/out", ("/proc/none: cannot be made", "choose another place")),
        ("psyQA", "--output_dir /proc/none", ("/proc/none: cannot be made", "choose another place")),
        ("psyQA", "downloads", ("downloads", "--name value")),
    ],
)
def test_options(refused, tmp_path, name, options, words):
    file, item = NAMES[name]
    (tmp_path / file).write_text(json.dumps([item]) if item else "春\t秋\n")
    has(prepare(refused, name, f"--raw {{tmp}}/{file} {options}"), words)


def test_the_default_folder_is_a_file(refused, tmp_path):
    file, item = NAMES["belle"]
    (tmp_path / file).write_text(json.dumps([item]))
    line = refused("data/belle/prepare.py", f"--raw {{tmp}}/{file}", DATA_DIR=str(tmp_path / file))
    has(line, (f"{file}: is not a folder", "--output_dir"))


COUPLETS = {
    "halves of different length": (["春 天"], ["秋"], "halves of different length: 1"),
    "fewer second lines": (["春", "夏"], ["秋"], "ends before line 2"),
    "no lines": ([""], [""], "no record in it can be used"),
}


@pytest.mark.parametrize("what", COUPLETS)
def test_couplets(refused, tmp_path, what):
    *halves, words = COUPLETS[what]
    for part in ("train", "test"):
        (tmp_path / "raw" / part).mkdir(parents=True)
        for name, lines in zip(("in.txt", "out.txt"), halves, strict=True):
            (tmp_path / "raw" / part / name).write_text("".join(f"{line}\n" for line in lines))
    has(prepare(refused, "couplets", "--raw {tmp}/raw"), (words, ";"))


@pytest.mark.parametrize("line", ["春", "春\t秋\t冬", "\t", "春 秋"])
def test_couplets_of_a_tsv_file(refused, tmp_path, line):
    (tmp_path / "couplets.tsv").write_text(f"{line}\n" * 2)
    has(prepare(refused, "couplets", "--raw {tmp}/couplets.tsv"), ("couplets.tsv: no record in it can be used", ": 2)"))


def archive(*members: tuple[str, bytes]) -> bytes:
    """A tar archive, gzipped."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


ARCHIVES = {
    "empty": (b"", "not a tar archive"),
    "a gzipped text": (gzip.compress(b"text" * 1000), "not a tar archive"),
    "cut off": (archive(("a.json", b"{}" * 9999))[:80], "cut off or damaged"),
    "without members": (archive(), "not JSON objects"),
    "of broken members": (archive(("a.json", b'{"round_0": ')), "not JSON objects"),
    "of texts": (archive(("a.json", b'"a"')), "not JSON objects"),
    "of another set": (archive(("a.json", json.dumps(NAMES["firefly"][1]).encode())), "looks like Firefly"),
    "rounds of null": (archive(("a.json", b'{"round_0": null}')), "a round without response: 1"),
    "rounds nested too deeply": (archive(("a.json", b'{"round_0": ' + b"[" * 9999)), "not JSON objects"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives(refused, tmp_path, what):
    content, words = ARCHIVES[what]
    (tmp_path / f"{DIALOGUE}.tar.gz").write_bytes(content)
    has(prepare(refused, "COIG", f"--raw {{tmp}}/{DIALOGUE}.tar.gz"), (f"{DIALOGUE}.tar.gz", words))


def test_members_of_an_archive_with_paths_upwards_are_read_and_not_unpacked(cold_or_forked, tmp_path):
    pair = {"round_0": {"response": json.dumps({"Q": "a", "A": "b"})}}
    (tmp_path / f"{DIALOGUE}.tar.gz").write_bytes(archive(("../../../escaped.json", json.dumps(pair).encode())))
    raw = tmp_path / f"{DIALOGUE}.tar.gz"
    assert cold_or_forked("data/COIG/prepare.py", "--raw", raw, "--output_dir", tmp_path / "x" / "out", cwd=tmp_path).ok()
    assert not list(tmp_path.parent.rglob("escaped.json"))
