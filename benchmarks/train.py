"""Speed and memory of training: the baseline, each of our optimizations alone, and all of them, on identical steps.

    python benchmarks/train.py --base_model models/smollm2-135m

The baseline is transformers' Trainer: micro-batches in random order, each padded to its longest record, logits for all
tokens. All recipes train on the same records in each optimizer step, without dropout; the losses of each step must be
equal. One micro-batch is computed as a warm-up before the first step, and not measured.
"""

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import Figures, child, interleave, report, text_maker
from utils.cli import option, run

RECIPES = ("plain", "plain grouped", "order", "logits", "all")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    base_model: str = option(help="model to train")
    steps: int = option(1, "optimizer steps per run", least=1)
    batch_size: int = option(64, "records per step", least=1)
    micro_batch_size: int = option(8, "records of full length at once", least=1)
    cutoff_len: int = option(512, "tokens per record", least=2)
    repeats: int = option(3, "runs of each recipe", least=1)
    recipe: str = option("", "internal: run only this recipe", choices=("", *RECIPES))
    data: str = option("", "internal: file of the encoded records")


def main(options: Options) -> None:
    """Measure all recipes alternately, or be one of them."""
    if options.recipe:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.json"
        data.write_text(json.dumps(encoded_records(options)), "utf-8")
        common = [
            f"--{name}={getattr(options, name)}"
            for name in ("base_model", "steps", "batch_size", "micro_batch_size", "cutoff_len")
        ]
        recipes: dict[str, Callable[[], Figures]] = {
            name: functools.partial(child, __file__, *common, "--data", data, "--recipe", name) for name in RECIPES
        }
        medians = interleave(recipes, options.repeats)
    check_equal(medians, options.steps)
    figures = {
        name: {key: value for key, value in values.items() if not key.startswith("loss")} for name, values in medians.items()
    }
    plain, ours = figures["plain"], figures["all"]
    ratios = {
        f"speed of {name} / plain": values["tokens_per_second"] / plain["tokens_per_second"] for name, values in figures.items()
    }
    ratios["speed of all / plain grouped"] = ours["tokens_per_second"] / figures["plain grouped"]["tokens_per_second"]
    ratios["memory of all / plain"] = ours["peak_mb"] / plain["peak_mb"]
    ratios["share of the matrix-product speed, plain"] = plain["gflops"] / plain["gflops_possible"]
    ratios["share of the matrix-product speed, all"] = ours["gflops"] / ours["gflops_possible"]
    settings = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in ("recipe", "data", "base_model")
    }
    report(figures, ratios, ("torch", "transformers", "peft", "accelerate"), settings=settings)


def encoded_records(options: Options) -> list[dict[str, list[int]]]:
    """Encoded Chinese records with log-normal lengths, like those of real ones, enough for all steps."""
    from utils.datasets.encoding import encode
    from utils.datasets.records import Record
    from utils.datasets.templates import Prompter
    from utils.models.tokenizer import load_tokenizer

    text, count = text_maker(), options.steps * options.batch_size
    records: list[Record] = [{"instruction": text(20), "input": "", "output": text(75)} for _ in range(count)]
    tokenizer = load_tokenizer(options.base_model)
    encoded = encode(records, Prompter("alpaca_short"), tokenizer, options.cutoff_len, train_on_inputs=False)
    return [{"input_ids": one.input_ids, "labels": one.labels} for one in encoded]


def measure(options: Options) -> dict[str, float]:
    """Train one recipe; returns seconds per step, tokens per second, floating-point speed, and each step's loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    records = json.loads(Path(options.data).read_text("utf-8"))
    set_seed(42)
    base = AutoModelForCausalLM.from_pretrained(options.base_model)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    warm_up(model, records[: options.micro_batch_size])
    runner = train_plain if options.recipe.startswith("plain") else train_ours
    times, losses, computed = runner(options, model, records)
    seconds = times[-1] - times[0]
    real = sum(len(record["input_ids"]) for record in records)
    return {
        "step_seconds": seconds / options.steps,
        "tokens_per_second": real / seconds,
        "padded_per_real": computed["tokens"] / real,
        "gflops": operations(model, computed) / seconds / 1e9,
        "gflops_possible": matrix_speed(model),
        **{f"loss{index}": loss for index, loss in enumerate(losses)},
    }


def warm_up(model: Any, records: list[dict]) -> None:
    """Run forward and backward on the beginnings of one micro-batch, in less memory than the measured steps take."""
    from utils.training.batching import pad

    model(**pad([{name: ids[:32] for name, ids in record.items()} for record in records], 1)).loss.backward()
    model.zero_grad()


def operations(model: Any, computed: dict[str, int]) -> float:
    """Floating-point operations of matrix products: 2 per weight and token forward, 2 more for the gradient of the input.

    The base model's weights have no gradients; LoRA weights take 6 operations; the output layer counts only where logits
    were computed. Attention: two products of length x length x hidden forward, four backward (as if not causal).
    """
    config = model.config
    linear = sum(m.weight.numel() for n, m in model.named_modules() if n.endswith("base_layer") or is_plain_linear(n, m))
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return computed["tokens"] * (4 * linear + 6 * lora) + computed["logits"] * 4 * head + computed["squares"] * attention


def is_plain_linear(name: str, module: Any) -> bool:
    """True for a linear layer of the base model that has no adapter and is not the output layer."""
    from torch import nn

    return type(module) is nn.Linear and "lora_" not in name and "base_layer" not in name and "lm_head" not in name


def matrix_speed(model: Any) -> float:
    """This machine's GFLOP/s at matrix products of the size of one micro-batch in the model's MLP."""
    import torch

    a = torch.randn(2048, model.config.hidden_size)
    b = torch.randn(model.config.hidden_size, model.config.intermediate_size)
    best = 0.0
    for _ in range(30):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * a.shape[0] * b.shape[0] * b.shape[1] / (time.perf_counter() - start) / 1e9)
    return best


def train_plain(options: Options, model: Any, records: list[dict]) -> tuple[list[float], list[float], dict[str, int]]:
    """transformers' Trainer as commonly used; the records of a step in the order of the file.

    "plain grouped" sorts by length within each step first, the best that group_by_length could do with the same steps.
    """
    from transformers import DataCollatorForSeq2Seq, Trainer

    from utils.models.tokenizer import load_tokenizer

    size = options.batch_size
    if options.recipe == "plain grouped":
        records = [
            r for s in range(0, len(records), size) for r in sorted(records[s : s + size], key=lambda r: -len(r["input_ids"]))
        ]
    collate = DataCollatorForSeq2Seq(load_tokenizer(options.base_model), padding=True)
    computed = {"tokens": 0, "logits": 0, "squares": 0}

    def counting(features: list[dict]) -> Any:
        batch = collate(features)
        rows, length = batch["input_ids"].shape
        computed["tokens"] += rows * length
        computed["logits"] += rows * length
        computed["squares"] += rows * length * length
        return batch

    args = training_arguments(
        options, train_sampling_strategy="sequential", gradient_accumulation_steps=size // options.micro_batch_size
    )
    clock = Clock()
    Trainer(model, args, train_dataset=records, data_collator=counting, callbacks=[clock.callback()]).train()
    return clock.times, clock.losses, computed


def train_ours(options: Options, model: Any, records: list[dict]) -> tuple[list[float], list[float], dict[str, int]]:
    """This project's trainer, or one of its optimizations alone."""
    from utils.training import batching, loss
    from utils.training.run import train
    from utils.training.trainer import RunConfig, StepTrainer

    data, size = Records(records), options.batch_size
    batching.StepBatchSampler.order = lambda self: list(range(len(records)))  # type: ignore[method-assign]
    if options.recipe == "logits":
        micro = options.micro_batch_size
        batching.pack_micro_batches = (
            lambda indices, lengths, most: [  # type: ignore[assignment]
                sorted(indices)[s : s + micro] for s in range(0, len(indices), micro)
            ]
        )
    if options.recipe == "order":
        loss.is_decoder_and_head = lambda *_: False  # type: ignore[assignment]
    plan = batching.BatchConfig(size, options.micro_batch_size * options.cutoff_len)
    args = training_arguments(options)
    trainer = StepTrainer(model, args, RunConfig(plan, options.base_model, {}, 10**9, 1), data, None)  # type: ignore[arg-type]
    clock = Clock()
    trainer.add_callback(clock.callback())
    train(trainer, None)
    computed = {"tokens": 0, "logits": 0, "squares": 0}
    for step in list(batching.StepBatchSampler(data.lengths, data.supervised, plan)):
        for batch in step:
            length = max(data.lengths[number] for number in batch.records)
            computed["tokens"] += length * len(batch.records)
            computed["squares"] += length * length * len(batch.records)
            full = length * len(batch.records)
            computed["logits"] += full if options.recipe == "order" else sum(data.supervised[n] for n in batch.records)
    return clock.times, clock.losses, computed


def training_arguments(options: Options, **more: Any) -> Any:
    """The Trainer's arguments that all recipes share."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.micro_batch_size,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )


class Records(list):
    """Encoded records with the attributes that our trainer expects of a dataset."""

    def __init__(self, records: list[dict]):
        super().__init__(records)
        self.lengths = [len(record["input_ids"]) for record in records]
        self.supervised = [sum(label != -100 for label in record["labels"][1:]) for record in records]
        self.numbers = range(len(records))


class Clock:
    """Records when the first step begins, when each step ends, and each step's loss."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def callback(self) -> Any:
        """The Trainer's callback."""
        from transformers import TrainerCallback

        clock = self

        class Notes(TrainerCallback):
            """Writes to the clock."""

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                """Record the time."""
                clock.times = clock.times or [time.perf_counter()]

            def on_step_end(self, *_: Any, **__: Any) -> None:
                """Record the time."""
                clock.times.append(time.perf_counter())

            def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
                """Record the loss."""
                if logs and "loss" in logs:
                    clock.losses.append(logs["loss"])

        return Notes()


def check_equal(medians: dict[str, dict[str, float]], steps: int) -> None:
    """End with an error if a recipe's loss differs from the baseline's by more than 1e-3 in any step."""
    for name, values in medians.items():
        for index in range(steps):
            difference = abs(values[f"loss{index}"] - medians["plain"][f"loss{index}"])
            if difference > 1e-3:
                sys.exit(f"{name}: the loss of step {index + 1} differs from the baseline's by {difference}")


if __name__ == "__main__":
    run(main, Options)
