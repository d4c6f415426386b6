"""An adapter's settings mean the same to training, answering and merging: what peft makes of them, or one line."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from utils.adapters import adapters, switching
from utils.adapters.settings import read_config, read_settings
from utils.console import UserError
from utils.inference.answerers import resolve
from utils.merging.adapter_deltas import Adapter
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
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "MiCA": {"init_lora_weights": "mica"},
    "single parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    "layers left out": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {False: tiny.llama(folder / "base"), True: tiny.llama(folder / "tied", tie_word_embeddings=True)}


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    return tiny.adapter(bases[False], tmp_path_factory.mktemp("adapters") / "plain")


def changed(adapter, folder, **settings):
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, folder)
    written = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_answering_start_from_what_peft_computes(bases, tmp_path, kind):
    base = bases[kind == "tied"]
    folder = tiny.adapter(base, tmp_path / "adapter", **KINDS[kind])
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))
    config = read_config(folder)
    config.inference_mode = False
    trained = adapters.load(AutoModelForCausalLM.from_pretrained(base), folder, config)
    assert torch.equal(logits(trained), expected)
    adapters.save(adapters.state(trained), trained.peft_config["default"], tmp_path / "again", str(base))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again")
    assert torch.equal(logits(again), expected)
    own, plain = tmp_path / "adapter", tiny.adapter(base, tmp_path / "plain", seed=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    alone = logits(model)
    both = switching.attach(model, {"own": own, "plain": plain}, str(base))
    switching.activate(both, "own")
    assert torch.equal(logits(model), expected)
    with switching.merged(both, "own"):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    switching.activate(both, None)
    assert torch.equal(logits(model), alone)


def refusals(base, folder):
    """What training, answering and merging say of an adapter."""
    said = []
    for use in (
        lambda: start.check_parent(start.RunStart(folder, None), {"lora_alpha": None}, str(base)),
        lambda: resolve(str(base), [str(folder)], ""),
        lambda: Adapter(folder),
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
    ],
)
def test_what_one_script_refuses_all_refuse_with_one_line(bases, plain, tmp_path, settings, words):
    said = refusals(bases[False], changed(plain, tmp_path / "adapter", **settings))
    assert len(set(said)) == 1 and words in said[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": None, "rank_pattern": None, "use_dora": None, "init_lora_weights": None, "lora_dropout": None},
        {"r": 4.0, "lora_alpha": 8.0, "rank_pattern": {"q_proj": 4.0}, "alpha_pattern": {"q_proj": 8.0}},
        {"init_lora_weights": "eva", "eva_config": None},
        {"init_lora_weights": "gaussian"},
        {
            "runtime_config": {"ephemeral_gpu_offload": True},
            "megatron_core": "megatron.core",
            "loftq_config": {"loftq_bits": 4},
        },
    ],
)
def test_numbers_and_nulls_as_other_programs_write_them(bases, plain, tmp_path, settings):
    """And starts that change nothing of the base on loading."""
    base, folder = bases[False], changed(plain, tmp_path / "adapter", **settings)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain))
    config = read_config(folder)
    config.inference_mode = False
    assert torch.equal(logits(adapters.load(AutoModelForCausalLM.from_pretrained(base), folder, config)), expected)
    attached = switching.attach(AutoModelForCausalLM.from_pretrained(base), {"own": folder}, str(base))
    assert torch.equal(logits(attached), expected)
    assert Adapter(folder).scaling("model.layers.0.self_attn.q_proj", 4) == 2.0
    assert read_settings(folder)["r"] == 4 and isinstance(read_settings(folder)["r"], int)


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


def test_training_goes_on_from_a_parent_whose_start_needs_the_base_s_values(bases, tmp_path, script):
    """A dry run and the first checks have a model without values."""
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    for kind in ("MiCA", "single parameters"):
        parent = tiny.adapter(bases[False], tmp_path / kind.replace(" ", "-"), **KINDS[kind])
        argv = ("--base_model", bases[False], "--data_path", tmp_path / "data.json", "--val_set_size", 0, "--dry_run")
        told = script("finetune.py", *argv, "--resume_from_checkpoint", parent, "--output_dir", tmp_path / "out").ok()
        assert "parameters would be trained" in told and ("--lora_dropout 0.05: is 0 here" in told) == (kind != "MiCA")


def test_the_base_s_own_biases_are_refused_by_training_and_answering(tmp_path):
    base = tiny.qwen2(tmp_path / "base")
    folder = tiny.adapter(base, tmp_path / "adapter", bias="lora_only")
    said = []
    for use in (
        lambda: start.check_parent(start.RunStart(folder, None), {"lora_alpha": None}, str(base)),
        lambda: resolve(str(base), [str(folder)], ""),
    ):
        with pytest.raises(UserError, match=f"merge it first: .*--lora_model {folder}") as caught:
            use()
        said.append(str(caught.value))
    assert len(set(said)) == 1
    Adapter(folder)


def test_a_base_beside_which_an_adapter_lies(bases, plain, tmp_path, script, capsys):
    """The base's own weights are loaded; with the adapter there, transformers would put it on."""
    from utils.merging import verify
    from utils.models.loading import load_base
    from utils.models.placement import place
    from utils.models.tokenizer import load_tokenizer

    both = shutil.copytree(bases[False], tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(plain / name, both)
    expected = logits(AutoModelForCausalLM.from_pretrained(bases[False]))
    model = load_base(str(both), load_tokenizer(both), place(False, False))
    assert torch.equal(logits(model), expected) and torch.equal(logits(verify.load_float32(both)), expected)
    assert "also holds an adapter" in capsys.readouterr().out
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    argv = ("--base_model", both, "--data_path", tmp_path / "data.json", "--val_set_size", 0)
    refused = script("finetune.py", *argv, "--output_dir", both)
    assert refused.status == 2 and "is the base model's own folder" in refused.error


def test_an_adapter_s_values_must_be_those_its_settings_ask_for(bases, plain, tmp_path):
    folder = changed(plain, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UserError, match="do not fit this base model"):
        switching.attach(AutoModelForCausalLM.from_pretrained(bases[False]), {"own": folder}, str(bases[False]))
    tensors = load_file(plain / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "q_proj" in name}, folder / "adapter_model.safetensors")
    switching.attach(AutoModelForCausalLM.from_pretrained(bases[False]), {"own": folder}, str(bases[False]))


def test_a_saved_adapter_is_read_back(bases, tmp_path, monkeypatch):
    folder = tiny.adapter(bases[False], tmp_path / "a")
    tensors, config = adapters.read_tensors(folder), read_config(folder)
    adapters.save(tensors, config, tmp_path / "b", "base")
    found = adapters.read_tensors(tmp_path / "b")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    def damaged(tensors, path, metadata):
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(adapters, "save_file", damaged)
    with pytest.raises(UserError, match="differs from what was saved; check the disk"):
        adapters.save(tensors, config, tmp_path / "c", "base")
