"""The names of a model's tensors once transformers has loaded them: for many families they differ from the files'."""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from utils.console import say
from utils.files import write_json

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

T = TypeVar("T")
EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in")
HEADS = ("lm_head", "embed_out")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
WRAPPED = ("module.", "_orig_mod.", "base_model.")  # prefixes that DataParallel, torch.compile and peft leave in names


@dataclasses.dataclass(frozen=True)
class ModelNames:
    """`stored`: for each name in the model that has one tensor of the files to itself, its name there; `joined`: for each
    that holds one tensor of the files for each expert, or several side by side (gate and up), their names, one list an
    expert; `embedding` and `head`: the names in the model of the weights of its embeddings and its output layer, "" if it
    has none. `in_order`: the names of all tensors of the model, as its layers are built."""

    stored: dict[str, str]
    embedding: str
    head: str
    in_order: tuple[str, ...] = ()
    joined: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)


def meta_model_of(config: dict[str, Any]) -> "PreTrainedModel":
    """The model that transformers builds from a configuration, without values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:  # through a file, since the library has its own notation for infinity
        write_json(Path(folder) / "config.json", config)
        read = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(read)


def ask_library(config: dict[str, Any], names: list[str]) -> ModelNames:
    """The names that transformers gives to the tensors `names` of a model's files; none for an unknown family.

    Tensors that it joins in other ways than experts, or divides, have no name of their own in the model, and are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from utils.models.layers import name_of, output_layer

    try:
        model = meta_model_of(config)
    except Exception:  # the library's own checks, for unknown families or values
        say(f"transformers cannot build a {config.get('model_type')}: tensors are matched by the ends of their names")
        return ModelNames({}, "", "")
    known = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    stacking = {pattern: number for c in converters if stacks(c) for number, pattern in enumerate(c.source_patterns)}
    stored: dict[str, str] = {}
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for name in sorted(names):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if pattern is None and renamed in known:
            stored[renamed] = name
        elif pattern in stacking and renamed in known:
            expert = int(re.findall(r"\.(\d+)\.", name)[-1])
            parts.setdefault(renamed, {})[expert, stacking[pattern]] = name
    joined = {name: by_expert for name, found in parts.items() if (by_expert := in_rows(found))}
    ends = [name_of(model, layer) for layer in (model.get_input_embeddings(), output_layer(model))]
    embedding, head = (f"{end}.weight" if end else "" for end in ends)
    return ModelNames(stored, embedding, head, tuple(known), joined)


def stacks(converter: "WeightConverter") -> bool:
    """True if it stacks one tensor per expert, after concatenating several if there are several."""
    kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def in_rows(parts: dict[tuple[int, int], str]) -> list[list[str]]:
    """Names by expert and number as lists, one per expert; [] if one is missing."""
    experts, numbers = (1 + max(place) for place in zip(*parts, strict=True))
    if len(parts) != experts * numbers:
        return []
    return [[parts[expert, number] for number in range(numbers)] for expert in range(experts)]


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

    @property
    def built(self) -> tuple[str, ...]:
        """The names of all tensors of the model that the library builds; none if it cannot."""
        return self._asked.in_order

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

    def with_tied_head(self, known: dict[str, T]) -> dict[str, T]:
        """What is `known` of the base's tensors, by name, completed with a tied output layer, which is as the embeddings."""
        return known | {self.tied_head: known[self.embedding]} if self.tied_head and self.embedding else dict(known)

    def missing(self) -> list[str]:
        """The model's names of tensors that the files lack: those that other layers have, and those outside of layers; all, if
        they have none.

        The library is asked only where names look like it: a layer lacks what another one has, nothing but the embeddings is
        outside of layers, an output layer is named by config.json alone, or the model was wrapped.
        """
        layers: dict[str, set[str]] = {}
        for name in self._names:
            layers.setdefault(NUMBER.sub("N", name, count=1), set()).update(NUMBER.findall(name)[:1])
        counts = {len(found) for found in layers.values() if found}
        outside = {name for name in self._names if not NUMBER.search(name)}
        ends = not self.embedding or (self.config.get("tie_word_embeddings") is False and not self.stored_head)
        lacks = ends or outside <= {self.embedding, self.stored_head}
        if len(counts) < 2 and not lacks and not any(name.startswith(WRAPPED) for name in self._names):
            return []
        there = self._asked.stored.keys() | self._asked.joined.keys()
        kinds = {NUMBER.sub("N", name, count=1) for name in there}
        tied = self._asked.head if self.tied_head else ""
        lost = [name for name in self._asked.in_order if name not in there | self._names and name != tied]
        top = {name for name in lost if name.endswith(".weight") and not NUMBER.search(name)}
        return [name for name in lost if name in top or NUMBER.sub("N", name, count=1) in kinds or not there]

    def joined(self, name: str) -> list[list[str]]:
        """The base's names of the tensors that the library joins into `name`, one list per expert; [] if it does not."""
        return self._asked.joined.get(name, [])
