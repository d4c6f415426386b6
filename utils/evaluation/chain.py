"""The folders of a chain of adapters, from the first step to the last, found by lineage.json."""

from pathlib import Path
from typing import Any

from utils import lineage
from utils.console import UserError, say
from utils.files import sha256


def chain_folders(last: str | Path) -> dict[str, Path]:
    """The folders of the chain that ends in `last`, oldest first, each by its step's name.

    A parent folder that is found neither at the recorded path nor beside its child is left out, which is printed; so is
    a notice if a parent's weights are no longer those that the child started from.
    Raises UserError if `last` has no lineage.
    """
    found = [(Path(last), lineage.read(last))]
    if found[0][1] is None:
        raise UserError(f"{last}: holds no {lineage.FILE}; name the output folder of a step that finetune.py made")
    while parent := (found[0][1] or {}).get("parent"):
        folder = locate(parent["name"], found[0][0])
        found.insert(0, (folder, parent.get("lineage")))
        check_weights(folder, parent["sha256"], found[1][0])
    folders: dict[str, Path] = {}
    for folder, known in found:
        if folder.is_dir():
            folders[name_of(folder, known, folders)] = folder
        else:
            say(f"{folder}: a step of the chain, but missing; left out")
    return folders


def locate(name: str, child: Path) -> Path:
    """A parent's folder: at the path recorded when the child was trained, else under the same name beside the child."""
    recorded, beside = Path(name), child.parent / Path(name).name
    return beside if beside.is_dir() and not recorded.is_dir() else recorded


def check_weights(folder: Path, known: str, child: Path) -> None:
    """Print a notice if the weights in `folder` have changed since the child started from them."""
    from utils.adapters.adapters import find_weights

    if folder.is_dir() and sha256(find_weights(folder)) != known:
        say(f"{folder}: its weights are not those that {child} was trained from; they have been replaced since")


def name_of(folder: Path, known: dict[str, Any] | None, taken: dict[str, Path]) -> str:
    """A step's name: its original output folder's, or its folder's with the parent if that is taken."""
    name = Path((known or {}).get("options", {}).get("output_dir") or folder).name
    return name if name not in taken else f"{folder.absolute().parent.name}/{folder.name}"
