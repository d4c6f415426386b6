"""Writes a LLaMA in Meta's layout: `params.json` and `consolidated.*.pth`, like torch.save, but never all in memory."""

import collections
import io
import itertools
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from utils.console import UserError
from utils.merging.shards import Block, Part, Piece
from utils.models.meta_layout import COLUMNS, ROWS, WHOLE, names_in_meta
from utils.models.weights import Kind

STORAGES = {torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage}
FILES_BY_HIDDEN_SIZE = {4096: 1, 5120: 2, 6656: 4, 8192: 8}  # 7B, 13B, 33B, 65B and 70B; others are one file


def params_of(config: dict[str, Any]) -> dict[str, Any]:
    """Meta's `params.json` for a Hugging Face configuration.

    Meta's code computes the size of the feed-forward layers from `multiple_of`; LLaMA's own is 256; for other sizes it is
    chosen to give the right size. Raises UserError for models that do not have LLaMA's architecture.
    """
    family = config.get("model_type")
    if family != "llama":
        raise UserError(
            f"--output_type pth: Meta's layout is for LLaMA, but this model is of the family {family}; leave it out"
        )
    inner, dim = config["intermediate_size"], config["hidden_size"]
    least = int(8 * dim / 3)
    reasons = {
        "has biases": config.get("attention_bias") or config.get("mlp_bias"),
        "scales its rotary embeddings": (config.get("rope_scaling") or {}).get("rope_type", "default") != "default",
        "has heads of another size": config.get("head_dim") not in (None, dim // config["num_attention_heads"]),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"--output_type pth: Meta's layout is for LLaMA, but this model {reason}; leave it out")
    params = {
        "dim": dim,
        "multiple_of": 256 if math.ceil(least / 256) * 256 == inner else inner,
        "n_heads": config["num_attention_heads"],
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": -1,
    }
    if inner < least:
        params["ffn_dim_multiplier"] = inner / least
    if config.get("num_key_value_heads", config["num_attention_heads"]) != config["num_attention_heads"]:
        params["n_kv_heads"] = config["num_key_value_heads"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return params if theta == 10000.0 else params | {"rope_theta": theta}


def plan_meta(kinds: dict[str, Kind], config: dict[str, Any]) -> dict[str, dict[str, Part]]:
    """Divide tensors as Meta does: file name -> Meta's name -> which part of which tensor.

    Rows that cannot be divided evenly, such as 49953 tokens in two files, go to the last file.
    Raises UserError for models that Meta's layout cannot hold.
    """
    params_of(config)
    count = FILES_BY_HIDDEN_SIZE.get(config["hidden_size"], 1)
    files: dict[str, dict[str, Part]] = {f"consolidated.{number:02}.pth": {} for number in range(count)}
    for ours, (theirs, division) in names_in_meta(config["num_hidden_layers"]).items():
        shape, dtype = kinds[ours]
        for number, file in enumerate(files):
            length = shape[0] if division == ROWS else shape[-1]
            first = number * (length // count)
            last = length if number == count - 1 else first + length // count
            if division == WHOLE:
                part = Part(ours, (shape, dtype))
            elif division == COLUMNS:
                part = Part(ours, ((shape[0], last - first), dtype), columns=slice(first, last))
            else:
                part = Part(ours, ((last - first, shape[1]), dtype), rows=rows_in_meta(ours, shape[0], config)[first:last])
            files[file][theirs] = part
    return files


def rows_in_meta(name: str, count: int, config: dict[str, Any]) -> torch.Tensor:
    """For each of Meta's rows, the index in Hugging Face's order."""
    rows = torch.arange(count)
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        size = config["hidden_size"] // config["num_attention_heads"]
        return rows.view(count // size, 2, -1).transpose(1, 2).reshape(-1)
    return rows


class StorageOf:
    """Stands in for a tensor's bytes while the file's table of contents is pickled."""

    def __init__(self, key: str, kind: Kind):
        self.key, self.kind = key, kind


class TensorOf:
    """Stands in for a tensor; it is pickled like in torch.save."""

    def __init__(self, storage: StorageOf):
        self.storage = storage

    def __reduce__(self) -> tuple[Any, tuple]:
        shape = self.storage.kind[0]
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, collections.OrderedDict())


class ContentsPickler(pickle.Pickler):
    """Pickles names and tensors; the tensors' bytes go into separate entries of the file, named by their keys."""

    def persistent_id(self, obj: Any) -> Any:
        """The reference to a storage that torch.load expects."""
        if not isinstance(obj, StorageOf):
            return None
        shape, dtype = obj.kind
        return "storage", STORAGES[dtype], obj.key, "cpu", math.prod(shape)


def write_pth(file: Path, kinds: dict[str, Kind], blocks: Iterable[Block]) -> list[Piece]:
    """Write what torch.save would, without holding it in memory; `blocks` are the values in the order of `kinds`, in any parts.

    The format is a zip file without compression: `data.pkl` and an entry for each tensor, which begins at a multiple
    of 64 bytes.
    """
    keys = {name: str(number) for number, name in enumerate(kinds)}
    contents = io.BytesIO()
    ContentsPickler(contents, protocol=2).dump({name: TensorOf(StorageOf(keys[name], kinds[name])) for name in kinds})
    pieces: list[Piece] = []
    with open(file, "wb") as raw, zipfile.ZipFile(raw, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{file.stem}/data.pkl"), contents.getvalue())
        archive.writestr(zipfile.ZipInfo(f"{file.stem}/byteorder"), "little")
        for name, parts in itertools.groupby(blocks, lambda block: block.name):
            entry = zipfile.ZipInfo(f"{file.stem}/data/{keys[name]}")
            begin = raw.tell() + 30 + len(entry.filename) + 20 + 4  # header, name, zip64 sizes, head of the padding
            padding = -begin % 64
            entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            with archive.open(entry, "w", force_zip64=True) as opened:
                for block in parts:
                    pieces.append(Piece(name, raw.tell(), len(block.data), block.checksum))
                    opened.write(block.data)
        archive.writestr(zipfile.ZipInfo(f"{file.stem}/version"), "3\n")
    if {piece.name for piece in pieces} != kinds.keys():
        raise RuntimeError(f"{file}: not all of the {len(kinds)} tensors that were planned were written")
    return pieces
