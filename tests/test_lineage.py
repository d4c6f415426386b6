"""lineage.json: which toolkit wrote it, in which form, and what is read of others' forms."""

import dataclasses
import json
import re
import subprocess
import time

import pytest
from scripting import ROOT

from utils import lineage
from utils.console import UserError
from utils.files import sha256


@dataclasses.dataclass
class Options:
    output_dir: str = "out"


def test_a_step_names_its_command_the_toolkit_and_its_form(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["there/finetune.py", "--output_dir", "out"])
    began = time.mktime((2024, 2, 3, 4, 5, 6, 0, 0, -1))
    monkeypatch.setattr("time.time", lambda: began + 90.26)
    step = lineage.describe("train", Options(), began, data={"train": 1})
    versions = step.pop("versions")
    assert versions.keys() == {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"}
    assert step == {
        "kind": "train", "command": ["finetune.py", "--output_dir", "out"], "options": {"output_dir": "out"}, "format": 1,
        "toolkit": lineage.toolkit(), "data": {"train": 1}, "time": {"began": "2024-02-03 04:05:06", "seconds": 90.3},
    }  # fmt: skip
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1]
    assert step["toolkit"]["version"] == newest
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert not (ROOT / ".git").exists() or step["toolkit"]["commit"].startswith(head.stdout.strip() or "-")
    lineage.write(tmp_path, step)
    assert lineage.read(tmp_path) == step


def test_the_module_prints_a_chain_by_its_folder(script, tmp_path):
    lineage.write(tmp_path, {"kind": "train", "options": {"output_dir": "output/f1"}})
    assert "| f1 " in script("utils/lineage.py", tmp_path).ok() == script("utils/lineage.py", f"--folder={tmp_path}").ok()
    assert "the output folder whose chain to print" in script("utils/lineage.py", "--help").ok()
    assert "--folder: missing" in script("utils/lineage.py").error


def test_an_older_file_without_a_format_is_read_and_a_newer_one_refused(tmp_path):
    step = {"kind": "train", "options": {"output_dir": "f1"}}
    (tmp_path / lineage.FILE).write_text(json.dumps(step))
    assert lineage.read(tmp_path) == step
    (tmp_path / lineage.FILE).write_text(json.dumps({"kind": "train", "options": {}, "parent": {
        "name": "f1", "sha256": "0", "lineage": step | {"format": 2}}}))  # fmt: skip
    with pytest.raises(UserError, match="has format 2, this version reads 1; update the toolkit"):
        lineage.read(tmp_path)


def test_a_step_of_which_any_part_has_another_form_is_none():
    """Whoever reads one later need not look again."""
    mark = {"architecture": {}, "tokenizer": None, "shapes": "", "samples": {"w": [0.0] * 4}}
    parent = {"name": "f1", "sha256": "0", "weight": 0.5}
    good = {"kind": "train", "options": {"output_dir": "f2"}, "base": {"name": "b", "fingerprint": mark}, "parents": [parent]}
    good |= {"results": {"train_loss": 1}, "time": {"seconds": 1.5}, "data": {"files": {}, "template": None}}
    assert lineage.is_step(good) and lineage.is_step(good | {"base": None, "parents": None, "results": None, "time": None})
    wrong = [[], {"kind": "train"}, {"options": {}}, good | {"template": {"name": "a"}}]
    for part, values in {
        "options": (None, {"output_dir": 1}, {"prompt_template_name": 1}),
        "base": ([1], {"name": 1, "fingerprint": mark}, {"name": "b"}, *({"name": "b", "fingerprint": one} for one in (
            [], {**mark, "architecture": []}, {**mark, "samples": []}, {**mark, "samples": {"w": [0.0] * 3}},
            {**mark, "samples": {"w": ["0"] * 4}}, {key: mark[key] for key in mark if key != "shapes"}))),
        "parents": ({"f1": parent}, ["f1"], *([parent | one] for one in ({"name": 1}, {"sha256": None}, {"weight": "much"}))),
        "parent": ("f1", {"name": "f1"}),
        "results": ([0.1], {"train_loss": "low"}, {"eval_loss": "low"}),
        "time": ("1.5", {"seconds": "1.5"}),
        "data": ([1], {"files": []}, {"template": ["a"]}, {"template": {"name": 1, "texts": {}}},
                 {"template": {"name": "a", "texts": {"prompt_input": 1}}}),
    }.items():  # fmt: skip
        wrong += [good | {part: value} | ({"parents": None} if part == "parent" else {}) for value in values]
    assert [step for step in wrong if lineage.is_step(step)] == []


def test_the_commit_is_that_of_a_clone_with_a_word_of_what_has_changed_since(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "9.0.0"\n')
    monkeypatch.setattr(lineage, "ROOT", tmp_path)
    assert lineage.toolkit() == {"version": "9.0.0", "commit": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert lineage.toolkit() == {"version": "9.0.0", "commit": head}
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "9.0.1"\n')
    assert lineage.toolkit() == {"version": "9.0.1", "commit": f"{head}-dirty"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_is_told_from_a_slightly_trained_one(tiny_llama, tmp_path, dtype):
    """By one tensor that was scaled by 1.001 where the types are the same; rounding to another type is not a training."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    original = lineage.fingerprint(str(tiny_llama))
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    rounded = lineage.fingerprint(str(folder))
    assert list(original["samples"]) == sorted(tensors)[:: len(tensors) // 8][:8], "from all over the model"
    assert original["tokenizer"] == sha256(tiny_llama / "tokenizer.json")
    assert lineage.differences(original, rounded) == lineage.differences(rounded, original) == []
    assert lineage.identity({"name": "a", "fingerprint": original}) != lineage.identity({"name": "b", "fingerprint": original})
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}  # of weights converted in 2023
    save_file(tensors | frequencies, folder / "model.safetensors")
    assert lineage.fingerprint(str(folder)) == rounded
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight"):
        save_file(tensors | {name: tensors[name] * 1.01}, folder / "model.safetensors")
        trained = lineage.fingerprint(str(folder))
        assert any("other values" in difference for difference in lineage.differences(rounded, trained))
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert any(
        "other values in" in difference for difference in lineage.differences(original, lineage.fingerprint(str(folder)))
    )
    if dtype == "float32":
        save_file(tensors | {name: tensors[name] * 1.001}, folder / "model.safetensors")
        assert lineage.differences(original, lineage.fingerprint(str(folder))) == ["other values in some tensors"]
        old = {key: original[key] for key in ("architecture", "tokenizer", "shapes", "samples")}  # as it was written before
        assert lineage.differences(old, rounded) == [] and lineage.is_fingerprint(old)
        small, larger = (old | {"samples": {"w": [value] * 4}} for value in (0.01, 0.0101))  # as weights of real models are
        assert lineage.differences(small, larger) == ["other values in w"]


def test_the_table_of_a_chain_tells_minutes_and_what_two_parents_share_once():
    first = {"options": {"output_dir": "f0"}}
    parents = [
        {"name": name, "weight": weight, "sha256": "0", "lineage": {"options": {"output_dir": name}, "parent": shared}}
        for shared in [{"name": "output/f0", "sha256": "0", "lineage": first}]
        for name, weight in (("f1", 0.7), ("f2", 0.3))
    ]
    rows = lineage.table_rows(lineage.until({"options": {"output_dir": "both"}, "parents": parents}))
    assert [row[0] for row in rows[1:]] == ["f0", "f1", "f2", "both"]
    assert [row[-1] for row in rows[1:]] == ["—", "f0", "f0", "f1*0.7, f2*0.3"]
    step = {"options": {"output_dir": "output/f1"}, "time": {"seconds": 90.0}, "results": {"train_loss": 0.5, "eval_loss": 1}}
    step["data"] = {"files": {"data/a.json": "0", "b.json": "1"}, "records": 9, "train": 7, "validation": 1, "tokens": 80}
    assert lineage.table([step | {"base": {"name": "models/base"}}, first]).splitlines() == [
        "| step | data           | records | tokens | train loss | val loss | minutes | parent |",
        "|------|----------------|---------|--------|------------|----------|---------|--------|",
        "| f1   | a.json, b.json | 7       | 80     | 0.5000     | 1.0000   | 1.5     | base   |",
        "| f0   | —              | —       | —      | —          | —        | —       | —      |",
    ]


def test_the_template_that_a_step_was_trained_with():
    one, other = {"name": "a", "texts": {}}, {"name": "b", "texts": {}}
    steps = [None, {}, {"data": None, "template": one}, {"data": {"template": other}, "template": one}]
    assert [lineage.template_of(step) for step in steps] == [None, None, one, other]
    assert lineage.template_of({"data": {"stage": "text", "template": one}}) is None


def test_another_base_is_refused_with_what_differs():
    mark = {"architecture": {"vocab_size": 8}, "tokenizer": "1", "shapes": "1", "samples": {"a": [0.1] * 4, "b": [0.2] * 4}}
    other = {"architecture": {"vocab_size": 9}, "tokenizer": "2", "shapes": "2", "samples": {"a": [0.2] * 4, "b": [0.1] * 4}}
    step = {"base": {"name": "theirs", "fingerprint": mark}}
    with pytest.raises(UserError) as error:
        lineage.check_same_base(step, other, "run-1", "mine")
    assert str(error.value) == (
        "run-1: was trained on another base (theirs) than mine: another tokenizer; other tensor names or shapes; "
        "other values in a; other values in b; give that base as --base_model"
    )
    for known in (None, {}, step, {"base": {"name": "theirs", "fingerprint": mark | {"tokenizer": None}}}):
        lineage.check_same_base(known, mark, "run-1", "mine")
    assert lineage.differences(mark, mark | {"tokenizer": None}) == []
