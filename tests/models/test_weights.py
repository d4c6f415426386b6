"""The tensors of a model's files: mapped no longer than they are read, and what is wrong with files of them."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.console import UserError
from utils.models import weights
from utils.models.weights import Weights, check_same, load_pickled

TENSORS = {name: torch.full((4, 8), number, dtype=torch.float32) for number, name in enumerate("abc", 1)}


def test_mappings_are_dropped_and_what_cannot_be_mapped_is_kept(tmp_path, monkeypatch, capsys):
    save_file(TENSORS, tmp_path / "one.safetensors")
    torch.save({"d": torch.ones(2)}, tmp_path / "two.bin", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(weights, "MAPPED_AT_MOST", 2 * 4 * 8 * 4)
    found = Weights(tmp_path, [tmp_path / "one.safetensors", tmp_path / "two.bin"])
    told = f"{tmp_path}/two.bin: is in torch's old format, so all of it is read into memory\n"
    assert capsys.readouterr().out == told
    for name, opened in (("a", 2), ("b", 2), ("c", 1), ("a", 2), ("d", 2)):
        found.tensor(name)
        assert len(found._opened) == opened
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in TENSORS.items()) and found.tensor("d").sum() == 2
    assert capsys.readouterr().out == "", "it was read once"


def test_types_are_those_of_torch_and_others_are_refused(tmp_path):
    names = (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8", "uint8",
        "bool",
    )  # fmt: skip
    kinds = {name: getattr(torch, name) for name in names}
    save_file({name: torch.ones(3, 2).to(dtype) for name, dtype in kinds.items()}, tmp_path / "model.safetensors")
    found = Weights(tmp_path)
    assert {name: found.kind(name) for name in found.names} == {name: ((3, 2), dtype) for name, dtype in kinds.items()}
    save_file({"a": torch.ones(2).to(torch.uint16)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"^a: is stored as U16, which is not supported; use weights in float16 or bfloat16$"):
        Weights(tmp_path)


def test_of_two_kinds_of_files_the_safe_ones_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert Weights(tmp_path).names == ["a", "b", "c"]
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys("abc", "model-1.safetensors")}))
    assert Weights(tmp_path).names == ["a", "b", "c"]
    index.unlink()
    assert Weights(tmp_path).names == ["x"]


def test_one_of_the_shards_may_be_opened_alone(tmp_path):
    homes = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, file in homes.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    assert Weights(tmp_path).names == ["a", "b"] and Weights(tmp_path, [tmp_path / homes["b"]]).names == ["b"]
    index.write_text(json.dumps({"weight_map": homes | {"x": homes["a"], "w": homes["b"]}}))
    with pytest.raises(UserError) as error:
        Weights(tmp_path)
    assert str(error.value) == f"{index}: 2 tensors are in none of its files (w, …); download them again"


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({}, ""),
        ({"d": torch.ones(1)}, "d"),
        ({"a": None}, "a"),
        ({"b": TENSORS["b"] + 1, "c": TENSORS["c"] + 1}, "b"),
        ({"b": TENSORS["b"].half()}, "b"),
        ({"c": TENSORS["c"][:3]}, "c"),
    ],
)
def test_two_copies_of_the_same_weights_are_compared(tmp_path, other, differs):
    changed = {name: tensor for name, tensor in (TENSORS | other).items() if tensor is not None}
    for name, tensors in (("model.safetensors", TENSORS), ("other.safetensors", changed)):
        save_file(tensors, tmp_path / name)
    one, two = (Weights(tmp_path, [tmp_path / name]) for name in ("model.safetensors", "other.safetensors"))
    if not differs:
        return check_same(one, two)
    with pytest.raises(UserError) as error:
        check_same(one, two)
    assert str(error.value) == (
        f"{tmp_path}: model.safetensors and other.safetensors hold different weights ({differs}, …); "
        "keep the right ones, and delete the others"
    )


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


PLAIN = "is not a plain tensor of numbers, but sparse, quantized or empty; get other weights"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([TENSORS["a"]], "{}: holds a list instead of named tensors; is it the right file?"),
        ({"a": TENSORS["a"].to_sparse()}, f"{{}}: a {PLAIN}"),
        ({"a": torch.empty(2, device="meta")}, f"{{}}: a {PLAIN}"),
        (Trap(), "{}: refused, because loading it would run code; get the weights as .safetensors"),
        (b"PK but no zip", "{}: cannot be read (its end is missing); download it again"),
        (b"<html>", "{}: is not a torch.save file; download it again"),
        (b"version https://git-lfs.github.com/spec/v1",
         "{}: is only git's pointer to the weights; fetch them with git lfs pull, or download it again"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_pickled_file(tmp_path, content, problem):
    file = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, Trap):
        file.write_bytes(pickle.dumps({"a": content}))
    else:
        torch.save(content, file)
    with pytest.raises(UserError) as error:
        load_pickled(file)
    assert str(error.value) == problem.format(file)
    assert not Path("was_run").exists()


def test_code_beside_weights_that_have_none_is_to_be_deleted(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": Trap()}))
    save_file(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        load_pickled(tmp_path / "a.bin")
    assert str(error.value) == f"{tmp_path}: refused, because loading a.bin would run code; delete it"
