"""Where a training run starts: from the base, from an earlier adapter's weights, or from one of its own checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

from utils import lineage
from utils.adapters.lora_config import as_set, given, settings_of, shown
from utils.adapters.settings import FILE
from utils.console import UserError, say
from utils.datasets.sources import is_hub_name
from utils.files import read_json, sha256
from utils.models.weights import base_folder
from utils.training import checkpoints


@dataclasses.dataclass(frozen=True)
class RunStart:
    """`parent`: the adapter whose weights the run begins with; `checkpoint`: the checkpoint of this run that it resumes."""

    parent: Path | None
    checkpoint: Path | None


def decide(output_dir: str, resume_from_checkpoint: str | None, overwrite: bool) -> RunStart:
    """Choose the start, and print which it is.

    A complete checkpoint in `output_dir` wins even if `resume_from_checkpoint` names a parent adapter: that is what the
    same command finds after a kill. Any other folder named there is the parent; "auto" means none.
    Raises UserError if the run is already finished, or the named folder holds no adapter.
    """
    from utils.adapters.adapters import open_tensors

    folder = Path(output_dir)
    named = None if resume_from_checkpoint in (None, "", "None", "False", "auto") else Path(resume_from_checkpoint or "")
    if named is not None and is_hub_name(str(named)):
        named = base_folder(str(named))
    own = named is not None and named.resolve().parent == folder.resolve() and checkpoints.step_of(named) >= 0
    parent = None if own else named
    if parent is not None:
        open_tensors(parent)  # refuses a broken one before the base is loaded
        if parent.resolve() == folder.resolve():
            raise UserError(f"--resume_from_checkpoint {parent}: is the output folder itself; choose another --output_dir")
    if overwrite:
        return announce(RunStart(parent, None))
    if (folder / lineage.FILE).is_file():
        raise UserError(f"{folder}: holds a finished run; choose another --output_dir, or give --overwrite_output_dir")
    if own and named is not None:
        if not checkpoints.is_whole(named):
            raise UserError(
                f"{named}: is not a complete checkpoint of this run; give --resume_from_checkpoint auto for the newest one"
            )
        return announce(RunStart(None, named))
    return announce(RunStart(parent, checkpoints.newest_whole(folder)))


def announce(start: RunStart) -> RunStart:
    """Print what the run starts from."""
    if start.checkpoint:
        say(f"resuming this run from {start.checkpoint}, with its optimizer, schedule, random state and place in the data")
    elif start.parent:
        say(f"incremental training: weights from {start.parent}; optimizer and schedule start fresh")
    else:
        say("warm start: a fresh adapter on the base model")
    return start


def clear(output_dir: str) -> None:
    """Remove what an earlier run left in the output folder, as --overwrite_output_dir asks."""
    folder = Path(output_dir)
    (folder / lineage.FILE).unlink(missing_ok=True)  # first, so that the rest is not taken for a finished run
    for old in checkpoints.in_order(folder):
        checkpoints.remove(old)


def base_and_parent(start: RunStart, base_model: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the lineage records of the base (name, fingerprint) and of the parent adapter (name, hash, its own lineage).

    A run that resumes from its checkpoint without naming its parent again keeps the one that it began with.
    Raises UserError if the parent was trained on another base.
    """
    from utils.adapters.adapters import find_weights

    base: dict[str, Any] = {"name": base_model, "fingerprint": lineage.fingerprint(base_model)}
    if start.parent is None:
        return base, read_json(start.checkpoint / checkpoints.MANIFEST)["run"]["parent"] if start.checkpoint else None
    own = lineage.read(start.parent)
    if own is None:
        say(f"{start.parent}: has no {lineage.FILE}, as is usual for published adapters; it is assumed to fit this base")
    lineage.check_same_base(own, base["fingerprint"], str(start.parent), base_model)
    return base, {"name": str(start.parent), "sha256": sha256(find_weights(start.parent)), "lineage": own}


def tell_other_dtype(parent: dict[str, Any] | None, dtype: str) -> None:
    """Print if the parent was trained in another dtype, which is fine: an adapter's own weights are always float32."""
    before = ((parent or {}).get("lineage") or {}).get("dtype")
    if before and before != dtype:
        say(f"the parent adapter was trained in {before}, this run computes in {dtype}")


def check_parent(start: RunStart, wanted: dict[str, Any], base_model: str) -> None:
    """Raises UserError if a wanted setting contradicts that of the adapter to train on, naming both, or is not for the base."""
    from utils.adapters import fit

    parent = start.checkpoint or start.parent
    if parent is None:
        return
    if (parent / FILE).is_file():
        fit.check(fit.Adapter(parent), base_folder(base_model))
    inherited = settings_of(parent, wanted)
    differences = [
        f"--{name} is {shown(value)}, the adapter's is {shown(inherited[name])}"
        for name, value in given(wanted).items()
        if as_set(value) != as_set(inherited[name]) and not (start.checkpoint and value == "all-linear")
    ]
    if differences:
        raise UserError(f"{parent}: {'; '.join(differences)}; leave these options out to take the adapter's")


def dtype_of(checkpoint: Path) -> str:
    """The dtype that a checkpoint's run computes in; of one from before it was recorded, which is not resumed, float32."""
    return read_json(checkpoint / checkpoints.MANIFEST)["run"]["options"].get("dtype") or "float32"


def check_unchanged(start: RunStart, run: dict[str, Any]) -> None:
    """Raises UserError, listing the differences, if the checkpoint to resume belongs to a run with other options or data."""
    if start.checkpoint is None:
        return
    before = read_json(start.checkpoint / checkpoints.MANIFEST)["run"]
    one, other = comparable(before), comparable(run)
    changed = [
        f"{key} was {one.get(key)!r}, is {other.get(key)!r}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]
    if changed:
        raise UserError(
            f"{start.checkpoint}: belongs to an unfinished run with other options or data ({'; '.join(changed)}); "
            "give the old ones to resume it, or --overwrite_output_dir to start over"
        )


def comparable(run: dict[str, Any]) -> dict[str, Any]:
    """A run's options, hashes of its data and its parent, and the fingerprint of its base, as one flat dict."""
    parent = (run["parent"] or {}).get("sha256")
    data = {f"data file {name}": hash for name, hash in run["data"].items()}
    return run["options"] | data | {"parent adapter": parent, "base model": run["base"]}
