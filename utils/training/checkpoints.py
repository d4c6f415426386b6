"""Checkpoints of a run: known to be complete, tied to the run's options and data, found again after a kill."""

import shutil
from pathlib import Path
from typing import Any

from utils.console import UserError, say
from utils.files import read_json, sha256, sync, write_json

MANIFEST = "checkpoint.json"  # written last: a folder without it is incomplete


def step_of(folder: Path) -> int:
    """The optimizer step after which a checkpoint was written; -1 for another folder."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if folder.name.startswith("checkpoint-") and number.isdigit() else -1


def in_order(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, complete or not, oldest step first."""
    return sorted((p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and step_of(p) >= 0), key=step_of)


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Write the manifest of a finished checkpoint: the run it belongs to, and the hash of each file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    for file in files:
        sync(file)
    hashes = {str(file.relative_to(folder)): sha256(file) for file in files}
    write_json(folder / MANIFEST, {"run": run, "files": hashes})


def is_whole(folder: Path) -> bool:
    """True if a checkpoint has its manifest and each of its files is unchanged since it was written."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) and isinstance(manifest.get("run"), dict) else None
    return isinstance(files, dict) and all(
        (folder / name).is_file() and sha256(folder / name) == hash for name, hash in files.items()
    )


def newest_whole(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step; prints which incomplete ones it skips."""
    for folder in reversed(in_order(output_dir)):
        if is_whole(folder):
            return folder
        say(f"{folder}: incomplete (interrupted while being written, or changed since); skipped")
    return None


def is_resumed(kept: Path) -> bool:
    """True if a run resumes, for which it needs the file `kept` that it wrote into its output folder at its start.

    Raises UserError if that file is missing.
    """
    if newest_whole(kept.parent) is None:
        return False
    if not kept.is_file():
        raise UserError(f"{kept}: is missing, and the run cannot be resumed; start over with --overwrite_output_dir")
    return True


def rotate(output_dir: str | Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and that of the best step."""
    for folder in in_order(output_dir)[:-keep]:
        if step_of(folder) != best_step:
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint; if it is a symbolic link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted one is not taken for complete
        shutil.rmtree(folder)
