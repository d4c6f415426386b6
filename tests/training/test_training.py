"""finetune.py on tiny real models: what is trained, where it starts, and that nothing is lost."""

import itertools
import json
import math
import random

import pytest
import torch
from peft import PeftModel
from scripting import warm
from trainings import FAMILIES, losses, options, same, tensors
from transformers import AutoModelForCausalLM

from utils import lineage
from utils.adapters import adapters
from utils.datasets.encoding import IGNORED
from utils.training.batching import OVERHEAD, BatchConfig, StepBatchSampler, pack_micro_batches, pad, split_across_ranks
from utils.training.loss import returning_loss

warm("transformers.trainer")

torch.set_num_threads(1)

# What is trained


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_and_loads_with_peft_alone(script, bases, data, tmp_path, family):
    """Rows 1 and 4: the saved adapter is not empty, has moved, and is all that was trained."""
    before = {file: file.read_bytes() for file in bases[family].iterdir()}
    out = script("finetune.py", *options(bases[family], data, tmp_path / "out")).ok()
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert {file: file.read_bytes() for file in bases[family].iterdir()} == before
    assert ("goes on query_key_value" in out) == (family == "bloom") and "{'" not in out
    base = AutoModelForCausalLM.from_pretrained(bases[family])
    ids = torch.arange(5, 25)[None]
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits
    assert not torch.allclose(plain, adapted)
    assert adapters.has_moved(tensors(tmp_path / "out"))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "checkpoint-5", "checkpoint-10",
        "lineage.json", "loss.png", "run.yaml", "tokenizer.json", "tokenizer_config.json", "train_log.jsonl",
    }  # fmt: skip


def test_one_number_that_has_moved_is_enough():
    still = {"a.lora_A.weight": torch.ones(2), "a.lora_B.weight": torch.zeros(2)}
    assert not adapters.has_moved(still)
    assert adapters.has_moved(still | {"b.lora_B.weight": torch.tensor([0.0, 1.0])})


def test_trainable_parameters_equal_the_formula(script, bases, data, tmp_path):
    """Row 4: r x (in + out) for each of the named layers: q 64 -> 64, v 64 -> 32, in two layers."""
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", lora_r=4)).ok()
    results = lineage.read(tmp_path / "out")["results"]
    assert results["trainable_parameters"] == 2 * 4 * ((64 + 64) + (64 + 32))
    assert f"{results['steps']} steps in 0." in out and f"training loss {results['train_loss']:.4f}" in out
    assert f"next: python generate.py --lora_weights {tmp_path / 'out'}" in out


@pytest.mark.parametrize("bits", ["load_8bit", "load_4bit"])
def test_quantized_bases_train(script, bases, data, tmp_path, bits):
    """bitsandbytes really quantizes, on the CPU too; the loss falls."""
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **{bits: True})).ok()
    assert bits.removeprefix("load_") in out
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


@pytest.mark.parametrize("bits", ["load_8bit", "load_4bit"])
def test_checkpointing_changes_no_bit_of_a_quantized_training(script, bases, data, tmp_path, bits):
    for on in (True, False):
        changes = {bits: True, "gradient_checkpointing": on, "max_steps": 2}
        script("finetune.py", *options(bases["llama"], data, tmp_path / str(on), **changes)).ok()
    assert same(tensors(tmp_path / "True"), tensors(tmp_path / "False"))


VARIANTS = [
    {"use_rslora": True},
    {"use_dora": True},
    {"neftune_noise_alpha": 5},
    {"modules_to_save": "[embed_tokens,lm_head]"},
    {"group_by_length": True},
    {"gradient_checkpointing": True},
    {"lr_scheduler_type": "cosine", "weight_decay": 0.1},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: next(iter(changes)))
def test_variants_train(script, bases, data, tmp_path, changes):
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **changes)).ok()
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for name in changes.keys() & {"use_rslora", "use_dora", "modules_to_save"}:
        assert config[name] == (["embed_tokens", "lm_head"] if name == "modules_to_save" else True)
    whole = {name.split(".")[-2] for name in tensors(tmp_path / "out") if "lora_" not in name}
    assert whole == ({"embed_tokens", "lm_head"} if "modules_to_save" in changes else set())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_compiled_layers_learn_the_same(script, bases, data, tmp_path, checkpointing):
    plain, compiled, cache = tmp_path / "plain", tmp_path / "compiled", tmp_path / "cache"
    changes = {"max_steps": 3, "learning_rate": 1e-3, "lora_dropout": 0, "gradient_checkpointing": checkpointing}
    script("finetune.py", *options(bases["llama"], data, plain, **changes)).ok()
    run = options(bases["llama"], data, compiled, torch_compile=True, **changes)
    assert "2 layers are compiled" in script("finetune.py", *run, TORCHINDUCTOR_CACHE_DIR=str(cache)).ok()
    assert list(cache.rglob("*.cpp")), "nothing was compiled"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert tensors(compiled).keys() == tensors(plain).keys()


def test_8_bit_products_are_not_compiled(script, bases, data, tmp_path):
    run = options(bases["llama"], data, tmp_path / "out", torch_compile=True, load_8bit=True)
    assert script("finetune.py", *run).error == (
        "finetune.py: error: --torch_compile: 8-bit products cannot be compiled, since what they give out depends on the "
        "values; add --load_8bit False, or leave --torch_compile out"
    )
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_model_has_not_is_named_with_those_it_has(script, bases, data, tmp_path):
    error = script("finetune.py", *options(bases["bloom"], data, tmp_path / "out", lora_target_modules="[q_proj]")).error
    assert "q_proj" in error and "query_key_value" in error and "dense_h_to_4h" in error
    assert not (tmp_path / "out").exists()


# Batches and the loss


def test_a_step_has_each_record_once_and_no_micro_batch_over_the_size():
    lengths = [random.Random(1).randint(5, 100) for _ in range(50)]
    steps = StepBatchSampler(lengths, lengths, BatchConfig(batch_size=16, micro_batch_tokens=200))
    dealt = [[record for micro in step for record in micro.records] for step in steps]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(42)).tolist()
    assert [sorted(step) for step in dealt] == [sorted(order[start : start + 16]) for start in range(0, 50, 16)]
    for step in steps:
        for micro in step:
            assert len(micro.records) * max(lengths[r] for r in micro.records) <= 200
            assert micro.supervised == sum(lengths[r] for m in step for r in m.records)
    steps.set_epoch(1)
    assert [[r for micro in step for r in micro.records] for step in steps] != dealt


def test_processes_share_a_step_evenly():
    lengths = [random.Random(1).randint(5, 100) for _ in range(50)]
    shares = [list(StepBatchSampler(lengths, lengths, BatchConfig(16, 200, world_size=3, rank=rank))) for rank in range(3)]
    for parts in zip(*shares, strict=True):
        assert len({len(part) for part in parts}) == 1, "all processes walk through as many micro-batches"
        assert len({part[0].supervised for part in parts}) == 1
    records = [r for part in shares for step in part for micro in step for r in micro.records]
    assert sorted(records) == list(range(50))
    work = [sum(lengths[i] for i in part) for part in split_across_ranks(range(48), lengths, 3)]
    assert max(work) < 1.1 * min(work)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_plain_recipe(bases, family):
    """Sorted micro-batches with logits where supervised, against one padded batch with a mask and all logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(bases[family])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "attention" in name or "attn" in name
    numbers = random.Random(2)
    records = []
    for _ in range(12):
        ids = [numbers.randint(4, 250) for _ in range(numbers.randint(4, 40))]
        prompt = numbers.randint(0, len(ids) - 2)
        records.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    lengths = [len(record["input_ids"]) for record in records]
    supervised = sum(label != IGNORED for record in records for label in record["labels"][1:])

    batch = pad(records, 1)
    mask = torch.tensor([[1] * n + [0] * (batch["input_ids"].shape[1] - n) for n in lengths])
    plain = model(**batch, attention_mask=mask).loss
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    with returning_loss(model) as sparse:
        assert sparse
        for micro in pack_micro_batches(range(12), lengths, 100):
            loss = model(**pad([records[i] for i in micro], 1)) / supervised
            loss.backward()
            total += loss.item()
    assert total == pytest.approx(plain.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_model_that_caps_its_logits_takes_the_full_path(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 2) * 2
        return output

    model.forward = capped
    batch = {"input_ids": torch.arange(5, 15)[None], "labels": torch.arange(5, 15)[None]}
    wanted = torch.nn.functional.cross_entropy(
        model(batch["input_ids"]).logits[0, :-1], batch["labels"][0, 1:], reduction="sum"
    )
    with returning_loss(model) as sparse:
        assert not sparse
        torch.testing.assert_close(model(**batch), wanted)


def test_micro_batches_are_cut_where_it_costs_least():
    numbers = random.Random(2)
    for _ in range(20):
        lengths = [numbers.randint(1, 400) for _ in range(8)]
        order = sorted(range(8), key=lambda i: (-lengths[i], i))
        dealt = pack_micro_batches(range(8), lengths, 600)
        assert [*itertools.chain(*dealt)] == order

        def cost(micro_batches, lengths=lengths):
            sizes = [len(micro) * max(lengths[i] for i in micro) for micro in micro_batches]
            return math.inf if max(sizes) > 600 else sum(sizes) + OVERHEAD * len(sizes)

        ways = [[0, *(i for i in range(1, 8) if bits >> i & 1), 8] for bits in range(0, 256, 2)]
        assert cost(dealt) == min(cost([order[a:b] for a, b in itertools.pairwise(way)]) for way in ways)
    assert pack_micro_batches(range(3), [700, 700, 5], 600) == [[0], [1], [2]]
    assert pack_micro_batches(range(4), [300] * 4, 600) == [[0, 1], [2, 3]]


def test_an_empty_micro_batch_has_loss_zero_and_gradients(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with returning_loss(model):
        loss = model(**pad([], 1))
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)
