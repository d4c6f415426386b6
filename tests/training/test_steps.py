"""A step and a validation as each rank sees them, and what is kept in the end: parts of the trainer, by hand."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import tiny
import torch
from trainings import same
from transformers import TrainerState

from utils.adapters import adapters
from utils.adapters.settings import read_config
from utils.console import UserError
from utils.models.tokenizer import load_tokenizer
from utils.training import checkpoints, run, trainer
from utils.training.batching import BatchConfig
from utils.training.budget import Budget
from utils.training.trainer import StepTrainer

torch.set_num_threads(1)


@dataclasses.dataclass
class Records:
    """Encoded records of such lengths; their tokens are their numbers, counted from 1."""

    lengths: list[int]
    supervised: list[int]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, number):
        return {"input_ids": [number + 1] * self.lengths[number], "labels": [1] * self.lengths[number]}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_are_loaded_in_the_order_of_their_epoch_apart_from_dropout_s_random_numbers(device):
    one = StepTrainer.__new__(StepTrainer)
    one.args = SimpleNamespace(dataloader_num_workers=2, device=torch.device(device), seed=11)
    one.job = SimpleNamespace(plan=BatchConfig(2, 99, seed=7, pad_to=8))
    one.train_dataset = Records([3, 4, 5], [1, 2, 3])
    loader = one.get_train_dataloader()
    assert (loader.num_workers, loader.pin_memory, loader.generator.initial_seed()) == (2, device == "cuda", 11)
    one.args.dataloader_num_workers, one.args.device = 0, torch.device("cpu")
    loader = one.get_train_dataloader()
    loader.set_epoch(3)
    before = torch.get_rng_state()
    steps = list(loader)
    assert torch.equal(torch.get_rng_state(), before)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(7 + 3)).tolist()
    assert [sorted(record for batch in step for record in batch["records"]) for step in steps] == [sorted(order[:2]), order[2:]]
    assert [step[0]["supervised"] for step in steps] == [sum(number + 1 for number in part) for part in (order[:2], order[2:])]
    assert {batch["input_ids"].shape[1] for step in steps for batch in step} == {8}


def test_the_ranks_gradients_are_averaged_also_where_one_has_none(monkeypatch):
    other = {(2,): torch.tensor([4.0, 2.0]), (1, 2): torch.tensor([[6.0, 8.0]])}

    def all_reduce(grad, async_op):
        grad.add_(other[tuple(grad.shape)])
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(trainer.distributed, "all_reduce", all_reduce)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (1, 2), (3,))])
    model[0].grad = torch.tensor([2.0, 0.0])
    model[2].requires_grad = False
    one = StepTrainer.__new__(StepTrainer)
    one.model, one.args = model, SimpleNamespace(world_size=2)
    one.average_gradients()
    assert [value.grad if value.grad is None else value.grad.tolist() for value in model] == [[3, 1], [[3, 4]], None]


LOST = (
    "step 2: the loss is not finite in the micro-batches of records 6, 8, 9 (counted from 0 over --data_path); look at these, "
    "or lower --learning_rate"
)
FLAT = (
    "step 2: the gradient is exactly zero, so nothing is learned; train other layers (--lora_target_modules), or in another "
    "--dtype or quantization"
)
OTHERS = "another rank has run out of memory with a single record"


@pytest.mark.parametrize(
    ("losses", "norm", "own", "heard", "told", "stopped"),
    [
        ([1.0, 2.0], 1.0, "", None, "", None),
        ([float("nan"), 2.0], 1.0, "", None, LOST, None),
        ([1.0, float("inf")], 1.0, "", None, LOST.replace("6, 8, 9", "7"), None),
        ([1.0, 2.0], 0.0, "", None, FLAT, None),
        ([1.0, 2.0], 1.0, "", [[0, 0], [15, 0]], "", 15),
        ([1.0, 2.0], 1.0, "", [[0, 0], [0, 0]], "", None),
        ([1.0, 2.0], 1.0, "", [[0, 0], [0, 1]], OTHERS, None),
        ([1.0, 2.0], 1.0, "mine is full", [[0, 1], [0, 0]], "mine is full", None),
        ([1.0, float("nan")], 1.0, "", [[0, 0], [0, 0]], LOST.replace("6, 8, 9", "7"), None),
    ],
)
def test_a_step_is_looked_at_by_all_ranks(losses, norm, own, heard, told, stopped):
    one = StepTrainer.__new__(StepTrainer)
    one.args = SimpleNamespace(device=torch.device("cpu"), world_size=2 if heard else 1)
    one.step_losses, one.gradient_norm, one.failure, one.stopped_by = torch.tensor(losses), torch.tensor(norm), own, None
    one.accelerator = SimpleNamespace(gather=lambda mine: torch.tensor(heard))
    one.step_records, one.state = [[3, 0, 4], [1]], SimpleNamespace(global_step=2)
    one.train_dataset = SimpleNamespace(numbers=[6, 7, 0, 8, 9])
    if told:
        with pytest.raises(UserError) as error:
            one.check_step()
        assert str(error.value) == told
    else:
        one.check_step()
    assert one.stopped_by == stopped


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_is_divided_among_ranks_into_as_many_micro_batches(ranks):
    """Each record once; the mean is over the tokens of all of them; a smaller budget cuts what a rank has further."""
    data = Records([50, 40, 30, 20, 10], [5, 4, 3, 2, 1])
    found, totals = [], []
    for rank, small in ((rank, small) for small in (False, True) for rank in range(ranks)):
        one, seen = StepTrainer.__new__(StepTrainer), []

        class Model(torch.nn.Module):
            def forward(self, input_ids, seen, **_):
                seen.append(sorted({int(row[0]) - 1 for row in input_ids}))
                return torch.tensor(float(input_ids.shape[0]))

        one.model, one.eval_dataset = Model().train(), data
        one.args, one.is_fsdp_enabled = SimpleNamespace(device=torch.device("cpu"), world_size=1), False
        one.job = SimpleNamespace(plan=BatchConfig(4, 100, world_size=ranks, rank=rank))
        one.budget = Budget(100)
        one.budget.tokens = 50 if small else 100
        one.accelerator = SimpleNamespace(reduce=lambda total, _: total * 3)
        call = one.model.forward
        one.model.forward = functools.partial(call, seen=seen)
        result = one.validate()
        assert not one.model.training
        totals.append((result, sum(map(len, seen))))
        found.append(seen)
    for half in (found[:ranks], found[ranks:]):
        assert len({len(seen) for seen in half}) == 1 or half is not found[:ranks]
        records = [number for seen in half for part in seen for number in part if number >= 0]
        assert sorted(records) == [0, 1, 2, 3, 4]
        assert all(sum(data.lengths[n] for n in part if n >= 0) <= 100 for seen in half for part in seen)
    assert max(len(part) for seen in found[ranks:] for part in seen) < max(len(part) for seen in found[:ranks] for part in seen)
    assert all(result == {"eval_loss": pytest.approx(3 * rows / 15)} for result, rows in totals)


@pytest.mark.parametrize(("take_best", "step", "told"), [
    (True, 2, "the lowest validation loss (1.0000, chrF 50.0)"), (False, 3, "the last one (1.2500)"),
])  # fmt: skip
def test_what_is_kept_of_a_run(tiny_llama, tmp_path, capsys, take_best, step, told):
    for number in (1, 2, 3):
        tiny.adapter(tiny_llama, tmp_path / f"checkpoint-{number}", seed=number)
    tensors, words = adapters.read_tensors(tmp_path / f"checkpoint-{step}"), load_tokenizer(tiny_llama)
    state = TrainerState(global_step=3, best_global_step=2)
    state.log_history = [
        {"step": 1, "loss": 4.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": 2.0},
        {"step": 2, "eval_chrf": 50.0, "eval_loss": 1.0}, {"step": 3, "loss": 1.5}, {"step": 3, "eval_loss": 1.25},
        {"step": 3, "train_runtime": 9}, *({"step": number, "loss": 2.5} for number in range(-9, 0)),
    ]  # fmt: skip
    one = SimpleNamespace(
        state=state, args=SimpleNamespace(output_dir=str(tmp_path), metric_for_best_model="eval_loss"),
        job=SimpleNamespace(keep=1, base_model="base"), accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model=SimpleNamespace(peft_config={"default": read_config(tmp_path / "checkpoint-1")}),
    )  # fmt: skip
    results = {"steps": 3, "kept_step": step, "train_loss": 2.5, "eval_loss": 1.0 if take_best else 1.25}
    results |= {"eval_chrf": 50.0} if take_best else {}
    count = sum(tensor.numel() for tensor in tensors.values())
    assert run.finish(one, words, take_best) == results | {"trainable_parameters": count}
    assert capsys.readouterr().out == f"kept: the adapter of step {step} of 3, {told}\n"
    assert same(adapters.read_tensors(tmp_path), tensors) and read_config(tmp_path).base_model_name_or_path == "base"
    assert [checkpoints.step_of(folder) for folder in checkpoints.in_order(tmp_path)] == [2, 3]
    assert load_tokenizer(tmp_path)("梦想")["input_ids"] == words("梦想")["input_ids"]
    still = {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}
    adapters.save(still, read_config(tmp_path), tmp_path / f"checkpoint-{step}", "base")
    with pytest.raises(
        UserError, match=f"^{tmp_path}: no lora_B has moved from zero, so nothing was learned; raise --learning"
    ):
        run.finish(one, words, take_best)
