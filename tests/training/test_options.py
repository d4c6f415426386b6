"""What each option of finetune.py becomes: in the library, in the losses, in the checkpoint that is tied to it."""

import dataclasses

import pytest
import torch
from transformers import TrainingArguments

import finetune
from utils.console import UserError
from utils.datasets.stages import INSTRUCTION, LABELLED, PREFERENCE, REWARD, TEXT
from utils.models.placement import DeviceConfig, place
from utils.training import checks, setup
from utils.training.data import tokenizer_folder
from utils.training.grpo import Policy
from utils.training.preferences import Preference
from utils.training.rewards import load_rewards
from utils.training.start import RunStart

torch.set_num_threads(1)

PLAIN = finetune.Options(base_model="base", data_path="data.json", gradient_checkpointing=False, batch_size=10)


def arguments(records=1000, **changes):
    return setup.training_arguments(dataclasses.replace(PLAIN, **changes), place(False, False), None, records)


TABLE = [  # option, value, what it sets in the library
    ("output_dir", "there", {"output_dir": "there"}),
    ("micro_batch_size", 5, {"per_device_train_batch_size": 5}),
    ("num_epochs", 7, {"num_train_epochs": 7, "max_steps": -1}),
    ("max_steps", 9, {"max_steps": 9}),
    ("learning_rate", 0.5, {"learning_rate": 0.5}),
    ("lr_scheduler_type", "cosine", {"lr_scheduler_type": "cosine"}),
    ("warmup_steps", 3, {"warmup_steps": 3}),
    ("weight_decay", 0.25, {"weight_decay": 0.25}),
    ("max_grad_norm", 0.75, {"max_grad_norm": 0.75}),
    ("neftune_noise_alpha", 5.0, {"neftune_noise_alpha": 5.0}),
    ("seed", 11, {"seed": 11}),
    ("save_steps", 13, {"save_steps": 13}),
    ("gradient_checkpointing", True, {"gradient_checkpointing": True}),
    ("deterministic", True, {"full_determinism": True}),
    ("num_workers", 2, {"dataloader_num_workers": 2}),
    ("report_to", ["tensorboard"], {"report_to": ["tensorboard"]}),
    ("wandb_run_name", "name", {"run_name": "name"}),
]


@pytest.mark.parametrize(("name", "value", "sets"), TABLE, ids=[row[0] for row in TABLE])
def test_an_option_sets_what_it_says(name, value, sets):
    plain, changed = arguments(), arguments(**{name: value})
    for attribute, wanted in sets.items():
        assert getattr(changed, attribute) == wanted
    assert any(getattr(plain, attribute) != wanted for attribute, wanted in sets.items())


@pytest.mark.parametrize(("records", "warmup"), [(50, 1), (1000, 30), (100_000, 100)])
def test_the_warm_up_is_a_tenth_of_all_steps_and_at_most_100(records, warmup, capsys):
    assert arguments(records).warmup_steps == warmup
    told = f"{3 * records // 10} optimizer steps of 10 records, {warmup} of them warm-up; computing in float32\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(("quantize", "dtype"), [(None, "float32"), ("8bit", "bfloat16"), ("4bit", "float16")])
@pytest.mark.parametrize("best", ["", "eval_loss", "eval_choices"])
def test_what_is_computed_in_and_what_is_best(quantize, dtype, best):
    placement = DeviceConfig(torch.device("cpu"), getattr(torch, dtype), quantize)
    given = dataclasses.replace(PLAIN, load_8bit=quantize == "8bit")
    args = setup.training_arguments(given, placement, None, 100, best)
    assert (args.bf16, args.fp16, args.optim.value) == (dtype == "bfloat16", dtype == "float16", "adamw_torch")
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": quantize == "8bit"}
    assert (args.metric_for_best_model, args.greater_is_better) == (best or None, best == "eval_choices")
    assert (args.logging_steps, args.logging_nan_inf_filter, args.remove_unused_columns) == (1, False, False)


def test_several_cards_are_used_by_several_processes(monkeypatch):
    """In one process the library would divide micro-batches among them."""
    for cards in (0, 1, 4):
        monkeypatch.setattr(TrainingArguments, "n_gpu", cards)
        assert arguments()._n_gpu == min(1, cards)


FREE = {
    "base_model", "data_path", "output_dir", "tokenizer", "resume_from_checkpoint", "overwrite_output_dir", "save_total_limit",
    "report_to", "wandb_project", "wandb_run_name", "wandb_watch", "wandb_log_model", "num_workers", "device_map", "dtype",
    "bf16", "fp16", "eval_answers", "eval_choices", "hub",
}  # fmt: skip


def test_a_checkpoint_is_tied_to_every_option_that_rules_the_result():
    """All but those that name places, or say what is printed; base, data and type are compared by what they are."""
    assert finetune.what_rules(PLAIN).keys() == {field.name for field in dataclasses.fields(finetune.Options)} - FREE


@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("offloaded", [[], ["a layer"]])
@pytest.mark.parametrize("given", [None, True, False])
def test_activations_are_computed_again_as_asked_for_or_where_it_is_necessary(monkeypatch, capsys, given, offloaded, is_short):
    monkeypatch.setattr("utils.models.spread.offloaded", lambda _: offloaded)
    monkeypatch.setattr("utils.training.memory.is_short", lambda model, *rest: rest[1:] == (4, 256) and is_short)
    options = dataclasses.replace(PLAIN, gradient_checkpointing=given)
    found = setup.wants_checkpointing(options, place(False, False), None)
    assert found == (given if given is not None else bool(offloaded) or is_short)
    told = (
        "layers are read for each pass: --gradient_checkpointing is on; otherwise all would be held until the backward pass\n"
    )
    assert capsys.readouterr().out == told * (given is None and bool(offloaded))


@pytest.mark.parametrize(
    ("own", "named", "parent", "checkpoint"),
    [("", "base", "", ""), ("given", "given", "", ""), ("given", "given", "parent", "checkpoint"), ("", "parent", "parent", ""),
     ("", "checkpoint", "parent", "checkpoint"), ("", "base", "without", "")],
)  # fmt: skip
def test_the_tokenizer_is_the_one_given_else_that_of_what_is_trained_on_else_the_base_s(
    tmp_path, own, named, parent, checkpoint
):
    for name in ("parent", "checkpoint", "without"):
        (tmp_path / name).mkdir()
        if name != "without":
            (tmp_path / name / "tokenizer.json").touch()
    begins = RunStart(*(tmp_path / name if name else None for name in (parent, checkpoint)))
    found = tokenizer_folder(dataclasses.replace(PLAIN, tokenizer=own), begins)
    assert found == (named if named in ("base", "given") else str(tmp_path / named))


@pytest.mark.parametrize(("size", "fits"), [(10, 6), (4, 6), (17, 12)])
def test_a_step_is_divided_among_the_processes(monkeypatch, size, fits):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError) as error:
        checks.check_together(dataclasses.replace(PLAIN, batch_size=size, micro_batch_size=2))
    assert str(error.value) == (
        f"--batch_size {size}: is not a multiple of --micro_batch_size 2 x 3 processes = 6; give {fits}, "
        "or another micro-batch size"
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, ""), ({"dtype": "float16"}, "float16"), ({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16"),
        ({"bf16": False}, "float32"), ({"fp16": False}, "float32"), ({"fp16": False, "dtype": "bfloat16"}, "bfloat16"),
    ],
)  # fmt: skip
def test_the_dtype_that_options_name(options, name):
    assert checks.named_dtype(dataclasses.replace(PLAIN, **options)) == name


def test_options_of_preferences_and_rewards_are_those_of_their_losses():
    given = dataclasses.replace(PLAIN, preference_beta=0.2, preference_sft=0.3, preference_margin=0.4, desirable_weight=1.5)
    given = dataclasses.replace(given, undesirable_weight=2.5)
    common = {"beta": 0.2, "sft": 0.3, "margin": 0.4, "good_weight": 1.5, "bad_weight": 2.5}
    for named, stage, loss in (
        ("", PREFERENCE, "dpo"),
        ("ipo", PREFERENCE, "ipo"),
        ("", LABELLED, "kto"),
        ("kto", LABELLED, "kto"),
    ):
        assert setup.preference(dataclasses.replace(given, preference_loss=named), stage) == Preference(loss, **common)
    rewards = ["length:0.5", "format"]
    given = dataclasses.replace(PLAIN, rewards=rewards[:1], group_size=3, temperature=0.7, clip_epsilon=0.1, kl_beta=0.05)
    policy = Policy(load_rewards(rewards[:1], ""), group=3, temperature=0.7, clip=0.1, beta=0.05, updates=2)
    assert setup.policy(dataclasses.replace(given, num_iterations=2)) == policy
    found = setup.policy(dataclasses.replace(PLAIN, rewards=rewards, reward_format="a+"))
    assert [one.name for one in found.rewards] == ["length", "format"] and found.rewards[1].function("aa", {}) == 1


@pytest.mark.parametrize(
    ("stage", "kind", "rest"),
    [
        (TEXT, "trainer.StepTrainer", ()),
        (INSTRUCTION, "trainer.StepTrainer", ()),
        (PREFERENCE, "preferences.PreferenceTrainer", ("settings",)),
        (LABELLED, "preferences.KTOTrainer", ("settings",)),
        (REWARD, "grpo.GRPOTrainer", ("policy", "sampler")),
    ],
)
def test_each_stage_has_its_trainer(monkeypatch, stage, kind, rest):
    asked = []
    for name in ("trainer.StepTrainer", "preferences.PreferenceTrainer", "preferences.KTOTrainer", "grpo.GRPOTrainer"):
        monkeypatch.setattr(f"utils.training.{name}", lambda *given, name=name: asked.append((name, *given)))
    monkeypatch.setattr(setup, "preference", lambda _, asked_stage: "settings" if asked_stage == stage else None)
    monkeypatch.setattr(setup, "policy", lambda _: "policy")
    sampler = "sampler" if stage == REWARD else None
    setup.prepare_trainer(
        PLAIN, place(False, False), "model", [0] * 50, [1], {"run": 1}, stage, "eval_loss", sampler, "evaluator"
    )
    [(found, model, args, job, train, validation, *more)] = asked
    assert (found, model, train, validation, tuple(more)) == (kind, "model", [0] * 50, [1], rest)
    assert (args.metric_for_best_model, job.base_model, job.run, job.evaluator) == (
        "eval_loss",
        "base",
        {"run": 1},
        "evaluator",
    )


NOT_SHARDED = (
    "FSDP: supports only raw text and questions and answers; start with torchrun, or with --device_map auto in one process",
    "--eval_answers, --eval_choices: are not supported with FSDP; evaluate the saved adapter with judge.py",
)


@pytest.mark.parametrize(
    ("stage", "options", "told"),
    [
        *((stage, {}, NOT_SHARDED[0]) for stage in (PREFERENCE, LABELLED, REWARD)),
        *((TEXT, {name: "a.json"}, NOT_SHARDED[1]) for name in ("eval_answers", "eval_choices")),
    ],
)
def test_what_is_not_sharded_is_refused_before_anything_is_loaded(monkeypatch, stage, options, told):
    placement = place(False, False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError) as error:
        setup.prepare_model(dataclasses.replace(PLAIN, **options), placement, RunStart(None, None), None, stage)
    assert str(error.value) == told
