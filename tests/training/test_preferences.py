"""Preferences: the losses' values and gradients against the papers' formulas, and whole runs."""

import contextlib
import functools
import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from trainings import history, losses, options, same, tensors
from transformers import AutoModelForCausalLM

from utils import lineage
from utils.datasets.dataset import JudgedDataset
from utils.datasets.encoding import IGNORED
from utils.training.batching import BatchConfig, pad
from utils.training.data import tell_labels
from utils.training.loss import returning_loss
from utils.training.preferences import (
    LOSSES,
    KTOTrainer,
    Preference,
    PreferenceTrainer,
    full_log_probs,
    half_of,
    judged_loss,
    pair_loss,
    pair_losses,
    sparse_log_probs,
)
from utils.training.prefix_sharing import share_prefixes


def worked_out(loss, policy, reference, counts, beta, margin):
    """One pair's loss by the formula, in plain numbers."""
    (pc, pr), (rc, rr), (nc, nr) = policy, reference, counts
    if loss == "dpo":
        return math.log(1 + math.exp(-beta * ((pc - rc) - (pr - rr))))
    if loss == "ipo":
        return ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * beta)) ** 2
    if loss == "simpo":
        return math.log(1 + math.exp(-(beta * (pc / nc - pr / nr) - margin)))
    odds = [math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((pc, nc), (pr, nr))]
    return -pc / nc + beta * math.log(1 + odds[1] / odds[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_are_those_of_the_papers(loss):
    policy, reference, counts = (-12.0, -20.0), (-14.0, -15.0), (4, 10)
    found, rewards = pair_losses(
        Preference(loss, 0.3, 0.5, 0.7), torch.tensor([policy]), torch.tensor([counts]), torch.tensor([reference])
    )
    expected = worked_out(loss, policy, reference, counts, 0.3, 0.7) + 0.5 * 12 / 4
    assert found.item() == pytest.approx(expected, rel=1e-5)
    rewarded = {"dpo": (0.6, -1.5), "ipo": (0.15, -0.15), "orpo": (-0.9, -0.6), "simpo": (-0.9, -0.6)}[loss]
    assert rewards[0].tolist() == pytest.approx(rewarded)


def test_a_pair_gives_the_loss_and_gradients_of_the_plain_recipe(bases):
    """Logits where labelled, the reference kept, against all logits and the adapter switched off."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).double().eval()
    pairs = []
    for length in (9, 14):
        ids = torch.randint(5, 200, (2, length)).tolist()
        ids[1][:5] = ids[0][:5]  # the question, and how both answers begin
        labels = [[IGNORED] * 4 + ids[0][4:], [IGNORED] * 4 + ids[1][4:]]
        pairs.append({"input_ids": ids[0], "labels": labels[0], "rejected_ids": ids[1][:-2], "rejected_labels": labels[1][:-2]})
    ids, labels = pairs[0]["input_ids"], pairs[0]["labels"]  # and each answer as the beginning of the other
    pairs.append({"input_ids": ids, "labels": labels, "rejected_ids": ids[:-3], "rejected_labels": labels[:-3]})
    pairs.append({"input_ids": ids[:-3], "labels": labels[:-3], "rejected_ids": ids, "rejected_labels": labels})

    def plain(row_ids, row_labels):
        scores = model(torch.tensor([row_ids])).logits[0, :-1].log_softmax(-1)
        return sum(scores[at, token] for at, token in enumerate(row_labels[1:]) if token != IGNORED)

    def both(pair):
        return plain(pair["input_ids"], pair["labels"]), plain(pair["rejected_ids"], pair["rejected_labels"])

    with torch.no_grad(), model.disable_adapter():
        references = [both(pair) for pair in pairs]
    expected = sum(
        -functional.logsigmoid(0.1 * ((c - rc) - (r - rr)))
        for (c, r), (rc, rr) in zip(map(both, pairs), references, strict=True)
    )
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected, weights)
    base, sums = model.get_base_model(), torch.zeros(4)
    batch = pad([pair | {"reference": np.float32(reference)} for pair, reference in zip(pairs, references, strict=True)], 1)
    shared = share_prefixes(batch["input_ids"], batch["places"])
    assert shared["input_ids"].shape == (4, 14 - 1 + 12 - 1 - 5), "what both begin with once, no last tokens"
    with returning_loss(base):
        base.forward = functools.partial(
            pair_loss, functools.partial(sparse_log_probs, base.base_model, base.lm_head), Preference("dpo", 0.1, 0, 0), sums
        )
        for rows in ({}, {"shared": shared}):
            loss = model(**batch, **rows)
            found = torch.autograd.grad(loss, weights)
            torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
            for one, other in zip(found, gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            empty = model(**pad([], 1))
            model(**batch)  # as in validation, whose rewards are not those of a step
    assert empty.item() == 0 and sums[3] == 8
    ids, places, targets = batch["input_ids"], batch["places"], batch["labels"].flatten()[batch["places"] + 1]
    with torch.no_grad():  # and at a temperature, in both ways
        cool = (model(ids).logits.flatten(0, 1)[places] / 0.5).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(sparse_log_probs(base.base_model, base.lm_head, ids, targets, places, 0.5), cool.float())
        torch.testing.assert_close(full_log_probs(base, ids, targets, places, 0.5), cool.float())


@pytest.mark.parametrize("turned", [False, True])
def test_an_answer_that_begins_the_other_takes_no_room_of_its_own(turned):
    long, short = ([1, 5, 6, 7, 8], [IGNORED, IGNORED, 6, 7, 8]), ([1, 5, 6], [IGNORED, IGNORED, 6])
    one, other = (short, long) if turned else (long, short)
    row = {"input_ids": one[0], "labels": one[1], "rejected_ids": other[0], "rejected_labels": other[1]}
    batch = pad([row], 1)
    shared = share_prefixes(batch["input_ids"], batch["places"])
    assert shared["input_ids"].tolist() == [[1, 5, 6, 7]] and shared["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert shared["places"].tolist() == ([1, 1, 2, 3] if turned else [1, 2, 3, 1])
    assert shared["attention_mask"][0, 0].tolist() == torch.ones(4, 4).tril().bool().tolist()


def test_each_half_of_a_micro_batch_is_that_of_its_own_answers():
    sides = [
        [([1, 5, 7], [IGNORED, 5, 7]), ([1, 6], [IGNORED, 6])],
        [([1, 5], [IGNORED, 5]), ([1, 6, 8], [IGNORED, IGNORED, 8])],
    ]
    rows = [
        {"input_ids": one[0], "labels": one[1], "rejected_ids": other[0], "rejected_labels": other[1], "good": number == 0,
         "reference": np.float32([number, -number - 1])}
        for number, (one, other) in enumerate(zip(*sides, strict=True))
    ]  # fmt: skip
    batch = pad(rows, 1)
    assert batch["good"].tolist() == [True, False] and batch["reference"].tolist() == [[0, -1], [1, -2]]
    for second, side in enumerate(sides):
        half, alone = half_of(batch, bool(second)), pad([{"input_ids": ids, "labels": labels} for ids, labels in side], 1)
        assert all(torch.equal(half[name], alone[name]) for name in alone)
        assert torch.equal(half["reference"], batch["reference"][:, second])


def test_what_is_tried_again_begins_where_it_began(monkeypatch):
    """Gradients, random numbers, and the sums of the rewards; on a card also its random numbers, and memory is given back."""
    asked, trainer = [], PreferenceTrainer.__new__(PreferenceTrainer)
    for name, answer in (("get_rng_state", 7), ("set_rng_state", None), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name, answer=answer: asked.append((name, *given)) or answer)
    trainer.args, trainer.model = SimpleNamespace(device=torch.device("cpu")), torch.nn.Linear(1, 1)
    trainer.rewards = torch.ones(4)
    restore, drawn = trainer.snapshot(), torch.rand(3)
    trainer.rewards += 1
    trainer.model(torch.ones(1)).backward()
    restore()
    assert torch.equal(torch.rand(3), drawn) and trainer.rewards.tolist() == [1] * 4
    assert all(parameter.grad is None for parameter in trainer.model.parameters()) and asked == []
    trainer.args.device = torch.device("cuda", 1)
    trainer.snapshot()()
    there = trainer.args.device
    assert asked == [("get_rng_state", there), ("set_rng_state", 7, there), ("empty_cache",)]


@pytest.mark.parametrize(
    ("kind", "sums", "means"),
    [
        (PreferenceTrainer, [6, 2, 3, 4], {"chosen": 1.5, "rejected": 0.5, "margin": 1.0, "accuracy": 0.75}),
        (PreferenceTrainer, [0, 0, 0, 0], dict.fromkeys(("chosen", "rejected", "margin", "accuracy"), 0)),
        (KTOTrainer, [6, -4, 3, 2, 4], {"chosen": 2.0, "rejected": -2.0, "margin": 4.0, "accuracy": 0.8}),
        (KTOTrainer, [6, 0, 3, 0, 3], {"chosen": 2.0, "accuracy": 1.0}),
        (KTOTrainer, [0, -4, 0, 2, 1], {"rejected": -2.0, "accuracy": 0.5}),
    ],
)
def test_rewards_are_logged_as_means(kind, sums, means):
    trainer = kind.__new__(kind)
    trainer.rewards, trainer.kl = torch.tensor(sums, dtype=torch.float), 0.25
    trainer.accelerator = SimpleNamespace(reduce=lambda values, _: values)
    wanted = {f"reward_{name}": value for name, value in means.items()} | ({"kl": 0.25} if kind is KTOTrainer else {})
    assert trainer.reward_logs() == pytest.approx(wanted)


def test_the_kto_loss_is_that_of_its_paper():
    """1 - sigmoid(beta (gain - kl)) where good, 1 - sigmoid(beta (kl - gain)) where bad, each with its weight."""
    log_probs, reference, kl = torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -3.5]), torch.tensor(0.25)
    ids, labels = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[IGNORED, IGNORED, 3]] * 2)
    totals = torch.zeros(5)
    loss = judged_loss(
        lambda **_: log_probs.requires_grad_(), Preference("kto", 0.5, 0.3, 0, 2.0, 3.0), totals, ids, labels,
        torch.tensor([1, 4]), reference, torch.tensor([True, False]), kl,
    )  # fmt: skip
    expected = 2 * (1 - 1 / (1 + math.exp(-0.5 * 1.75))) + 3 * (1 - 1 / (1 + math.exp(-0.5 * 0.75)))
    assert loss.item() == pytest.approx(expected + 0.3 * 3, rel=1e-6), "the good answer's own loss is added"
    assert totals.tolist() == pytest.approx([0.5 * 2, -0.5 * 0.5, 1, 1, 2])
    with torch.no_grad():  # as in validation, whose rewards are not those of a step
        judged_loss(
            lambda **_: log_probs, Preference("kto", 0.5, 0, 0), totals, ids, labels, torch.tensor([1, 4]), reference,
            torch.tensor([True, False]), kl,
        )  # fmt: skip
    assert totals[2:].tolist() == [1, 1, 2]


class Row(dict):
    """A set of one pair, its rows read as those of `EncodedDataset`."""

    lengths = (2,)

    def __len__(self):
        return 1

    def __getitem__(self, number):
        return dict(self.items())


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_the_reference_is_computed_once_without_dropout_and_read_again_where_a_run_resumes(monkeypatch, tmp_path, loss):
    """Of training and validation apart; not for a loss that has none."""
    row = {"input_ids": [1, 5], "labels": [IGNORED, 5], "rejected_ids": [1, 6], "rejected_labels": [IGNORED, 6]}
    seen, sets = [], [Row(row), Row(row | {"input_ids": [1, 7]})]

    class Model(torch.nn.Module):
        def forward(self, input_ids, **_):
            seen.append(self.training)
            return input_ids[:, 1].float()

    trainer = PreferenceTrainer.__new__(PreferenceTrainer)
    trainer.train_dataset, trainer.eval_dataset, trainer.model, trainer.shares_prefixes = *sets, Model(), False
    trainer.args = SimpleNamespace(device=torch.device("cpu"), output_dir=str(tmp_path), should_save=True)
    trainer.accelerator = SimpleNamespace(autocast=contextlib.nullcontext, reduce=lambda found, _: found)
    trainer.job = SimpleNamespace(plan=BatchConfig(2, 8))
    trainer.settings = Preference(loss, 0.1, 0, 0)
    monkeypatch.setattr(trainer, "returning_loss", contextlib.nullcontext, raising=False)
    wanted = [[[5, 6]], [[7, 6]]] if loss == "dpo" else [[[0, 0]], [[0, 0]]]
    for resumed in (False, True):
        monkeypatch.setattr("utils.training.checkpoints.is_resumed", lambda _, resumed=resumed: resumed)
        trainer.attach_reference()
        assert [one.reference.tolist() for one in sets] == wanted
    assert seen == [False, False] * (loss == "dpo") and (tmp_path / "reference.npz").exists() == (loss == "dpo")


@pytest.mark.parametrize("training", [True, False])
def test_kl_is_the_mean_gain_of_mismatched_answers_at_least_0_and_computed_without_dropout(training):
    """Over all micro-batches and ranks, of which an empty one has nothing."""
    seen = []

    class Model(torch.nn.Module):
        def forward(self, input_ids, labels, places):
            seen.append((self.training, input_ids.tolist(), len(places)))
            return torch.tensor([3.0, 5.0])[: len(input_ids)]

    trainer = KTOTrainer.__new__(KTOTrainer)
    trainer.args, trainer.model = SimpleNamespace(device=torch.device("cpu")), Model().train(training)
    trainer.is_fsdp_enabled = False
    row = {"input_ids": [1, 5], "labels": [IGNORED, 5], "rejected_ids": [1, 6], "rejected_labels": [IGNORED, 6], "good": True}
    batches = [pad([row | {"reference": np.float32([0, one])} for one in part], 1) for part in ([1.0, 2.0], [7.0], [])]
    for others, kl in ((torch.tensor([9.0, 2.0]), (2 + 3 - 4 + 9) / 5), (torch.tensor([-9.0, 2.0]), 0)):
        reduce = functools.partial(lambda others, found, _: found + others, others)
        trainer.accelerator = SimpleNamespace(autocast=contextlib.nullcontext, reduce=reduce)
        found = trainer.completed(batches)
        assert trainer.kl == pytest.approx(kl) and trainer.model.training is training
        assert [batch["input_ids"].tolist() for batch in found] == [[[1, 5]] * 2, [[1, 5]], [[0]]]
        assert [batch["kl"].item() for batch in found[:2]] == pytest.approx([kl] * 2) and found[2] is batches[2]
    assert seen == [(False, [[1, 6]] * 2, 2), (False, [[1, 6]], 1), (False, [[0]], 0)] * 2


def test_beside_an_answer_stands_the_nearest_one_to_another_question():
    rows = [([1, 5], [7]), ([1, 5], [8]), ([1, 6], [9, 9, 9, 9])]
    table = datasets.Dataset.from_list([
        {"input_ids": asked + said, "labels": [IGNORED] * 2 + said, "full_length": 2 + len(said), "supervised": 1}
        for asked, said in rows
    ])  # fmt: skip
    beside = [JudgedDataset(table, range(3), cutoff_len=5)[number] for number in range(3)]
    assert [row["rejected_ids"] for row in beside] == [[1, 5, 9, 9, 9], [1, 5, 9, 9, 9], [1, 6, 8]]
    assert [row["rejected_labels"][:3] for row in beside] == [[IGNORED, IGNORED, last] for last in (9, 9, 8)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twenty questions with a good and a bad answer."""
    records = [
        {
            "instruction": f"第{n}题：" + "问" * (n % 7),
            "input": "",
            "chosen": "好" * (3 + n % 5),
            "rejected": "坏" * (2 + n % 6),
        }
        for n in range(20)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def steps_of(folder):
    return [entry for entry in history(folder) if "loss" in entry]


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_to_prefer(script, bases, pairs, tmp_path, loss):
    beta = 2 if loss == "simpo" else 0.3
    changes = {"preference_loss": loss, "preference_beta": beta, "val_set_size": 4, "batch_size": 4, "lora_dropout": 0}
    script("finetune.py", *options(bases["llama"], pairs, tmp_path / "out", **changes)).ok()
    log = steps_of(tmp_path / "out")
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["reward_accuracy"] == 1
    assert log[-1]["reward_margin"] == pytest.approx(log[-1]["reward_chosen"] - log[-1]["reward_rejected"])
    if loss == "dpo":
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "at first the policy is the reference"
        assert log[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    found = lineage.read(tmp_path / "out")
    assert found["data"]["stage"] == "preference" and found["results"]["eval_loss"] < log[0]["loss"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom", "mistral"])
def test_the_answers_of_a_pair_share_a_row_where_the_model_can(script, bases, pairs, tmp_path, family):
    """Not with ALiBi, nor beyond a sliding window; the first loss is that of the reference itself."""
    changes = {"lora_target_modules": "query_key_value"} if family == "bloom" else {}
    out = script("finetune.py", *options(bases[family], pairs, tmp_path / "out", max_steps=1, lora_dropout=0, **changes)).ok()
    assert ("rows of their own" in out) is (family in ("bloom", "mistral"))
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_the_reference_is_the_parent_also_after_a_stop(script, bases, pairs, data, tmp_path):
    """An adapter upon an adapter: the first loss is log 2 again; stopped and resumed it ends the same, bit for bit."""
    script("finetune.py", *options(bases["llama"], data, tmp_path / "f1")).ok()
    more = {"resume_from_checkpoint": tmp_path / "f1", "batch_size": 4, "save_steps": 2, "lora_dropout": 0}
    script("finetune.py", *options(bases["llama"], pairs, tmp_path / "f2", **more)).ok()
    assert losses(tmp_path / "f2")[0] == pytest.approx(math.log(2), abs=1e-5)
    run = script.start("finetune.py", *options(bases["llama"], pairs, tmp_path / "again", **more))
    run.wait_until(lambda: (tmp_path / "again" / "checkpoint-2" / "checkpoint.json").is_file())
    run.kill()
    run.wait()
    assert "checkpoint-2" in script("finetune.py", *options(bases["llama"], pairs, tmp_path / "again", **more)).ok()
    assert same(tensors(tmp_path / "f2"), tensors(tmp_path / "again"))


@pytest.fixture(scope="module")
def labelled(pairs, tmp_path_factory):
    """Both answers of each pair as labelled answers, the last of them with a label that is none."""
    records = [
        {"prompt": record["instruction"], "completion": record[name], "label": name == "chosen"}
        for record in json.loads(pairs.read_text("utf-8"))
        for name in ("chosen", "rejected")
    ][:-8]
    records[-1]["label"] = None
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), "utf-8")
    return path


@pytest.mark.parametrize(
    ("good", "bad", "weights", "balance"),
    [
        (1, 4, (1, 1), "--desirable_weight 4"),
        (5, 2, (1, 1), "--undesirable_weight 2.5"),
        (4, 3, (1, 1), ""),
        (3, 3, (1, 1), ""),
        (2, 8, (4, 1), ""),
        (3, 0, (1, 1), ""),
    ],
)
def test_weights_that_would_balance_good_and_bad_answers_are_told(capsys, good, bad, weights, balance):
    labels = [True] * good + [False] * (bad + 1)  # of which the last is not trained on
    columns = {"good": labels} | dict.fromkeys(("full_length", "supervised"), [5] * len(labels))
    assert tell_labels(JudgedDataset(datasets.Dataset.from_dict(columns), range(good + bad), 10), *weights) == good
    told = f"{good} answers labelled good (--desirable_weight {weights[0]}), {bad} bad (--undesirable_weight {weights[1]})\n"
    more = f"good and bad do not weigh the same; {balance} would balance them\n" if balance else ""
    assert capsys.readouterr().out == told + more


KTO = {"preference_beta": 0.5, "val_set_size": 4, "batch_size": 4, "lora_dropout": 0.1, "save_steps": 3}


@pytest.mark.slow
def test_kto_stopped_and_resumed_ends_the_same(script, bases, labelled, tmp_path):
    script("finetune.py", *options(bases["llama"], labelled, tmp_path / "out", **KTO)).ok()
    run = script.start("finetune.py", *options(bases["llama"], labelled, tmp_path / "again", **KTO))
    run.wait_until(lambda: (tmp_path / "again" / "checkpoint-3" / "checkpoint.json").is_file())
    run.kill()
    run.wait()
    assert "checkpoint-3" in script("finetune.py", *options(bases["llama"], labelled, tmp_path / "again", **KTO)).ok()
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "again"))


def test_labelled_answers_are_learned_by_kto(script, bases, pairs, labelled, tmp_path):
    """Answers with a label, or both of each pair: at first half the weight is lost."""
    out = script("finetune.py", *options(bases["llama"], labelled, tmp_path / "out", **KTO)).ok()
    assert "1 of 32 labelled answers dropped: label is neither true nor false" in out and "answers labelled good" in out
    log = steps_of(tmp_path / "out")
    assert min(entry["kl"] for entry in log) == 0 and log[0]["kl"] < 1e-4 < max(entry["kl"] for entry in log)
    assert log[-1]["loss"] < 0.3 < log[0]["loss"] and log[-1]["reward_margin"] > 1
    assert 0.5 < log[-1]["reward_accuracy"] <= 1
    assert lineage.read(tmp_path / "out")["data"]["stage"] == "labelled"
    error = script("finetune.py", *options(bases["llama"], labelled, tmp_path / "no", preference_loss="dpo")).error
    assert "--preference_loss dpo: compares two answers" in error
    script("finetune.py", *options(bases["llama"], pairs, tmp_path / "pairs", preference_loss="kto", max_steps=2)).ok()
    assert lineage.read(tmp_path / "pairs")["data"]["records"] == 40
