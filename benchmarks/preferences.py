"""Training on preferences and on raw text, compared with trl: losses and gradients, speed and memory.

    python benchmarks/preferences.py --base_model models/smollm2-135m

trl must be installed (pip install trl, or PYTHONPATH with a folder that contains it). First trl's own trainers compute each
loss and its gradients on one of their batches, and ours on exactly the same ids: DPO, IPO, SimPO, KTO, the odds ratio of
ORPO (trl adds the loss of the prompt, we only that of the answer), and GRPO with clipping and KL. Then DPO and pretraining
on raw text (trl: packed) alternate, without dropout, on the same records.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import Figures, child, interleave, report, text_maker
from benchmarks.trl_losses import BETA, IGNORED, LOSSES, gradients_of, lora_model, our_loss, tokenizer_of, trl_loss, trl_trainer
from utils.cli import option, run
from utils.console import UserError

RECIPES = ("trl dpo", "our dpo", "trl text", "our text")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    base_model: str = option(help="model to train")
    steps: int = option(2, "optimizer steps per run", least=1)
    batch_size: int = option(16, "pairs, or documents, per step", least=1)
    micro_batch_size: int = option(4, "sequences of full length at once", least=1)
    cutoff_len: int = option(256, "tokens per sequence", least=2)
    repeats: int = option(3, "runs of each recipe", least=1)
    only: str = option("", "measure only the speed of this", choices=("", "dpo", "text"))
    recipe: str = option("", "internal: run only this recipe", choices=("", "equal", *RECIPES))
    data: str = option("", "internal: file of the records")


def main(options: Options) -> None:
    """Compare the losses, measure all recipes alternately, or be one of them."""
    if options.recipe:
        print(json.dumps(equal(options) if options.recipe == "equal" else measure(options)))
        return
    if importlib.util.find_spec("trl") is None:
        raise UserError("trl: not installed; pip install trl, or set PYTHONPATH to a folder that contains it")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.json"
        data.write_text(json.dumps(records(options), ensure_ascii=False), "utf-8")
        names = ("base_model", "steps", "batch_size", "micro_batch_size", "cutoff_len")
        common = [*(f"--{name}={getattr(options, name)}" for name in names), "--data", str(data)]
        facts: dict[str, Any] = {}
        if not options.only:
            compared = child(__file__, *common, "--recipe", "equal")
            facts["differences"] = {name: value for name, value in compared.items() if " " in name}
        recipes: dict[str, Callable[[], Figures]] = {
            name: functools.partial(child, __file__, *common, "--recipe", name)
            for name in RECIPES
            if name.endswith(options.only)
        }
        medians = interleave(recipes, options.repeats)
    ratios: Figures = {}
    for what, peer in (("dpo", "trl"), ("text", "trl packed")):
        if f"our {what}" in medians:
            theirs, ours = medians[f"trl {what}"], medians[f"our {what}"]
            ratios |= {
                f"real tokens per second, our {what} / {peer}": ours["tokens_per_second"] / theirs["tokens_per_second"],
                f"processor time, {peer} / our {what}": theirs["train_cpu_seconds"] / ours["train_cpu_seconds"],
                f"memory, our {what} / {peer}": ours["peak_mb"] / theirs["peak_mb"],
            }
    report(medians, ratios, ("torch", "transformers", "peft", "trl"), **facts)


def records(options: Options) -> dict[str, list[dict[str, str]]]:
    """Pairs and documents with lengths distributed like those of real ones."""
    text, count = text_maker(), options.steps * options.batch_size
    pairs = [{"prompt": text(15), "chosen": text(40), "rejected": text(40)} for _ in range(count)]
    return {"pairs": pairs, "texts": [{"text": text(80)} for _ in range(count)]}


def equal(options: Options) -> Figures:
    """For each loss, the relative difference between ours and trl's, and the largest one of its gradients."""
    found: Figures = {}
    small = dataclasses.replace(options, batch_size=4, micro_batch_size=4)
    pairs = json.loads(Path(options.data).read_text("utf-8"))["pairs"][:4]
    for name in LOSSES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            model = lora_model(options, trained=True)
            theirs, start, inputs = trl_loss(name, small, model, pairs, folder)
            ours = our_loss(name, model, start, inputs)
            one, other = gradients_of(model, theirs), gradients_of(model, ours)
        largest = max(gradient.abs().max().item() for gradient in one)
        found[f"{name} loss"] = abs(theirs.item() - ours.item()) / abs(theirs.item())
        found[f"{name} gradient"] = max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) / largest
    bad = {name: value for name, value in found.items() if not value < 1e-4}
    if bad:
        sys.exit(f"not equal to trl's within 1e-4: {bad}")
    return found


def measure(options: Options) -> Figures:
    """Train one recipe; wall and CPU seconds of the training, including the reference model, and tokens per second."""
    both = json.loads(Path(options.data).read_text("utf-8"))
    who, what = options.recipe.split()
    rows = both["pairs" if what == "dpo" else "texts"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        model = lora_model(options)
        recipe = train_trl if who == "trl" else train_ours
        seconds, cpu_seconds, tokens = recipe(options, model, what, rows, folder)
    return {"train_seconds": seconds, "train_cpu_seconds": cpu_seconds, "tokens_per_second": tokens / seconds}


def real_tokens(options: Options, what: str, rows: list[dict[str, str]]) -> int:
    """The number of tokens in the training sequences, end tokens included, without padding."""
    tokenizer = tokenizer_of(options)
    texts = (
        [row["text"] for row in rows]
        if what == "text"
        else [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    )
    return sum(min(options.cutoff_len, len(ids) + 1) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def train_trl(options: Options, model: Any, what: str, rows: list[dict], folder: str) -> tuple[float, float, int]:
    """trl's DPOTrainer, or its SFTTrainer with packing."""
    if what == "dpo":
        trainer = trl_trainer("DPO", options, model, rows, folder, beta=BETA)
    else:
        trainer = trl_trainer("SFT", options, model, rows, folder, packing=True)
    return *seconds_of(trainer.train), real_tokens(options, what, rows)


def seconds_of(function: Callable[[], Any]) -> tuple[float, float]:
    """The wall and CPU time of one call."""
    began, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - cpu


def train_ours(options: Options, model: Any, what: str, rows: list[dict], folder: str) -> tuple[float, float, int]:
    """Our trainer on the same records."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from transformers import TrainingArguments

    from utils.datasets.dataset import EncodedDataset
    from utils.training.batching import BatchConfig
    from utils.training.preferences import Preference, PreferenceTrainer
    from utils.training.run import train
    from utils.training.trainer import RunConfig, StepTrainer

    args = TrainingArguments(
        output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-4, num_train_epochs=1,
        save_strategy="no", remove_unused_columns=False, logging_steps=1,
    )  # fmt: skip
    plan = BatchConfig(options.batch_size, options.micro_batch_size * options.cutoff_len)
    table = Dataset(pa.table(encoded(options, what, rows)))
    data = EncodedDataset(table, np.arange(len(table)), options.cutoff_len)
    job = RunConfig(plan, options.base_model, {}, 10**6, 1)

    def learn() -> None:
        if what == "dpo":
            trainer: StepTrainer = PreferenceTrainer(model, args, job, data, None, Preference("dpo", BETA, 0.0, 0.0))
        else:
            trainer = StepTrainer(model, args, job, data, None)
        trainer._save_checkpoint = lambda *_: None  # type: ignore[method-assign]  # trl's run saves nothing, either
        train(trainer, None)

    return *seconds_of(learn), real_tokens(options, what, rows)


def encoded(options: Options, what: str, rows: list[dict[str, str]]) -> dict[str, list]:
    """The columns of our dataset: the same ids as trl's for these records."""
    tokenizer = tokenizer_of(options)

    def ids_of(text: str) -> list[int]:
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][: options.cutoff_len]

    if what == "text":
        ids = [ids_of(row["text"]) for row in rows]
        sizes = [len(one) for one in ids]
        return {"input_ids": ids, "labels": ids, "full_length": np_ints(sizes), "supervised": np_ints([n - 1 for n in sizes])}
    columns: dict[str, list] = {}
    for side, names in (("chosen", ("input_ids", "labels")), ("rejected", ("rejected_ids", "rejected_labels"))):
        ids = [ids_of(row["prompt"] + row[side]) for row in rows]
        known = [len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row in rows]
        columns[names[0]] = ids
        columns[names[1]] = [[IGNORED] * n + one[n:] for n, one in zip(known, ids, strict=True)]
    longest = [max(map(len, pair)) for pair in zip(columns["input_ids"], columns["rejected_ids"], strict=True)]
    return columns | {"full_length": np_ints(longest), "supervised": np_ints([1] * len(rows))}


def np_ints(numbers: list[int]) -> Any:
    """Numbers as a column of int32."""
    import pyarrow as pa

    return pa.array(numbers, pa.int32())


if __name__ == "__main__":
    run(main, Options)
