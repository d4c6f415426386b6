"""Merging: what is refused before the first byte, and after the last; nothing is kept of a merge that would be broken."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from merges import LINEAR, merge, rewrite, tensors
from safetensors.torch import load_file, save_file

from utils.console import UserError
from utils.merging import meta_writer, shards
from utils.merging.plan import check_output, plan_merge
from utils.models.weights import check_whole

# ---- what is refused before the first byte


def test_another_size_of_model(base, adapter, tmp_path):
    """PITFALLS 7."""
    wide = tiny.llama(tmp_path / "wide", hidden_size=96, num_attention_heads=6)
    with pytest.raises(UserError, match="another size of model"):
        merge(wide, adapter, tmp_path / "out")
    deep = tiny.llama(tmp_path / "deep", num_hidden_layers=3)
    longer = tiny.adapter(deep, tmp_path / "longer")
    with pytest.raises(UserError, match=r"2 of its layers are not in the base \(model\.layers\.2\..*which has 2 layers"):
        merge(base, longer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_by_lineage(base, adapter, tmp_path):
    """PITFALLS 7: same sizes, other weights."""
    from utils import lineage

    marked = tmp_path / "marked"
    shutil.copytree(adapter, marked)
    facts = {"kind": "train", "options": {}, "base": {"name": "mine", "fingerprint": lineage.fingerprint(str(base))}}
    (marked / "lineage.json").write_text(json.dumps(facts))
    merge(base, marked, tmp_path / "fits")
    merge(tiny.llama(tmp_path / "first", seed=5), [adapter, marked], tmp_path / "on top of another")
    with pytest.raises(UserError, match="was trained on another base"):
        merge(tiny.llama(tmp_path / "other", seed=5), marked, tmp_path / "out")


def test_quantized_bases(base, adapter, tmp_path):
    """PITFALLS 7."""
    said = tmp_path / "said"
    shutil.copytree(base, said)
    config = json.loads((said / "config.json").read_text())
    (said / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"quantized \(gptq\)"):
        merge(said, adapter, tmp_path / "out")
    unsaid = rewrite(base, tmp_path / "unsaid", "safetensors", torch.float16)
    stored = tensors(unsaid)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {name: stored[name].to(torch.int8)}, unsaid / "model.safetensors")
    with pytest.raises(UserError, match=r"quantized \(int8 in model\.layers\.0\.mlp\.up_proj"):
        merge(unsaid, adapter, tmp_path / "out")


def test_code_in_a_downloaded_adapter_is_not_run(base, adapter, tmp_path):
    """PITFALLS 21."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(UserError, match=r"refused|cannot be read"):
        merge(base, folder, tmp_path / "out")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_files_that_are_no_weights(base, adapter, tmp_path, name):
    """Such as what is left of them by git without git-lfs: nobody should look for code in these."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    with pytest.raises(UserError, match="only git's pointer to the weights; fetch them with git lfs pull"):
        merge(base, folder, tmp_path / "out")
    (folder / name).write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match=r"is not a torch\.save file; download it again|not a complete safetensors file"):
        merge(base, folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "changed by pissa"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"r": 5}, "has rank 4, its settings say 5"),
        ({"peft_type": "IA3"}, "does not describe a LoRA"),
    ],
)
def test_adapters_that_cannot_be_merged(base, adapter, tmp_path, settings, message):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=message):
        merge(base, folder, tmp_path / "out")


def test_broken_adapters(base, adapter, tmp_path):
    """PITFALLS 1: half of a pair, an empty shell, an untrained one."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in stored.items() if "layers.0.mlp.up_proj.lora_B" not in n}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no lora_B"):
        merge(base, folder, tmp_path / "out")
    save_file({n: t * ("lora_B" not in n) for n, t in stored.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no adapter changes anything"):
        merge(base, folder, tmp_path / "out")
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds no LoRA weights"):
        merge(base, folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_without_some_of_the_layers_that_its_settings_name(base, tmp_path):
    """Of a base with fewer layers, say, or cut short; peft would compute zeros there; training and answering refuse it."""
    deep = tiny.llama(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"has nothing for model\.layers\.2\.self_attn\.q_proj"):
        plan_merge(str(deep), [str(tiny.adapter(base, tmp_path / "shallow"))])
    for settings, lost in (
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "model.layers.0.self_attn.k_proj"),
        ({"target_modules": r".*\.(q|v|k)_proj"}, "model.layers.0.self_attn.k_proj"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ):
        adapter = tiny.adapter(base, tmp_path / "adapter")
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        with pytest.raises(UserError, match=f"has nothing for {lost}, which its settings name"):
            plan_merge(str(base), [str(adapter)])


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.layers.1.mlp.up_proj.weight", ""), *(("", prefix) for prefix in ("module.", "_orig_mod.", "base_model."))],
)
def test_a_base_that_lacks_tensors(base, adapter, tmp_path, old, new):
    """Or has them by the names of a wrapped model, in which transformers finds none; loading refuses it with the same line."""
    folder = shutil.copytree(base, tmp_path / "base")
    found = {f"{new}{name}": tensor for name, tensor in load_file(base / "model.safetensors").items() if name != old}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensors are missing \(\S+, …\); check its files"):
        plan_merge(str(folder), [str(adapter)])


def test_every_tensor_of_an_adapter_counts_once(base, adapter, tmp_path):
    """Two names for one tensor, as a file joined by hand may have them: which one was meant is not guessed."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(stored | {name.replace("lora_A", "lora_A.default"): stored[name] * 2}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="are the same tensor"):
        merge(base, folder, tmp_path / "out")
    renamed = {n.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): t for n, t in stored.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    merge(base, folder, tmp_path / "out")


def test_the_output_folder(base, adapter, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letters.txt").write_text("not a model")
    with pytest.raises(UserError, match="is not empty"):
        merge(base, adapter, out)
    with pytest.raises(UserError, match="holds no model that could be overwritten"):
        merge(base, adapter, out, "--overwrite")
    assert (out / "letters.txt").read_text() == "not a model"
    for name in ("config.json", "params.json", "adapter_config.json", "lineage.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        check_output([base], 0, str(tmp_path / name), True)
    with pytest.raises(UserError, match="is or contains"):
        merge(base, adapter, base, "--overwrite")
    merge(base, adapter, tmp_path / "model")
    with pytest.raises(UserError, match="give --overwrite"):
        merge(base, adapter, tmp_path / "model")
    merge(base, adapter, tmp_path / "model", "--overwrite")
    with pytest.raises(UserError, match="not a size"):
        merge(base, adapter, tmp_path / "more", "--max_shard_size", "5 elephants")
    usage = shutil.disk_usage(tmp_path)
    large = tiny.llama(tmp_path / "large", hidden_size=256, intermediate_size=512)
    size = sum(tensor.nbytes for tensor in tensors(large).values())
    for share in (0.9, 1.0, 1.02):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, share=share: usage._replace(free=int(size * share)))
        if share < 1.01:
            with pytest.raises(UserError, match=r"MB are needed and \d MB are free; make room"):
                merge(large, [], tmp_path / "more")
    merge(large, [], tmp_path / "more")


def test_zeros_at_a_file_s_end_count_as_lost_from_the_middle_of_a_matrix_on(tmp_path):
    """Padding rows are zeros, too, and so is what training begins with."""
    file, shape = tmp_path / "model.safetensors", (8, 16)
    for name, zeros, is_lost in (("z.weight", 8, True), ("z.weight", 4, True), ("z.weight", 3, False), ("z.lora_B", 8, False)):
        last = torch.ones(shape)
        last[8 - zeros :] = 0
        save_file({"a": torch.ones(shape), name: last}, file)
        if is_lost:
            with pytest.raises(UserError, match=r"holds only zeros from z\.weight on, as a copy that was interrupted"):
                check_whole(file)
        else:
            check_whole(file)


def test_missing_shards(base, adapter, tmp_path):
    source = rewrite(base, tmp_path / "base", "sharded safetensors", torch.float16)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        merge(source, adapter, tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        merge(tmp_path / "nowhere", adapter, tmp_path / "out")
    with pytest.raises(UserError, match="is an adapter, not a base model"):
        merge(adapter, base, tmp_path / "out")


# ---- what is refused after


def test_values_that_do_not_fit_or_are_no_numbers(base, tmp_path):
    """Nothing is kept of a merge that would be broken."""
    source = rewrite(base, tmp_path / "base", "safetensors", torch.bfloat16)
    stored = tensors(source)
    name = "model.layers.1.mlp.up_proj.weight"
    for value, message in ((1e6, "too large for float16"), (float("nan"), "NaN"), (float("inf"), "too large for")):
        broken = stored[name].clone()
        broken[3, 5] = value
        save_file(stored | {name: broken}, source / "model.safetensors")
        for adapters in ([], [tiny.adapter(base, tmp_path / "adapter", target_modules=LINEAR)]):
            with pytest.raises(UserError, match=f"{name}.*{message}"):
                merge(source, adapters, tmp_path / "out", "--dtype", "float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()


def test_a_file_that_was_not_written_as_computed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}"))))
    kinds = {"a": ((3, 4), torch.float16), "b": ((5,), torch.float32)}
    values = {"a": torch.randn(3, 4).half(), "b": torch.randn(5)}
    for file, write in ((tmp_path / "x.safetensors", shards.write_safetensors), (tmp_path / "x.pth", meta_writer.write_pth)):
        pieces = write(file, kinds, [shards.block_of(name, part) for name, value in values.items() for part in value.split(2)])
        shards.read_back(file, kinds, pieces)
        assert synced.pop() == file.name and not synced
        data = file.read_bytes()
        place = data.index(values["b"].numpy().tobytes())
        file.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
        with pytest.raises(UserError, match="b reads back differently from what was written"):
            shards.read_back(file, kinds, pieces)
        file.write_bytes(data)
        with pytest.raises(UserError, match="holds other tensors"):
            shards.read_back(file, kinds | {"b": ((1, 5), torch.float32)}, pieces)
        synced.clear()


def test_values_begin_at_a_multiple_of_eight_bytes(tmp_path):
    for length in range(1, 9):
        name = "a" * length
        shards.write_safetensors(tmp_path / name, {name: ((1,), torch.float32)}, [shards.block_of(name, torch.ones(1))])
        assert int.from_bytes((tmp_path / name).read_bytes()[:8], "little") % 8 == 0


def test_a_merge_is_read_back(base, adapter, tmp_path, monkeypatch):
    """Where a disk keeps other bytes than it was given, nothing is kept of the merge."""
    write = shards.write_safetensors

    def damaging(file, kinds, blocks):
        pieces = write(file, kinds, blocks)
        data = bytearray(file.read_bytes())
        data[-3] ^= 64
        file.write_bytes(data)
        return pieces

    monkeypatch.setattr(shards, "write_safetensors", damaging)
    with pytest.raises(UserError, match="reads back differently from what was written"):
        merge(base, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
