"""Files of records, prompts, answers, texts and templates that are missing, broken, or something else than a file."""

import codecs
import gzip
import json
import os
import socket

import pytest
from cases import RECORDS, has

GOOD = json.dumps(RECORDS, ensure_ascii=False)
CONTENTS = {  # what is broken -> what stands in the file
    "empty": b"",
    "blank": b" \n\n ",
    "a byte-order mark alone": codecs.BOM_UTF8,
    "cut off": GOOD.encode()[:-20],
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
def test_data_to_train_on(refused, broken):
    has(refused("finetune.py", f"--data_path {broken}"), ("broken.json",))


@pytest.mark.parametrize("broken", [*CONTENTS, *PLACES], indirect=True)
def test_prompts_to_answer(refused, broken):
    """A folder is one of the ways to give prompts; this one is empty."""
    has(refused("generate.py", f"--test_input_path {broken}"), ("broken.json",))


@pytest.mark.parametrize("broken", [*CONTENTS, *PLACES], indirect=True)
def test_answers_to_compare(refused, broken):
    has(refused("judge.py", f"--answers three={broken}"), ("broken.json",))


@pytest.mark.parametrize("broken", [*CONTENTS, *PLACES], indirect=True)
def test_templates(refused, broken):
    has(refused("finetune.py", f"--prompt_template_name {broken}"), ("broken.json",))


BRACE = ("_no_input", "double each brace that is meant literally")
GOOD_TEMPLATE = {
    "prompt_input": "问：{instruction}\n文：{input}\n答：",
    "prompt_no_input": "问：{instruction}\n答：",
    "response_split": "答：",
}
TEMPLATES = {  # what differs from a good one (None: the key is missing) -> the words of the refusal
    "no prompt with an input": ({"prompt_input": None}, ("key prompt_input is missing", "add it")),
    "no prompt without an input": ({"prompt_no_input": None}, ("key prompt_no_input is missing", "add it")),
    "no split": ({"response_split": None}, ("key response_split is missing", "add it")),
    "a key too many": ({"system": "你好"}, ("key system is unknown", "keys are")),
    "a number for a prompt": ({"prompt_input": 5}, ("a JSON object of texts", "see templates/README.md")),
    "a list for a prompt": ({"prompt_no_input": ["问：{instruction}"]}, ("a JSON object of texts", "see templates/README.md")),
    "an empty prompt": ({"prompt_no_input": ""}, ("prompt_no_input", ";")),
    "a split that is not in it": ({"response_split": "Response:"}, ("does not contain the response_split", "add it")),
    "no place for the instruction": ({"prompt_no_input": "问：\n答："}, ("prompt_no_input", "it must have {instruction}")),
    "no place for the input": ({"prompt_input": "问：{instruction}\n答："}, ("it must have {input}, {instruction}",)),
    "a place for nothing": ({"prompt_no_input": "{instruction}{output}答："}, ("{output}", "use {instruction}")),
    "a number for a place": ({"prompt_no_input": "{0}答："}, ("prompt_no_input", "{instruction}")),
    "a place without a name": ({"prompt_no_input": "{}答："}, ("prompt_no_input", "{instruction}")),
    "an attribute of a place": ({"prompt_no_input": "{instruction.__class__}答："}, ("prompt_no_input", "{instruction}")),
    "an item of a place": ({"prompt_no_input": "{instruction[0]}答："}, ("prompt_no_input", "{instruction}")),
    "a format of a place": ({"prompt_no_input": "{instruction:>99999999}答："}, ("prompt_no_input", "{instruction")),
    "a conversion of a place": ({"prompt_no_input": "{instruction!r}答："}, ("prompt_no_input", "{instruction")),
    "a brace that opens": ({"prompt_no_input": "{instruction} {答："}, BRACE),
    "a brace that closes": ({"prompt_no_input": "{instruction} }答："}, BRACE),
    "a brace in a later turn": ({"turn_no_input": "问：{instruction"}, BRACE),
}  # fmt: skip


@pytest.mark.parametrize("option", ["finetune.py --prompt_template_name", "generate.py --prompt_template"])
@pytest.mark.parametrize("what", TEMPLATES)
def test_templates_of_another_form(refused, tmp_path, what, option):
    changes, words = TEMPLATES[what]
    texts = {key: text for key, text in (GOOD_TEMPLATE | changes).items() if text is not None}
    (tmp_path / "mine.json").write_text(json.dumps(texts, ensure_ascii=False), "utf-8")
    program, name = option.split()
    has(refused(program, f"{name} {{tmp}}/mine.json"), ("mine.json", *words))


OBJECTS = {"a JSON object over many lines", "an object of lists"}  # whose texts are as good as any


@pytest.mark.parametrize("broken", [kind for kind in (*CONTENTS, *PLACES) if kind not in OBJECTS], indirect=True)
def test_texts_to_learn_pieces_from(refused, broken):
    has(refused("extend_vocab.py", f"--text {broken}"), ("broken.json",))
