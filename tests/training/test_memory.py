"""Memory of training: the estimate beside what autograd really keeps, and what happens where memory ends."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from test_ranks import train_in_turn
from trainings import losses, options, same, tensors
from transformers import LlamaModel

from benchmarks import memory as cases
from utils.adapters import adapters
from utils.models.architecture import meta_model
from utils.models.memory import free_memory, peak_memory
from utils.models.placement import DeviceConfig, place
from utils.training import memory
from utils.training.activations import Saved
from utils.training.budget import Budget

SAMPLE = [  # each family, type and choice of what trains, once or twice
    ("llama", "8 bit", "q and v"),
    ("qwen3_moe", "float32", "all linear layers"),
    ("gemma2", "4 bit", "all linear layers"),
    ("bloom", "bfloat16", "embeddings too"),
]
EVERY = [(family, kind, trained) for family in cases.FAMILIES for kind, trained in cases.cases()]


@pytest.mark.parametrize(
    ("family", "kind", "trained"),
    [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.slow, id=", ".join(case)) for case in EVERY],
)
def test_the_estimate_is_within_15_percent_of_what_autograd_keeps(tmp_path, family, kind, trained):
    figures = cases.compare(cases.random_model(family, tmp_path), kind, trained, 2, 96)
    print(figures)
    assert 0.85 < figures["ratio"] < 1.15
    assert 0.85 < figures["checkpointed_ratio"] < 1.15
    assert figures["checkpointed_counted_mb"] < 0.7 * figures["counted_mb"]


# What is said of it


@pytest.fixture
def unread(bases):
    """A model without values, with an adapter."""
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    return adapters.add(meta_model(str(bases["llama"])), config)


def test_what_is_faster_than_8_bit_is_said(unread, monkeypatch, capsys):
    placement = place(True, False, dtype="bfloat16")
    plain = dataclasses.replace(placement, quantize=None)
    needed = memory.estimate(unread, plain, 4, 64).total(False) * 1e5
    monkeypatch.setattr(memory, "weights", lambda model, one: (1e9 if one.quantize == "8bit" else 0.6e9, 1))
    monkeypatch.setattr(memory, "try_estimate", lambda *_: memory.Estimate(needed, 0, 0, 0, 0))
    half = f"bfloat16 has room here, about {needed / 1e9:.1f} GB, and is faster: --load_8bit False"
    small = "4 bit is smaller, about 0.6 GB of weights, and usually faster: --load_4bit"
    for share, told in ((1.01, half), (0.99, small)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=share * needed / 0.9 - 1e9: free)
        memory.tell_faster(unread, placement, 4, 64)
        assert capsys.readouterr().out == f"8 bit is the default on a GPU, but waits for it at each layer; {told}\n"


def test_checkpointing_is_on_where_memory_is_short(unread, monkeypatch, capsys):
    placement = place(False, False, dtype="float32")
    needed = memory.Estimate(9e9, 1e9, 2e9, 0.5e9, 3e9)
    monkeypatch.setattr(memory, "try_estimate", lambda *_: needed)
    for free, missing in ((6.01e9, 0), (5e9, 1)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free / 0.9)
        assert memory.is_short(unread, placement, 4, 64) is bool(missing)
        told = "memory is short by about 1.0 GB: --gradient_checkpointing is on (False: off)\n"
        assert capsys.readouterr().out == told * missing
    memory.show(unread, placement, 4, 64)
    assert capsys.readouterr().out.splitlines() == [
        "memory on cpu, float32, --gradient_checkpointing False: "
        "about 15.0 GB (base 9.00, adapter 1.00, activations 2.00, logits 3.00)",
        "memory on cpu, float32, --gradient_checkpointing True: "
        "about 13.5 GB (base 9.00, adapter 1.00, activations 0.50, logits 3.00)",
    ]


@pytest.mark.parametrize(("sparse", "rows"), [(True, 512), (False, 1200)])
@pytest.mark.parametrize(("quantize", "a_weight"), [(None, 2), ("8bit", 1), ("4bit", 0.53)])
@pytest.mark.parametrize(("device", "holes"), [("cpu", 1.6), ("cuda", 1)])
def test_what_an_estimate_is_made_of(unread, monkeypatch, sparse, rows, quantize, a_weight, device, holes):
    """Of a model that does more than its output layer to its logits, all of them; 4 records of 300 tokens."""
    monkeypatch.setattr(memory, "saved_in_training", lambda *_: Saved(1000, 10, 20, 300, sparse))
    model = unread.get_base_model()
    linear = sum(one.numel() for name, one in model.named_parameters() if "proj" in name and "lora" not in name)
    other = sum(one.numel() for name, one in model.named_parameters() if "proj" not in name)
    trained = 2 * 8 * (64 + 64)
    base = linear * a_weight + other * 2
    wanted = memory.Estimate(base, 16 * trained, 1000 * holes, 330 * holes, 3 * rows * model.config.vocab_size * 4)
    found = memory.estimate(unread, DeviceConfig(torch.device(device), torch.bfloat16, quantize), 4, 300)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted))


def test_a_model_that_cannot_run_without_values_is_told_and_trained(unread, capsys):
    unread.get_base_model().config.hidden_act = "of no library"
    assert memory.is_short(unread, place(False, False), 4, 64) is False
    told = r"memory cannot be estimated for this model \(.+\); if it runs out, give --gradient_checkpointing\n"
    assert re.fullmatch(told, capsys.readouterr().out)


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_most_that_a_process_took_is_in_bytes(monkeypatch, system, unit):
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    assert peak_memory() == 7 * unit


# Where memory ends


def test_on_a_card_what_torch_keeps_for_itself_is_free_too(monkeypatch):
    known = {"memory_reserved": 70, "memory_allocated": 30, "mem_get_info": (1000, 9000)}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 1040


def test_half_of_what_did_not_fit_is_tried_next_and_kept_in_checkpoints(tmp_path):
    budget, other = Budget(400), Budget(100)
    budget.save(tmp_path, 0)
    assert not list(tmp_path.iterdir()), "nothing was reduced"
    told = "out of memory with 3 records of 100 tokens at once; repeated with half as many, also from here on"
    assert budget.reduce(3, 100) == told
    budget.save(tmp_path, 1)
    other.load(tmp_path, 1)
    for rank, tokens in ((0, 400), (1, 150)):
        third = Budget(400)
        third.load(tmp_path, rank)
        small = Budget(120)
        small.load(tmp_path, rank)
        assert small.tokens == 120, "never more than the options say now"
        assert (third.tokens, third.is_reduced) == (tokens, rank == 1)
    assert budget.tokens == 150 and len(budget.pack(range(3), [70, 75, 80])) == 2 and other.tokens == 100


@pytest.fixture
def little_memory(monkeypatch):
    """From the call on, a real allocation fails in each forward pass of more than so many tokens that is to be learned from."""

    def limit(tokens):
        plain = LlamaModel.forward

        def forward(self, input_ids, *args, **options):
            if torch.is_grad_enabled() and input_ids.numel() > tokens:
                torch.empty(2**50)
            return plain(self, input_ids, *args, **options)

        monkeypatch.setattr(LlamaModel, "forward", forward)

    return limit


def test_where_memory_ends_micro_batches_are_halved_and_nothing_else_changes(script, bases, data, tmp_path, little_memory):
    changes = {"lora_dropout": 0, "micro_batch_size": 8, "max_steps": 4, "val_set_size": 4}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "plain", **changes)).ok()
    little_memory(200)
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "short", **changes)).ok()
    assert "records of" in out and "out of memory with" in out and "half as many" in out
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    for name, tensor in tensors(tmp_path / "plain").items():
        # AdamW makes steps of up to the learning rate, 1e-2, of gradients that are rounding alone
        assert (tensors(tmp_path / "short")[name] - tensor).abs().max() < 1e-4, name


def test_a_resumed_run_keeps_its_smaller_micro_batches(script, bases, data, tmp_path, little_memory):
    """With dropout, whose numbers depend on them: the adapters are equal bit for bit, also after the end of memory."""
    changes = {"micro_batch_size": 8, "num_epochs": 1, "save_steps": 2, "save_total_limit": 9}
    little_memory(200)
    script("finetune.py", *options(bases["llama"], data, tmp_path / "one", **changes)).ok()
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "two" / "checkpoint-2")
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "two", **changes)).ok()
    assert "resuming this run from" in out and "out of memory" not in out
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


def test_memory_that_a_single_record_exceeds_is_told_in_a_line(script, bases, data, tmp_path, little_memory):
    little_memory(8)
    error = script("finetune.py", *options(bases["llama"], data, tmp_path / "out")).error
    assert "out of memory with a single record of" in error and "--gradient_checkpointing" in error
    assert not (tmp_path / "out").exists()


def test_a_rank_whose_memory_ends_does_its_part_again(script, bases, data, tmp_path):
    """The second of two ranks has less memory; together they learn what one process does."""
    one = train_in_turn(script, 1, bases["llama"], data, tmp_path / "one", [13])[13]
    two = train_in_turn(script, 2, bases["llama"], data, tmp_path / "two", [13], LITTLE_MEMORY="1:130")[13]
    assert two[0] == pytest.approx(one[0], abs=1e-5)
    for name, tensor in one[1].items():
        assert (two[1][name] - tensor).abs().max() < 1e-5, name
