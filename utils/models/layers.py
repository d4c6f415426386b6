"""Finds a model's layers by asking the model itself: embeddings, output layer, linear layers, and the language part."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)  # GPT-2 has the latter


def name_of(model: nn.Module, layer: nn.Module | None) -> str:
    """The full name of a layer of `model`; "" if it has no such layer."""
    return next((name for name, module in model.named_modules() if module is layer), "") if layer is not None else ""


def output_layer(model: Any) -> nn.Module | None:
    """The layer that computes the scores of the next token, if the model names it."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def embedding_names(model: Any) -> list[str]:
    """The last parts of the names of the input embeddings and the output layer, such as embed_tokens and lm_head."""
    names = (name_of(model, layer) for layer in (model.get_input_embeddings(), output_layer(model)))
    return [name.split(".")[-1] for name in names if name]


def language_part(model: Any) -> str:
    """The common prefix, with its dot, of the names of the language model's layers in a multimodal model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or isinstance(decoder, LINEAR):
        return ""  # ModernBERT calls its output layer the decoder
    name = name_of(model, decoder)
    return f"{name}." if name else ""


def linear_layers(model: nn.Module) -> list[str]:
    """The last parts of the names of the language model's linear layers, each once, without the output layer's."""
    output, part = output_layer(model), language_part(model)
    names = [name for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not output]
    return list(dict.fromkeys(name.split(".")[-1] for name in names if name.startswith(part)))


def on_language_part(model: nn.Module, names: list[str]) -> list[str] | str:
    """`names` of linear layers, as a pattern for only the language model's if other parts of the model also have such
    layers."""
    part = language_part(model)
    found = (name for name, module in model.named_modules() if isinstance(module, LINEAR) and name.split(".")[-1] in names)
    if all(name.startswith(part) for name in found):
        return names
    return rf"{part.replace('.', chr(92) + '.')}(.*\.)?({'|'.join(names)})"
