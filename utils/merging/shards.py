"""Writing a model's tensors to files as they are computed, block by block, in shards of a given size."""

import dataclasses
import errno
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash

from utils.console import UserError
from utils.files import write_json
from utils.models.weights import DTYPES, SAFETENSORS, Kind, Weights, size_of

NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "": 1}


@dataclasses.dataclass(frozen=True)
class Part:
    """What a tensor in a file consists of: rows (all, or these in this order) and columns of the model's tensor `source`."""

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


def plan_shards(kinds: dict[str, Kind], most: int) -> dict[str, dict[str, Part]]:
    """Distribute tensors, in order, over files of at most `most` bytes (or one tensor): file name -> its tensors."""
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
    """Write the index of which shard holds each tensor."""
    total = sum(size_of(part.kind) for shard in shards.values() for part in shard.values())
    homes = {name: file for file, shard in shards.items() for name in shard}
    write_json(folder / f"{SAFETENSORS}.index.json", {"metadata": {"total_size": total}, "weight_map": homes})


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive values of the tensor `name`, their bytes and these bytes' XXH3 (64 bits)."""

    name: str
    data: memoryview
    checksum: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where in a file a block was written, to be read back."""

    name: str
    offset: int
    length: int
    checksum: int


def block_of(name: str, values: torch.Tensor) -> Block:
    """The values as bytes in a file, without a copy if they are contiguous."""
    data = memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
    return Block(name, data, xxhash.xxh3_64_intdigest(data))


def write_safetensors(file: Path, kinds: dict[str, Kind], blocks: Iterable[Block]) -> list[Piece]:
    """Write a safetensors file; `blocks` are the tensors' values in the order of `kinds`, each tensor in any parts.

    The format: https://github.com/huggingface/safetensors, "Format".
    """
    entries, size = {"__metadata__": {"format": "pt"}}, 0
    for name, kind in kinds.items():
        entries[name] = {"dtype": NAMES[kind[1]], "shape": list(kind[0]), "data_offsets": [size, size + size_of(kind)]}  # type: ignore[dict-item]
        size += size_of(kind)
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    pieces = []
    with open(file, "wb", buffering=0) as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        for block in blocks:
            pieces.append(Piece(block.name, opened.tell(), len(block.data), block.checksum))
            if opened.write(block.data) != len(block.data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        if opened.tell() != 8 + len(header) + size:
            raise RuntimeError(f"{file}: {opened.tell()} bytes were written, {8 + len(header) + size} were planned")
    return pieces


def read_back(file: Path, kinds: dict[str, Kind], pieces: list[Piece]) -> None:
    """Flush a file to disk, read it, and compare it with what was computed. Raises UserError if it differs."""
    with open(file, "rb", buffering=0) as opened:
        os.fsync(opened.fileno())
        buffer = memoryview(bytearray(max((piece.length for piece in pieces), default=0)))
        for piece in pieces:
            opened.seek(piece.offset)
            part = buffer[: piece.length]
            if opened.readinto(part) != piece.length or xxhash.xxh3_64_intdigest(part) != piece.checksum:
                raise UserError(
                    f"{file.name}: {piece.name} reads back differently from what was written; check the disk, and merge again"
                )
    found = Weights(file.parent, [file])
    if {name: found.kind(name) for name in found.names} != kinds:
        raise UserError(f"{file.name}: holds other tensors than those written; check the disk, and merge again")
