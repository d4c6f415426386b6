"""A model folder's tensors, whatever files they lie in: memory-mapped, one at a time, never unpickled with code."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils.console import UserError
from utils.files import read_json

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


class Weights:
    """The tensors of a folder in Hugging Face's layout: `names`, and by name `shape`, `dtype` and `tensor`.

    Reads `model.safetensors` or `pytorch_model.bin`, whole or in shards. A tensor is read from the disk when it
    is asked for. Raises UserError where a file is missing, cut off, or asks for code to be run.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = weight_files(self.folder)
        self._homes: dict[str, object] = {}
        for file in self.files:
            opened = open_safetensors(file) if file.suffix == ".safetensors" else load_pickled(file)
            self._homes.update(dict.fromkeys(opened.keys(), opened))
        self.names = sorted(self._homes)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in the type it is stored in."""
        home = self._homes[name]
        return home[name] if isinstance(home, dict) else home.get_tensor(name)  # type: ignore[attr-defined]

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape, without reading it."""
        home = self._homes[name]
        return tuple(home[name].shape if isinstance(home, dict) else home.get_slice(name).get_shape())  # type: ignore[attr-defined]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, in order. Raises UserError where there are none, or a shard is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    for name in (SAFETENSORS, PICKLED):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            files = [folder / Path(file).name for file in sorted(set(read_json(index)["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(
                    f"{folder}: {len(missing)} of {len(files)} shards are missing ({missing[0]}, …); copy them again"
                )
            return files
    raise UserError(f"{folder}: holds neither {SAFETENSORS} nor {PICKLED}, whole or in shards; is it a model folder?")


def open_safetensors(file: Path):
    """A memory-mapped safetensors file. Raises UserError where it is cut off or of another format."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from None


def load_pickled(file: Path) -> dict[str, torch.Tensor]:
    """A file of torch.save, memory-mapped where its format allows, without running any code in it.

    Raises UserError where the file is cut off, or holds anything but tensors.
    """
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old, unzipped format cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: refused, it asks for code to be run on loading; get the weights as .safetensors") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); copy it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: holds a {type(loaded).__name__} instead of named tensors; is it the right file?")
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def base_folder(base_model: str) -> Path:
    """The folder of a base model given as a path or as a name on the Hugging Face hub (fetched once, then cached).

    Raises UserError where there is neither.
    """
    path = Path(base_model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or base_model.startswith(("/", ".", "~")) or base_model.count("/") > 1:
        raise UserError(f"{base_model}: no such folder; check the path of the model")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base_model, ignore_patterns=["*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*"]))
    except (OSError, ValueError):  # what the hub's client raises for: no network, offline, no such name
        raise UserError(f"{base_model}: neither a folder nor a model that the hub gives now; check the name") from None
