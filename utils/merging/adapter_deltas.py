"""What an adapter changes in a base model: which tensors, and how, in peft's order.

rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
"""

import functools
import math
import re
from pathlib import Path
from typing import Any

from utils.adapters.adapters import open_tensors
from utils.adapters.consistency import PART, PREFIX, TOKENS, check, missing_layer, named
from utils.adapters.settings import read_settings
from utils.console import UserError
from utils.files import sha256
from utils.merging import experts
from utils.merging.tensor_recipes import Add, AddExperts, Change, Replace, ReplaceRows, Shift
from utils.models.names import ModelNames, ask_library
from utils.models.weights import Kind

EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in")
HEADS = ("lm_head", "embed_out")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
WRAPPED = ("module.", "_orig_mod.", "base_model.")  # how names begin that DataParallel, torch.compile and peft leave
TURNED = ("gpt2", "openai-gpt")  # families whose linear layers hold inputs x outputs, as fan_in_fan_out tells of some of them


class Adapter:
    """An adapter folder: its `settings`, its tensors (not read yet), and the base's tensors that they change.

    Raises UserError, with the reason, if it is not a LoRA, or cannot be merged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = read_settings(folder)
        self.weights, self.names = open_tensors(folder)
        check(folder, self.settings, self.names)
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

    def replaced_rows(self, module: str, shape: tuple[int, ...]) -> ReplaceRows:
        """The rows of `module`, which has this `shape`, that are replaced. Raises UserError if they do not fit."""
        tokens = self.settings["trainable_token_indices"]
        named = tokens if isinstance(tokens, dict) else {module: tokens}
        index: list[int] = next((rows for name, rows in named.items() if f".{module}".endswith(f".{name}")), [])
        found = self.weights.shape(self.tokens[module])
        if found != (len(index), *shape[1:]) or not index or not 0 <= min(index) <= max(index) < shape[0]:
            raise misfit(self.folder, f"{module}{TOKENS} for {len(index)} tokens", found, shape)
        return ReplaceRows(self.weights, self.tokens[module], tuple(index))

    def scaling(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA. Raises UserError if the rank is not the one in the settings."""
        expected = of_pattern(self.settings.get("rank_pattern"), module, self.settings.get("r"))
        if rank != expected:
            raise UserError(
                f"{self.folder}: {module} has rank {rank}, its settings say {expected}; the files do not belong together"
            )
        alpha = of_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha"))
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def addition(self, module: str, shape: tuple[int, ...], model_type: str) -> Add:
        """What is added to the weight of `module`, which has this `shape`. Raises UserError if it does not fit."""
        parts = self.modules[module]
        a, b = self.weights.shape(parts["A"]), self.weights.shape(parts["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{self.folder}: {module} has lora_A {a} and lora_B {b}, which do not match; download it again")
        straight, turned = (b[0], a[1]), (a[1], b[0])
        is_embedding = "lora_embedding" in parts["A"]
        if shape not in (straight, turned) or (is_embedding and shape != turned):
            raise misfit(self.folder, f"{module}.weight", turned if is_embedding else straight, shape)
        columns = is_embedding or shape != straight or (straight == turned and model_type in TURNED)
        magnitude = parts.get("magnitude_vector")
        if magnitude and math.prod(self.weights.shape(magnitude)) != b[0]:
            raise misfit(self.folder, f"{module}.lora_magnitude_vector", self.weights.shape(magnitude), (b[0],))
        return Add(self.weights, parts["A"], parts["B"], self.scaling(module, a[0]), magnitude, columns)

    def changes(self, kinds: dict[str, Kind], find: "Finder") -> dict[str, list[Change]]:
        """The base's tensors that change, by name, and their changes in order; `kinds` are the current tensors.

        A replacement may have more rows than what it replaces (new tokens), never fewer. Raises UserError if a tensor of
        the adapter matches no tensor of the base, or does not fit it.
        """
        found: dict[str, list[Change]] = {}
        shapes = {name: kind[0] for name, kind in kinds.items()}
        single = experts.parameters(find.config, self.folder) if self.settings.get("target_parameters") else {}
        lost = [name for name in self.replaced if not find(name)]
        layers = [module for module in (*self.modules, *self.tokens) if module not in single]
        lost += [f"{module}.weight" for module in layers if not find(f"{module}.weight")]
        if lost:
            raise UserError(
                f"{self.folder}: {len(lost)} of its layers are not in the base ({sorted(lost)[0]}, …), which has "
                f"{find.layers} layers; use the base model that it was trained on"
            )
        self._check_all_there(shapes, find)
        for name, name_in_file in self.replaced.items():
            target, shape = find(name), self.weights.shape(name_in_file)
            grows = target in find.embeddings and shape[1:] == shapes[target][1:] and shape[0] > shapes[target][0]
            if shape != shapes[target] and not grows:
                raise misfit(self.folder, name, shape, shapes[target], target in find.embeddings)
            shapes[target] = shape
            found.setdefault(target, []).append(Replace(self.weights, name_in_file))
        for module, parts in self.modules.items():
            if module in single:
                name = single[module].name
                changes = experts.additions(self.weights, parts, single[module], shapes, find(name), find.joined(name))
                for target, change in changes:
                    found.setdefault(target, []).append(change)
                continue
            target = find(f"{module}.weight")
            addition = self.addition(module, shapes[target], find.config.get("model_type", ""))
            found.setdefault(target, []).append(addition)
            if "bias" in parts:
                bias = find(f"{module}.bias")
                if not bias:
                    raise UserError(
                        f"{self.folder}: {module} has a bias, the base's has none; it cannot be merged, use it through peft"
                    )
                shift = self.weights.tensor(parts["bias"]).float() * addition.scaling
                found.setdefault(bias, []).append(Shift(shift))
        for module in self.tokens:
            target = find(f"{module}.weight")
            found.setdefault(target, []).append(self.replaced_rows(module, shapes[target]))
        used = len(self.replaced) + len(self.tokens) + sum(map(len, self.modules.values()))
        if used != len(self.names) or used != self._count(found):
            raise RuntimeError(f"{self.folder}: {self._count(found)} of {len(self.names)} tensors would be used")
        return found

    def _check_all_there(self, shapes: dict[str, tuple[int, ...]], find: "Finder") -> None:
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

    @staticmethod
    def _count(found: dict[str, list[Change]]) -> int:
        """How many of the adapter's tensors the changes use; that of an expert's parameter may change several tensors."""
        changes = [change for changes in found.values() for change in changes]
        several = {change.a: 2 for change in changes if isinstance(change, AddExperts)}
        others = [change for change in changes if not isinstance(change, AddExperts)]
        return sum(several.values()) + sum((3 if c.magnitude else 2) if isinstance(c, Add) else 1 for c in others)


class Finder:
    """Finds the base's name for the name that a tensor has in the model that transformers builds.

    Files of some families omit the first part of every name (`h.0.…` for BLOOM's `transformer.h.0.…`), and others have
    older names, which the library knows. A tied output layer is in no file, but may be in an adapter; it is then a new
    tensor, `tied_head`. GPT-NeoX's is called embed_out in files, and lm_head in the model. `embedding` and `stored_head`
    are the base's names of its embeddings and its output layer, "" if it has none.
    """

    def __init__(self, names: list[str], config: dict[str, Any]):
        self._names, self.config = set(names), config
        self._has_parts = any(key.endswith("_config") and key != "quantization_config" for key in config)  # one for images, say
        self.embedding, self.stored_head = self._end(EMBEDDINGS), self._end(HEADS)
        if not self.embedding:
            self.embedding = self._asked.stored.get(self._asked.embedding, "")
            self.stored_head = self.stored_head or self._asked.stored.get(self._asked.head, "")
        tied = config.get("tie_word_embeddings", True) and not self.stored_head
        self.tied_head = HEADS[config.get("model_type") == "gpt_neox"] + ".weight" if tied else ""
        self.embeddings = {self.embedding, self.stored_head or self.tied_head}
        self.layers = 1 + max(
            (int(number) for name in names for number in re.findall(r"\.(\d+)\.", f".{name}")[:1]), default=-1
        )

    def _end(self, modules: tuple[str, ...]) -> str:
        """The one weight whose layer has one of these names; "" if none has, or several have."""
        found = [name for name in self._names if name.endswith(".weight") and name.split(".")[-2] in modules]
        return found[0] if len(found) == 1 else ""

    @functools.cached_property
    def _asked(self) -> ModelNames:
        """The library's names; only loaded if names are not found directly, since it takes seconds."""
        return ask_library(self.config, sorted(self._names))

    def __call__(self, name: str) -> str:
        """The base's name, or "" if it has no such tensor or several candidates."""
        if name in self._names:
            return name
        if self._has_parts and name in self._asked.stored:
            return self._asked.stored[name]
        _, _, shorter = name.partition(".")
        longer = [stored for stored in self._names if stored.partition(".")[2] == name]
        candidates = [shorter] if shorter in self._names else longer
        is_head = name.endswith(".weight") and name.split(".")[-2] in HEADS
        if len(candidates) == 1:
            return candidates[0]
        if is_head and (self.stored_head or self.tied_head):
            return self.stored_head or self.tied_head
        return self._asked.stored.get(name, "")

    def missing(self) -> list[str]:
        """The model's names of tensors that the files lack, where they have them for other layers; all, if they have none.

        The library is asked only where names look like it: those of a layer that another one has, or of a wrapped model.
        """
        layers: dict[str, set[str]] = {}
        for name in self._names:
            layers.setdefault(NUMBER.sub("N", name, count=1), set()).update(NUMBER.findall(name)[:1])
        counts = {len(found) for found in layers.values() if found}
        if len(counts) < 2 and not any(name.startswith(WRAPPED) for name in self._names):
            return []
        there = self._asked.stored.keys() | self._asked.joined.keys()
        kinds = {NUMBER.sub("N", name, count=1) for name in there}
        lost = [name for name in self._asked.in_order if name not in there]
        return [name for name in lost if NUMBER.sub("N", name, count=1) in kinds or not there]

    def joined(self, name: str) -> list[list[str]]:
        """The base's names of the tensors that the library joins into `name`, one list per expert; [] if it does not."""
        return self._asked.joined.get(name, [])


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
            f"{text}: vocabularies of two stages; 32000 tokens belong to LLaMA, 49953 to Chinese-LLaMA and 49954 to "
            "Chinese-Alpaca: merge them in this order, --lora_model chinese-llama…,chinese-alpaca…"
        )
    return UserError(f"{text}: another size of model; use the base model that the adapter was trained on")
