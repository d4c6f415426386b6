"""Merging: tensors are computed, written and read back block by block, and never is the whole model in memory."""

import collections
import math
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from utils import layouts, lineage, shards
from utils.console import UserError, progress, say
from utils.files import read_json, sha256, write_json
from utils.merge_plan import Plan
from utils.recipes import Recipe
from utils.shards import Block, Part
from utils.tokenizer_files import FILES

BLOCK = 2**19  # values computed at once: few enough for a processor's cache, enough for Python to cost nothing beside
KEPT = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")  # what travels with a base beside its tensors


def write_model(plan: Plan, folder: Path) -> None:
    """Write a whole model folder. Raises UserError where a check of its tensors fails."""
    with ThreadPoolExecutor(1) as beside:
        rest = beside.submit(write_rest, plan, folder)  # imports transformers, which takes as long as a gigabyte of tensors
        hashes = beside.submit(lambda: [adapter.hashes for adapter in plan.adapters])  # for the lineage
        write_tensors(plan, folder)
        rest.result()
        hashes.result()
    check_changed(plan)


def write_tensors(plan: Plan, folder: Path) -> None:
    """Compute, write and read back all tensors. Raises UserError where values are not finite, or differ when read back.

    One thread writes, the others compute; a finished file is read back while the next one is written.
    """
    threads, workers = torch.get_num_threads(), os.cpu_count() or 1
    computing = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with (
        computing,
        ThreadPoolExecutor(1) as reading,
        progress(total=plan.size, unit="B", unit_scale=True, desc="merging") as bar,
    ):
        checks = []
        try:
            for file, parts in plan.files.items():
                kinds = {name: part.kind for name, part in parts.items()}
                write = shards.write_safetensors if file.endswith(".safetensors") else layouts.write_pth
                pieces = write(folder / file, kinds, blocks(plan, parts, computing, 2 * workers, bar))
                checks.append(reading.submit(shards.read_back, folder / file, kinds, pieces))
            for check in checks:
                check.result()
        finally:
            computing.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    if len(plan.files) > 1 and all(file.endswith(".safetensors") for file in plan.files):
        shards.write_index(folder, plan.files)


def blocks(plan: Plan, parts: dict[str, Part], pool: ThreadPoolExecutor, ahead: int, bar: Any) -> Iterator[Block]:
    """The values of all tensors of a file in order; `ahead` blocks are computed before they are asked for."""
    waiting: collections.deque[Future[Block]] = collections.deque()
    for name, part in parts.items():
        rows = part.kind[0][0] if part.kind[0] else 1
        step = max(1, BLOCK * rows // max(1, math.prod(part.kind[0])))
        for start in range(0, rows, step):
            index = slice(start, min(start + step, rows)) if part.rows is None else part.rows[start : start + step]
            waiting.append(pool.submit(compute, name, plan.recipes[part.source], index, part.columns or slice(None)))
            if len(waiting) > ahead:
                yield finished(waiting, bar)
    while waiting:
        yield finished(waiting, bar)


def compute(name: str, recipe: Recipe, index: slice | torch.Tensor, columns: slice) -> Block:
    """One block of the tensor `name` of a file."""
    return shards.block_of(name, recipe.rows(index, columns))


def finished(waiting: "collections.deque[Future[Block]]", bar: Any) -> Block:
    """The next block, when it is there."""
    block = waiting.popleft().result()
    bar.update(len(block.data))
    return block


def check_changed(plan: Plan) -> None:
    """Say how many tensors come out as in the base in spite of adapters. Raises UserError where all do."""
    touched = [recipe for recipe in plan.recipes.values() if recipe.changes]
    changed = sum(recipe.changed for recipe in touched)
    if touched and not changed:
        raise UserError("the merged model is the base: no adapter changes anything after rounding; were they trained?")
    if changed < len(touched):
        lost = len(touched) - changed
        say(f"{lost} of {len(touched)} tensors with adapters come out as the base's: the changes are lost in rounding")


def write_rest(plan: Plan, folder: Path) -> None:
    """Write what makes a folder of tensors a model: its tokenizer, configuration, and what else travelled with the base."""
    config, tokenizer = plan.config, None
    if plan.tokenizer:
        from utils.tokenizer import read_tokenizer, save_tokenizer

        tokenizer = read_tokenizer(plan.tokenizer)
        save_tokenizer(tokenizer, plan.tokenizer, folder)  # before config.json, which has transformers import much more
        set_special_ids(config, tokenizer, "config.json")
    if any(file.endswith(".pth") for file in plan.files):
        write_json(folder / "params.json", layouts.params_of(config))
    else:
        write_json(folder / "config.json", config)
    for pattern in KEPT:
        for file in filter(Path.is_file, plan.base.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    generation = folder / "generation_config.json"
    if generation.is_file() and tokenizer is not None:
        settings = read_json(generation)
        set_special_ids(settings, tokenizer, generation.name)
        write_json(generation, settings)


def set_special_ids(config: dict[str, Any], tokenizer: Any, name: str) -> None:
    """Take the ids of `<s>`, `</s>` and padding from the tokenizer, and say what that changes."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found, right = config.get(key), getattr(tokenizer, key)
        if right is not None and found != right and not (isinstance(found, list) and right in found):
            if found is not None:
                say(f"{name}: {key} {found} becomes {right}, as the tokenizer has it")
            config[key] = right
        elif right is None and isinstance(found, int) and not 0 <= found < len(tokenizer):
            say(f"{name}: {key} {found} is no token of the tokenizer; removed")
            config[key] = None


def write_lineage(plan: Plan, folder: Path, options: Any, began: float) -> None:
    """Say in `lineage.json` what went in, with hashes."""
    adapters = [
        {
            "name": str(adapter.folder),
            "sha256": adapter.hashes,
            "lineage": lineage.read(adapter.folder),
        }
        for adapter in plan.adapters
    ]
    facts = {
        "base": {"name": options.base_model, "fingerprint": plan.fingerprint},
        "adapters": adapters,
        "tokenizer": plan.tokenizer
        and {
            "name": str(plan.tokenizer),
            "sha256": {name: sha256(folder / name) for name in FILES if (folder / name).is_file()},
        },
        "results": {"bytes": plan.size, "tensors": len(plan.recipes), "changed": sum(r.changed for r in plan.recipes.values())},
    }
    lineage.write(folder, lineage.describe("merge", options, began, **facts))


def summary(plan: Plan, output_dir: str, seconds: float) -> str:
    """The last line: how much was written, how fast, and with how much memory."""
    unit = 1 if sys.platform == "darwin" else 1024  # of the peak, which macOS counts in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    speed = f"{plan.size / 1e9:.2f} GB in {seconds:.1f} s, {plan.size / 1e6 / seconds:.0f} MB/s"
    return f"done: {output_dir}, {speed}, peak memory {peak / 1e6:.0f} MB"
