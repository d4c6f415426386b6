"""Where a base model given by name is fetched from: the Hugging Face hub, or ModelScope (https://modelscope.cn)."""

import importlib.util
import os
from pathlib import Path

from utils.console import UserError, reason, say

HUBS = ("huggingface", "modelscope")
PREFIX = "modelscope:"  # prefix of names there, also in lineage.json, so that later steps find the same model
NOT_WEIGHTS = ["*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*"]


def named_on(hub: str, base_model: str) -> str:
    """The base model's name with its `hub`'s prefix; folders, and names that already have it, are unchanged.

    Raises UserError if the package for ModelScope is not installed.
    """
    is_name = base_model.count("/") == 1 and not base_model.startswith(("/", ".", "~")) and not os.path.exists(base_model)
    named = PREFIX + base_model if hub == "modelscope" and is_name and not base_model.startswith(PREFIX) else base_model
    if named.startswith(PREFIX) and importlib.util.find_spec("modelscope") is None:
        raise UserError("--hub modelscope: the modelscope package is not installed; pip install modelscope")
    return named


def from_modelscope(name: str) -> Path:
    """The folder of a model from ModelScope, fetched once, then cached; with HF_HUB_OFFLINE=1 only the cache is used.

    Raises UserError if the package is not installed, or neither cache nor ModelScope gives the model.
    """
    named_on("modelscope", name)
    from huggingface_hub.constants import is_offline_mode

    say(f"{name.removeprefix(PREFIX)}: from ModelScope's cache" + ("" if is_offline_mode() else ", or fetched from ModelScope"))
    try:
        from modelscope.hub.snapshot_download import snapshot_download

        folder = snapshot_download(
            name.removeprefix(PREFIX), local_files_only=is_offline_mode(), ignore_file_pattern=NOT_WEIGHTS
        )
    except Exception as error:  # network, service, name and cache errors each have their own class
        raise UserError(f"{name}: not available from ModelScope now ({reason(error)}); check the name") from None
    return Path(folder)


def from_huggingface(name: str) -> Path:
    """The same for the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=NOT_WEIGHTS))
    except (OSError, ValueError):  # what the hub's client raises for: no network, offline, no such name
        raise UserError(f"{name}: neither a folder nor a model available on the hub now; check the name") from None
