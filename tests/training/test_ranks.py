"""Several processes give what one gives: gloo ranks on this machine."""

import json
from pathlib import Path

import pytest
import torch
from trainings import losses, tensors

torch.set_num_threads(1)


def train_in_turn(script, ranks, base, records, out, counts, more=None, **env):
    """Adapters trained on the first `counts` records each, by so many ranks, with `more` options."""
    program = [Path(__file__).with_name("trainings_in_turn.py"), records, out, ",".join(map(str, counts))]
    options = {
        "base_model": base, "batch_size": 12, "micro_batch_size": 2, "num_epochs": 1, "val_set_size": 0, "cutoff_len": 128,
        "learning_rate": 1e-3, "prompt_template_name": "alpaca_short", "modules_to_save": "[lm_head]", "lora_dropout": 0,
    } | (more or {})  # fmt: skip
    words = [*program, *(f"--{name}={value}" for name, value in options.items())]
    script.ranks(ranks, *words, **env) if ranks > 1 else script(*words, **env).ok()
    return {count: (losses(out / str(count)), tensors(out / str(count))) for count in counts}


def check_ranks(script, base, data, folder, counts, *groups):
    """Each group of ranks gives what one process gives.

    The output layer is trained, too, which an empty micro-batch must reach. Adam divides by the size of the gradient: a
    step moves each weight by about the learning rate (1e-3), so a share that is 1 % wrong shows, and where gradients are
    near zero the order of summing alone shows by some thousandths.
    """
    records = json.loads(data.read_text("utf-8"))
    (folder / "records.json").write_text(json.dumps(records + records[:24], ensure_ascii=False), "utf-8")
    one = train_in_turn(script, 1, base, folder / "records.json", folder / "one", counts)
    for ranks in groups:
        many = train_in_turn(script, ranks, base, folder / "records.json", folder / str(ranks), counts)
        for count in counts:
            assert many[count][0] == pytest.approx(one[count][0], abs=1e-5), (ranks, count)
            for name, tensor in one[count][1].items():
                assert (many[count][1][name] - tensor).abs().max() < 1e-5, (ranks, count, name)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_what_one_process_gives(script, bases, data, tmp_path, ranks):
    """1: no record for a rank; 13: none in the second step; 29: a rank has an empty micro-batch."""
    check_ranks(script, bases["llama"], data, tmp_path, [1, 13, 29], ranks)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("first", range(1, 25, 8))
def test_ranks_give_what_one_process_gives_for_every_number_of_records(script, bases, data, tmp_path, first):
    """Every remainder of the twelve in a step, alone and after a whole step."""
    check_ranks(script, bases["llama"], data, tmp_path, range(first, first + 8), 2, 3)


STAGES = {
    "dpo": {"preference_beta": 0.3},
    "kto": {"preference_loss": "kto", "preference_beta": 0.3},
    "grpo": {"rewards": "[length]", "group_size": 4, "max_new_tokens": 6, "kl_beta": 0.1, "num_iterations": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_learn_from_preferences_and_rewards_as_one_process_does(script, bases, tmp_path, stage):
    """13 records: the second step has one, so that a rank has none."""
    answers = {"output": "好" * 5} if stage == "grpo" else {"chosen": "好的" * 3, "rejected": "坏"}
    records = [{"instruction": f"第{n}题" + "问" * (n % 4), "input": "", **answers} for n in range(13)]
    records = [record | ({"chosen": "好" * (2 + n % 5)} if "chosen" in record else {}) for n, record in enumerate(records)]
    (tmp_path / "records.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    more = STAGES[stage] | {"modules_to_save": "[]"}
    one, two = (
        train_in_turn(script, r, bases["llama"], tmp_path / "records.json", tmp_path / str(r), [13], more) for r in (1, 2)
    )
    assert two[13][0] == pytest.approx(one[13][0], abs=1e-5)
    for name, tensor in one[13][1].items():
        assert (two[13][1][name] - tensor).abs().max() < 1e-5, name
