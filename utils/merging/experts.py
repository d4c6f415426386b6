"""Adapters on single parameters, such as those of all experts: which tensors in a base's files they change."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.adapters.settings import read_config
from utils.console import UserError, reason
from utils.merging.tensor_recipes import Add, AddExperts
from utils.models.names import meta_model_of
from utils.models.weights import Weights


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the model under a LoRA: (outputs, inputs) or (experts, outputs, inputs), or, with
    `outputs_are_columns`, (experts, inputs, outputs)."""

    name: str
    shape: tuple[int, ...]
    scaling: float
    outputs_are_columns: bool


def parameters(config: dict[str, Any], folder: Path) -> dict[str, Parameter]:
    """The parameters that have a LoRA, by the LoRA's names in the adapter's file, determined by peft.

    Raises UserError if transformers or peft cannot build such a model.
    """
    from peft import get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    settings = read_config(folder)
    settings.lora_dropout, settings.init_lora_weights = 0.0, True  # nothing is computed with it
    settings.base_model_name_or_path = None  # peft warns if the name differs
    try:
        model = get_peft_model(meta_model_of(config), settings)
    except Exception as error:  # the library's own checks
        raise UserError(
            f"{folder}: does not fit the base ({reason(error)}); use the base model that it was trained on"
        ) from None
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            parameter = module.get_param()
            columns = parameter.dim() == 3 and getattr(module.get_base_layer(), "is_transposed", False)
            full = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            found[name] = Parameter(full, tuple(parameter.shape), module.scaling["default"], columns)
    return found


def additions(
    weights: Weights,
    lora: dict[str, str],
    parameter: Parameter,
    shapes: dict[str, tuple[int, ...]],
    whole: str,
    parts: list[list[str]],
) -> Iterator[tuple[str, Add]]:
    """The tensors in the base's files that hold `parameter`, and what is added to each.

    `lora` are the names of "A" and "B" in the file `weights`; the parameter is the tensor `whole` or, if "", its `parts`,
    one list per expert. Raises UserError if these do not fit.
    """
    a, b = lora["A"], lora["B"]
    found = weights.shape(a), weights.shape(b)
    experts = parameter.shape[0] if len(parameter.shape) == 3 else 1
    outputs, inputs = parameter.shape[-2:][:: -1 if parameter.outputs_are_columns else 1]
    ranks = found[0][0]
    if found != ((ranks, inputs), (outputs, ranks)) or ranks % experts:
        mismatch = f"lora_A {found[0]} and lora_B {found[1]}, the base's {parameter.name} is {parameter.shape}"
        raise UserError(f"{weights.folder}: has {mismatch}; use the base model that it was trained on")
    common = (weights, a, b, parameter.scaling, None, parameter.outputs_are_columns)
    if whole and shapes[whole] == parameter.shape:
        yield whole, AddExperts(*common, experts) if len(parameter.shape) == 3 else Add(*common)
        return
    rows = [[shapes[name][0] for name in names] for names in parts]
    if parameter.outputs_are_columns or len(parts) != experts or any(sum(row) != outputs for row in rows):
        raise UserError(
            f"{weights.folder}: changes {parameter.name}, which the base's files store in another layout; use it through peft"
        )
    for expert, names in enumerate(parts):
        start = 0
        for name in names:
            end = start + shapes[name][0]
            yield name, AddExperts(*common, experts, expert, (start, end))
            start = end
