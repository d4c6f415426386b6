"""Merging: tensors are computed, written and read back block by block, and never is the whole model in memory."""

import collections
import concurrent.futures
import os
import resource
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils import layouts, lineage, shards
from utils.console import UserError, progress, say
from utils.files import read_json, sha256, write_json
from utils.merge_plan import Plan, set_special_ids
from utils.shards import Part
from utils.tokenizer import FILES, save_tokenizer
from utils.weights import Weights

BLOCK = 2**19  # values computed at once: few enough for a processor's cache, enough for Python to cost nothing beside
KEPT = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")  # what travels with a base beside its tensors


def write_tensors(plan: Plan, folder: Path) -> None:
    """Compute, write and read back all tensors. Raises UserError where values are not finite, or differ when read back."""
    threads = torch.get_num_threads()
    workers = os.cpu_count() or 1
    pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    bar = progress(total=plan.size, unit="B", unit_scale=True, desc="merging")
    with pool, bar:
        checks = []
        try:
            for file, parts in plan.files.items():
                kinds = {name: part.kind for name, part in parts.items()}
                write = shards.write_safetensors if file.endswith(".safetensors") else layouts.write_pth
                sums = write(folder / file, kinds, blocks(plan, parts, pool, workers, bar))
                checks.append(pool.submit(read_back, folder / file, kinds, sums))
            for check in checks:
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    if len(plan.files) > 1 and all(file.endswith(".safetensors") for file in plan.files):
        shards.write_index(folder, plan.files)


def blocks(plan: Plan, parts: dict[str, Part], pool: Any, workers: int, bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of all tensors of a file in order, a few blocks computed ahead."""
    waiting: collections.deque[tuple[str, Any]] = collections.deque()

    def finished() -> tuple[str, torch.Tensor]:
        name, future = waiting.popleft()
        block = future.result()
        bar.update(block.nbytes)
        return name, block

    for name, part in parts.items():
        rows = part.kind[0][0] if part.kind[0] else 1
        step = max(1, BLOCK * rows // max(1, shards.size_of(part.kind) // part.kind[1].itemsize))
        for start in range(0, rows, step):
            index = slice(start, min(start + step, rows)) if part.rows is None else part.rows[start : start + step]
            recipe = plan.recipes[part.source]
            waiting.append((name, pool.submit(recipe.rows, index, part.columns or slice(None))))
            if len(waiting) > 2 * workers:
                yield finished()
    while waiting:
        yield finished()


def read_back(file: Path, kinds: dict[str, shards.Kind], sums: dict[str, int]) -> None:
    """Compare a written file with what was computed. Raises UserError where it differs."""
    written = Weights(file.parent, [file])
    for name, (shape, dtype) in kinds.items():
        found = 0
        if name in written.names and (written.shape(name), written.dtype(name)) == (shape, dtype):
            step = max(1, 2**22 * (shape[0] if shape else 1) // max(1, shards.size_of((shape, dtype))))
            for start in range(0, shape[0] if shape else 1, step):
                found = zlib.crc32(shards.as_bytes(written.rows(name, slice(start, start + step))), found)
        if found != sums[name]:
            raise UserError(
                f"{file.name}: {name} was read back otherwise than it was written; check the disk, then merge again"
            )


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
    """Write what makes a folder of tensors a model: its configuration, tokenizer, and what else travelled with the base."""
    if any(file.endswith(".pth") for file in plan.files):
        write_json(folder / "params.json", layouts.params_of(plan.config))
    else:
        write_json(folder / "config.json", plan.config)
    for pattern in KEPT:
        for file in filter(Path.is_file, plan.base.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    generation = folder / "generation_config.json"
    if generation.is_file() and plan.tokenizer is not None:
        settings = read_json(generation)
        set_special_ids(settings, plan.tokenizer, generation.name)
        write_json(generation, settings)
    if plan.tokenizer_folder:
        save_tokenizer(plan.tokenizer, plan.tokenizer_folder, folder)


def write_lineage(plan: Plan, folder: Path, options: Any, began: float) -> None:
    """Say in `lineage.json` what went in, with hashes."""
    adapters = [
        {
            "name": str(adapter.folder),
            "sha256": {file.name: sha256(file) for file in (*adapter.weights.files, adapter.folder / "adapter_config.json")},
            "lineage": lineage.read(adapter.folder),
        }
        for adapter in plan.adapters
    ]
    facts = {
        "base": {"name": options.base_model, "fingerprint": plan.fingerprint},
        "adapters": adapters,
        "tokenizer": plan.tokenizer_folder
        and {
            "name": str(plan.tokenizer_folder),
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
