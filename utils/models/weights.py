"""A model folder's tensors, in whatever files: memory-mapped, one at a time, never running pickled code."""

import functools
import math
import pickle
import threading
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from utils.console import UserError, reason, say
from utils.files import read_json
from utils.models import hubs

warnings.filterwarnings("ignore", module="torch._weights_only_unpickler")  # about files that we refuse with our own error

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
MAPPED_AT_MOST = 2**26
DTYPES = {  # by their names in the safetensors format
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Kind = tuple[tuple[int, ...], torch.dtype]  # a tensor's shape and type


def size_of(kind: Kind) -> int:
    """The size of a tensor in bytes."""
    shape, dtype = kind
    return math.prod(shape) * dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, such as float16."""
    return str(dtype).removeprefix("torch.")


class Weights:
    """The tensors of a model or adapter: `names`, and by name `shape`, `dtype`, `tensor` and `rows`.

    Reads `model.safetensors` or `pytorch_model.bin`, complete or in shards, or any `files` of these two kinds. Tensors are
    memory-mapped. Mappings are dropped after `MAPPED_AT_MOST` bytes were read through them, since their pages count as this
    process's memory; so reading without keeping takes little memory, whatever the size of the model. Raises UserError if a
    file or a tensor is missing, cut off, or would run code.
    """

    def __init__(self, folder: str | Path, files: list[Path] | None = None):
        self.folder = Path(folder)
        self.files = files or weight_files(self.folder)
        self._lock = threading.Lock()
        self._opened: dict[Path, Any] = {}
        self._bytes_read = 0
        self._homes: dict[str, Path] = {}
        self._kinds: dict[str, Kind] = {}
        for file in self.files:
            opened = self._open(file)
            check_filled(file, opened)
            for name in opened.keys():  # noqa: SIM118, a safetensors file is not a mapping
                self._homes[name] = file
                self._kinds[name] = kind_in(opened, name)
        self.names = sorted(self._homes)
        index = self.folder / f"{SAFETENSORS if self.files[0].suffix == '.safetensors' else PICKLED}.index.json"
        missing = sorted(homes_in(index).keys() - self._homes.keys()) if index.is_file() and not files else []
        if missing:
            raise UserError(f"{index}: {len(missing)} tensors are in none of its files ({missing[0]}, …); download them again")

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape."""
        return self._kinds[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which one tensor is stored."""
        return self._kinds[name][1]

    def kind(self, name: str) -> Kind:
        """One tensor's shape and dtype."""
        return self.shape(name), self.dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype."""
        return self.rows(name, slice(None))

    def rows(self, name: str, index: slice | torch.Tensor) -> torch.Tensor:
        """The rows `index` (along the first dimension) of one tensor, in its stored dtype; thread-safe."""
        file = self._homes[name]
        with self._lock:
            opened = self._open(file)
            tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        rows = tensor[index] if tensor.dim() else tensor
        with self._lock:
            self._bytes_read += rows.nbytes
            if self._bytes_read > MAPPED_AT_MOST:
                self._opened = {file: opened for file, opened in self._opened.items() if isinstance(opened, Unmapped)}
                self._bytes_read = 0
        return rows

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            self._opened[file] = open_safetensors(file) if file.suffix == ".safetensors" else load_pickled(file)
        return self._opened[file]

    def file_of(self, name: str) -> Path:
        """The file that holds one tensor."""
        return self._homes[name]


class DerivedWeights(Weights):
    """The tensors of `stored`, of which those in `derived` have the values that `derive` returns."""

    derived: Collection[str]

    def __init__(self, stored: Weights):
        self.folder, self.files, self.names, self.stored = stored.folder, stored.files, stored.names, stored
        self.tensor_of = functools.lru_cache(maxsize=4)(self.derive)  # blocks of one tensor are requested in parallel

    def derive(self, name: str) -> torch.Tensor:
        """All values of one of the `derived` tensors."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(name)

    def file_of(self, name: str) -> Path:
        return self.stored.file_of(name)

    def rows(self, name: str, index: slice | torch.Tensor) -> torch.Tensor:
        return self.tensor_of(name)[index] if name in self.derived else self.stored.rows(name, index)


class Unmapped(dict):
    """Tensors of a file that cannot be mapped, so that all are in memory."""


def kind_in(opened: Any, name: str) -> Kind:
    """Shape and dtype of a tensor of an opened file, without reading it. Raises UserError for types unknown to torch."""
    if isinstance(opened, dict):
        return tuple(opened[name].shape), opened[name].dtype
    part = opened.get_slice(name)
    if part.get_dtype() not in DTYPES:
        raise UserError(f"{name}: is stored as {part.get_dtype()}, which is not supported; use weights in float16 or bfloat16")
    return tuple(part.get_shape()), DTYPES[part.get_dtype()]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, in order.

    Raises UserError if there are none, a shard is missing or cut off, two of them hold different values for a tensor, or the
    folder also holds other weights of the same kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    files = named_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: {len(missing)} of {len(files)} shards are missing ({missing[0]}, …); download them again")
    for file in files:
        check_whole(file)
    if files[0].suffix == ".safetensors":
        check_apart(files)
    whole, index = folder / SAFETENSORS, folder / f"{SAFETENSORS}.index.json"
    shards = [folder / Path(name).name for name in set(homes_in(index).values())] if index.is_file() else []
    if whole.is_file() and shards and all(shard.is_file() for shard in shards):
        check_same(Weights(folder, [whole]), Weights(folder, sorted(shards)))
    return files


def check_whole(file: Path) -> None:
    """Raises UserError if a file of weights is cut off or of another format, as far as its ends tell."""
    head = beginning(file)
    if file.suffix == ".safetensors":
        check_filled(file, open_safetensors(file))
    elif not head.startswith((b"PK", b"\x80")):  # a zip file, or (before 1.6) a pickle
        raise UserError(f"{file}: is not a torch.save file; download it again")
    elif head.startswith(b"PK") and not zipfile.is_zipfile(file):
        raise UserError(f"{file}: cannot be read (its end is missing); download it again")


def check_filled(file: Path, opened: Any) -> None:
    """Raises UserError if a safetensors file ends in zeros: what copied it had made room for it, and was interrupted.

    These reach back at least to the middle of a matrix, but not only of one that training begins with as zeros. A few rows
    are read, and none if the file's last bytes say otherwise.
    """
    with open(file, "rb") as raw:
        raw.seek(max(0, file.stat().st_size - 64))
        if isinstance(opened, dict) or any(raw.read()):
            return
    for name in reversed(opened.offset_keys()):
        part = opened.get_slice(name)
        shape = part.get_shape()
        if not shape or 0 in shape or part.get_dtype() not in DTYPES or not DTYPES[part.get_dtype()].is_floating_point:
            return
        if any(part[row : row + 1].view(torch.uint8).any() for row in (shape[0] - 1, shape[0] // 2)):
            return
        if len(shape) > 1 and "lora_B" not in name:
            raise UserError(f"{file}: holds only zeros from {name} on, as a copy that was interrupted; download it again")


def check_apart(shards: list[Path]) -> None:
    """Raises UserError if two shards hold different values for the same tensor."""
    homes: dict[str, Any] = {}
    for file in shards:
        opened = open_safetensors(file)
        for name in opened.keys():  # noqa: SIM118, a safetensors file is not a mapping
            other = homes.setdefault(name, opened)
            if other is not opened and not alike(other.get_tensor(name), opened.get_tensor(name)):
                raise UserError(
                    f"{file}: {name} is also in another shard, with other values; delete all shards, and download them again"
                )


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True for tensors of the same type, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def check_same(one: "Weights", other: "Weights") -> None:
    """Raises UserError if two copies of the same weights differ, in names, shapes, or the first values of a tensor."""
    lost = set(one.names) ^ set(other.names)
    start, both = slice(1), [name for name in one.names if name not in lost]  # the first row
    differ = [n for n in both if one.shape(n) != other.shape(n) or not alike(one.rows(n, start), other.rows(n, start))]
    if lost or differ:
        raise UserError(
            f"{one.folder}: {one.files[0].name} and {other.files[0].name} hold different weights "
            f"({min([*lost, *differ])}, …); keep the right ones, and delete the others"
        )


def named_files(folder: Path) -> list[Path]:
    """The files that should hold a folder's weights, by their names. Raises UserError if there are none."""
    for name in (SAFETENSORS, PICKLED):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / Path(file).name for file in sorted(set(homes_in(index).values()))]
    raise UserError(f"{folder}: holds neither {SAFETENSORS} nor {PICKLED}, complete or in shards; is it a model folder?")


def has_weights(folder: Path) -> bool:
    """True if a folder has the weights of a model, or an index of them."""
    return any((folder / f"{name}{end}").is_file() for name in (SAFETENSORS, PICKLED) for end in ("", ".index.json"))


def homes_in(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index file. Raises UserError if it does not tell."""
    found = read_json(index)
    homes = found.get("weight_map") if isinstance(found, dict) else None
    if not homes or not isinstance(homes, dict) or not all(isinstance(file, str) for file in homes.values()):
        raise UserError(f"{index}: does not say which file holds each tensor; download it again")
    return homes


def open_safetensors(file: Path):
    """A memory-mapped safetensors file. Raises UserError if it is cut off or of another format."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        beginning(file)
        raise UserError(f"{file}: not a complete safetensors file ({error}); download it again") from None


def beginning(file: Path) -> bytes:
    """A file's first bytes. Raises UserError if the file is only a git-lfs pointer."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{file}: is only git's pointer to the weights; fetch them with git lfs pull, or download it again")
    return head


def load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """A torch.save file, memory-mapped if its format allows (else an `Unmapped`), without running any code in it.

    Raises UserError if the file is cut off, or holds anything but tensors.
    """
    check_whole(file)
    try:
        try:
            loaded, group = torch.load(file, map_location="cpu", weights_only=True, mmap=True), dict
        except RuntimeError:  # torch's format from before 1.6 cannot be mapped
            say(f"{file}: is in torch's old format, so all of it is read into memory")
            loaded, group = torch.load(file, map_location="cpu", weights_only=True), Unmapped
    except pickle.UnpicklingError:
        if file.with_suffix(".safetensors").is_file():
            raise UserError(f"{file.parent}: refused, because loading {file.name} would run code; delete it") from None
        raise UserError(f"{file}: refused, because loading it would run code; get the weights as .safetensors") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); download it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: holds a {type(loaded).__name__} instead of named tensors; is it the right file?")
    found = group(
        (name, tensor) for name, tensor in loaded.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    )
    for name, tensor in found.items():
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise UserError(
                f"{file}: {name} is not a plain tensor of numbers, but sparse, quantized or empty; get other weights"
            )
    return found


def refuse_adapter(folder: Path) -> None:
    """Raises UserError if the folder of a base model is that of an adapter."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is an adapter, not a base model; give it as --lora_model, or as --lora_weights")


def tell_adapter(folder: Path) -> None:
    """Print if a base model's folder also holds an adapter; only the model's own weights are used."""
    if (folder / "adapter_config.json").is_file():
        say(f"{folder}: also holds an adapter (adapter_config.json), which is not used; give it as one, in a folder of its own")


def base_folder(base_model: str) -> Path:
    """The folder of a base model given as a path or as a name on a hub (fetched once, then cached).

    Raises UserError if there is neither.
    """
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path
    if base_model.startswith(hubs.PREFIX):
        return hubs.from_modelscope(base_model)
    if path.exists() or base_model.startswith(("/", ".", "~")) or base_model.count("/") > 1:
        raise UserError(f"{base_model}: no such folder; check the path of the model")
    return hubs.from_huggingface(base_model)
