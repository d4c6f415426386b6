"""Biases of adapters on layers without one: zeros in the base, if its configuration has a switch for them."""

from pathlib import Path
from typing import Any

import torch

from utils.adapters.biases import built_by, switches_for
from utils.console import say
from utils.merging.adapter_deltas import Adapter
from utils.models.weights import DerivedWeights, Weights


class WithBiases(DerivedWeights):
    """The tensors of `stored`, plus biases of the shapes in `zeros`, all zero."""

    def __init__(self, stored: Weights, zeros: dict[str, tuple[int, ...]]):
        super().__init__(stored)
        self.derived = self.zeros = zeros
        self.names = sorted({*stored.names, *zeros})

    def shape(self, name: str) -> tuple[int, ...]:
        return self.zeros.get(name) or self.stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(self._in_file(name))

    def file_of(self, name: str) -> Path:
        return self.stored.file_of(self._in_file(name))

    def derive(self, name: str) -> torch.Tensor:
        return torch.zeros(self.zeros[name], dtype=self.dtype(name))

    def _in_file(self, name: str) -> str:
        """A tensor's name in the files; for a bias that of its weight, whose dtype and file it has."""
        return name.removesuffix("bias") + "weight" if name in self.zeros else name


def add_missing(config: dict[str, Any], weights: Weights, adapters: list[Adapter]) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights with the biases that adapters have and the base has not; printed.

    Raises UserError if the base cannot have them.
    """
    switches: dict[str, bool] = {}
    for adapter in adapters:
        switches |= switches_for(config, adapter.names, adapter.folder)
    if not switches:
        return config, weights
    before = built_by(config, {})
    built = {name: shape for name, shape in built_by(config, switches).items() if name not in before}
    if not all(name.removesuffix("bias") + "weight" in weights.names for name in built):
        return config, weights  # named differently in the model; refused where they are missed
    layers = ", ".join(sorted({name.split(".")[-2] for name in built}))
    say(f"the base has no biases on {layers}, but the adapter does; {', '.join(switches)} becomes true")
    return config | switches, WithBiases(weights, built)
