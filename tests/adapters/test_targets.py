"""Which layers an adapter goes on: names, ends of names, patterns, and what a family has by default."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, Gemma3Config, GPT2Config, LlamaConfig, MambaConfig

from utils.adapters.lora_config import lora_config
from utils.adapters.targets import as_targets, check_layers, choose_targets
from utils.console import UserError
from utils.models import layers

WANTED = {"lora_target_modules": [], "lora_dropout": 0.0}


def meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def llama():
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return meta(LlamaConfig(**small))


@pytest.mark.parametrize(
    ("targets", "whole", "words"),
    [
        (["x_proj"], [], "has no layer x_proj; its linear layers are q_proj, k_proj"),
        (["proj"], [], "has no layer proj"),
        (["norm"], [], "model.norm is a LlamaRMSNorm, which cannot have a LoRA"),
        (["self_attn"], [], "is a LlamaAttention"),
        (["model.layers.0"], [], "is a LlamaDecoderLayer"),
        (["layers"], [], "is a ModuleList"),
        (["layers.9.self_attn.q_proj"], [], "has no layer layers.9"),
        ([".*"], [], "which cannot have a LoRA"),
        (["q_proj.*"], [], "has no layer q_proj"),
        (["q_proj"], ["layers"], "--modules_to_save layers: is a list of layers"),
        (["q_proj"], ["lm_tail"], "--modules_to_save: the model has no layer lm_tail"),
        (["q_proj", "v_proj"], ["v_proj"], "v_proj is in both"),
        (["q_proj"], ["self_attn"], "q_proj is in both"),
        (["q_proj"], ["rotary_emb"], "--modules_to_save rotary_emb: has no weights to train"),
        (["q_proj", ".*_proj"], [], "--lora_target_modules q_proj,.*_proj: .*_proj is a pattern; give it alone"),
        (["q_proj", "all-linear"], [], "is a pattern; give it alone"),
        (["(q_proj"], [], "not a regular expression"),
    ],
)
def test_names_of_what_no_lora_can_go_on(llama, targets, whole, words):
    with pytest.raises(UserError) as caught:
        check_layers(llama, as_targets(targets), whole)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["self_attn.q_proj", "model.layers.1.mlp.down_proj"], 3),
        (["embed_tokens", "lm_head"], 2),
        (["all-linear"], 14),
        ([r".*\.[qv]_proj"], 4),
        ([r"model\.layers\.1\..*_proj"], 7),
    ],
)
def test_names_as_peft_takes_them(llama, targets, count):
    from peft import get_peft_model

    targets = as_targets(targets)
    check_layers(llama, targets, ["norm"])
    config = lora_config(llama, WANTED | {"lora_target_modules": targets}, None)
    wrapped = get_peft_model(meta(llama.config), config)
    assert sum(hasattr(module, "lora_A") for module in wrapped.modules()) == count


def test_default_layers_of_families():
    """DeepSeek's latent attention, with and without a compressed query; GPT-2's layers, which are no nn.Linear."""
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    mla = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1}
    deepseek = meta(DeepseekV2Config(**small, **mla, q_lora_rank=8))
    assert lora_config(deepseek, WANTED, None).target_modules == {"q_b_proj", "kv_b_proj"}
    assert lora_config(meta(DeepseekV2Config(**small, **mla, q_lora_rank=None)), WANTED, None).target_modules == {
        "q_proj",
        "kv_b_proj",
    }
    gpt2 = meta(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    assert lora_config(gpt2, WANTED, None).target_modules == {"c_attn"}
    assert lora_config(gpt2, WANTED, None, every_layer=True).target_modules == {"c_attn", "c_proj", "c_fc"}
    assert layers.embedding_names(gpt2) == ["wte", "lm_head"]
    mamba = meta(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert lora_config(mamba, WANTED, None).target_modules == {"in_proj", "x_proj"}


class Flat(torch.nn.ModuleDict):
    """A model of layers beside one another, of which `head` gives the scores."""

    def get_output_embeddings(self):
        return self["head"]


DEFAULTS = [
    "q_proj v_proj", "q_b_proj kv_b_proj", "q_b_proj kv_proj", "q_proj kv_b_proj", "query_key_value", "qkv_proj", "c_attn",
    "Wqkv", "att_proj", "Wq Wv", "in_proj x_proj", "in_proj", "other",
]  # fmt: skip


@pytest.mark.parametrize("names", DEFAULTS)
def test_the_first_default_that_a_model_has_is_taken_and_others_than_llama_s_are_told(names, capsys):
    names = names.split()
    others = ["head", "down"] if names != ["other"] else ["head"]
    later = ["in_proj"] if names != ["other"] and "in_proj" not in names else []
    model = Flat({name: torch.nn.Linear(2, 2) for name in [*others, *later, *names]})
    told = f"this model has no q_proj and v_proj: the adapter goes on {', '.join(names)}\n"
    assert choose_targets(model, [], False) == names
    assert capsys.readouterr().out == told * (names != ["q_proj", "v_proj"])


def test_an_output_layer_that_is_called_the_decoder_is_no_language_part():
    """As ModernBERT's is."""

    class Decoder(torch.nn.ModuleDict):
        def get_decoder(self):
            return self["decoder"]

    assert layers.language_part(Decoder({"decoder": torch.nn.Linear(2, 2)})) == ""
    assert layers.language_part(Decoder({"decoder": torch.nn.ModuleDict()})) == "decoder."


def test_the_output_layer_is_none_of_the_linear_ones_wherever_it_lies():
    model = Flat({name: torch.nn.Linear(2, 2) for name in ("body", "head")})
    assert layers.linear_layers(model) == ["body"] and layers.on_language_part(model, ["body"]) == ["body"]


def test_a_model_that_sees_is_trained_as_a_language_model():
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    model = meta(Gemma3Config(text_config=text | {"head_dim": 8}, vision_config=vision))
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert layers.linear_layers(model) == linear and layers.language_part(model) == "model.language_model."
    pattern = layers.on_language_part(model, ["q_proj", "up_proj"])
    assert pattern == r"model\.language_model\.(.*\.)?(q_proj|up_proj)"
    assert layers.on_language_part(model, ["up_proj"]) == ["up_proj"], "no other part has such layers"
    for wanted in (WANTED, WANTED | {"lora_target_modules": "all-linear"}):
        config = lora_config(model, wanted, None)
        check_layers(model, config.target_modules, [])
        from peft import get_peft_model

        wrapped = get_peft_model(meta(model.config), config)
        found = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
        assert found and all("language_model" in name for name in found)


def test_patterns_are_kept_and_asked_for_again(script, tmp_path):
    """`all-linear` stays one word in the adapter's settings, so that the next step's same option agrees with it."""
    base = tiny.llama(tmp_path / "base")
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    argv = ["--base_model", base, "--data_path", tmp_path / "data.json", "--val_set_size", 0, "--num_epochs", 1]
    argv += ["--lora_target_modules", "all-linear"]
    assert script("finetune.py", *argv, "--output_dir", tmp_path / "f1").ok()
    settings = json.loads((tmp_path / "f1" / "adapter_config.json").read_text())
    assert settings["target_modules"] == "all-linear"
    more = ["--resume_from_checkpoint", tmp_path / "f1", "--output_dir", tmp_path / "f2"]
    assert script("finetune.py", *argv, *more).ok()
    assert script("finetune.py", *argv[:-1], "[self_attn.q_proj]", *more, "--overwrite_output_dir").status == 2
