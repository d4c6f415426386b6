"""Files of records, prompts, answers, texts and templates that are missing, broken, or something else than a file."""

import codecs
import gzip
import json
import os
import socket

import pytest
from cases import RECORDS, cold_or_forked, has, refused, world  # noqa: F401

GOOD = json.dumps(RECORDS, ensure_ascii=False)
CONTENTS = {  # what is broken -> what stands in the file
    "empty": b"",
    "blank": b" \n\n ",
    "a byte-order mark alone": codecs.BOM_UTF8,
    "cut off": GOOD.encode()[:-20],
    "in UTF-16": GOOD.encode("utf-16"),
    "in GBK": GOOD.encode("gbk"),
    "an empty list": b"[]",
    "a number": b"5\n",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 10,
    "zeros": bytes(5000),
    "a page of HTML": "<!DOCTYPE html><html><body>请登录</body></html>".encode(),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n",
    "a zip": b"PK\x03\x04" + bytes(200),
    "gzipped and cut off": gzip.compress(GOOD.encode())[:-30],
    "gzipped nothing": gzip.compress(b""),
    "nested too deeply": b"[" * 200_000,
    "an object nested too deeply": b'{"instruction": ' * 50_000,
    "two lists": GOOD.encode() * 2,
    "a JSON object over many lines": json.dumps(RECORDS[0], indent=1).encode(),
    "an object of lists": json.dumps({"instruction": ["a"], "output": ["b"]}).encode(),
    "quoted with ’typographic‘ marks": "[{“instruction”: “甲”, “output”: “乙”}]".encode(),
    "Python, not JSON": b"[{'instruction': 'a', 'output': 'b'}]",
    "commas after the last": b'[{"instruction": "a", "output": "b",},]',
    "comments within": b'[\n// note\n{"instruction": "a", "output": "b"}]',
}
PLACES = ("missing", "a folder", "a broken link", "a link to itself", "a pipe", "a socket", "an endless device", "memory")


def make(path, kind):
    """Put there what is broken; returns the path."""
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a broken link":
        path.symlink_to("gone.json")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        os.chdir(path.parent)  # its name may have a hundred bytes only
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "an endless device":
        path.symlink_to("/dev/zero")
    elif kind == "memory":
        path.symlink_to("/proc/self/mem")
    return path


@pytest.fixture
def broken(tmp_path, monkeypatch, request):
    """A path to what `request.param` says."""
    monkeypatch.chdir(tmp_path)
    return make(tmp_path / "broken.json", request.param)


@pytest.mark.parametrize("broken", [*CONTENTS, *PLACES], indirect=True)
def test_data_to_train_on(refused, broken):  # noqa: F811
    has(refused("finetune.py", f"--data_path {broken}"), ("broken.json",))


@pytest.mark.parametrize("broken", [*CONTENTS, *PLACES], indirect=True)
def test_prompts_to_answer(refused, broken):  # noqa: F811
    """A folder is one of the ways to give prompts; this one is empty."""
    has(refused("generate.py", f"--test_input_path {broken}"), ("broken.json",))


@pytest.mark.parametrize("broken", [*CONTENTS, *PLACES], indirect=True)
def test_answers_to_compare(refused, broken):  # noqa: F811
    has(refused("judge.py", f"--answers three={broken}"), ("broken.json",))


@pytest.mark.parametrize("broken", [*CONTENTS, *PLACES], indirect=True)
def test_templates(refused, broken):  # noqa: F811
    has(refused("finetune.py", f"--prompt_template_name {broken}"), ("broken.json",))


OBJECTS = {"a JSON object over many lines", "an object of lists"}  # whose texts are as good as any


@pytest.mark.parametrize("broken", [kind for kind in (*CONTENTS, *PLACES) if kind not in OBJECTS], indirect=True)
def test_texts_to_learn_pieces_from(refused, broken):  # noqa: F811
    has(refused("extend_vocab.py", f"--text {broken}"), ("broken.json",))
