"""Whether an adapter fits a base: its tensors by the names and shapes in the base's files, before anything is loaded.

rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
"""

import functools
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from utils.adapters import biases, consistency
from utils.adapters.adapters import open_tensors
from utils.adapters.consistency import PART, PREFIX, TOKENS, missing_layer, named
from utils.adapters.settings import read_settings
from utils.console import UserError
from utils.files import sha256
from utils.models import meta_layout, quantized
from utils.models.names import Finder
from utils.models.tokenizer_files import STAGES

TURNED = ("gpt2", "openai-gpt")  # families whose linear layers hold inputs x outputs, as fan_in_fan_out tells of some of them


def check(adapter: "Adapter", base: Path, grows: bool = True) -> None:
    """Raises UserError if an adapter is for another base.

    Without `grows` it may not have more tokens than the base. A base whose tensors cannot be read here is left to who loads
    it: a dry run needs none, and some quantized ones are read by their own library only.
    """
    folder = adapter.folder
    biases.check_base(folder, adapter.names, base)
    try:
        config, weights = meta_layout.open_model(base)
        weights = quantized.full(base, config, weights)
    except UserError:
        return
    find = Finder(weights.names, quantized.without_method(config))
    before = find.with_tied_head({name: weights.shape(name) for name in weights.names})
    after = adapter.check_fit(before, find, loading=True)
    grown = [name for name in before if after[name] != before[name]]
    if grown and not grows:
        raise UserError(
            f"{folder}: its vocabulary has {after[grown[0]][0]} tokens, that of {base} {before[grown[0]][0]}; merge it first: "
            f"python merge_weights.py --base_model {base} --lora_model {folder} --output_dir MERGED"
        )


class Adapter:
    """An adapter folder: its `settings` and its tensors (not read yet), by what they do.

    Raises UserError, with the reason, if it is not a LoRA, or its two files do not belong together.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = read_settings(folder)
        self.weights, self.names = open_tensors(folder)
        consistency.check(folder, self.settings, self.names)
        self.modules: dict[str, dict[str, str]] = {}  # module -> "A", "B", … -> name in the file
        self.replaced: dict[str, str] = {}  # name of a whole tensor -> name in the file
        self.tokens: dict[str, str] = {}  # module whose single rows are replaced -> name in the file
        for name, name_in_file in self.names.items():
            name = name.removeprefix(PREFIX)
            match = PART.match(name)
            if match:
                part = "bias" if match["bias"] else match["part"].removeprefix("embedding_")
                self.modules.setdefault(match["module"], {})[part] = name_in_file
            elif name.endswith(TOKENS):
                self.tokens[name.removesuffix(TOKENS)] = name_in_file
            else:
                self.replaced[name.replace(".base_layer.", ".")] = name_in_file
        for module, parts in self.modules.items():
            if not {"A", "B"} <= parts.keys():
                raise UserError(
                    f"{folder}: {module} has no lora_{'B' if 'A' in parts else 'A'}; saving it failed, train it again"
                )

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each of its files, by name."""
        return {file.name: sha256(file) for file in (*self.weights.files, self.folder / "adapter_config.json")}

    def is_trained_copy(self, name: str) -> bool:
        """True if a whole tensor belongs to a module in `modules_to_save`: if the base's own is tied, it stays beside it."""
        module = name.rpartition(".")[0]
        return named(self.settings.get("modules_to_save") or [], module)

    def rows_of(self, module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The rows of `module`, which has this `shape`, that are replaced. Raises UserError if they do not fit."""
        tokens = self.settings["trainable_token_indices"]
        named = tokens if isinstance(tokens, dict) else {module: tokens}
        index: list[int] = next((rows for name, rows in named.items() if f".{module}".endswith(f".{name}")), [])
        found = self.weights.shape(self.tokens[module])
        if found != (len(index), *shape[1:]) or not index or not 0 <= min(index) <= max(index) < shape[0]:
            raise misfit(self.folder, f"{module}{TOKENS} for {len(index)} tokens", found, shape)
        return tuple(index)

    def scaling(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA. Raises UserError if the rank is not the one in the settings."""
        expected = of_pattern(self.settings.get("rank_pattern"), module, self.settings.get("r"))
        if rank != expected:
            raise UserError(
                f"{self.folder}: {module} has rank {rank}, its settings say {expected}; the files do not belong together"
            )
        alpha = of_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha"))
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def has_columns(self, module: str, shape: tuple[int, ...], model_type: str) -> bool:
        """True if the weight of `module`, which has this `shape`, holds an output in each column. Raises UserError if the
        LoRA does not fit it."""
        parts = self.modules[module]
        a, b = self.weights.shape(parts["A"]), self.weights.shape(parts["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{self.folder}: {module} has lora_A {a} and lora_B {b}, which do not match; download it again")
        straight, turned = (b[0], a[1]), (a[1], b[0])
        is_embedding = "lora_embedding" in parts["A"]
        if shape not in (straight, turned) or (is_embedding and shape != turned):
            raise misfit(self.folder, f"{module}.weight", turned if is_embedding else straight, shape)
        self.scaling(module, a[0])
        magnitude = parts.get("magnitude_vector")
        if magnitude and math.prod(self.weights.shape(magnitude)) != b[0]:
            raise misfit(self.folder, f"{module}.lora_magnitude_vector", self.weights.shape(magnitude), (b[0],))
        return is_embedding or shape != straight or (straight == turned and model_type in TURNED)

    def check_fit(
        self, shapes: dict[str, tuple[int, ...]], find: Finder, single: Collection[str] = (), loading: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of the base's tensors, by name, once the adapter has replaced what it replaces, from those before.

        A replacement may have more rows than what it replaces (new tokens), never fewer; what the modules `single` change is
        checked elsewhere. Raises UserError if a tensor of the adapter matches no tensor of the base, or does not fit it. For
        `loading`, a layer that the base's files store in parts or joined with others is left to the library.
        """
        layers = [module for module in self.modules if module not in single]
        if loading and self.settings.get("target_parameters"):
            layers = []
        lost = [name for name in self.replaced if not find(name)]
        lost += [f"{module}.weight" for module in (*layers, *self.tokens) if not find(f"{module}.weight")]
        if lost and loading:
            lost = [name for name in lost if name not in find.built]
        if lost:
            raise UserError(
                f"{self.folder}: {len(lost)} of its layers are not in the base ({sorted(lost)[0]}, …), which has "
                f"{find.layers} layers; use the base model that it was trained on"
            )
        self._check_all_there(shapes, find)
        after = dict(shapes)
        for name in filter(find, self.replaced):
            target, shape = find(name), self.weights.shape(self.replaced[name])
            grows = target in find.embeddings and shape[1:] == after[target][1:] and shape[0] > after[target][0]
            if shape != after[target] and not grows:
                raise misfit(self.folder, name, shape, after[target], target in find.embeddings)
            after[target] = shape
        for module in layers:
            found = after.get(find(f"{module}.weight"), ())
            if len(found) == 2 or not loading:
                self.has_columns(module, found, find.config.get("model_type", ""))
        for module in self.tokens:
            if find(f"{module}.weight"):
                self.rows_of(module, after[find(f"{module}.weight")])
        return after

    def _check_all_there(self, shapes: dict[str, tuple[int, ...]], find: Finder) -> None:
        """Raises UserError if the settings name a layer of the base for which the adapter has nothing."""
        kept = [name.rpartition(".")[0] for name in self.replaced]
        saved = [name for name in self.settings.get("modules_to_save") or [] if not any(named([name], one) for one in kept)]
        whole = next((name for name in saved if any(named([f"{name}.weight"], stored) for stored in shapes)), "")
        have = {find(f"{module}.weight") for module in self.modules}
        beside = [name.removesuffix(".weight") for name in shapes.keys() - have if name.endswith(".weight")]
        plain = not self.settings.get("target_parameters")
        lost = whole or (missing_layer(self.settings, self.modules, beside, find.config) if plain else "")
        if lost:
            raise UserError(f"{self.folder}: has nothing for {lost}, which its settings name; use the base it was trained on")


def of_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value whose pattern matches the end of a module's name, as in peft: the first that does, else `default`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def misfit(folder: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...], is_embedding: bool = False) -> UserError:
    """The error for a tensor whose shape differs from the base's, with the usual reason."""
    text = f"{folder}: {name} is {' x '.join(map(str, found))}, the base's is {' x '.join(map(str, wanted))}"
    if is_embedding and found[1:] == wanted[1:]:
        return UserError(
            f"{text}: vocabularies of two stages; {STAGES}: merge them in this order, "
            "--lora_model chinese-llama…,chinese-alpaca…"
        )
    return UserError(f"{text}: another size of model; use the base model that the adapter was trained on")
