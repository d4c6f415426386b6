"""Where a folder comes from: `lineage.json`, and the chain it describes.

python -m utils.lineage output/rerun-2-alpaca-13b-3
"""

import dataclasses
import importlib.metadata
import math
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from utils.cli import option, run
from utils.console import UserError
from utils.files import digest, read_json, sha256, write_json
from utils.options_file import write_options

FILE = "lineage.json"
FORMAT = 1  # of the file; older versions wrote no number, but the same form
ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
SAMPLED_TENSORS, SAMPLED_VALUES = 8, 4
TOLERANCE = 0.0045  # for values rounded to bfloat16 (2^-8) in one and float16 (2^-11) in the other
MOST_TENSORS = 512  # whose values are compared exactly
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def fingerprint(base_model: str) -> dict[str, Any]:
    """What distinguishes one base model from another, in milliseconds whatever its size.

    The architecture, the tokenizer's hash, the number of tensors with their names and shapes (hashed), a few values of a
    few tensors, and, hashed, a few of nearly all and the types. It does not depend on the shards, and another dtype changes
    it within `TOLERANCE`; in the same dtype values are compared exactly.
    """
    from utils.models.meta_layout import open_model
    from utils.models.weights import base_folder

    folder = base_folder(base_model)
    config, weights = open_model(folder)
    tied = config.get("tie_word_embeddings", False)
    names = [n for n in weights.names if not n.endswith("inv_freq") and not (tied and n == "lm_head.weight")]
    step = max(1, len(names) // SAMPLED_TENSORS)
    samples = {name: [round(value, 6) for value in sample(weights, name)] for name in names[::step][:SAMPLED_TENSORS]}
    many = names[:: max(1, math.ceil(len(names) / MOST_TENSORS))]
    tokenizers = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {
        "architecture": {key: config[key] for key in ARCHITECTURE if key in config},
        "tokenizer": sha256(tokenizers[0]) if tokenizers else None,
        "shapes": digest([[name, *weights.shape(name)] for name in names]),
        "samples": samples,
        "types": digest([[name, str(weights.dtype(name))] for name in names]),
        "values": digest([[name, *sample(weights, name)] for name in many]),
    }


def sample(weights: Any, name: str) -> list[float]:
    """`SAMPLED_VALUES` values from all over a tensor; zeros for an empty one, which no model has."""
    size, width = math.prod(weights.shape(name)), max(1, math.prod(weights.shape(name)[1:]))
    if not size:
        return [0.0] * SAMPLED_VALUES
    places = [divmod(int(i * (size - 1) / SAMPLED_VALUES), width) for i in range(1, SAMPLED_VALUES + 1)]
    return [weights.rows(name, slice(row, row + 1)).flatten()[column].item() for row, column in places]


def identity(base: dict[str, Any]) -> str:
    """The hash by which a checkpoint knows its base: of the entries that fingerprints had from the first version on."""
    known = {key: base["fingerprint"][key] for key in ("architecture", "tokenizer", "shapes", "samples")}
    return digest(base | {"fingerprint": known})


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The differences between two fingerprints, in words; empty if they are of the same model."""
    found = []
    for key in one["architecture"].keys() | other["architecture"].keys():
        a, b = one["architecture"].get(key), other["architecture"].get(key)
        if a != b:
            found.append(f"{key} {a} against {b}")
    if one["tokenizer"] and other["tokenizer"] and one["tokenizer"] != other["tokenizer"]:
        found.append("another tokenizer")
    if one["shapes"] != other["shapes"]:
        found.append("other tensor names or shapes")
    for name in one["samples"].keys() & other["samples"].keys():
        pairs = list(zip(one["samples"][name], other["samples"][name], strict=True))
        if any(abs(a - b) > TOLERANCE * max(abs(a), abs(b), 1e-3) for a, b in pairs):
            found.append(f"other values in {name}")
    if not found and one.get("types", 0) == other.get("types") and one.get("values") != other.get("values"):
        found.append("other values in some tensors")
    return sorted(found)


def check_same_base(lineage: dict[str, Any] | None, base: dict[str, Any], adapter: str, base_model: str) -> None:
    """Raises UserError if the adapter's lineage names a base with another fingerprint than `base`."""
    if lineage and lineage.get("base"):
        found = differences(lineage["base"]["fingerprint"], base)
        if found:
            raise UserError(
                f"{adapter}: was trained on another base ({lineage['base']['name']}) than {base_model}: "
                f"{'; '.join(found[:4])}; give that base as --base_model"
            )


def describe(kind: str, options: Any, began: float, **facts: Any) -> dict[str, Any]:
    """The lineage of one step: what was run (`kind`, command, all options) and its `facts`.

    Facts are `base` ({"name", "fingerprint"}), `parent` ({"name", "sha256", "lineage"}), `data`, `results` and whatever
    else the kind of step records. `began` is a time of time.time(); only `time` differs between two runs of the same
    command, and holds the seconds since then.
    """
    return {
        "kind": kind,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": dataclasses.asdict(options),
        "format": FORMAT,
        "toolkit": toolkit(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **facts,
        "time": {"began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)), "seconds": round(time.time() - began, 1)},
    }


def toolkit() -> dict[str, str | None]:
    """The version of this toolkit, and the commit if it is a clone."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    return {"version": version, "commit": commit() if (ROOT / ".git").exists() else None}


def commit() -> str | None:
    """The commit of these files, with "-dirty" if some have changed since; None if git cannot tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write(folder: str | Path, lineage: dict[str, Any]) -> None:
    """Write `lineage.json` into `folder`, and the options it was made with as `run.yaml`, for `--config`."""
    write_options(lineage["options"], Path(folder) / "run.yaml")
    write_json(Path(folder) / FILE, lineage)


def read(folder: str | Path) -> dict[str, Any] | None:
    """The lineage of a folder, or None if it has none, like published models.

    Raises UserError if the file is there but is not a lineage, or is of a format that only a newer version reads.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    lineage = read_json(path)
    steps = [lineage]
    for step in steps:
        if not is_step(step):
            raise UserError(f"{path}: not a lineage file; delete it, or download it again")
        if step.get("format", FORMAT) != FORMAT:
            raise UserError(f"{path}: has format {step['format']}, this version reads {FORMAT}; update the toolkit")
        steps += [parent["lineage"] for parent in parents_of(step) if parent.get("lineage") is not None]
    return lineage


def parents_of(step: dict[str, Any]) -> list[dict[str, Any]]:
    """What a step started from, each with `name`, `sha256` and `lineage`: nothing, a parent, or several combined ones."""
    return [step["parent"]] if step.get("parent") else step.get("parents") or []


def template_of(lineage: dict[str, Any] | None) -> dict[str, Any] | None:
    """The template with which an adapter was trained: its `name` and `texts`; None if none is recorded."""
    data = (lineage or {}).get("data") or {}
    return None if lineage is None or data.get("stage") == "text" else data.get("template") or lineage.get("template")


def is_step(step: Any) -> bool:
    """True if the parts of a step, its base and its parent that are read elsewhere have the form that `describe` gives.

    Checked by hand: with pydantic, `python -m utils.lineage` takes 1.8 times the CPU time to start.
    """
    if not isinstance(step, dict) or not isinstance(step.get("options"), dict) or "kind" not in step:
        return False
    base, parents = step.get("base") or {}, step.get("parents") or [step.get("parent") or {}]
    results, data, spent = step.get("results") or {}, step.get("data") or {}, step.get("time") or {}
    if not isinstance(data, dict):
        return False
    template = data.get("template") or step.get("template") or {"name": "", "texts": {}}
    if not isinstance(parents, list) or not all(isinstance(p, dict) for p in (base, *parents, template, results, data, spent)):
        return False
    texts = [step["options"].get("output_dir", ""), step["options"].get("prompt_template_name", "")]
    texts += [part.get("name") for part in (base, *parents) if part] + [parent.get("sha256") for parent in parents if parent]
    numbers = [results.get("train_loss"), results.get("eval_loss"), spent.get("seconds"), *(p.get("weight") for p in parents)]
    return (
        all(isinstance(text, str) for text in texts)
        and all(number is None or isinstance(number, (int, float)) for number in numbers)
        and isinstance(template.get("name"), str)
        and isinstance(template.get("texts"), dict)
        and all(isinstance(text, str) for text in template["texts"].values())
        and isinstance(data.get("files", {}), dict)
        and (not base or is_fingerprint(base.get("fingerprint")))
    )


def is_fingerprint(value: Any) -> bool:
    """True for what `fingerprint` returns."""
    if not isinstance(value, dict) or not {"architecture", "tokenizer", "shapes", "samples"} <= value.keys():
        return False
    architecture, samples = value["architecture"], value["samples"]
    return (
        isinstance(architecture, dict)
        and isinstance(samples, dict)
        and all(
            isinstance(values, list) and len(values) == SAMPLED_VALUES and all(isinstance(v, (int, float)) for v in values)
            for values in samples.values()
        )
    )


def chain(folder: str | Path) -> list[dict[str, Any]]:
    """The lineages from the first step to that of `folder`. Raises UserError if it has none."""
    lineage = read(folder)
    if lineage is None:
        raise UserError(f"{folder}: holds no {FILE}; name an output folder of finetune.py or merge_weights.py")
    return until(lineage)


def until(step: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that led to this one, ending with it; before a combination come the chains of all its parents."""
    found: list[dict[str, Any]] = []
    for parent in parents_of(step):
        found += [earlier for earlier in until(parent["lineage"]) if earlier not in found] if parent.get("lineage") else []
    return [*found, step]


def parents_text(step: dict[str, Any]) -> str:
    """The names of a step's parents, with their weights if several were combined; without parents, its base's name."""
    parents = parents_of(step) or [step.get("base") or {"name": "—"}]
    return ", ".join(Path(p["name"]).name + (f"*{p['weight']:g}" if "weight" in p else "") for p in parents)


def table_rows(steps: list[dict[str, Any]]) -> list[list[str]]:
    """A chain as rows of cells after a header: step, data, records, tokens, losses, time, parent."""
    rows = [["step", "data", "records", "tokens", "train loss", "val loss", "minutes", "parent"]]
    for step in steps:
        results, data, spent = (step.get(part) or {} for part in ("results", "data", "time"))
        rows.append(
            [
                Path(step["options"].get("output_dir", "—")).name,
                ", ".join(Path(file).name for file in data.get("files", {})) or "—",
                str(data.get("train", "—")),
                str(data.get("tokens", "—")),
                *(f"{results[key]:.4f}" if results.get(key) is not None else "—" for key in ("train_loss", "eval_loss")),
                f"{spent['seconds'] / 60:.1f}" if spent.get("seconds") is not None else "—",
                parents_text(step),
            ]
        )
    return rows


def table(steps: list[dict[str, Any]]) -> str:
    """A chain as a Markdown table."""
    rows = table_rows(steps)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this module as a command."""

    folder: str = option(help="the output folder whose chain to print")


def main(options: Options) -> None:
    """Print the chain that ends in a folder."""
    print(table(chain(options.folder)))


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        sys.argv[1:] = ["--folder", sys.argv[1]]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(main, Options)
