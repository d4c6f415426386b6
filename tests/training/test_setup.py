"""What a run begins with, what follows a step, what it tells and what is kept: one sharp look at each."""

import dataclasses
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from trainings import history, same
from transformers import GPT2Config, LlamaConfig, OPTConfig, TrainerControl, TrainerState
from transformers.trainer_pt_utils import get_length_grouped_indices

import finetune
from utils.adapters import adapters
from utils.console import UserError
from utils.datasets.encoding import IGNORED, encode
from utils.datasets.sources import sources, weighted
from utils.datasets.templates import Prompter
from utils.files import sha256
from utils.models.placement import place
from utils.models.tokenizer import load_tokenizer
from utils.training import checks, run, run_log, setup, trainer
from utils.training.batching import BatchConfig, StepBatchSampler, pad, split_across_ranks
from utils.training.data import prepare_data
from utils.training.start import RunStart

torch.set_num_threads(1)

PLAIN = finetune.Options(base_model="base", data_path="data.json", gradient_checkpointing=False, batch_size=10)


@pytest.mark.parametrize(
    ("step", "does"),
    [
        (1, ""), (3, "e"), (4, ""), (5, "es"), (6, "e"), (9, "e"), (10, "es"), (12, "es"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("evaluates", [True, False])
@pytest.mark.parametrize("stopped", [None, 15])
def test_what_follows_a_step(step, does, evaluates, stopped):
    """Five steps an epoch, twelve in all, an evaluation every third; the library has asked to save at the fourth."""
    checked, control = [], TrainerControl(should_save=step == 4)
    job = SimpleNamespace(eval_steps=3, evaluator=None)
    loader = SimpleNamespace(train_dataloader=range(5))
    run = SimpleNamespace(eval_dataset=[1] if evaluates else None, job=job, callback_handler=loader, stopped_by=stopped)
    run.check_step = lambda: checked.append(step)
    trainer.StepCallback(run).on_step_end(None, TrainerState(global_step=step, max_steps=12), control)
    wanted = (evaluates and "e" in does, "s" in does or step == 4 or stopped is not None, stopped is not None)
    assert (control.should_evaluate, control.should_save, control.should_training_stop) == wanted and checked == [step]


def test_a_cutoff_beyond_what_a_model_was_made_for_is_told_and_beyond_its_positions_refused(tmp_path, capsys):
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kinds = {"llama": LlamaConfig(**small, intermediate_size=16), "gpt2": GPT2Config(**small)}
    kinds["opt"] = OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16)
    for name, config in kinds.items():
        config.max_position_embeddings = 64
        config.save_pretrained(tmp_path / name)
        for length, is_told in ((63, False), (64, False), (65, True)):
            given = dataclasses.replace(PLAIN, base_model=str(tmp_path / name), cutoff_len=length)
            if is_told and name != "llama":
                with pytest.raises(UserError, match=f"^--cutoff_len 65: {tmp_path / name} has 64 positions; give 64 or less$"):
                    checks.check_window(given, config)
                continue
            checks.check_window(given, config)
            told = f"--cutoff_len 65: exceeds the 64 tokens that {tmp_path / name} was made for\n"
            assert capsys.readouterr().out == told * is_told


@pytest.mark.parametrize("validation", [None, 0.25])
def test_the_end_of_a_run_is_told(monkeypatch, capsys, validation):
    monkeypatch.setattr(setup, "peak_memory", lambda: 2_460_000_000)
    monkeypatch.setattr("time.time", lambda: 190.0)
    results = {"steps": 7, "train_loss": 1.23456, "eval_loss": validation}
    setup.tell_end(dataclasses.replace(PLAIN, output_dir="my run"), results, 100.0)
    told = f"training loss 1.2346{', validation loss 0.2500' if validation else ''}"
    assert capsys.readouterr().out.splitlines() == [
        f"7 steps in 1.5 minutes; {told}; at most 2.5 GB of memory",
        "done: my run holds the adapter; its chain: python -m utils.lineage 'my run'",
        "next: python generate.py --lora_weights 'my run'",
    ]


def test_room_for_the_adapter_and_a_checkpoint_is_looked_for(bases, monkeypatch):
    asked = []
    monkeypatch.setattr(setup, "check_room", lambda *room: asked.append(room))
    given = dataclasses.replace(PLAIN, base_model=str(bases["llama"]), output_dir="there", lora_r=4)
    words = load_tokenizer(bases["llama"])
    model = setup.prepare_model(given, place(False, False), RunStart(None, None), words, "instruction")
    trained = 2 * 4 * ((64 + 64) + (64 + 32))
    assert model.get_nb_trainable_parameters()[0] == trained and asked == [("there", 16 * trained)]


def test_the_seed_alone_rules_how_a_fresh_adapter_begins_and_one_that_is_trained_on_is_its_own(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "check_room", lambda *_: None)
    words, parent = load_tokenizer(bases["llama"]), tiny.adapter(bases["llama"], tmp_path / "parent")

    def begun(seed, before, parent=None):
        torch.manual_seed(before)
        given = dataclasses.replace(PLAIN, base_model=str(bases["llama"]), seed=seed)
        model = setup.prepare_model(given, place(False, False), RunStart(parent, None), words, "instruction")
        return {name: tensor.clone() for name, tensor in adapters.state(model).items()}

    one = begun(1, 5)
    assert same(one, begun(1, 6)) and not same(one, begun(2, 5))
    assert same(begun(1, 5, parent), adapters.read_tensors(parent))


@pytest.mark.parametrize(("options", "steps"), [({}, 3 * 5), ({"num_epochs": 1}, 5), ({"max_steps": 4}, 4)])
def test_the_last_step_of_an_epoch_may_have_fewer_records(options, steps):
    assert setup.count_steps(dataclasses.replace(PLAIN, **options), 41) == steps


@pytest.mark.parametrize(
    ("metric", "evaluated", "why"),
    [
        ("eval_chrf", {"eval_loss": 1.25, "eval_chrf": 60}, "the first with the highest eval_chrf (1.2500, chrF 60.0)"),
        ("eval_exact", {"eval_exact": 7.25}, "the first with the highest eval_exact (exact numbers (%) 7.2)"),
        ("eval_loss", {"eval_loss": 1.25}, "the lowest validation loss (1.2500)"),
        (None, {"eval_loss": 1.25, "eval_choices": 50}, "the last one (1.2500, right choices (%) 50.0)"),
    ],
)
def test_why_an_adapter_is_kept_is_told(metric, evaluated, why):
    args = SimpleNamespace(metric_for_best_model=metric or "eval_loss")
    assert run.why_kept(args, metric is not None, evaluated) == why


def test_a_run_s_log_and_its_progress_follow_the_history(tmp_path, monkeypatch, capsys):
    """What an earlier run left in the log is gone; a resumed one begins with what its checkpoint has logged."""
    log, control = run_log.RunLog(str(tmp_path)), TrainerControl()
    (tmp_path / "train_log.jsonl").write_text("old\n")
    state = TrainerState(global_step=2, max_steps=10)
    state.log_history = [{"loss": 2.0, "step": 2}, {"eval_loss": 3.0, "step": 2}, {"train_runtime": 1.0, "step": 2}]
    monkeypatch.setattr("time.time", lambda: 100.0)
    log.on_train_begin(None, state, control)
    monkeypatch.setattr("time.time", lambda: 104.26)
    for entry in ({"loss": 1.5, "step": 3}, {"eval_loss": 1.0, "step": 3}, {"train_runtime": 4.0, "step": 3}):
        state.global_step = 3
        state.log_history.append(entry)
        log.on_log(None, state, control)
    assert json.loads((tmp_path / ".progress.json").read_text()) == {"first": 2, "step": 3, "steps": 10, "seconds": 4.3}
    assert (log.bar.initial, log.bar.n, log.bar.total) == (2, 3, 10)
    for metrics in ({"eval_loss": 1.0}, {"eval_loss": -0.5, "eval_reward": 0.5}, {"eval_choices": 50.0}):
        log.on_evaluate(None, state, control, metrics)
    assert capsys.readouterr().out.splitlines() == [
        "step 3 of 10: validation loss 1.0000", "step 3 of 10: validation reward 0.5000"
    ]  # fmt: skip
    log.close()
    lines = history(tmp_path)
    assert lines == [
        {"loss": 2.0, "step": 2},
        {"eval_loss": 3.0, "step": 2},
        {"loss": 1.5, "step": 3},
        {"eval_loss": 1.0, "step": 3},
    ]
    assert not (tmp_path / ".progress.json").exists()


def test_the_curves_of_what_was_logged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png",
        lambda canvas, path: drawn.append(canvas.figure) or open(path, "w").close(),
    )
    names = {
        "loss": {"loss": "training", "eval_loss": "validation"},
        "reward": {
            "reward": "training", "eval_reward": "validation", "reward_chosen": "reward_chosen",
            "reward_rejected": "reward_rejected", "reward_margin": "reward_margin",
        },
        "accuracy": {"reward_accuracy": "reward_accuracy"},
        "score": {"eval_choices": "right choices (%)", "eval_chrf": "chrF", "eval_exact": "exact numbers (%)"},
    }  # fmt: skip
    numbers = {name: number for number, name in enumerate((name for panel in names.values() for name in panel), 1)}
    run_log.plot([{"step": 3, "kl": 1.0, **numbers}, {"step": 4, "loss": 2.0}], tmp_path / "a.png")
    run_log.plot([{"step": 1, "loss": 1.0, "reward_margin": 0.5}], tmp_path / "b.png")
    found = [
        {
            axes.get_ylabel(): {line.get_label(): (line.get_marker(), line.get_xydata().tolist()) for line in axes.lines}
            for axes in figure.axes
        }
        for figure in drawn
    ]
    every = {
        panel: {label: ("o" if "eval" in name else "None", [[3, numbers[name]]]) for name, label in labels.items()}
        for panel, labels in names.items()
    }
    every["loss"]["training"][1].append([4, 2.0])
    few = {"loss": {"training": ("None", [[1, 1.0]])}, "reward": {"reward_margin": ("None", [[1, 0.5]])}}
    assert found == [every, few] and {axes.get_xlabel() for figure in drawn for axes in figure.axes} == {"optimizer step"}


def test_micro_batches_are_sized_by_their_own_number_of_records(data, monkeypatch):
    seen = {}
    monkeypatch.setattr(trainer, "StepTrainer", lambda model, args, job, train, validation: seen.update(job=job))
    given = dataclasses.replace(
        PLAIN, data_path=str(data), micro_batch_size=2, cutoff_len=100, batch_size=64, group_by_length=True, seed=3
    )
    setup.prepare_trainer(given, place(False, False), None, [0] * 1000, None, {}, "instruction")
    plan = BatchConfig(64, 200, world_size=1, rank=0, group_by_length=True, seed=3, pad_to=1)
    assert seen["job"] == trainer.RunConfig(plan, "base", {}, 200, 3, None)
    args = SimpleNamespace(world_size=4, process_index=2, device=torch.device("cuda"))
    monkeypatch.setattr(setup, "training_arguments", lambda *_: args)
    setup.prepare_trainer(given, place(False, False), None, [0] * 1000, None, {}, "instruction")
    assert seen["job"].plan == dataclasses.replace(plan, world_size=4, rank=2, pad_to=8)


def test_what_a_run_learns_is_counted_for_its_lineage(bases, data, tmp_path, capsys):
    """Half of forty-two records, two of them too long to keep anything of their answers, ten kept for validation."""
    records = json.loads(data.read_text("utf-8"))
    records[:0] = [{"instruction": "问" * 200, "input": "", "output": "答"}] * 2
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    given = dataclasses.replace(
        PLAIN, base_model=str(bases["llama"]), data_path=f"{file}:1.5", cutoff_len=128, val_set_size=10,
        prompt_template_name="alpaca_short", train_on_inputs=False, seed=7,
    )  # fmt: skip
    _, train, validation, facts = prepare_data(given, RunStart(None, None), None, "instruction")
    encoded = encode(records, Prompter("alpaca_short"), load_tokenizer(bases["llama"]), 128, train_on_inputs=False)
    again = Counter(weighted(sources(f"{file}:1.5")[0], 42, "7 0"))
    dropped, kept = again[0] + again[1], {*validation.numbers.tolist()}
    learned = [encoded[number] for number in again.elements() if number > 1 and number not in kept]
    assert sorted(train.numbers.tolist()) == sorted(n for n in again.elements() if n > 1 and n not in kept)
    counts = {"records": 63, "dropped": dropped, "train": len(learned), "validation": 10}
    counts["tokens"] = sum(len(one.input_ids) for one in learned)
    counts["supervised"] = sum(label != IGNORED for one in learned for label in one.labels[1:])
    assert facts == counts | {
        "path": f"{file}:1.5", "stage": "instruction", "files": {str(file): sha256(file)},
        "template": {"name": "alpaca_short", "texts": Prompter("alpaca_short").texts},
    }  # fmt: skip
    told = (
        f"{len(learned)} records to train on, 10 to validate with; an epoch has {counts['tokens']} tokens, "
        f"{counts['supervised']} of them supervised"
    )
    assert told in capsys.readouterr().out.splitlines()
    kept = [
        prepare_data(dataclasses.replace(given, seed=seed), RunStart(None, None), None, "instruction")[2].numbers.tolist()
        for seed in (7, 8)
    ]
    assert kept[0] == validation.numbers.tolist() != kept[1]


def test_each_epoch_has_an_order_of_its_own_that_seed_and_length_rule():
    lengths = [random.Random(1).randint(5, 100) for _ in range(40)]
    for seed, epoch in ((1, 0), (1, 1), (7, 0)):
        drawn, grouped = (
            StepBatchSampler(lengths, lengths, BatchConfig(8, 999, group_by_length=group, seed=seed)) for group in (False, True)
        )
        drawn.set_epoch(epoch)
        grouped.set_epoch(epoch)
        generators = [torch.Generator().manual_seed(seed + epoch) for _ in range(2)]
        assert drawn.order() == torch.randperm(40, generator=generators[0]).tolist()
        assert grouped.order() == get_length_grouped_indices(lengths, 8, generator=generators[1])


def test_records_are_dealt_to_and_fro():
    assert split_across_ranks(range(6), [9, 8, 7, 6, 5, 4], 2) == [[0, 3, 4], [1, 2, 5]]


def test_padding_is_rounded_up_and_labels_it_not():
    batch = pad([{"input_ids": [5] * 9, "labels": [5] * 9}, {"input_ids": [6], "labels": [6]}], 8)
    assert batch["input_ids"].shape == (2, 16) and batch["places"].tolist() == list(range(8))
