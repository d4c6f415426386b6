"""Encoding 100,000 records: one by one with `map` as alpaca-lora does, in batches with `map`, and this toolkit.

    python benchmarks/encode.py --base_model models/smollm2-135m

Each runs in a process of its own. All ids must be equal. Labels may differ at the token that straddles prompt and answer,
which alpaca-lora misses because it encodes the prompt separately; the number of additional labels is printed. The memory of
ours is also measured for fewer records.
"""

import dataclasses
import functools
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import ROOT, Figures, child, interleave, report
from utils.cli import option, run

CUTOFF = 256


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    base_model: str = option(help="model whose tokenizer is used")
    records: int = option(100_000, "records to encode", least=1)
    repeats: int = option(1, "runs of each recipe", least=1)
    recipe: str = option("", "internal: run only this recipe", choices=("", "plain", "batched", "ours"))
    data: str = option("", "internal: file of the records")


def main(options: Options) -> None:
    """Measure all recipes alternately, or be one of them."""
    if options.recipe:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        recipes: dict[str, Callable[[], Figures]] = {}
        counts = {"plain": (1,), "batched": (1,), "ours": (1, 10, 100)}
        for name, count in [(name, options.records // part) for name, parts in counts.items() for part in parts]:
            data = Path(folder) / f"{count}.json"
            write_data(data, count)
            arguments = ("--base_model", options.base_model, "--data", data, "--recipe", name)
            recipes[f"{name}, {count} records"] = functools.partial(child, __file__, *arguments)
        medians = interleave(recipes, options.repeats)
    plain, batched, our, *fewer = medians.values()
    if len({plain["ids"], batched["ids"], our["ids"]}) > 1 or batched["supervised"] != our["supervised"]:
        sys.exit("the recipes' ids differ")
    ratios = {
        "encoding, records per second, ours / plain": plain["encoding_seconds"] / our["encoding_seconds"],
        "encoding, records per second, ours / batched map": batched["encoding_seconds"] / our["encoding_seconds"],
        "processor time, batched map / ours": batched["cpu_seconds"] / our["cpu_seconds"],
        "peak memory, batched map / ours": batched["peak_mb"] / our["peak_mb"],
        f"peak memory, {options.records} records / {options.records // 10}": our["peak_mb"] / fewer[0]["peak_mb"],
        f"peak memory, {options.records} records / {options.records // 100}": our["peak_mb"] / fewer[1]["peak_mb"],
    }
    labels = plain["supervised"] - our["supervised"]
    for figures in medians.values():
        figures.pop("ids")
    report(medians, ratios, ("datasets", "tokenizers", "transformers"), labels_more_in_plain=labels)


def write_data(path: Path, count: int) -> None:
    """Write Chinese records with log-normal lengths, like those of real ones; each contains its number."""
    from utils.datasets.records import read_records

    files = sorted(ROOT.glob("test_data/*.json")) + sorted(ROOT.glob("data/demo/f*.json"))
    texts = "".join(r["instruction"] + r["output"] for file in files for r in read_records(file, need_output=False))
    numbers = random.Random(42)

    def text(median: float) -> str:
        length = min(2000, int(numbers.lognormvariate(0, 0.9) * median) + 2)
        start = numbers.randrange(len(texts) - length)
        return texts[start : start + length]

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            record = {"instruction": f"{number} {text(20).strip()}", "input": "", "output": text(75).strip() or "好"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def measure(options: Options) -> dict[str, float]:
    """Seconds of encoding, a hash of all ids, and the number of supervised tokens."""
    import datasets

    from utils.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.base_model)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        start = time.perf_counter()
        table = {"ours": ours, "plain": plain, "batched": batched}[options.recipe](options, tokenizer, cache)
        seconds = time.perf_counter() - start
        found, supervised = hashlib.sha256(), 0
        for row in table.select_columns(["input_ids", "labels"]).iter(1000):
            found.update(json.dumps(row["input_ids"]).encode())
            supervised += sum(label != -100 for labels in row["labels"] for label in labels)
    return {"encoding_seconds": seconds, "ids": int(found.hexdigest()[:12], 16), "supervised": supervised}


def ours(options: Options, tokenizer: Any, _: str) -> Any:
    """This toolkit, with an empty cache."""
    from utils.datasets import dataset
    from utils.datasets.encoders import Encoder
    from utils.datasets.templates import Prompter

    encoder = Encoder(Prompter("alpaca_short"), tokenizer, "none", CUTOFF, False)
    return dataset.encode_all(encoder, options.data, {options.data: "none"}, 42, keep=True)[0]


def batched(options: Options, tokenizer: Any, cache: str) -> Any:
    """This toolkit's encoding in the library's process pool: `map` in batches, one process per core."""
    from datasets import load_dataset

    from utils.datasets.dataset import CHUNK
    from utils.datasets.encoding import encode
    from utils.datasets.templates import Prompter

    prompter = Prompter("alpaca_short")

    def encoded(columns: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        records: Any = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        found = encode(records, prompter, tokenizer, CUTOFF, False)
        return {"input_ids": [one.input_ids for one in found], "labels": [one.labels for one in found]}

    records = load_dataset("json", data_files=options.data, cache_dir=cache)["train"]
    cores = len(os.sched_getaffinity(0))
    return records.map(encoded, batched=True, batch_size=CHUNK, num_proc=cores, remove_columns=records.column_names)


def plain(options: Options, tokenizer: Any, cache: str) -> Any:
    """alpaca-lora's way: each record's full text and its prompt are encoded, one record per call."""
    from datasets import load_dataset

    from utils.datasets.templates import Prompter

    prompter = Prompter("alpaca_short")

    def encode(text: str, ends: bool) -> dict[str, list[int]]:
        result = tokenizer(text, truncation=True, max_length=CUTOFF, padding=False, return_tensors=None)
        if ends and len(result["input_ids"]) < CUTOFF and result["input_ids"][-1:] != [tokenizer.eos_token_id]:
            result["input_ids"].append(tokenizer.eos_token_id)
            result["attention_mask"].append(1)
        result["labels"] = result["input_ids"].copy()
        return result

    def whole(record: Any) -> dict[str, list[int]]:
        (turn,) = prompter.turns(record)
        full, asked = encode(turn.prompt + turn.answer, True), len(encode(turn.prompt, False)["input_ids"])
        full["labels"] = [-100] * asked + full["labels"][asked:]
        return full

    return load_dataset("json", data_files=options.data, cache_dir=cache)["train"].map(whole)


if __name__ == "__main__":
    run(main, Options)
