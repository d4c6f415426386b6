"""Biases of adapters on layers without one: zeros in the base, if its configuration has a switch for them."""

from pathlib import Path
from typing import Any

import torch

from utils.console import say
from utils.merging.adapter_deltas import Adapter, Finder
from utils.models.names import meta_model_of
from utils.models.weights import Weights

SWITCHES = ("attention_bias", "mlp_bias")


class WithBiases(Weights):
    """The tensors of `stored`, plus biases of the shapes in `zeros`, all zero."""

    def __init__(self, stored: Weights, zeros: dict[str, tuple[int, ...]]):
        self.folder, self.files, self.stored, self.zeros = stored.folder, stored.files, stored, zeros
        self.names = sorted([*stored.names, *zeros])

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape."""
        return self.zeros.get(name) or self.stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor; a bias has its weight's."""
        return self.stored.dtype(self._in_file(name))

    def file_of(self, name: str) -> Path:
        """The file that holds one tensor, or a bias's weight."""
        return self.stored.file_of(self._in_file(name))

    def rows(self, name: str, index: slice | torch.Tensor) -> torch.Tensor:
        """The rows `index` of one tensor."""
        return (
            torch.zeros(self.zeros[name], dtype=self.dtype(name))[index]
            if name in self.zeros
            else self.stored.rows(name, index)
        )

    def _in_file(self, name: str) -> str:
        return name.removesuffix("bias") + "weight" if name in self.zeros else name


def add_missing(config: dict[str, Any], weights: Weights, adapters: list[Adapter]) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights with biases that adapters have and the base lacks, if that is a valid model; printed."""
    find = Finder(weights.names, config)
    wanted = {f"{module}.bias" for adapter in adapters for module, parts in adapter.modules.items() if "bias" in parts}
    missing = {name for name in wanted if not find(name)}
    on = {name: True for name in SWITCHES if config.get(name) is False}
    if not missing or not on:
        return config, weights
    before = meta_model_of(config).state_dict().keys()
    for switches in (*({name: True} for name in on), on):  # as few switches as suffice
        built = {
            name: tuple(value.shape)
            for name, value in meta_model_of(config | switches).state_dict().items()
            if name not in before
        }
        if missing <= built.keys() and all(find(name.removesuffix("bias") + "weight") for name in built):
            layers = ", ".join(sorted({name.split(".")[-2] for name in missing}))
            say(f"the base has no biases on {layers}, but the adapter does; {', '.join(switches)} becomes true")
            return config | switches, WithBiases(weights, built)
    return config, weights
