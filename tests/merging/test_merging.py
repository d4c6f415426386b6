"""Merging: the mathematics against peft's, of every kind of LoRA and family; tied embeddings, and new tokens."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from bitsandbytes import functional
from merges import (
    LINEAR,
    loaded,
    merge,
    rewrite,
    same_logits,
    tensors,
    with_peft,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from utils.adapters import switching
from utils.console import UserError
from utils.models.tokenizer import load_tokenizer

EVERYTHING = {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]}


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
        "alpha_pattern": {"v_proj": 5, r"self_attn\.v_proj": 50, "model.layers.0.mlp.up_proj": 64},
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


MOE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {  # in the files, experts lie apart; or together, inputs x outputs; or together, outputs x inputs
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "layer_types": ["full_attention"] * 2,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_loras_on_the_parameters_of_experts(tmp_path, family):
    """In training and answering, too, two of them are on one module."""
    base = tmp_path / "base"
    settings = {"vocab_size": len(tiny.tokenizer(base)), "initializer_range": 0.3, "pad_token_id": 3} | MOE | EXPERTS[family]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).save_pretrained(base)
    told = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": told}
    adapter = tiny.adapter(base, tmp_path / "adapter", scale=0.1, **options)
    expected = with_peft(base, adapter)
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out", "--verify")), expected)
    switching.attach(model := AutoModelForCausalLM.from_pretrained(base), {"own": adapter}, str(base))
    assert same_logits(model.eval(), expected, atol=1e-5)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only", "lora_bias"])
def test_biases(tmp_path, bias):
    """Qwen2 has biases in some of its layers."""
    base = tmp_path / "base"
    size = len(tiny.tokenizer(base))
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    Qwen2(Qwen2Config(vocab_size=size, num_key_value_heads=2, **settings)).save_pretrained(base)
    options = {"lora_bias": True} if bias == "lora_bias" else {"bias": bias}
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj"], **options)
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out")), with_peft(base, adapter))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "up_proj"]])
def test_biases_for_layers_without_one(base, tmp_path, targets, capsys):
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=targets, lora_bias=True)
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out", "--verify")), with_peft(base, adapter))
    config, switches = json.loads((tmp_path / "out" / "config.json").read_text()), ("attention_bias", "mlp_bias")
    on = [name for name in switches if config[name]]
    assert len(on) == 1 + (targets == ["o_proj", "up_proj"])
    assert f"{', '.join(on)} becomes true" in capsys.readouterr().out
    with pytest.raises(UserError, match="has a bias, the base's has none"):
        merge(base, adapter, tmp_path / "pth", "--output_type", "pth")
    if targets == ["down_proj"]:
        other = tiny.adapter(base, tmp_path / "other", seed=1, target_modules=["q_proj"], lora_bias=True)
        for order in ([adapter, other], [other, adapter]):
            out = merge(base, order, tmp_path / "both", "--overwrite")
            assert all(json.loads((out / "config.json").read_text())[name] for name in switches)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["c_proj"], ["c_attn", "wte"], ["c_proj", "lm_head"]])
def test_gpt2_stores_its_weights_turned(tmp_path, dora, targets):
    """Layers of inputs x outputs, some of them square, whatever fan_in_fan_out says; with lm_head peft saves it as false."""
    base = tmp_path / "base"
    size = len(tiny.tokenizer(base))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)).save_pretrained(base)
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True, use_dora=dora)
    assert same_logits(loaded(merge(base, adapter, tmp_path / "out")), with_peft(base, adapter))
    step = {"kind": "train", "options": {"load_4bit": True}, "dtype": "float32"}
    (adapter / "lineage.json").write_text(json.dumps(step))
    into = tensors(merge(base, adapter, tmp_path / "beside", "--merge_into", "dequantized"))
    assert torch.equal(into["transformer.wpe.weight"], tensors(base)["transformer.wpe.weight"]), "positions are no linear layer"


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
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # its layers are Conv1D
    "qwen2_moe": {  # with shared experts beside the others
        **SMALL,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
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


def test_two_towers_of_equal_shapes(tmp_path):
    """The names in the files are older than those in the model, and both towers have layers of the same names and shapes."""
    base = tmp_path / "base"
    text = {**SMALL, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": len(tiny.tokenizer(base))}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**SMALL, "image_size": 28})
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    stored = tensors(base)
    shapes = [t.shape for n, t in stored.items() if n.endswith("layers.0.self_attn.q_proj.weight")]
    assert len(shapes) == 2 and shapes[0] == shapes[1]
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=r".*language_model.*\.[qv]_proj", scale=0.05)
    out = merge(base, adapter, tmp_path / "out")
    assert same_logits(loaded(out), with_peft(base, adapter), atol=1e-4)
    changed = {name for name, tensor in tensors(out).items() if not torch.equal(tensor, stored[name])}
    assert len(changed) == 4 and all(name.startswith("language_model.") for name in changed)


def test_a_name_that_several_tensors_could_be_meant_by(tmp_path):
    """Neither is guessed."""
    from utils.models.names import Finder

    find = Finder(["a.layers.0.q.weight", "b.layers.0.q.weight", "a.layers.1.q.weight"], {"model_type": "of no library"})
    assert find("layers.0.q.weight") == "" and find("layers.1.q.weight") == "a.layers.1.q.weight" and find.layers == 2
    find = Finder(["tok.weight", "lm_head.weight"], {"model_type": "of no library"})
    assert (find.embedding, find.stored_head, find.tied_head, find.layers) == ("", "lm_head.weight", "", 0)


def test_experts_of_which_one_is_missing_are_no_joined_tensor():
    from utils.models.names import in_rows

    parts = {(expert, number): f"{expert} {number}" for expert in range(3) for number in range(2)}
    assert in_rows(parts) == [["0 0", "0 1"], ["1 0", "1 1"], ["2 0", "2 1"]]
    assert all(in_rows({place: name for place, name in parts.items() if place != lost}) == [] for lost in [(0, 1), (2, 0)])


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
    two = merge(once, [], tmp_path / "two", "--max_shard_size", str(sum(t.nbytes for t in tensors(once).values()) - 1))
    assert len(list(two.glob("*.safetensors"))) == 2 and same_logits(loaded(two), loaded(once))


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
    from utils.models.vocabulary import grow_embeddings

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


# ---- single tokens, and a base that was quantized while training


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_single_tokens_are_merged(tmp_path, monkeypatch, capsys, tied):
    base = tiny.llama(tmp_path / "base", tie_word_embeddings=tied)
    adapter = tiny.adapter(base, tmp_path / "adapter", trainable_token_indices=[6, 5, 300])
    monkeypatch.setattr("utils.merging.merge.BLOCK", 1000)  # values: the last ones of the embeddings stay
    merged = merge(base, adapter, tmp_path / "out")
    assert same_logits(loaded(merged), with_peft(base, adapter)) and "equal the base's" not in capsys.readouterr().out
    assert json.loads((merged / "lineage.json").read_text())["results"]["changed"] == 4 + 1
    file = adapter / "adapter_config.json"
    for rows, fit in (([6, 5, 475], True), ([6, 5, 476], False), ([6, 5, -1], False), ([6, 5], False)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": rows}))
        with contextlib.nullcontext() if fit else pytest.raises(UserError, match=r"token|trainable"):
            merge(base, adapter, tmp_path / "other", "--overwrite")


@pytest.mark.parametrize("way", ["load_4bit", "load_8bit"])
def test_adapter_trained_beside_a_quantized_base_is_merged_into_either(base, adapter, tmp_path, capsys, way):
    trained = tmp_path / "trained"
    shutil.copytree(adapter, trained)
    step = {"kind": "train", "options": {way: True}, "dtype": "float32"}
    (trained / "lineage.json").write_text(json.dumps(step))
    full = tensors(merge(base, trained, tmp_path / "full"))
    told = capsys.readouterr().out
    percent = float(re.search(r"differ from the full ones by ([\d.]+)%", told)[1])
    dequantized = tensors(merge(base, trained, tmp_path / "dequantized", "--merge_into", "dequantized"))
    linear = [name for name in full if full[name].dim() == 2 and "embed" not in name and "lm_head" not in name]
    apart = sum((full[name] - dequantized[name]).square().sum() for name in linear)
    whole = sum(tensors(base)[name].square().sum() for name in linear)
    assert 100 * (apart / whole).sqrt() == pytest.approx(percent, rel=0.05)
    for name in linear if way == "load_4bit" else ():
        stored = tensors(base)[name]
        packed = functional.dequantize_4bit(*functional.quantize_4bit(stored, quant_type="nf4", compress_statistics=True))
        torch.testing.assert_close(dequantized[name] - full[name], packed - stored, rtol=0, atol=1e-6)
    assert (0.2 < percent < 2) if way == "load_8bit" else (5 < percent < 15)
    assert all(torch.equal(full[name], dequantized[name]) for name in full.keys() - set(linear))
