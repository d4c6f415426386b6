"""The loss: in chunks, with biases and whole output layers, in float32, and as a run logs it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from trainings import entries, losses, options
from transformers import AutoModelForCausalLM

from utils import lineage
from utils.datasets.encoding import encode
from utils.datasets.templates import Prompter
from utils.models.tokenizer import load_tokenizer
from utils.training import loss
from utils.training.batching import pad
from utils.training.loss import returning_loss

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(bases):
    return AutoModelForCausalLM.from_pretrained(bases["llama"])


IDS = torch.arange(5, 45).view(2, 20)
BATCH = pad([{"input_ids": row, "labels": row} for row in IDS.tolist()], 1)


def value_and_gradient(model, layer=None):
    model.zero_grad()
    with returning_loss(model) as sparse:
        assert sparse
        value = model(**BATCH)
    value.backward()
    return value.detach(), (layer or model.model.layers[0].self_attn.q_proj).weight.grad.clone()


def test_chunks_are_summed(model, monkeypatch):
    """What every GPU run does: 38 labelled tokens in chunks of 3, against all at once."""
    whole = value_and_gradient(model)
    monkeypatch.setattr(loss, "CHUNK", 3)
    monkeypatch.setattr(loss, "plain_layer", lambda head: None)
    for one, other in zip(value_and_gradient(model), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_bias_of_the_output_layer_counts(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size) * 3)
    wanted = model(IDS, labels=IDS).loss * 38
    torch.testing.assert_close(value_and_gradient(model)[0], wanted)


def test_a_model_that_scales_what_its_output_layer_is_given_takes_the_full_path(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.lm_head.register_forward_pre_hook(lambda _, given: (given[0] * 2,))
    wanted = model(IDS, labels=IDS).loss * 38
    with returning_loss(model) as sparse:
        torch.testing.assert_close(model(**BATCH), wanted)
    assert sparse is False


@pytest.mark.parametrize("training", [True, False])
def test_what_tries_the_output_layer_leaves_dropout_as_it_was(model, training):
    model.train(training)
    with returning_loss(model):
        assert {module.training for module in model.modules()} == {training}
    model.train()


def test_an_output_layer_trained_whole_is_the_one_that_is_trained(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = wrapped.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        trained.weight.mul_(2)
    assert loss.plain_layer(wrapped.get_base_model().lm_head) is trained
    wanted = wrapped(IDS, labels=IDS).loss * 38
    torch.testing.assert_close(value_and_gradient(wrapped.get_base_model(), trained)[0], wanted)
    assert trained.weight.grad.any()
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["llama"]), LoraConfig(target_modules=["lm_head"]))
    assert loss.plain_layer(wrapped.get_base_model().lm_head) is None


def test_cross_entropies_are_float32_whatever_is_computed_in():
    """512 tokens of equal scores: in bfloat16 the sum is a multiple of 16."""
    head = torch.nn.Linear(4, 600, bias=False, dtype=torch.bfloat16)
    torch.nn.init.zeros_(head.weight)
    value = loss.head_loss(head, torch.ones(500, 4, dtype=torch.bfloat16), torch.zeros(500, dtype=torch.long))
    logits = torch.zeros(1, 501, 600, dtype=torch.bfloat16)
    labels = torch.tensor([[7, *[3] * 500]])
    whole = loss.full_loss(lambda **_: SimpleNamespace(logits=logits), labels, labels)
    for found in (value, whole):
        assert found.dtype == torch.float32 and found.item() == pytest.approx(500 * math.log(600), rel=1e-5)


def plain_loss(base, folder, records):
    """The mean over all predicted tokens of the adapter in `folder` on `base`, one record at a time."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = (PeftModel.from_pretrained(model, folder) if folder else model).eval()
    values = []
    for record in encode(records, Prompter("alpaca_short"), load_tokenizer(base), 128, train_on_inputs=True):
        logits = model(torch.tensor([record.input_ids])).logits[0, :-1]
        values.append(functional.cross_entropy(logits, torch.tensor(record.labels[1:]), reduction="none").detach())
    return torch.cat(values).mean().item()


def test_what_a_run_logs_is_the_plain_loss(script, bases, data, tmp_path):
    """The first step's is the base's; validation's is the saved checkpoint's, without dropout; the lineage has the mean."""
    records = json.loads(data.read_text("utf-8"))
    changes = {"lora_dropout": 0, "batch_size": 40, "num_epochs": 1, "train_on_inputs": True, "learning_rate": 0.03}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "first", **changes)).ok()
    assert losses(tmp_path / "first") == [pytest.approx(plain_loss(bases["llama"], None, records), rel=1e-5)]
    changes = {"lora_dropout": 0.9, "val_set_size": 39, "batch_size": 1, "micro_batch_size": 1, "max_steps": 3, "eval_steps": 1}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", save_steps=1, **changes)).ok()
    rows = {}
    for step, value in entries(tmp_path / "out", "eval_loss").items():
        folder = tmp_path / "out" / f"checkpoint-{step}"
        rows[step] = (value, plain_loss(bases["llama"], folder, records))
    results = lineage.read(tmp_path / "out")["results"]
    logged = losses(tmp_path / "out")
    assert results["train_loss"] == pytest.approx(sum(logged) / len(logged)) and len(set(logged)) > 1
    assert len(rows) == 3 and all(value == pytest.approx(plain, rel=0.02) for value, plain in rows.values()), rows


def test_a_run_that_learned_nothing_is_an_error(script, bases, data, tmp_path):
    assert (
        "nothing was learned" in script("finetune.py", *options(bases["llama"], data, tmp_path / "out", learning_rate=0)).error
    )
