"""Where a training run starts: from the base, from an earlier adapter's weights, or from a checkpoint of its own."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import checkpoints, lineage
from utils.console import UserError, say
from utils.files import read_json, sha256
from utils.sources import is_hub_name
from utils.weights import base_folder

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

DEFAULT_TARGETS = ("q_proj", "v_proj")
ATTENTION = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "att_proj")  # fused projections: BLOOM, Phi-3, GPT-2, MPT, …
DEFAULT_R, DEFAULT_ALPHA = 8, 16


@dataclasses.dataclass(frozen=True)
class Start:
    """`parent`: the adapter whose weights the run begins with; `checkpoint`: the one of this run that it goes on from."""

    parent: Path | None
    checkpoint: Path | None


def decide(output_dir: str, resume_from_checkpoint: str | None, overwrite: bool) -> Start:
    """Choose the start, and say which it is.

    A whole checkpoint in `output_dir` wins, also when `resume_from_checkpoint` names a parent adapter, since that is
    what the same command finds after a kill. Another folder is a parent; "auto" means none.
    Raises UserError where the run is finished already, or the named folder holds no adapter.
    """
    from utils.adapters import open_tensors

    folder = Path(output_dir)
    named = None if resume_from_checkpoint in (None, "", "None", "False", "auto") else Path(resume_from_checkpoint or "")
    if named is not None and is_hub_name(str(named)):
        named = base_folder(str(named))
    own = named is not None and named.resolve().parent == folder.resolve() and checkpoints.step_of(named) >= 0
    parent = None if own else named
    if parent is not None:
        open_tensors(parent)  # so that a broken one is refused before the base is loaded
        if parent.resolve() == folder.resolve():
            raise UserError(f"--resume_from_checkpoint {parent}: is the output folder itself; choose another --output_dir")
    if overwrite:
        return said(Start(parent, None))
    if (folder / lineage.FILE).is_file():
        raise UserError(f"{folder}: holds a finished run; choose another --output_dir, or give --overwrite_output_dir")
    if own and named is not None:
        if not checkpoints.is_whole(named):
            raise UserError(
                f"{named}: is no whole checkpoint of this run; give --resume_from_checkpoint auto for the newest one"
            )
        return said(Start(None, named))
    return said(Start(parent, checkpoints.newest_whole(folder)))


def said(start: Start) -> Start:
    """Print what the run starts from."""
    if start.checkpoint:
        say(f"going on with this run from {start.checkpoint}, with its optimizer, schedule, random state and place in the data")
    elif start.parent:
        say(f"incremental training: weights from {start.parent}; optimizer and schedule start anew")
    else:
        say("warm start: a fresh adapter on the base model")
    return start


def clear(output_dir: str) -> None:
    """Remove what an earlier run left in the output folder, as --overwrite_output_dir asks."""
    folder = Path(output_dir)
    (folder / lineage.FILE).unlink(missing_ok=True)  # first, so that the rest is not taken for a finished run
    for old in checkpoints.in_order(folder):
        checkpoints.remove(old)


def base_and_parent(start: Start, base_model: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the lineage keeps of the base (name, fingerprint) and of the parent adapter (name, hash, its own lineage).

    A run that goes on from its checkpoint without naming its parent again has the one that it began with.
    Raises UserError where the parent was trained on another base.
    """
    from utils.adapters import find_weights

    base: dict[str, Any] = {"name": base_model, "fingerprint": lineage.fingerprint(base_model)}
    if start.parent is None:
        return base, read_json(start.checkpoint / checkpoints.MANIFEST)["run"]["parent"] if start.checkpoint else None
    own = lineage.read(start.parent)
    if own is None:
        say(f"{start.parent}: has no {lineage.FILE}, as published adapters have none; that it fits this base is taken on trust")
    lineage.check_base(own, base["fingerprint"], str(start.parent), base_model)
    return base, {"name": str(start.parent), "sha256": sha256(find_weights(start.parent)), "lineage": own}


def check_parent(start: Start, wanted: dict[str, Any]) -> None:
    """Raise UserError where a wanted setting of the adapter contradicts that of the one to train on; both are named."""
    parent = start.checkpoint or start.parent
    if parent is None:
        return
    inherited = settings_of(parent, wanted)
    differences = [
        f"--{name} is {shown(value)}, the adapter's is {shown(inherited[name])}"
        for name, value in given(wanted).items()
        if as_set(value) != as_set(inherited[name])
    ]
    if differences:
        raise UserError(f"{parent}: {'; '.join(differences)}; leave these options out to take the adapter's")


def lora_config(model: "nn.Module", wanted: dict[str, Any], parent: Path | None) -> "LoraConfig":
    """The settings of the adapter to train: those `wanted` (None: not given), the rest the parent's, or the defaults."""
    from peft import LoraConfig

    from utils.adapters import read_config

    if parent is None:
        targets = wanted["lora_target_modules"] or default_targets(model)
        settings = {"lora_r": DEFAULT_R, "lora_alpha": DEFAULT_ALPHA} | given(wanted) | {"lora_target_modules": targets}
    else:
        settings = settings_of(parent, wanted)
        taken = [f"--{name} {shown(value)}" for name, value in settings.items() if name not in given(wanted) and value]
        if taken:
            say(f"taken from {parent}: {', '.join(taken)}")
        if (parent / "adapter_config.json").is_file():
            config = read_config(parent)
            config.lora_dropout, config.inference_mode = wanted["lora_dropout"], False
            return config
        told = f"rank {settings['lora_r']} on {', '.join(settings['lora_target_modules'])}; alpha {settings['lora_alpha']}"
        say(f"{parent}: has no adapter_config.json; its weights show {told} is assumed")
    return LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["lora_target_modules"],
        lora_dropout=wanted["lora_dropout"],
        use_rslora=settings.get("use_rslora", False),
        use_dora=settings.get("use_dora", False),
        modules_to_save=settings.get("modules_to_save") or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def given(wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted settings that were given and that a parent has, too: all but dropout, which is each run's own."""
    return {name: value for name, value in wanted.items() if name != "lora_dropout" and value not in (None, [])}


def settings_of(parent: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """A parent's settings under the options' names; those of a checkpoint of alpaca-lora, which has weights alone, as
    these show them."""
    from utils.adapters import read_settings, read_tensors

    if (parent / "adapter_config.json").is_file():
        settings = read_settings(parent)
        return {
            "lora_r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "lora_target_modules": settings.get("target_modules"),
            "use_rslora": settings.get("use_rslora", False),
            "use_dora": settings.get("use_dora", False),
            "modules_to_save": settings.get("modules_to_save") or [],
        }
    loras = {name: tensor for name, tensor in read_tensors(parent).items() if name.endswith("lora_A.weight")}
    targets = sorted({name.split(".")[-3] for name in loras})
    rank = next(iter(loras.values())).shape[0]
    alpha = wanted["lora_alpha"] or DEFAULT_ALPHA
    variants = {"use_rslora": False, "use_dora": False, "modules_to_save": []}
    return {"lora_r": rank, "lora_alpha": alpha, "lora_target_modules": targets} | variants


def default_targets(model: "nn.Module") -> list[str]:
    """q_proj and v_proj, or the fused attention projection of a family that has no such layers, which is said.

    Raises UserError where the model has neither.
    """
    from utils.adapters import linear_layers

    layers = linear_layers(model)
    if set(DEFAULT_TARGETS) <= set(layers):
        return list(DEFAULT_TARGETS)
    for name in ATTENTION:
        if name in layers:
            say(f"this model has no q_proj and v_proj: the adapter goes on {name}")
            return [name]
    raise UserError(
        f"--lora_target_modules: not given, and the model has no q_proj and v_proj; choose from {', '.join(layers)}"
    )


def as_set(value: Any) -> Any:
    """Lists and sets of names compared without their order."""
    return set(value) if isinstance(value, (list, set, tuple)) else value


def shown(value: Any) -> str:
    """A setting as one writes it on the command line."""
    return f"[{','.join(sorted(value))}]" if isinstance(value, (list, set, tuple)) else str(value)


def check_unchanged(start: Start, run: dict[str, Any]) -> None:
    """Raises UserError where the checkpoint to go on from belongs to a run of other options or data; lists them."""
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
            "give the old ones to go on with it, or --overwrite_output_dir to start anew"
        )


def comparable(run: dict[str, Any]) -> dict[str, Any]:
    """A run's options, its data and its parent by their hashes, and its base by its fingerprint, as flat entries."""
    parent = (run["parent"] or {}).get("sha256")
    data = {f"data file {name}": hash for name, hash in run["data"].items()}
    return run["options"] | data | {"parent adapter": parent, "base model": run["base"]}
