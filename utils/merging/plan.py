"""Planning a merge: what fits together, how each tensor of the merged model is computed, and in which file it goes."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from utils import lineage
from utils.console import UserError, say
from utils.files import check_room
from utils.merging import biases, meta_writer, shards
from utils.merging.adapter_deltas import Adapter
from utils.merging.shards import Part
from utils.merging.tensor_recipes import Change, Grow, Recipe, Replace, ReplaceRows, same_changes
from utils.models import meta_layout, quantized
from utils.models.names import Finder
from utils.models.tokenizer_files import MODEL, STAGES, count_tokens, has_tokenizer, is_sentencepiece, too_many_tokens
from utils.models.weights import Weights, base_folder, dtype_name, size_of, tell_adapter

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PADDING = 8  # vocabularies are padded to multiples of this; those of LLaMA and its descendants are not


@dataclasses.dataclass
class MergePlan:
    """Everything known before the first byte is written.

    `fingerprint` is the base's (see lineage.py), `config` the merged model's. `recipes` are the tensors of the merged
    model by name, and `files` says which parts of them go where. `rows` are the embeddings' rows of the base, and after
    each adapter. `tokenizer` is the folder of the merged model's tokenizer (None: there is none).
    """

    base: Path
    fingerprint: dict[str, Any]
    adapters: list[Adapter]
    config: dict[str, Any]
    recipes: dict[str, Recipe]
    rows: list[int]
    files: dict[str, dict[str, Part]]
    tokenizer: Path | None

    @property
    def size(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(size_of(part.kind) for parts in self.files.values() for part in parts.values())

    @property
    def folders(self) -> list[Path]:
        """The adapters' folders."""
        return [adapter.folder for adapter in self.adapters]


def plan_merge(
    base_model: str,
    lora_models: list[str],
    dtype: str | None = None,
    output_type: str = "huggingface",
    max_shard_size: str = "5GB",
    merge_into: str = "full",
) -> MergePlan:
    """Read what is to be merged and check that it fits together; nothing is written.

    Raises UserError for a quantized base, an adapter of another model or stage, a tokenizer of another stage.
    """
    most = shards.read_size(max_shard_size)
    base = base_folder(base_model)
    config, weights = meta_layout.open_model(base)
    tell_adapter(base)
    config, weights = dequantized(base, config, weights)
    if meta_layout.is_meta(base):
        say(f"{base}: Meta's layout; max_position_embeddings is assumed to be {config['max_position_embeddings']}")
    adapters, fingerprint = [Adapter(base_folder(name)) for name in lora_models], lineage.fingerprint(base_model)
    for adapter in adapters[:1]:  # later ones were trained on the result of the first
        lineage.check_same_base(lineage.read(adapter.folder), fingerprint, str(adapter.folder), base_model)
    if output_type != "pth":  # Meta's layout has no place for biases
        config, weights = biases.add_missing(config, weights, adapters)
    find = Finder(weights.names, config)
    if lost := find.missing():
        raise UserError(f"{base_model}: {len(lost)} tensors are missing ({min(lost)}, …); check its files")
    weights = beside_quantized(weights, find, adapters, merge_into)
    recipes, rows = plan_recipes(weights, find, adapters)
    tokenizer = choose_tokenizer(base, adapters, rows)
    grow_missing_rows(recipes, find, base, tokenizer)
    for recipe in recipes.values():
        if dtype and recipe.kind[1].is_floating_point:
            recipe.kind = recipe.kind[0], FLOATS[dtype]
    untie(recipes, find, config, keep_head=output_type == "pth")
    for part in (config, config.get("text_config")):  # the latter for multimodal models
        if find.embedding and isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = recipes[find.embedding].kind[0][0]
    describe_dtype(config, recipes)
    kinds = {name: recipes[name].kind for name in in_order(recipes, weights)}
    files = meta_writer.plan_meta(kinds, config) if output_type == "pth" else shards.plan_shards(kinds, most)
    return MergePlan(base, fingerprint, adapters, config, recipes, rows, files, tokenizer)


def dequantized(base: Path, config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights of a base, dequantized if necessary, which is printed."""
    found = quantized.full(base, config, weights)
    if isinstance(found, quantized.Dequantized):
        count = f"{len(found.derived)} tensors are quantized ({quantized.method_of(config)})"
        say(f"{base}: {count}; dequantized to {dtype_name(found.full)}, by the library")
        config = quantized.without_method(config)
    return config, found


def beside_quantized(weights: Weights, find: Finder, adapters: list[Adapter], merge_into: str) -> Weights:
    """The weights to merge into: the base's, or their quantized and dequantized values, with which an adapter was trained.
    Their difference is measured on some tensors, and printed. Raises UserError if `merge_into` is "dequantized" and no
    adapter's lineage says that its base was quantized.
    """
    read = [(adapter, lineage.read(adapter.folder) or {}) for adapter in adapters]
    learned = [(adapter, parent.get("lineage") or {}) for adapter, step in read for parent in step.get("parents") or []]
    for adapter, step in read + learned:  # the latter for a combination
        options = step.get("options", {})
        way = "4-bit" if options.get("load_4bit") else "8-bit" if options.get("load_8bit") else ""
        if not way or isinstance(weights, quantized.Dequantized):
            continue
        linear = [name for name in weights.names if name not in find.embeddings and len(weights.shape(name)) == 2]
        left = quantized.Requantized(weights, [name for name in linear if "pos" not in name and "wpe" not in name], way, step)
        share, count = left.difference()
        into, other = ("full", "dequantized") if merge_into == "full" else ("dequantized", "full")
        say(
            f"{adapter.folder}: was trained with {way} weights, which differ from the full ones by {share:.2%} (root mean "
            f"square over {count} tensors); merged into the {into} ones (--merge_into {other}: into the {other} ones)"
        )
        return weights if merge_into == "full" else left
    if merge_into == "dequantized" and not isinstance(weights, quantized.Dequantized):
        raise UserError("--merge_into dequantized: no lineage.json says that the base was quantized; leave it out")
    return weights


def plan_recipes(weights: Weights, find: Finder, adapters: list[Adapter]) -> tuple[dict[str, Recipe], list[int]]:
    """How each tensor is computed, and the embeddings' rows: the base's, and after each adapter.

    An output layer that is tied to the embeddings starts as these. What an adapter changes in the embeddings also
    changes it where peft would do so: when the embeddings were resized and saved, or with `ensure_weight_tying`.
    """
    sources = find.with_tied_head({name: name for name in weights.names})
    recipes = {name: Recipe(weights, source, weights.kind(source)) for name, source in sources.items()}
    embeddings = [name for name in find.embeddings if name in recipes]
    rows = [max((recipes[name].kind[0][0] for name in embeddings), default=0)]
    for adapter in adapters:
        changes = adapter.changes({name: recipe.kind for name, recipe in recipes.items()}, find)
        if find.tied_head in recipes and find.tied_head not in changes and (shared := shared_with_head(adapter, find, changes)):
            changes[find.tied_head] = shared
        for name, found in changes.items():
            replacing = [change for change in found if isinstance(change, Replace)]
            if replacing and recipes[name].changes:
                say(f"{adapter.folder}: replaces {name}, which an adapter before it has changed")
            if replacing:
                recipes[name].kind = replacing[-1].weights.shape(replacing[-1].name), recipes[name].kind[1]
            if not recipes[name].kind[1].is_floating_point:
                kind = dtype_name(recipes[name].kind[1])
                raise UserError(f"{weights.folder}: {name} is of {kind}; merge into the same model in float16 or bfloat16")
            recipes[name].changes += found
        rows.append(max((recipes[name].kind[0][0] for name in embeddings), default=0))
    return recipes, rows


def shared_with_head(adapter: Adapter, find: Finder, changes: dict[str, list[Change]]) -> list[Change]:
    """The adapter's changes in the embeddings that peft would also make in an output layer that is tied to them."""
    moved = changes.get(find.embedding, [])
    if adapter.settings.get("ensure_weight_tying"):
        return moved
    if adapter.is_trained_copy(find.embedding):
        return []
    return [change for change in moved if isinstance(change, (Replace, ReplaceRows))]


def choose_tokenizer(base: Path, adapters: list[Adapter], rows: list[int]) -> Path | None:
    """The folder of the merged model's tokenizer, or None: that of the last adapter with other tokens, else the base's.
    Raises UserError if the number of its tokens does not match the embeddings' rows at its stage.
    """
    homes = [base, base.parent] if meta_layout.is_meta(base) else [base]
    chosen = next((home for home in homes if has_tokenizer(home)), None)
    count = count_all(chosen) if chosen else None
    if count and count > rows[0]:
        raise too_many_tokens(base, rows[0], count)
    for adapter, before, after in zip(adapters, rows, rows[1:], strict=False):
        folder = adapter.folder
        if not has_tokenizer(folder):
            if after > before:
                raise UserError(
                    f"{folder}: extends the vocabulary from {before} to {after} tokens and has no tokenizer of its own; "
                    "put its tokenizer.model, tokenizer_config.json and special_tokens_map.json there"
                )
            continue
        own, extends = count_all(folder), after > before
        forgot_a_token = extends and own < after and after % PADDING
        of_earlier_stage = not extends and count and own < count
        if own > after or forgot_a_token or of_earlier_stage:
            raise UserError(
                f"{folder}: its tokenizer has {own} tokens, the model at this stage {after} embedding rows; {STAGES}: "
                "use the base, adapters and tokenizers of one chain, in its order"
            )
        if own != count:  # if equal, the base's files are the original, and these were saved again by training
            chosen, count = folder, own
    if chosen is None:
        say(f"{base}: has no tokenizer, nor has any adapter; the merged folder will have none")
    elif rows[-1] > rows[0]:
        say(f"vocabulary: {rows[0]} tokens in the base, {rows[-1]} in the merged model")
    if rows[:2] == [32000, 49954] and adapters[0].settings.get("r") == 64:  # the plain Chinese-Alpaca's rank is 8
        say(
            f"{adapters[0].folder}: looks like Chinese-Alpaca-Plus or -Pro, which belong on top of Chinese-LLaMA-Plus; if it "
            "is, merge both: --lora_model chinese-llama-plus…,chinese-alpaca-plus…"
        )
    return chosen


def count_all(folder: Path) -> int:
    """The number of tokens of the tokenizer in a folder."""
    if is_sentencepiece(folder / MODEL):
        return count_tokens(folder)
    from utils.models.tokenizer import read_tokenizer

    return len(read_tokenizer(folder))


def grow_missing_rows(recipes: dict[str, Recipe], find: Finder, base: Path, tokenizer: Path | None) -> None:
    """If an adapter holds only one of the two embeddings with new tokens, extend the other as training did."""
    names = [name for name in find.embeddings if name in recipes]
    most = max((recipes[name].kind[0][0] for name in names), default=0)
    grown = any(isinstance(change, Replace) for name in names for change in recipes[name].changes)
    for name in names:
        recipe = recipes[name]
        rows, width = recipe.kind[0]
        if rows < most:
            if tokenizer is None or not grown or any(isinstance(change, Replace) for change in recipe.changes):
                raise UserError(
                    f"{name}: has {rows} rows, the other embeddings {most}, and no adapter holds the rest; {STAGES}"
                )
            from utils.models.tokenizer import read_tokenizer
            from utils.models.vocabulary import pieces_of_new_tokens

            pieces = pieces_of_new_tokens(read_tokenizer(base), read_tokenizer(tokenizer))
            recipe.kind = (most, width), recipe.kind[1]
            recipe.changes.insert(0, Grow(recipe.base, recipe.source, most, pieces))
            say(f"{name}: {most - rows} rows for new tokens are in no adapter; each is the mean of the rows it replaces")


def untie(recipes: dict[str, Recipe], find: Finder, config: dict[str, Any], keep_head: bool) -> None:
    """Put the output layer into the merged model if necessary, and set `tie_word_embeddings` to whether it is tied."""
    head = find.tied_head or find.stored_head
    if head not in recipes or not find.embedding:
        return
    if not same_changes(recipes[find.embedding].changes, recipes[head].changes):
        if find.tied_head:
            say(f"{head} now differs from {find.embedding}: tie_word_embeddings becomes false")
        config["tie_word_embeddings"] = False
    elif find.tied_head and not keep_head:
        del recipes[head]


def describe_dtype(config: dict[str, Any], recipes: dict[str, Recipe]) -> None:
    """Set the configuration's dtype to that of the largest tensor."""
    largest = max(recipes.values(), key=lambda recipe: size_of(recipe.kind))
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = dtype_name(largest.kind[1])


def in_order(recipes: dict[str, Recipe], weights: Weights) -> list[str]:
    """Names in the order of the base's files, layer 2 before layer 10; new ones come last."""

    def place(name: str) -> tuple[str, list[Any]]:
        file = weights.file_of(name).name if name in weights.names else "~"
        return file, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    return sorted(recipes, key=place)


def check_output(sources: list[Path], size: int, output_dir: str, overwrite: bool) -> None:
    """Raises UserError if the output would overwrite a source, or anything without --overwrite, or lacks disk space."""
    output = Path(output_dir).absolute()
    for folder in sources:
        if output.resolve() == folder.resolve() or output.resolve() in folder.resolve().parents:
            raise UserError(f"--output_dir {output_dir}: is or contains {folder}, which is merged; choose another folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(f"--output_dir {output_dir}: is not empty; choose another folder, or give --overwrite")
        if not any((output / name).is_file() for name in ("config.json", "params.json", "adapter_config.json", "lineage.json")):
            raise UserError(f"--output_dir {output_dir}: holds no model that could be overwritten; choose another folder")
    check_room(output, int(size * 1.01))
