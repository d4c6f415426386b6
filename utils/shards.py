"""Writing a model's tensors to safetensors files as they are computed, block by block, in shards of a given size."""

import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch

from utils.console import UserError
from utils.files import write_json
from utils.weights import DTYPES, SAFETENSORS

Kind = tuple[tuple[int, ...], torch.dtype]  # a tensor's shape and type
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "": 1}


@dataclasses.dataclass(frozen=True)
class Part:
    """What a tensor of a file is: rows (all, or these in this order) and columns of the model's tensor `source`."""

    source: str
    kind: Kind
    rows: torch.Tensor | None = None
    columns: slice | None = None


def read_size(text: str) -> int:
    """A number of bytes written as 500MB, 5GB, 2GiB or 1000000. Raises UserError for anything else."""
    number = text.strip().upper().rstrip("KMGIB")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"--max_shard_size {text}: not a size; write one such as 500MB or 5GB")
    return size


def size_of(kind: Kind) -> int:
    """The bytes that a tensor takes."""
    shape, dtype = kind
    return math.prod(shape) * dtype.itemsize


def plan_shards(kinds: dict[str, Kind], most: int) -> dict[str, dict[str, Part]]:
    """Share out tensors, in their order, to files of at most `most` bytes (or one tensor): file name -> its tensors."""
    shards: list[dict[str, Part]] = [{}]
    room = most
    for name, kind in kinds.items():
        if size_of(kind) > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = Part(name, kind)
        room -= size_of(kind)
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    stem = SAFETENSORS.removesuffix(".safetensors")
    return {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: dict[str, dict[str, Part]]) -> None:
    """Write the index that tells in which shard each tensor lies."""
    total = sum(size_of(part.kind) for shard in shards.values() for part in shard.values())
    homes = {name: file for file, shard in shards.items() for name in shard}
    write_json(folder / f"{SAFETENSORS}.index.json", {"metadata": {"total_size": total}, "weight_map": homes})


def write_safetensors(file: Path, kinds: dict[str, Kind], blocks: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Write a safetensors file; `blocks` are the tensors' values in the order of `kinds`, each tensor in any parts.

    Returns each tensor's CRC-32. The format: https://github.com/huggingface/safetensors, "Format".
    """
    entries, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, kind in kinds.items():
        entries[name] = {"dtype": NAMES[kind[1]], "shape": list(kind[0]), "data_offsets": [offset, offset + size_of(kind)]}  # type: ignore[dict-item]
        offset += size_of(kind)
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    sums = dict.fromkeys(kinds, 0)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        for name, block in blocks:
            data = as_bytes(block)
            opened.write(data)
            sums[name] = zlib.crc32(data, sums[name])
        if opened.tell() != 8 + len(header) + offset:
            raise RuntimeError(f"{file}: {opened.tell()} bytes were written, {8 + len(header) + offset} were planned")
    return sums


def as_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())
