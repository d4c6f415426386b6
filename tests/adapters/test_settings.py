"""An adapter's settings mean the same to training, answering and merging: what peft makes of them, or one line."""

import dataclasses
import functools
import json
import shutil

import families
import pytest
import tiny
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import initialize_lora_eva_weights
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merge_weights
from utils.adapters import adapters, consistency, fit, switching
from utils.adapters.settings import is_pattern, read_config, read_settings
from utils.cli import parse
from utils.console import UserError
from utils.inference.answerers import resolve
from utils.merging.adapter_deltas import Adapter
from utils.merging.plan import plan_merge
from utils.training import start

IDS = torch.tensor([[1, 5, 6, 7, 30, 300, 5]])
KINDS = {
    "single rows of the embeddings": {"trainable_token_indices": [5, 6]},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases of its own": {"lora_bias": True},
    "names with dots": {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.down_proj"]},
    "a pattern": {"target_modules": r".*\.[qk]_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "some layers only": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "patterns for ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "DoRA": {"use_dora": True},
    "whole layers": {"modules_to_save": ["norm", "lm_head"]},
    "tied output layer": {"target_modules": ["q_proj", "lm_head"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "MiCA": {"init_lora_weights": "mica"},
    "single parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    "layers left out": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    "layers left out by a pattern": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
    "no biases to train": {"bias": "lora_only"},
    "the base's own biases": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"], "init_lora_weights": "gaussian"},
    "all of the base's biases": {"bias": "all", "target_modules": ["q_proj", "k_proj", "v_proj"], "use_rslora": True},
    "EVA": {"init_lora_weights": "eva", "target_modules": ["q_proj", "v_proj", "up_proj"]},
}
BASES = {"tied": "tied", "tied output layer": "tied", "the base's own biases": "qwen2", "all of the base's biases": "qwen2"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    tied = tiny.llama(folder / "tied", tie_word_embeddings=True)
    return {"llama": tiny.llama(folder / "llama"), "tied": tied, "qwen2": tiny.qwen2(folder / "qwen2")}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    return tiny.adapter(bases["llama"], tmp_path_factory.mktemp("adapters") / "plain")


def changed(adapter, folder, **settings):
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, folder)
    written = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def eva(base, folder, **settings):
    """An adapter that peft's EVA starts, with ranks of its own for each layer, and that has learned since."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, eva_config=EvaConfig(rho=2), **settings))
    ids = torch.randint(4, 400, (16, 24), generator=torch.Generator().manual_seed(0))
    initialize_lora_eva_weights(model, [{"input_ids": ids[row : row + 4]} for row in range(0, 16, 4)], show_progress_bar=False)
    assert model.peft_config["default"].rank_pattern
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_training_answering_and_merging_give_what_peft_computes(bases, tmp_path, kind):
    base = bases[BASES.get(kind, "llama")]
    folder = (eva if kind == "EVA" else tiny.adapter)(base, tmp_path / "adapter", **KINDS[kind])
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    fit.check(fit.Adapter(folder), base)
    config = adapters.config_on(AutoModelForCausalLM.from_pretrained(base), folder)
    config.inference_mode = False
    trained = adapters.load(AutoModelForCausalLM.from_pretrained(base), folder, config)
    close(logits(trained), expected)
    adapters.save(adapters.state(trained), trained.peft_config["default"], tmp_path / "again", str(base))
    close(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")), expected)
    for number, one in enumerate((folder, tmp_path / "again")[: 1 + ("bias" in kind)]):
        argv = ["--base_model", str(base), "--lora_model", str(one), "--output_dir", str(tmp_path / f"merged{number}")]
        merge_weights.main(parse(merge_weights.Options, argv))
        close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{number}")), expected)
    own, plain = tmp_path / "adapter", tiny.adapter(base, tmp_path / "plain", seed=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    alone = logits(model)
    both = switching.attach(model, {"own": own, "plain": plain}, str(base))
    switching.activate(both, "own")
    close(logits(model), expected)
    with switching.merged(both, "own"):
        close(logits(model), expected)
    switching.activate(both, None)
    assert torch.equal(logits(model), alone)


def refusals(base, folder):
    """What training, answering and merging say of an adapter."""
    said = []
    for use in (
        lambda: start.check_parent(start.RunStart(folder, None), {"lora_alpha": None}, str(base)),
        lambda: resolve(str(base), [str(folder)], ""),
        lambda: plan_merge(str(base), [str(folder)]),
    ):
        with pytest.raises(UserError) as caught:
            use()
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa"}, "belongs to a base changed by pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed by pissa"),
        ({"init_lora_weights": "OLoRA"}, "changed by OLoRA"),
        ({"init_lora_weights": "corda"}, "changed by corda"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "changed by loftq"),
        ({"init_lora_weights": "lora_ga"}, "changed by lora_ga"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [5]}, "active only in parts of a text"),
        ({"velora_config": {"groups": 4}}, "keeps compressed activations"),
        ({"kasa_config": {}}, "truncates the base's weights"),
        ({"monteclora_config": {}}, "are sampled"),
        ({"arrow_config": {}}, "chooses among experts"),
        ({"use_bdlora": {}}, "block-diagonal"),
        ({"target_modules": "((([a-z0-9_.])+)+)+!"}, "invalid value ((([a-z0-9_.])+)+)+! for target_modules"),
        ({"init_lora_weights": "hello"}, "invalid value hello for init_lora_weights"),
        ({"task_type": ["CAUSAL_LM"]}, " for task_type;"),
        ({"target_modules": []}, "invalid value [] for target_modules"),
        ({"r": "8"}, "invalid value 8 for r"),
        ({"r": 8.5}, "invalid value 8.5 for r"),
        ({"r": True}, "invalid value True for r"),
        ({"lora_alpha": None}, "invalid value None for lora_alpha"),
        ({"use_dora": "false"}, "invalid value false for use_dora"),
        ({"bias": "some"}, "invalid value some for bias"),
        ({"modules_to_save": "lm_head"}, "invalid value lm_head for modules_to_save"),
        ({"target_modules": "q_proj("}, " for target_modules;"),
        ({"trainable_token_indices": ["<s>"]}, " for trainable_token_indices;"),
        ({"layers_to_transform": "1"}, "invalid value 1 for layers_to_transform"),
        ({"target_modules": ["q_proj"]}, "a LoRA on model.layers.0.self_attn.v_proj, its settings leave it out"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "on model.layers.1.self_attn.q_proj, its settings leave it out"),
        ({"layers_to_transform": [1]}, "on model.layers.0.self_attn.q_proj, its settings leave it out"),
        ({"use_dora": True}, "have use_dora true, its weights do not match"),
        ({"trainable_token_indices": [5]}, "differ in trainable_token_indices"),
    ],
)
def test_what_one_script_refuses_all_refuse_with_one_line(bases, plain, tmp_path, settings, words):
    said = refusals(bases["llama"], changed(plain, tmp_path / "adapter", **settings))
    assert len(set(said)) == 1 and words in said[0]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (tiny.llama, {"hidden_size": 96, "num_attention_heads": 6}, "q_proj.weight is 96 x 96, the base's is 64 x 64: another"),
        (tiny.llama, {"num_hidden_layers": 3}, "2 of its layers are not in the base (model.layers.2.self_attn.q_proj.weight, "),
        (tiny.bloom, {}, "2 of its layers are not in the base (transformer.h.0.self_attention.query_key_value.weight, "),
    ],
)
def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(bases, tmp_path, kind, changes, words):
    said = refusals(bases["llama"], tiny.adapter(kind(tmp_path / "other", **changes), tmp_path / "adapter"))
    assert len(set(said)) == 1 and words in said[0]


def test_all_linear_layers_of_a_mixture_leave_its_embeddings_and_its_router_out(tmp_path):
    base = families.make("qwen2_moe", tmp_path / "base")
    named = tiny.adapter(base, tmp_path / "named", target_modules="all-linear")  # peft writes names, this project the word
    fit.check(fit.Adapter(changed(named, tmp_path / "adapter", target_modules="all-linear")), base)


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": None, "rank_pattern": None, "use_dora": None, "init_lora_weights": None, "lora_dropout": None},
        {"r": 4.0, "lora_alpha": 8.0, "rank_pattern": {"q_proj": 4.0}, "alpha_pattern": {"q_proj": 8.0}},
        {"init_lora_weights": "EVA", "eva_config": None},
        {"init_lora_weights": "Orthogonal", "inference_mode": False},
        {
            "runtime_config": {"ephemeral_gpu_offload": True},
            "megatron_core": "megatron.core",
            "loftq_config": {"loftq_bits": 4},
        },
    ],
)
def test_numbers_and_nulls_as_other_programs_write_them(bases, plain, tmp_path, settings):
    """And starts that change nothing of the base on loading."""
    base, folder = bases["llama"], changed(plain, tmp_path / "adapter", **settings)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain))
    config = read_config(folder)
    config.inference_mode = False
    assert torch.equal(logits(adapters.load(AutoModelForCausalLM.from_pretrained(base), folder, config)), expected)
    attached = switching.attach(AutoModelForCausalLM.from_pretrained(base), {"own": folder}, str(base))
    assert torch.equal(logits(attached), expected) and not any(one.requires_grad for one in attached.parameters())
    assert Adapter(folder).scaling("model.layers.0.self_attn.q_proj", 4) == 2.0
    assert read_settings(folder)["r"] == 4 and isinstance(read_settings(folder)["r"], int)


def test_a_pattern_must_not_be_matched_for_hours():
    usual = [
        r".*\.(q|k)_proj", r"^(?!.*visual).*(?:q_proj|v_proj)$", r"[)(*+]+\(a\*\)+", "(ab)+", "(a|b){2}",
        "|".join(f".*{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")),
        r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:q_proj))",
    ]  # fmt: skip
    endless = ["(a|a)*b", "(.*)*x", "(a+b?)+$", "(?:a|aa)+$", ".*.*.*.*.*.*.*.*x", "(x+x+)+y", "([a-z]+){1,}!", "(((a+)b)c)*"]
    assert all(map(is_pattern, usual)) and not any(map(is_pattern, endless))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"target_modules": None}, "0q 1q 0k 1k"),
        ({"target_modules": ["q"]}, "0q 1q"),
        ({"target_modules": ["layers.1.q", "h.0.k"]}, "1q"),
        ({"target_modules": "all-linear"}, "0q 1q 0k 1k"),
        ({"target_modules": "all-linear", "exclude_modules": ["k"]}, "0q 1q"),
        ({"target_modules": r".*\.0\.[qk]"}, "0q 0k"),
        ({"target_modules": r".*\.[qk]", "exclude_modules": r".*\.0\..*"}, "1q 1k"),
        ({"target_modules": ["q", "k"], "layers_to_transform": 1}, "1q 1k"),
        ({"target_modules": ["q"], "layers_to_transform": [0, 3]}, "0q"),
        ({"target_modules": ["q"], "layers_to_transform": []}, "0q 1q"),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"}, "1q"),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, "1q"),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"}, ""),
    ],
)
def test_the_layers_that_settings_put_a_lora_on_are_those_of_peft(settings, layers):
    names = {f"{number}{kind}": f"model.layers.{number}.{kind}" for kind in "qk" for number in (0, 1)}
    assert [short for short, name in names.items() if consistency.is_target(settings, name)] == layers.split()
    if settings["target_modules"] not in (None, "all-linear"):
        config = LoraConfig(**settings)
        assert [short for short, name in names.items() if check_target_module_exists(config, name)] == layers.split()


def test_every_setting_that_peft_knows_has_its_place_here():
    """And those that it does not know are left out by all scripts, which is printed."""
    from peft import LoraConfig

    from utils.adapters import settings

    known = settings.KINDS.keys() | settings.UNSUPPORTED.keys() | settings.OTHER_SETTINGS
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == set(), "peft has new settings: settings.py"


def test_unknown_settings_are_printed_by_the_reader_of_all_scripts(plain, tmp_path, capsys):
    folder = changed(plain, tmp_path / "adapter", use_magic={"x": 1}, unused=None, off=False)
    assert "use_magic" not in read_settings(folder)
    assert f"{folder}/adapter_config.json: unknown settings are left out: use_magic\n" in capsys.readouterr().out
    folder = changed(plain, tmp_path / "loftq", loftq_config={"loftq_bits": 4}, base_model_name_or_path="changed")
    assert read_settings(folder)
    assert f"{folder}: was made by LoftQ, and fits only the base changed by it: changed\n" in capsys.readouterr().out


def test_training_goes_on_from_a_parent_whose_start_needs_the_base_s_values(bases, tmp_path, script):
    """A dry run and the first checks have a model without values."""
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    for kind in ("MiCA", "single parameters"):
        parent = tiny.adapter(bases["llama"], tmp_path / kind.replace(" ", "-"), **KINDS[kind])
        argv = ("--base_model", bases["llama"], "--data_path", tmp_path / "data.json", "--val_set_size", 0, "--dry_run")
        told = script("finetune.py", *argv, "--resume_from_checkpoint", parent, "--output_dir", tmp_path / "out").ok()
        assert "parameters would be trained" in told and ("--lora_dropout 0.05: is 0 here" in told) == (kind != "MiCA")


@pytest.mark.parametrize(
    ("made", "settings", "words"),
    [
        ({"bias": "all"}, {}, "changes biases of layers without a LoRA, too (model.layers.0.self_attn.k_proj, "),
        ({"bias": "lora_only", "use_dora": True}, {}, "changes the base's biases beside DoRA"),
        ({"bias": "lora_only", "target_modules": ["q_proj", "embed_tokens"]}, {}, "and has a LoRA on the embeddings"),
        ({"lora_bias": True, "target_modules": ["o_proj"]}, {}, "self_attn.o_proj has a bias, the base's has none"),
        ({"lora_bias": True}, {"lora_bias": False}, "have biases of their own, its settings leave them out (lora_bias)"),
        ({"use_dora": True}, {"use_dora": False}, "have use_dora false, its weights do not match"),
    ],
)
def test_what_cannot_be_switched_or_merged_all_refuse_with_one_line(bases, tmp_path, made, settings, words):
    adapter = tiny.adapter(bases["qwen2"], tmp_path / "made", **made)
    said = refusals(bases["qwen2"], changed(adapter, tmp_path / "adapter", **settings))
    assert len(set(said)) == 1 and words in said[0]


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"fan_in_fan_out": True}, {"target_modules": None}])
def test_what_peft_makes_of_settings_that_say_more_or_less_than_the_weights(bases, plain, tmp_path, settings):
    """Biases that are not there are zero; layers hold what they do, whatever is said; no targets are all that there are."""
    folder = changed(plain, tmp_path / "adapter", **settings)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), plain))
    argv = ["--base_model", str(bases["llama"]), "--lora_model", str(folder), "--output_dir", str(tmp_path / "out")]
    merge_weights.main(parse(merge_weights.Options, argv))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    assert torch.equal(logits(switching.attach(model, {"own": folder}, "")), expected)


@pytest.mark.parametrize("name", ["q_proj.base_layer.bias", "q_proj.bias"])
def test_biases_of_the_base_that_the_settings_do_not_name(bases, tmp_path, name):
    """peft loads them, so they count."""
    made = tiny.adapter(bases["qwen2"], tmp_path / "made", bias="lora_only", target_modules=["q_proj"])
    folder = changed(made, tmp_path / "adapter", bias="none")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["qwen2"]), made))
    tensors = {key.replace("q_proj.base_layer.bias", name): one for key, one in adapters.read_tensors(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(bases["qwen2"])
    torch.testing.assert_close(logits(switching.attach(model, {"own": folder}, "")), expected, atol=1e-5, rtol=1e-5)


def test_whole_layers_that_the_settings_do_not_name(bases, tmp_path):
    """As peft saves grown embeddings; those that are the base's own are no part of what is trained."""
    made = tiny.adapter(bases["llama"], tmp_path / "made", modules_to_save=["lm_head"])
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), made))
    folder = changed(made, tmp_path / "adapter", modules_to_save=None)
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    assert torch.equal(logits(switching.attach(model, {"own": folder}, "")), expected)
    own = {"base_model.model.lm_head.weight": load_file(bases["llama"] / "model.safetensors")["lm_head.weight"]}
    save_file(adapters.read_tensors(folder) | own, folder / "adapter_model.safetensors")
    assert adapters.config_on(AutoModelForCausalLM.from_pretrained(bases["llama"]), folder).modules_to_save is None
    assert adapters.config_on(AutoModelForCausalLM.from_pretrained(bases["tied"]), folder).modules_to_save == ["lm_head"]


def test_a_base_beside_which_an_adapter_lies(bases, plain, tmp_path, script, capsys):
    """The base's own weights are loaded; with the adapter there, transformers would put it on."""
    from utils.merging import verify
    from utils.models.loading import load_base
    from utils.models.placement import place
    from utils.models.tokenizer import load_tokenizer

    both = shutil.copytree(bases["llama"], tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(plain / name, both)
    expected = logits(AutoModelForCausalLM.from_pretrained(bases["llama"]))
    model = load_base(str(both), load_tokenizer(both), place(False, False))
    assert torch.equal(logits(model), expected) and torch.equal(logits(verify.load_float32(both)), expected)
    assert "also holds an adapter" in capsys.readouterr().out
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    argv = ("--base_model", both, "--data_path", tmp_path / "data.json", "--val_set_size", 0)
    refused = script("finetune.py", *argv, "--output_dir", both)
    assert refused.status == 2 and "is the base model's own folder" in refused.error


def test_an_adapter_s_values_must_be_those_its_settings_ask_for(bases, plain, tmp_path):
    folder = changed(plain, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UserError) as error:
        switching.attach(AutoModelForCausalLM.from_pretrained(bases["llama"]), {"own": folder}, str(bases["llama"]))
    names = [f"base_model.model.model.layers.{place}.weight" for place in
             ("0.self_attn.v_proj.lora_A", "0.self_attn.v_proj.lora_B", "1.self_attn.v_proj.lora_A")]  # fmt: skip
    shapes = [(4, 64), (32, 4), (4, 64)]
    differ = "; ".join(f"{name} is {shape}, the model wants none" for name, shape in zip(names, shapes, strict=True))
    assert str(error.value) == (
        f"{folder}: 4 of the adapter's tensors do not fit this base model and these options ({differ}); "
        "use the base it was trained on"
    )
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "q_proj" in name}, folder / "adapter_model.safetensors")
    switching.attach(AutoModelForCausalLM.from_pretrained(bases["llama"]), {"own": folder}, str(bases["llama"]))


def test_a_saved_adapter_is_read_back(bases, tmp_path, monkeypatch):
    folder = tiny.adapter(bases["llama"], tmp_path / "a")
    tensors, config = adapters.read_tensors(folder), read_config(folder)
    adapters.save(tensors, config, tmp_path / "b", "base")
    found = adapters.read_tensors(tmp_path / "b")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    told = {"inference_mode": True, "base_model_name_or_path": "base"}
    sets = {name: sorted(value) for name, value in config.to_dict().items() if isinstance(value, set)}
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()) == config.to_dict() | sets | told

    def damaged(tensors, path, metadata):
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(adapters, "save_file", damaged)
    with pytest.raises(UserError, match="differs from what was saved; check the disk"):
        adapters.save(tensors, config, tmp_path / "c", "base")
