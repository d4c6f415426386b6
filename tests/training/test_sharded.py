"""FSDP on two CPU ranks: each holds its part, and together they give what one process gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from scripting import ROOT
from trainings import losses, options, same, tensors
from transformers import AutoModelForCausalLM

from utils.console import UserError
from utils.models.placement import place
from utils.models.sharding import loads, wants_fsdp, without_weights

torch.set_num_threads(1)


def configured(name="fsdp.yaml"):
    """What accelerate hands to a program from one of the configuration files."""
    settings = yaml.safe_load((ROOT / "scripts" / "accelerate" / name).read_text("utf-8"))["fsdp_config"]
    return {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value).lower() for key, value in settings.items()}


def train_sharded(arguments):
    """What each of two ranks says of itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [sys.executable, *launcher, str(Path(__file__).with_name("fsdp_on_cpus.py")), *arguments]
    env = configured() | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [json.JSONDecoder().raw_decode(part)[0] for part in done.stdout.split("rank ")[1:] if part.startswith("{")]
    return sorted(told, key=lambda facts: facts["rank"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "whole", "near"), [("float32", "[lm_head]", 1e-5), ("bfloat16", "[]", 1e-2)], ids=["float32", "bfloat16"]
)
def test_two_ranks_hold_half_each_and_give_what_one_gives(script, bases, data, tmp_path, dtype, whole, near):
    changes = {"max_steps": 3, "val_set_size": 8, "lora_dropout": 0, "learning_rate": 1e-3, "dtype": dtype}
    changes["modules_to_save"] = whole
    script("finetune.py", *options(bases["llama"], data, tmp_path / "one", **changes)).ok()
    first, second = train_sharded(options(bases["llama"], data, tmp_path / "two", **changes))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=near)
    if dtype == "float32":
        for name, tensor in tensors(tmp_path / "one").items():
            assert (tensors(tmp_path / "two")[name] - tensor).abs().max() < near, name
    assert second["after loading"] < 1e-3 * first["after loading"]
    assert max(first["in the end"], second["in the end"]) <= 0.51 * first["after loading"]
    wanted = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    for facts in (first, second):
        kind, values = facts["rotary"]
        assert kind == "torch.float32" and torch.allclose(torch.tensor(values), wanted, rtol=1e-6)
        assert facts["trained"] == ["torch.float32"]


@pytest.mark.slow
def test_two_ranks_with_a_base_in_4_bit_give_what_one_gives(script, bases, data, tmp_path):
    changes = {"max_steps": 3, "lora_dropout": 0, "learning_rate": 1e-3, "load_4bit": True}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "one", **changes)).ok()
    train_sharded(options(bases["llama"], data, tmp_path / "two", **changes))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for name, tensor in tensors(tmp_path / "one").items():
        assert (tensors(tmp_path / "two")[name] - tensor).abs().max() < 1e-5, name


@pytest.mark.slow
def test_two_ranks_go_on_from_a_checkpoint_as_if_they_had_not_stopped(bases, data, tmp_path):
    changes = {"max_steps": 4, "save_steps": 2, "save_total_limit": 2, "lora_dropout": 0.1, "dtype": "float32"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_sharded(options(bases["llama"], data, whole, **changes))
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train_sharded(options(bases["llama"], data, resumed, **changes))
    written = [(folder / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns for folder in (whole, resumed)]
    assert written[0] == written[1], "the run began anew"
    assert len(losses(whole)) == 4 and losses(resumed) == losses(whole)
    assert same(tensors(resumed), tensors(whole))


def test_a_configuration_that_would_train_wrongly_is_refused(monkeypatch):
    for name in ("fsdp.yaml", "fsdp-4bit.yaml"):
        for key, value in configured(name).items():
            monkeypatch.setenv(key, value)
        place(False, False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for rank in ("0", "2"):  # the latter is the first of a second machine
        monkeypatch.setenv("RANK", rank)
        assert loads() is (rank == "0")
    needed = {"VERSION": "2", "STATE_DICT_TYPE": "FULL_STATE_DICT", "CPU_RAM_EFFICIENT_LOADING": "true"}
    for key, wanted in needed.items():
        for value in ("1", "", "SHARDED_STATE_DICT", "false"):
            with monkeypatch.context() as changed:
                changed.setenv(f"FSDP_{key}", value)
                with pytest.raises(UserError) as error:
                    place(False, False)
            shown = f"FSDP: fsdp_{key.lower()} is {value or 'missing'}, but must be {wanted}; see scripts/accelerate/fsdp.yaml"
            assert str(error.value) == shown
    for value, wants in (("1", True), ("True", True), ("0", False), ("false", False), ("", False)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
        assert wants_fsdp() is wants


def test_a_rank_that_does_not_load_has_the_same_model_of_zeros(tmp_path):
    base = tiny.llama(tmp_path, tie_word_embeddings=True)
    model, whole = without_weights(base, torch.bfloat16), AutoModelForCausalLM.from_pretrained(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    kinds = {name: (value.shape, torch.bfloat16) for name, value in whole.named_parameters()}
    assert {name: (value.shape, value.dtype) for name, value in model.named_parameters()} == kinds
    assert all(not value.any() and not value.requires_grad for value in model.parameters())
    for name, buffer in whole.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer) and buffer.dtype == torch.float32


def test_pairs_are_not_sharded(script, bases, tmp_path):
    pairs = [{"instruction": f"问{i}", "chosen": "好", "rejected": "坏"} for i in range(8)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), "utf-8")
    run = options(bases["llama"], tmp_path / "pairs.json", tmp_path / "out")
    assert "FSDP: supports only raw text and questions and answers" in script("finetune.py", *run, **configured()).error
