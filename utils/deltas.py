"""What an adapter changes in a base model: which tensors, and how, in the order in which peft would do it.

rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
"""

import functools
import math
import re
from pathlib import Path
from typing import Any

from utils.adapters import open_tensors, read_settings
from utils.console import UserError
from utils.files import sha256
from utils.recipes import Add, Change, Replace, Shift
from utils.shards import Kind

PREFIX = "base_model.model."
PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>embedding_A|embedding_B|A|B|magnitude_vector)(?P<bias>\.bias)?(?:\.weight)?$")
NOT_A_SUM = {  # settings under which an adapter is more than a change of the weights, or changes other weights on loading
    "layer_replication": "it repeats layers",
    "target_parameters": "it changes parameters outside of linear layers",
    "trainable_token_indices": "it holds single rows of the embeddings",
    "alora_invocation_tokens": "it is active in parts of a text only",
    "use_qalora": "it groups inputs for a quantised base",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "it truncates the base's weights on loading",
    "arrow_config": "it chooses among experts",
    "monteclora_config": "its weights are sampled",
    "megatron_config": "it belongs to Megatron's layers",
}
EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in")
HEADS = ("lm_head", "embed_out")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapter:
    """An adapter folder: its `settings`, its tensors (not read yet), and the base's tensors that they change.

    Raises UserError where it is no LoRA, or one that cannot be merged, which is said with the reason.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = read_settings(folder)
        self.weights, self.names = open_tensors(folder)
        for setting, reason in NOT_A_SUM.items():
            if self.settings.get(setting):
                raise UserError(f"{folder}: cannot be merged, since {reason} ({setting}); use it through peft")
        start = self.settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            raise UserError(
                f"{folder}: belongs to a base changed by {start}; save it with peft's path_initial_model_for_weight_conversion"
            )
        self.modules: dict[str, dict[str, str]] = {}  # module -> "A", "B", … -> name in the file
        self.replaced: dict[str, str] = {}  # name of a whole tensor -> name in the file
        for name, name_in_file in self.names.items():
            name = name.removeprefix(PREFIX)
            match = PART.match(name)
            if match:
                part = "bias" if match["bias"] else match["part"].removeprefix("embedding_")
                self.modules.setdefault(match["module"], {})[part] = name_in_file
            else:
                self.replaced[name.replace(".base_layer.", ".")] = name_in_file
        for module, parts in self.modules.items():
            if not {"A", "B"} <= parts.keys():
                raise UserError(
                    f"{folder}: {module} has no lora_{'B' if 'A' in parts else 'A'}; the save failed, train it again"
                )

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each of its files, by name."""
        return {file.name: sha256(file) for file in (*self.weights.files, self.folder / "adapter_config.json")}

    def is_trained_copy(self, name: str) -> bool:
        """True if a whole tensor is of a module in `modules_to_save`: then the base's own stays beside it, where it is tied."""
        module = name.rpartition(".")[0]
        return any(module == saved or module.endswith(f".{saved}") for saved in self.settings.get("modules_to_save") or [])

    def scaling(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA. Raises UserError where the rank is not the one in the settings."""
        expected = of_pattern(self.settings.get("rank_pattern"), module, self.settings.get("r"))
        if rank != expected:
            raise UserError(
                f"{self.folder}: {module} has rank {rank}, its settings say {expected}; the files do not belong together"
            )
        alpha = of_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha"))
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def addition(self, module: str, shape: tuple[int, ...]) -> Add:
        """What is added to the weight of `module`, which has this `shape`. Raises UserError where it does not fit."""
        parts = self.modules[module]
        a, b = self.weights.shape(parts["A"]), self.weights.shape(parts["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{self.folder}: {module} has lora_A {a} and lora_B {b}, which do not go together; copy it again")
        straight, turned = (b[0], a[1]), (a[1], b[0])
        is_embedding = "lora_embedding" in parts["A"]
        if shape not in (straight, turned) or (is_embedding and shape != turned):
            raise misfit(self.folder, f"{module}.weight", turned if is_embedding else straight, shape)
        columns = is_embedding or shape != straight or (straight == turned and bool(self.settings.get("fan_in_fan_out")))
        magnitude = parts.get("magnitude_vector")
        if magnitude and math.prod(self.weights.shape(magnitude)) != b[0]:
            raise misfit(self.folder, f"{module}.lora_magnitude_vector", self.weights.shape(magnitude), (b[0],))
        return Add(self.weights, parts["A"], parts["B"], self.scaling(module, a[0]), magnitude, columns)

    def changes(self, kinds: dict[str, Kind], find: "Finder") -> dict[str, list[Change]]:
        """The base's tensors that change, by name, and their changes in order; `kinds` are the tensors as they are so far.

        A replacement may have more rows than what it replaces (new tokens), never fewer. Raises UserError where a
        tensor of the adapter belongs to no tensor of the base, or does not fit it.
        """
        found: dict[str, list[Change]] = {}
        shapes = {name: kind[0] for name, kind in kinds.items()}
        lost = [name for name in self.replaced if not find(name)]
        lost += [f"{module}.weight" for module in self.modules if not find(f"{module}.weight")]
        if lost:
            raise UserError(
                f"{self.folder}: {len(lost)} of its layers are not in the base ({sorted(lost)[0]}, …), which has "
                f"{find.layers} layers; use the base model that it was trained on"
            )
        for name, name_in_file in self.replaced.items():
            target, shape = find(name), self.weights.shape(name_in_file)
            grows = target in find.embeddings and shape[1:] == shapes[target][1:] and shape[0] > shapes[target][0]
            if shape != shapes[target] and not grows:
                raise misfit(self.folder, name, shape, shapes[target], target in find.embeddings)
            shapes[target] = shape
            found.setdefault(target, []).append(Replace(self.weights, name_in_file))
        for module, parts in self.modules.items():
            target = find(f"{module}.weight")
            addition = self.addition(module, shapes[target])
            found.setdefault(target, []).append(addition)
            if "bias" in parts:
                bias = find(f"{module}.bias")
                if not bias:
                    raise UserError(
                        f"{self.folder}: {module} has a bias, the base's has none; it cannot be merged, use it through peft"
                    )
                shift = self.weights.tensor(parts["bias"]).float() * addition.scaling
                found.setdefault(bias, []).append(Shift(shift))
        used = len(self.replaced) + sum(map(len, self.modules.values()))
        if used != len(self.names) or used != self._count(found):
            raise RuntimeError(f"{self.folder}: {self._count(found)} of {len(self.names)} tensors would be used")
        return found

    @staticmethod
    def _count(found: dict[str, list[Change]]) -> int:
        """How many of the adapter's tensors the changes use."""
        changes = [change for changes in found.values() for change in changes]
        return sum((3 if change.magnitude else 2) if isinstance(change, Add) else 1 for change in changes)


class Finder:
    """Finds the base's name for the name that a tensor has in the model that transformers builds.

    Files of some families leave out the first part of every name (`h.0.…` for BLOOM's `transformer.h.0.…`). An output
    layer that is tied to the embeddings is in no file, but may be in an adapter; it is then a new tensor, `tied_head`.
    GPT-NeoX's is called embed_out in files, and lm_head in the model. `embedding` and `stored_head` are the base's names
    of its embeddings and its output layer, "" where it has none.
    """

    def __init__(self, names: list[str], tied: bool, family: str):
        self._names = set(names)
        modules = {name: name.split(".")[-2] for name in names if name.endswith(".weight")}
        self.embedding = next((name for name, module in modules.items() if module in EMBEDDINGS), "")
        self.stored_head = next((name for name, module in modules.items() if module in HEADS), "")
        self.tied_head = HEADS[family == "gpt_neox"] + ".weight" if tied and not self.stored_head else ""
        self.embeddings = {self.embedding, self.stored_head or self.tied_head}
        self.layers = 1 + max(
            (int(number) for name in names for number in re.findall(r"\.(\d+)\.", f".{name}")[:1]), default=-1
        )

    def __call__(self, name: str) -> str:
        """The base's name, or "" where it has no such tensor."""
        _, _, shorter = name.partition(".")
        longer = [stored for stored in self._names if stored.partition(".")[2] == name]
        found = next((candidate for candidate in (name, shorter, *longer) if candidate in self._names), "")
        is_head = name.endswith(".weight") and name.split(".")[-2] in HEADS
        return found or (self.stored_head or self.tied_head if is_head else "")


def of_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value whose pattern matches the end of a module's name, as in peft: the first that does, else `default`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def misfit(folder: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...], is_embedding: bool = False) -> UserError:
    """The error for a tensor of another shape than the base's, with what usually is the reason."""
    text = f"{folder}: {name} is {' x '.join(map(str, found))}, the base's is {' x '.join(map(str, wanted))}"
    if is_embedding and found[1:] == wanted[1:]:
        return UserError(
            f"{text}: vocabularies of two stages; 32000 tokens belong to LLaMA, 49953 to Chinese-LLaMA and 49954 to "
            "Chinese-Alpaca: merge them in this order, --lora_model chinese-llama…,chinese-alpaca…"
        )
    return UserError(f"{text}: another size of model; use the base model that the adapter was trained on")
