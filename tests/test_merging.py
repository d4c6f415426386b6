"""Merging: the mathematics against peft's, every layout, what is checked before and after, and what is left on disk."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepieces
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

import merge_weights
from utils import layouts, merge_plan, shards, weights
from utils.adapters import read_config
from utils.cli import parse
from utils.console import UserError
from utils.tokenizer import load_tokenizer
from utils.verifying import compare_logits

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING = {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]}


def merge(base, adapters, output, *options) -> Path:
    """Run merge_weights.py in this process."""
    adapters = adapters if isinstance(adapters, list) else [adapters]
    arguments = ["--base_model", base, "--output_dir", output, *options]
    if adapters:
        arguments += ["--lora_model", ",".join(map(str, adapters))]
    merge_weights.main(parse(merge_weights.Options, list(map(str, arguments))))
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def with_peft(base: Path, *adapters: Path):
    """Base and adapters in float32, as peft computes them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        model = PeftModel.from_pretrained(model, adapter, config=read_config(adapter))
    return model.eval()


@torch.no_grad()
def same_logits(one, other, atol=2e-3) -> bool:
    ids = torch.randint(4, one.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    first, second = one(ids).logits, other(ids).logits
    return first.shape == second.shape and torch.allclose(first, second, atol=atol, rtol=1e-3)


def loaded(folder: Path):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("merging") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return tiny.adapter(base, base.parent / "adapter", target_modules=LINEAR)


def rewrite(base: Path, folder: Path, layout: str, dtype: torch.dtype) -> Path:
    """The model of `base` in another layout and type."""
    folder.mkdir()
    for file in base.glob("*.json"):
        shutil.copy(file, folder)
    found = {name: tensor.to(dtype) for name, tensor in tensors(base).items()}
    names = sorted(found)
    parts = [names] if "sharded" not in layout else [names[::3], names[1::3], names[2::3]]
    stem, save = ("model", save_file) if "safetensors" in layout else ("pytorch_model", torch.save)
    ending = "safetensors" if "safetensors" in layout else "bin"
    files = [f"{stem}.{ending}"] if len(parts) == 1 else [f"{stem}-{i:05}-of-00003.{ending}" for i in (1, 2, 3)]
    for file, part in zip(files, parts, strict=True):
        options = {"_use_new_zipfile_serialization": False} if "old" in layout else {}
        save({name: found[name] for name in part}, folder / file, **options)
    if len(parts) > 1:
        homes = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder


# ---- the mathematics


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin", "old bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_weight_is_updated_in_float32_and_rounded_once(base, adapter, tmp_path, layout, dtype):
    source = rewrite(base, tmp_path / "base", layout, dtype)
    merged = tensors(merge(source, adapter, tmp_path / "out"))
    stored, lora = tensors(base), load_file(adapter / "adapter_model.safetensors")
    assert merged.keys() == stored.keys()
    for name, tensor in stored.items():
        prefix = "base_model.model." + name.removesuffix("weight")
        delta = 0
        if f"{prefix}lora_A.weight" in lora:
            delta = lora[f"{prefix}lora_B.weight"].double() @ lora[f"{prefix}lora_A.weight"].double() * (8 / 4)
        exact = tensor.to(dtype).double() + delta
        assert merged[name].dtype == dtype
        half_ulp = torch.finfo(dtype).eps * exact.abs() * 0.5001 + 2e-6
        assert ((merged[name].double() - exact).abs() <= half_ulp).all(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


VARIANTS = {
    "rslora": {"use_rslora": True, **EVERYTHING},
    "dora": {"use_dora": True, "target_modules": LINEAR},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7, r"layers\.\d\.self_attn\.v_proj": 3},
        "alpha_pattern": {"v_proj": 5, "model.layers.0.mlp.up_proj": 64},
    },
    "norms and a whole layer": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "up_proj", "lm_head"]},
    "embeddings by LoRA": {"target_modules": ["embed_tokens", "q_proj"]},
    "the output layer by LoRA": {"target_modules": ["lm_head", "q_proj"]},
    "an alpha of zero rank's square": {"target_modules": "all-linear", "r": 16, "lora_alpha": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora_predict_what_peft_predicts(base, tmp_path, variant):
    adapter = tiny.adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out")), with_peft(base, adapter))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only", "lora_bias"])
def test_biases(tmp_path, bias):
    """Qwen2 has biases in some of its layers."""
    base = tmp_path / "base"
    size = len(tiny.tokenizer(base))
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    Qwen2(Qwen2Config(vocab_size=size, num_key_value_heads=2, **settings)).save_pretrained(base)
    options = {"lora_bias": True} if bias == "lora_bias" else {"bias": bias}
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **options)
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out")), with_peft(base, adapter))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["c_proj"], ["c_attn", "wte"]])
def test_gpt2_stores_its_weights_turned(tmp_path, dora, targets):
    """fan_in_fan_out: layers of inputs x outputs, some of them square."""
    base = tmp_path / "base"
    size = len(tiny.tokenizer(base))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)).save_pretrained(base)
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True, use_dora=dora)
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out")), with_peft(base, adapter))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("whole", [[], ["word_embeddings"], ["lm_head"], ["word_embeddings", "lm_head"]])
def test_bloom(tmp_path, prefix, whole):
    """Tied embeddings, padded vocabulary, and (as published) names without their first part."""
    base = tiny.bloom(tmp_path / "base")
    stored = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors(base).items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    adapter = tiny.adapter(base, tmp_path / "adapter", modules_to_save=whole or None)
    out = merge(base, adapter, tmp_path / "out")
    assert same_logits(loaded(out), with_peft(base, adapter))
    config = json.loads((out / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) is (not whole)
    assert config["vocab_size"] == len(load_tokenizer(base)) + 8, "a padded vocabulary keeps its padding"


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "mistral": {**SMALL, "num_key_value_heads": 2},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": SMALL,  # its output layer has another name in files than in the model
    "phi": SMALL,  # its output layer has a bias
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [False, True])
def test_any_family_with_linear_layers(tmp_path, family, whole):
    base = tmp_path / "base"
    size = len(tiny.tokenizer(base))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=size, **FAMILIES[family]))
    model.save_pretrained(base)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name.split(".")[-1] for name, module in model.named_modules() if module in ends] if whole else None
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules="all-linear", modules_to_save=names, scale=0.05)
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out")), with_peft(base, adapter), atol=1e-4)


def test_several_adapters_in_their_order(base, tmp_path, capsys):
    """Also where both replace the embeddings: the later one's stay, and that is said."""
    first = tiny.adapter(base, tmp_path / "first", seed=1, **EVERYTHING)
    second = tiny.adapter(base, tmp_path / "second", seed=2, use_dora=True, target_modules=LINEAR, modules_to_save=["lm_head"])
    both = merge(base, [first, second], tmp_path / "both")
    assert "replaces lm_head.weight, which an adapter before it has changed" in capsys.readouterr().out
    assert same_logits(loaded(both), with_peft(base, first, second))
    one_by_one = merge(merge(base, first, tmp_path / "one"), second, tmp_path / "two")
    for name, tensor in tensors(one_by_one).items():
        torch.testing.assert_close(tensor, tensors(both)[name], atol=1e-5, rtol=1e-5)


def test_a_second_merge_of_nothing_changes_nothing(base, adapter, tmp_path):
    once = merge(base, adapter, tmp_path / "once")
    twice = merge(once, [], tmp_path / "twice", "--max_shard_size", "100KB")
    assert len(list(twice.glob("*.safetensors"))) > 3
    assert all(torch.equal(tensor, tensors(twice)[name]) for name, tensor in tensors(once).items())


# ---- tied embeddings, new tokens

TIED = {
    "neither": [],
    "only the embeddings": ["embed_tokens"],
    "only the output layer": ["lm_head"],
    "both": ["embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("whole", TIED)
@pytest.mark.parametrize("ensured", [False, True])
def test_tied_embeddings(tmp_path, whole, ensured):
    base = tiny.llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = tiny.adapter(base, tmp_path / "adapter", modules_to_save=TIED[whole] or None, ensure_weight_tying=ensured)
    out = merge(base, adapter, tmp_path / "out")
    assert same_logits(loaded(out), with_peft(base, adapter))
    assert AutoConfig.from_pretrained(out).tie_word_embeddings is (not TIED[whole] or ensured)
    assert ("lm_head.weight" in tensors(out)) is (bool(TIED[whole]) and not ensured)


def extended(base: Path, folder: Path) -> Path:
    """A tokenizer with three tokens more than the base's."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["春天", "梦想家", "世界"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_new_tokens(tmp_path, tied, whole):
    """What the adapter does not hold of the new rows is as training began it: the mean of what the token replaces."""
    from utils.vocabulary import grow_embeddings

    base = tiny.llama(tmp_path / "base", tie_word_embeddings=tied)
    old, new = load_tokenizer(base), load_tokenizer(extended(base, tmp_path / "tokenizer"))
    model = AutoModelForCausalLM.from_pretrained(base)
    grow_embeddings(model, old, new)
    model.save_pretrained(tmp_path / "grown")
    adapter = tiny.adapter(tmp_path / "grown", tmp_path / "adapter", modules_to_save=whole)
    new.save_pretrained(adapter)
    out = merge(base, adapter, tmp_path / "out")
    assert same_logits(loaded(out), with_peft(tmp_path / "grown", adapter))
    assert len(AutoTokenizer.from_pretrained(out)) == len(new) == AutoConfig.from_pretrained(out).vocab_size


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
    assert "config.json: eos_token_id 1 becomes 2, as the tokenizer has it" in said
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


# ---- Meta's layout


def meta_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows of a query or key projection in Meta's order (the inverse of the converter's permutation)."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("files", "dtype"), [(1, torch.float32), (2, torch.float16), (4, torch.bfloat16)])
def test_meta_layout_there_and_back(tmp_path, files, dtype, monkeypatch):
    monkeypatch.setitem(layouts.FILES_BY_HIDDEN_SIZE, 64, files)
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
    with pytest.raises(UserError, match="this model is of the family bloom"):
        merge(tiny.bloom(tmp_path / "bloom"), [], tmp_path / "out", "--output_type", "pth")


# ---- what is written


def test_two_runs_write_the_same_bytes(base, adapter, tmp_path, monkeypatch):
    first = merge(base, adapter, tmp_path / "a", "--max_shard_size", "200KB", "--dtype", "bfloat16")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    monkeypatch.setattr(weights, "MAPPED_AT_MOST", 3000)
    second = merge(base, adapter, tmp_path / "b", "--max_shard_size", "200KB", "--dtype", "bfloat16")
    names = {file.name for file in first.iterdir()}
    assert names == {file.name for file in second.iterdir()} and "model.safetensors.index.json" in names
    for name in names - {"lineage.json"}:
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
    assert facts["results"]["changed"] == 4 and facts["results"]["bytes"] > 0


def test_the_last_line_and_old_options(base, adapter, tmp_path, script):
    ended = script(
        "merge_weights.py", "--base_model", base, "--lora_model", adapter, "--output_dir", tmp_path / "out",
        "--offload_dir", tmp_path / "offload", "--output_type", "huggingface",
    )  # fmt: skip
    assert "--offload_dir: not needed any more" in ended.ok and not (tmp_path / "offload").exists()
    last = ended.out.strip().splitlines()[-1]
    assert last.startswith("done: ") and " GB in " in last and " MB/s, peak memory " in last


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
    assert "done: " in script("merge_weights.py", *options, "--output_dir", tmp_path / "out").ok
    assert not (tmp_path / ".out.part").exists()
    for file in whole.iterdir():
        assert file.name == "lineage.json" or (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_verify_compares_logits(base, adapter, tmp_path, capsys):
    out = merge(base, adapter, tmp_path / "out", "--verify")
    assert "verified on 4 prompts: scores differ by 0.00%" in capsys.readouterr().out
    plan = merge_plan.plan_merge(str(base), [str(adapter)], None, "huggingface", "5GB")
    compare_logits(plan, out)
    with pytest.raises(UserError, match="is not what base and adapters are together"):
        compare_logits(plan, base)


def test_verify_of_stages_and_layouts(published, tmp_path, capsys):
    stages = [published / "llama-plus", published / "alpaca"]
    merge(published / "llama", stages, tmp_path / "out", "--verify", "--output_type", "pth")
    assert "verified on 4 prompts" in capsys.readouterr().out


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
    with pytest.raises(UserError, match="was trained on another base"):
        merge(tiny.llama(tmp_path / "other", seed=5), marked, tmp_path / "out")


def test_quantised_bases(base, adapter, tmp_path):
    """PITFALLS 7."""
    said = tmp_path / "said"
    shutil.copytree(base, said)
    config = json.loads((said / "config.json").read_text())
    (said / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"quantised \(gptq\)"):
        merge(said, adapter, tmp_path / "out")
    unsaid = rewrite(base, tmp_path / "unsaid", "safetensors", torch.float16)
    stored = tensors(unsaid)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {name: stored[name].to(torch.int8)}, unsaid / "model.safetensors")
    with pytest.raises(UserError, match=r"quantised \(int8\)"):
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
    with pytest.raises(UserError, match=r"is no file of torch\.save; copy it again|not a whole safetensors file"):
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


def test_every_tensor_of_an_adapter_counts_once(base, adapter, tmp_path):
    """Two names for one tensor, as a file joined by hand may have them: which one was meant is not guessed."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(stored | {name.replace("lora_A", "lora_A.default"): stored[name] * 2}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="are one tensor"):
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
    with pytest.raises(UserError, match="is or contains"):
        merge(base, adapter, base, "--overwrite")
    merge(base, adapter, tmp_path / "model")
    with pytest.raises(UserError, match="give --overwrite"):
        merge(base, adapter, tmp_path / "model")
    merge(base, adapter, tmp_path / "model", "--overwrite")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"are needed and 0\.00 GB free"):
        merge(base, adapter, tmp_path / "more")
    with pytest.raises(UserError, match="not a size"):
        merge(base, adapter, tmp_path / "more", "--max_shard_size", "5 elephants")


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


def test_a_file_that_was_not_written_as_computed(tmp_path):
    kinds = {"a": ((3, 4), torch.float16), "b": ((5,), torch.float32)}
    values = {"a": torch.randn(3, 4).half(), "b": torch.randn(5)}
    for file, write in ((tmp_path / "x.safetensors", shards.write_safetensors), (tmp_path / "x.pth", layouts.write_pth)):
        pieces = write(file, kinds, [shards.block_of(name, part) for name, value in values.items() for part in value.split(2)])
        shards.read_back(file, kinds, pieces)
        data = file.read_bytes()
        place = data.index(values["b"].numpy().tobytes())
        file.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
        with pytest.raises(UserError, match="b is not read as it was written"):
            shards.read_back(file, kinds, pieces)
        file.write_bytes(data)
        with pytest.raises(UserError, match="holds other tensors"):
            shards.read_back(file, kinds | {"b": ((1, 5), torch.float32)}, pieces)
