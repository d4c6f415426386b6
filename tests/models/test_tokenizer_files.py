"""A tokenizer's files: which there are, what they say, and that each of them counts."""

import json

import pytest
from transformers import AddedToken

from utils.models.tokenizer_files import copy_tokenizer, read_settings, tokenizer_hash


def test_every_file_of_a_tokenizer_is_copied_and_no_other(tmp_path):
    (tmp_path / "copy").mkdir()
    names = ["added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "tokenizer.json",
             "tokenizer.model", "tokenizer_config.json", "vocab.json"]  # fmt: skip
    for name in (*names, "config.json"):
        (tmp_path / name).write_text(name)
    assert sorted(copy_tokenizer(tmp_path, tmp_path / "copy")) == names
    assert {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()} == {name: name for name in names}


SETTINGS = {
    "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": True}, "unk_token": "", "add_bos_token": False,
    "add_eos_token": True, "legacy": False, "model_max_length": 7, "padding_side": "left", "chat_template": "of the settings",
    "tokenizer_class": "Mine", "use_fast": True, "additional_special_tokens": ["<x>"],
}  # fmt: skip


@pytest.mark.parametrize("template", [None, "of the file"])
@pytest.mark.parametrize("extra", [None, ["<y>"], {"image": "<y>"}])
def test_what_the_files_beside_a_model_say(tmp_path, template, extra):
    files = {"tokenizer_config.json": SETTINGS | ({"extra_special_tokens": extra} if extra else {})}
    files["special_tokens_map.json"] = {"pad_token": "<p>", "unk_token": "<u>", "bos_token": ""}
    files["added_tokens.json"] = {"<p>": 9}
    files["tokenizer.json"] = {"added_tokens": [{"id": 5, "content": "not read"}]}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if template:
        (tmp_path / "chat_template.jinja").write_text(template)

    def token(text, **flags):
        return AddedToken(text, **{"normalized": False, "special": True} | flags)

    assert read_settings(tmp_path) == {
        "bos_token": token("<s>"), "eos_token": token("</s>", lstrip=True, special=False), "unk_token": token("<u>"),
        "pad_token": token("<p>"), "extra_special_tokens": [token("<y>" if extra else "<x>")], "add_bos_token": False,
        "add_eos_token": True, "legacy": False, "model_max_length": 7, "padding_side": "left",
        "chat_template": template or "of the settings", "added_tokens_decoder": {9: token("<p>")}, "saved_class": "Mine",
    }  # fmt: skip


def test_every_file_of_a_tokenizer_counts_in_its_hash(tmp_path, monkeypatch):
    seen = {tokenizer_hash(tmp_path)}
    for name in ("added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        seen.add(tokenizer_hash(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert len(seen | {tokenizer_hash(tmp_path)}) == 6
    for library in ("transformers", "sentencepiece"):  # which read them
        with monkeypatch.context() as newer:
            newer.setattr("importlib.metadata.version", lambda name, library=library: "9" if name == library else "1")
            seen.add(tokenizer_hash(tmp_path))
    assert len(seen) == 8
