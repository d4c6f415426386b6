"""Merging: tensors are computed, written and read back block by block; the whole model is never in memory."""

import collections
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from utils import lineage
from utils.console import UserError, progress, say
from utils.files import read_json, sha256, write_json
from utils.merging import meta_writer, shards
from utils.merging.plan import MergePlan
from utils.merging.shards import Block, Part
from utils.merging.tensor_recipes import Recipe
from utils.models.memory import peak_memory
from utils.models.tokenizer_files import FILES

BLOCK = 2**19  # values computed at once: fits the CPU cache, yet amortizes Python overhead
KEPT = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")  # copied with a base besides its tensors


def write_model(plan: MergePlan, folder: Path) -> None:
    """Write a complete model folder. Raises UserError if a check of its tensors fails."""
    with ThreadPoolExecutor(1) as beside:
        rest = beside.submit(write_rest, plan, folder)  # imports transformers, which takes as long as a gigabyte of tensors
        hashes = beside.submit(lambda: [adapter.hashes for adapter in plan.adapters])  # for the lineage
        write_tensors(plan, folder)
        rest.result()
        hashes.result()
    check_changed(plan)


def write_tensors(plan: MergePlan, folder: Path) -> None:
    """Compute, write and read back all tensors. Raises UserError if values are not finite, or differ when read back.

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
                write = shards.write_safetensors if file.endswith(".safetensors") else meta_writer.write_pth
                pieces = write(folder / file, kinds, blocks(plan, parts, computing, 2 * workers, bar))
                checks.append(reading.submit(shards.read_back, folder / file, kinds, pieces))
            for check in checks:
                check.result()
        finally:
            computing.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    if len(plan.files) > 1 and all(file.endswith(".safetensors") for file in plan.files):
        shards.write_index(folder, plan.files)


def blocks(plan: MergePlan, parts: dict[str, Part], pool: ThreadPoolExecutor, ahead: int, bar: Any) -> Iterator[Block]:
    """The values of all tensors of a file in order; up to `ahead` blocks are computed in advance."""
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
    """The next block, once it is computed."""
    block = waiting.popleft().result()
    bar.update(len(block.data))
    return block


def check_changed(plan: MergePlan) -> None:
    """Print how many tensors equal the base's despite adapters. Raises UserError if all do."""
    touched = [recipe for recipe in plan.recipes.values() if recipe.changes]
    changed = sum(recipe.changed for recipe in touched)
    if touched and not changed:
        raise UserError("the merged model equals the base: no adapter changes anything after rounding; were they trained?")
    if changed < len(touched):
        lost = len(touched) - changed
        say(f"{lost} of {len(touched)} tensors with adapters equal the base's: their changes are lost in rounding")


def write_rest(plan: MergePlan, folder: Path) -> None:
    """Write what a model folder has besides tensors: tokenizer, configuration, and other files of the base."""
    config, tokenizer = plan.config, None
    if plan.tokenizer:
        from utils.models.tokenizer import read_tokenizer, save_tokenizer

        tokenizer = read_tokenizer(plan.tokenizer)
        # before config.json exists, which makes transformers import much more
        save_tokenizer(tokenizer, plan.tokenizer, folder)
        set_special_ids(config, tokenizer, "config.json")
    if any(file.endswith(".pth") for file in plan.files):
        write_json(folder / "params.json", meta_writer.params_of(config))
    else:
        write_json(folder / "config.json", config)
    trained = lineage.template_of(lineage.read(plan.adapters[-1].folder)) if plan.adapters else None
    if tokenizer is not None and trained:  # after config.json, from which transformers chooses the tokenizer
        from utils.datasets.jinja_export import write_chat_template

        write_chat_template(trained["name"], trained["texts"], tokenizer, folder)
    for pattern in KEPT:
        for file in filter(Path.is_file, plan.base.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    if tokenizer is not None:
        write_generation_config(folder, config, tokenizer, trained or {})


def write_generation_config(folder: Path, config: dict[str, Any], tokenizer: Any, template: dict[str, Any]) -> None:
    """List in `generation_config.json` all tokens that end answers: the tokenizer's, and those learned from a chat template.

    Without the latter, other programs continue past the end of an answer. A base without the file gets one only for these.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    if settings:
        set_special_ids(settings, tokenizer, path.name)
    known = settings.get("eos_token_id", config.get("eos_token_id"))
    ends = known if isinstance(known, list) else [] if known is None else [known]
    control = tokenizer.get_added_vocab()
    taught = str(template.get("texts", {}).get("ends", "")).split()
    more = [control[name] for name in taught if name in control and control[name] not in ends]
    if more:
        settings["eos_token_id"] = [*ends, *more]
        names = " ".join(tokenizer.convert_ids_to_tokens(more))
        say(f"{path.name}: {names} also ends answers, as the adapter learned with its chat template")
    if settings:
        write_json(path, settings)


def set_special_ids(config: dict[str, Any], tokenizer: Any, name: str) -> None:
    """Take the ids of `<s>`, `</s>` and padding from the tokenizer, and print changes."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found, right = config.get(key), getattr(tokenizer, key)
        if isinstance(found, list):  # keeps those end tokens that the tokenizer has
            kept = [token for token in found if isinstance(token, int) and 0 <= token < len(tokenizer)]
            right = kept if right is None or right in kept else [right, *kept]
        if right not in (None, []) and found != right:
            if found is not None:
                say(f"{name}: {key} {found} becomes {right}, the tokenizer's")
            config[key] = right
        elif right is None and isinstance(found, int) and not 0 <= found < len(tokenizer):
            say(f"{name}: {key} {found} is not a token of the tokenizer; removed")
            config[key] = None


def write_lineage(plan: MergePlan, folder: Path, options: Any, began: float, combined: dict[str, Any]) -> None:
    """Record in `lineage.json` what was merged, with hashes; `combined`: facts about adapters that were combined before."""
    adapters = [{"name": str(one.folder), "sha256": one.hashes, "lineage": lineage.read(one.folder)} for one in plan.adapters]
    hashes = {name: sha256(folder / name) for name in FILES if (folder / name).is_file()}
    changed = sum(recipe.changed for recipe in plan.recipes.values())
    facts = {
        "base": {"name": options.base_model, "fingerprint": plan.fingerprint},
        **(combined or {"adapters": adapters}),
        "tokenizer": {"name": str(plan.tokenizer), "sha256": hashes} if plan.tokenizer else None,
        "results": {"bytes": plan.size, "tensors": len(plan.recipes), "changed": changed},
    }
    lineage.write(folder, lineage.describe("merge", options, began, **facts))


def summary(plan: MergePlan, output_dir: str, seconds: float) -> str:
    """The last line to print: how much was written, how fast, and with how much memory."""
    speed = f"{plan.size / 1e9:.2f} GB in {seconds:.1f} s, {plan.size / 1e6 / seconds:.0f} MB/s"
    return f"done: {output_dir}, {speed}, peak memory {peak_memory() / 1e6:.0f} MB"
