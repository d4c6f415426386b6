"""Merging: the published Chinese folders, Meta's layout there and back, and what is written, also after a kill."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepieces
import tiny
import torch
from merges import LINEAR, loaded, merge, rewrite, same_logits, tensors
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from utils.adapters.settings import read_config
from utils.console import UserError
from utils.merging import meta_writer, shards
from utils.merging.plan import choose_tokenizer, in_order
from utils.models import weights
from utils.models.tokenizer import load_tokenizer

# ---- published Chinese-LLaMA and Chinese-Alpaca folders


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """LLaMA, and LoRA folders of two stages as they were published: .bin, old settings, the tokenizer beside them."""
    top = tmp_path_factory.mktemp("published")
    base = sentencepieces.llama(top / "llama")
    size = len(load_tokenizer(base))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=-1, tie_word_embeddings=False, dtype="float16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(base, max_shard_size="100KB")
    sentencepieces.chinese_alpaca(base, top / "alpaca")
    shutil.copytree(top / "alpaca", top / "llama-plus")
    (top / "llama-plus" / "special_tokens_map.json").write_text('{"bos_token":"<s>","eos_token":"</s>","unk_token":"<unk>"}')
    for name, rank in (("llama-plus", 8), ("alpaca", 4)):
        rows = len(load_tokenizer(top / name))
        lora = {f"base_model.model.{part}.weight": torch.randn(rows, 64) * 0.1 for part in ("model.embed_tokens", "lm_head")}
        for module, child in model.named_modules():
            if module.endswith(tuple(LINEAR)):
                lora[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, child.in_features) * 0.1
                lora[f"base_model.model.{module}.lora_B.weight"] = torch.randn(child.out_features, rank) * 0.1
        torch.save(lora, top / name / "adapter_model.bin")
        settings = {
            "bias": "none", "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 4 * rank,
            "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": ["embed_tokens", "lm_head"],
            "peft_type": "LORA", "r": rank, "target_modules": LINEAR, "task_type": "CAUSAL_LM",
        }  # fmt: skip
        (top / name / "adapter_config.json").write_text(json.dumps(settings))
    return top


def by_hand(base: Path, *folders: Path) -> dict[str, torch.Tensor]:
    """What Chinese-LLaMA's own script computes: whole tensors replace, the others get B @ A * alpha / r, in float32."""
    result = {name: tensor.float() for name, tensor in tensors(base).items()}
    for folder in folders:
        lora = torch.load(folder / "adapter_model.bin", weights_only=True)
        settings = json.loads((folder / "adapter_config.json").read_text())
        for name, tensor in lora.items():
            name = name.removeprefix("base_model.model.")
            if name.endswith("lora_A.weight"):
                b = lora[f"base_model.model.{name}".replace("lora_A", "lora_B")]
                result[name.replace("lora_A.", "")] += b @ tensor * (settings["lora_alpha"] / settings["r"])
            elif "lora_B" not in name:
                result[name] = tensor
    return result


def test_chinese_llama_then_chinese_alpaca(published, tmp_path, capsys):
    """PITFALLS 5, 8 and 22: vocabulary, special ids and tokenizer of the last stage."""
    llama, stages = published / "llama", [published / "llama-plus", published / "alpaca"]
    out = merge(llama, stages, tmp_path / "out", "--max_shard_size", "200KB")
    expected = by_hand(llama, *stages)
    found = tensors(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.half(), atol=0, rtol=torch.finfo(torch.float16).eps)
    tokenizer = load_tokenizer(out)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == found["lm_head.weight"].shape[0]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, len(tokenizer) - 1)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    for name in ("tokenizer.model", "special_tokens_map.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (published / "alpaca" / name).read_bytes()
    said = capsys.readouterr().out
    ids = {"bos_token_id": (0, 1), "eos_token_id": (1, 2), "pad_token_id": (-1, len(tokenizer) - 1)}
    changed = [f"config.json: {key} {before} becomes {after}, the tokenizer's" for key, (before, after) in ids.items()]
    assert changed == [line for line in said.splitlines() if line.startswith("config.json: ")]
    assert f"{len(load_tokenizer(llama))} tokens in the base, {len(tokenizer)} in the merged model" in said
    assert same_logits(loaded(out), with_resized(llama, *stages), atol=0.05)


def with_resized(base: Path, *adapters: Path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for folder in adapters:
        model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        model.resize_token_embeddings(len(load_tokenizer(folder)))
        model = PeftModel.from_pretrained(model, folder, config=read_config(folder))
    return model.eval()


def test_stages_in_the_wrong_order_or_mixed(published, tmp_path):
    """PITFALLS 5: the error says which number of tokens belongs to which stage."""
    llama, first, second = published / "llama", published / "llama-plus", published / "alpaca"
    stages = "32000 tokens belong to LLaMA, 49953 to Chinese-LLaMA"
    with pytest.raises(UserError, match=f"vocabularies of two stages; {stages}"):
        merge(llama, [second, first], tmp_path / "out")
    mixed = tmp_path / "mixed"
    shutil.copytree(second, mixed)
    (mixed / "special_tokens_map.json").unlink()  # 49953 tokens for 49954 rows
    with pytest.raises(UserError, match=f"its tokenizer has .* embedding rows; {stages}"):
        merge(llama, mixed, tmp_path / "out")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (mixed / name).unlink()
    with pytest.raises(UserError, match=r"extends the vocabulary .* and has no tokenizer of its own"):
        merge(llama, mixed, tmp_path / "out")
    wrong_base = tmp_path / "wrong"  # LLaMA's weights with Chinese-Alpaca's tokenizer
    shutil.copytree(llama, wrong_base)
    for file in second.glob("*token*"):
        shutil.copy(file, wrong_base)
    with pytest.raises(UserError, match=f"embedding rows for a tokenizer of .*{stages}"):
        merge(wrong_base, first, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_later_stage_on_the_base(published, tmp_path):
    """An adapter without embeddings of its own fits LLaMA's layers, but was trained on 49954 tokens."""
    merged = merge(published / "llama", [published / "llama-plus", published / "alpaca"], tmp_path / "merged")
    adapter = tiny.adapter(merged, tmp_path / "adapter")
    for file in merged.glob("*token*"):
        shutil.copy(file, adapter)
    with pytest.raises(UserError, match=r"its tokenizer has .* 49954 to Chinese-Alpaca"):
        merge(published / "llama", adapter, tmp_path / "out")
    merge(merged, adapter, tmp_path / "out")
    early = tiny.adapter(merged, tmp_path / "early")
    for file in (published / "llama").glob("*token*"):
        shutil.copy(file, early)
    counts = [len(load_tokenizer(published / "llama")), len(load_tokenizer(merged))]
    with pytest.raises(UserError, match="its tokenizer has {} tokens, the model at this stage {} embedding".format(*counts)):
        merge(merged, early, tmp_path / "no")


def test_chinese_alpaca_plus_without_what_it_belongs_on_is_told(tmp_path, capsys):
    """Its rank is 64, that of the plain Chinese-Alpaca 8."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(sentencepieces.train(sentencepieces.ENGLISH, 420))
    for number in range(len(model.pieces), 49954):
        model.pieces.add(piece=f"{number}号", score=0)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    for rank, told in ((8, 0), (64, 1)):
        adapter = SimpleNamespace(folder=tmp_path, settings={"r": rank})
        assert choose_tokenizer(tmp_path / "base", [adapter], [32000, 49954]) == tmp_path
        assert capsys.readouterr().out.splitlines() == [
            "vocabulary: 32000 tokens in the base, 49954 in the merged model",
            *[
                f"{tmp_path}: looks like Chinese-Alpaca-Plus or -Pro, which belong on top of Chinese-LLaMA-Plus; if it is, "
                "merge both: --lora_model chinese-llama-plus…,chinese-alpaca-plus…"
            ]
            * told,
        ]


# ---- Meta's layout


def meta_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows of a query or key projection in Meta's order (the inverse of the converter's permutation)."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("files", "dtype"), [(1, torch.float32), (2, torch.float16), (4, torch.bfloat16)])
def test_meta_layout_there_and_back(tmp_path, files, dtype, monkeypatch):
    monkeypatch.setitem(meta_writer.FILES_BY_HIDDEN_SIZE, 64, files)
    base = tiny.llama(tmp_path / "base", num_key_value_heads=4)
    half = rewrite(base, tmp_path / "half", "safetensors", dtype)
    stored = tensors(half)
    pth = merge(half, [], tmp_path / "pth", "--output_type", "pth")
    parts = [torch.load(pth / f"consolidated.{i:02}.pth", weights_only=True) for i in range(files)]
    assert len(list(pth.glob("*.pth"))) == files
    whole = {name: [part[name] for part in parts] for name in parts[0]}
    joined = {
        "tok_embeddings.weight": torch.cat(whole["tok_embeddings.weight"], 1),
        "output.weight": torch.cat(whole["output.weight"], 0),
        "layers.1.attention.wq.weight": torch.cat(whole["layers.1.attention.wq.weight"], 0),
        "layers.1.attention.wo.weight": torch.cat(whole["layers.1.attention.wo.weight"], 1),
        "layers.0.feed_forward.w2.weight": torch.cat(whole["layers.0.feed_forward.w2.weight"], 1),
        "norm.weight": whole["norm.weight"][-1],
    }
    assert torch.equal(joined["tok_embeddings.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(joined["output.weight"], stored["lm_head.weight"])
    assert torch.equal(joined["layers.1.attention.wq.weight"], meta_rows(stored["model.layers.1.self_attn.q_proj.weight"], 4))
    assert torch.equal(joined["layers.1.attention.wo.weight"], stored["model.layers.1.self_attn.o_proj.weight"])
    assert torch.equal(joined["layers.0.feed_forward.w2.weight"], stored["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(joined["norm.weight"], stored["model.norm.weight"])
    assert len(whole["output.weight"][-1]) - len(whole["output.weight"][0]) == len(stored["lm_head.weight"]) % files
    params = json.loads((pth / "params.json").read_text())
    assert {key: params[key] for key in ("dim", "n_heads", "n_layers", "norm_eps", "vocab_size")} == {
        "dim": 64, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1,
    }  # fmt: skip
    inner = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * 64 / 3))  # as Meta's model.py computes it
    assert params["multiple_of"] * ((inner + params["multiple_of"] - 1) // params["multiple_of"]) == 128
    back = merge(pth, [], tmp_path / "back")
    assert all(torch.equal(tensor, tensors(back)[name]) for name, tensor in stored.items())
    assert tensors(back).keys() == stored.keys()
    assert same_logits(loaded(back), loaded(half))
    adapter = tiny.adapter(base, tmp_path / "adapter", use_dora=True, target_modules=LINEAR)
    both = [tensors(merge(source, adapter, tmp_path / name)) for source, name in ((half, "a"), (pth, "b"))]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0]), "the base's layout does not matter"
    merged_pth = merge(half, adapter, tmp_path / "c", "--output_type", "pth")
    assert all(
        torch.equal(tensor, tensors(merge(merged_pth, [], tmp_path / "d", "--overwrite"))[n]) for n, tensor in both[0].items()
    )


def test_metas_files_as_downloaded(published, tmp_path):
    """Grouped keys, the tokenizer one folder up, extra tensors, and nothing else."""
    base = tiny.llama(tmp_path / "base")
    folder = merge(base, [], tmp_path / "LLaMA" / "7B", "--output_type", "pth", "--dtype", "float16")
    for file in folder.glob("*.json"):
        if file.name != "params.json":
            file.unlink()
    shutil.copy(published / "llama" / "tokenizer.model", tmp_path / "LLaMA")
    part = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save(part | {"rope.freqs": torch.ones(8)}, folder / "consolidated.00.pth")
    out = merge(folder, [], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["num_key_value_heads"], config["max_position_embeddings"], config["torch_dtype"]) == (2, 2048, "float16")
    assert all(torch.equal(tensor.half(), tensors(out)[name]) for name, tensor in tensors(base).items())
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"][0] == 1
    with pytest.raises(UserError, match="copy all of its consolidated"):
        params = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps(params | {"dim": 128}))
        merge(folder, [], tmp_path / "out2")


def test_metas_layout_is_for_llama(tmp_path):
    """Whose models of 7, 13, 33 and 65 or 70 billion parameters are in as many files as Meta published."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    common = {"norm_eps": 1e-6, "vocab_size": -1}
    for values, more, params in (
        ((4096, 11008, 32, 32), {}, {"multiple_of": 256}),
        ((8192, 28672, 64, 80), {"num_key_value_heads": 8}, {"multiple_of": 28672, "n_kv_heads": 8}),
        ((64, 128, 4, 2), {"rope_theta": 1e6}, {"multiple_of": 128, "ffn_dim_multiplier": 128 / 170, "rope_theta": 1e6}),
        ((64, 170, 4, 2), {"rope_parameters": {"rope_theta": 500.0}}, {"multiple_of": 170, "rope_theta": 500.0}),
        ((64, 170, 4, 2), {"num_key_value_heads": 4, "rope_theta": 10000.0}, {"multiple_of": 170}),
    ):
        config = {"model_type": "llama", "rms_norm_eps": 1e-6} | dict(zip(sizes, values, strict=True)) | more
        dim, _, heads, layers = values
        assert meta_writer.params_of(config) == {"dim": dim, "n_heads": heads, "n_layers": layers} | common | params
    assert meta_writer.FILES_BY_HIDDEN_SIZE == {4096: 1, 5120: 2, 6656: 4, 8192: 8}
    with pytest.raises(UserError, match="this model is of the family bloom"):
        merge(tiny.bloom(tmp_path / "bloom"), [], tmp_path / "out", "--output_type", "pth")


# ---- what is written


def test_two_runs_write_the_same_bytes(base, adapter, tmp_path, monkeypatch):
    first = merge(base, adapter, tmp_path / "a", "--max_shard_size", "200KB", "--dtype", "bfloat16")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    monkeypatch.setattr(weights, "MAPPED_AT_MOST", 3000)
    torch.set_num_threads(3)
    second = merge(base, adapter, tmp_path / "b", "--max_shard_size", "200KB", "--dtype", "bfloat16")
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    names = {file.name for file in first.iterdir()}
    assert names == {file.name for file in second.iterdir()} and "model.safetensors.index.json" in names
    for name in names - {"lineage.json", "run.yaml"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert all(file.stat().st_size < 210_000 for file in first.glob("*.safetensors"))
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(first).values())
    index = json.loads((first / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(first).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(first).values())


def test_lineage_says_what_went_in(base, tmp_path):
    from utils.files import sha256

    adapter = tiny.adapter(base, tmp_path / "adapter")
    facts = json.loads((merge(base, adapter, tmp_path / "out") / "lineage.json").read_text())
    assert facts["kind"] == "merge" and facts["base"]["name"] == str(base) and facts["base"]["fingerprint"]["shapes"]
    [came] = facts["adapters"]
    assert came["sha256"]["adapter_model.safetensors"] == sha256(adapter / "adapter_model.safetensors")
    assert facts["tokenizer"]["sha256"]["tokenizer.json"] == sha256(base / "tokenizer.json")
    written = tensors(tmp_path / "out")
    size = sum(tensor.nbytes for tensor in written.values())
    assert facts["results"] == {"bytes": size, "tensors": len(written), "changed": 4}


def test_the_last_line_and_old_options(base, adapter, tmp_path, script):
    ended = script(
        "merge_weights.py", "--base_model", base, "--lora_model", adapter, "--output_dir", tmp_path / "out",
        "--offload_dir", tmp_path / "offload", "--output_type", "huggingface",
    )  # fmt: skip
    told = "--offload_dir: no longer needed, since tensors are merged one by one; nothing is written there"
    first, last = ended.ok().splitlines()
    assert first == told and not (tmp_path / "offload").exists()
    found = re.fullmatch(rf"done: {tmp_path / 'out'}, 0\.00 GB in ([\d.]+) s, (\d+) MB/s, peak memory (\d+) MB", last)
    size = sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values()) / 1e6
    assert 50 < int(found[3]) < 5000 and int(found[2]) == pytest.approx(size / float(found[1]), abs=2)


def test_sizes_as_they_are_written():
    sizes = {
        "500MB": 5 * 10**8,
        "5GB": 5 * 10**9,
        "2GiB": 2**31,
        "1.5KiB": 1536,
        "3mib": 3 * 2**20,
        "10 kb": 10_000,
        "123": 123,
    }
    assert {text: shards.read_size(text) for text in sizes} == sizes
    kinds = {name: ((count,), torch.float32) for name, count in (("a", 50), ("b", 25), ("c", 25), ("d", 101), ("e", 1))}
    wanted = [["a", "b", "c"], ["d"], ["e"]]
    planned = shards.plan_shards(kinds, 400)
    assert list(planned) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [list(parts) for parts in planned.values()] == wanted
    assert list(shards.plan_shards(kinds, 10**9)) == ["model.safetensors"]


def test_layer_2_comes_before_layer_10_and_what_is_new_last():
    stored = SimpleNamespace(names=["layers.10.w", "layers.2.w"], file_of=lambda name: Path("model.safetensors"))
    assert in_order(dict.fromkeys(["head", *stored.names]), stored) == ["layers.2.w", "layers.10.w", "head"]


def test_killed_and_started_again(tmp_path, script):
    """Until it is whole, the folder does not have its name; the second run ends as an undisturbed one does."""
    base = tiny.llama(tmp_path / "base", num_hidden_layers=6, hidden_size=256, intermediate_size=1024)
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=LINEAR)
    options = ("--base_model", base, "--lora_model", adapter, "--max_shard_size", "2MB")
    whole = merge(base, adapter, tmp_path / "whole", "--max_shard_size", "2MB")
    run = script.start("merge_weights.py", *options, "--output_dir", tmp_path / "out")
    run.wait_until(lambda: len(list(tmp_path.glob(".out.part/*.safetensors"))) > 2)
    run.kill()
    assert run.wait().status == -9 and not (tmp_path / "out").exists() and (tmp_path / ".out.part").exists()
    assert "done: " in script("merge_weights.py", *options, "--output_dir", tmp_path / "out").ok()
    assert not (tmp_path / ".out.part").exists()
    for file in whole.iterdir():
        assert file.name in ("lineage.json", "run.yaml") or (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_verify_of_stages_and_layouts(published, tmp_path, capsys):
    stages = [published / "llama-plus", published / "alpaca"]
    merge(published / "llama", stages, tmp_path / "out", "--verify", "--output_type", "pth")
    assert "verified on 4 prompts" in capsys.readouterr().out


def test_every_end_token_and_licence_of_the_base_stays(base, adapter, tmp_path):
    """A model that ends its answers with either of two tokens, as Llama 3 does, still does so when merged."""
    source = shutil.copytree(base, tmp_path / "base")
    config = json.loads((source / "config.json").read_text())
    last = len(load_tokenizer(base)) - 1
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, last]}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, last, last + 1], "temperature": 0.6}))
    licences = ("LICENSE", "LICENSE.md", "NOTICE.txt", "USE_POLICY.md")
    for name in (*licences, "LICENSES", "readme.md"):
        (source / name).mkdir() if name == "LICENSES" else (source / name).write_text(name)
    out = merge(source, adapter, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, last]
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, last] and settings["temperature"] == 0.6
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [2, last]
    assert [name for name in (*licences, "readme.md") if (out / name).is_file()] == list(licences)
    assert all((out / name).read_text() == name for name in licences)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [200, 201]}))  # without the tokenizer's own
    found = json.loads((merge(source, adapter, tmp_path / "more") / "generation_config.json").read_text())
    assert found["eos_token_id"] == [2, 200, 201]
