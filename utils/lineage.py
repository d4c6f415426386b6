"""Where a folder comes from: `lineage.json`, and the chain it tells.

python -m utils.lineage output/rerun-2-alpaca-13b-3
"""

import dataclasses
import importlib.metadata
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from utils.cli import option, run
from utils.console import UserError
from utils.files import digest, read_json, sha256, write_json

FILE = "lineage.json"
ARCHITECTURE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
SAMPLED_TENSORS, SAMPLED_VALUES, TOLERANCE = 8, 4, 0.02
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def fingerprint(base_model: str) -> dict[str, Any]:
    """What tells one base model from another, in milliseconds whatever its size.

    The architecture, the tokenizer's hash, the number of tensors with their names and shapes (hashed), and a few
    values of a few tensors. Another dtype or other shards leave it the same within `TOLERANCE`.
    """
    from utils.layouts import open_model
    from utils.weights import base_folder

    folder = base_folder(base_model)
    config, weights = open_model(folder)
    tied = config.get("tie_word_embeddings", False)
    names = [n for n in weights.names if not n.endswith("inv_freq") and not (tied and n == "lm_head.weight")]
    step = max(1, len(names) // SAMPLED_TENSORS)
    samples = {}
    for name in names[::step][:SAMPLED_TENSORS]:
        size = math.prod(weights.shape(name))
        width = size // max(1, weights.shape(name)[0])
        places = [divmod(int(i * (size - 1) / SAMPLED_VALUES), width) for i in range(1, SAMPLED_VALUES + 1)]
        samples[name] = [round(weights.rows(name, slice(r, r + 1)).flatten()[c].item(), 6) for r, c in places]
    tokenizers = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {
        "architecture": {key: config[key] for key in ARCHITECTURE if key in config},
        "tokenizer": sha256(tokenizers[0]) if tokenizers else None,
        "shapes": digest([[name, *weights.shape(name)] for name in names]),
        "samples": samples,
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty where they are of the same model."""
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
    return sorted(found)


def check_base(lineage: dict[str, Any] | None, base: dict[str, Any], adapter: str, base_model: str) -> None:
    """Raises UserError where the adapter's lineage names a base with another fingerprint than `base`."""
    if lineage and lineage.get("base"):
        found = differences(lineage["base"]["fingerprint"], base)
        if found:
            raise UserError(
                f"{adapter}: was trained on another base ({lineage['base']['name']}) than {base_model}: "
                f"{'; '.join(found[:4])}; give that base as --base_model"
            )


def describe(kind: str, options: Any, began: float, **facts: Any) -> dict[str, Any]:
    """The lineage of one step: what was run (`kind`, the command, all options) and its `facts`.

    Facts are `base` ({"name", "fingerprint"}), `parent` ({"name", "sha256", "lineage"}), `data`, `results` and
    whatever else the kind of step knows. `began` is a time of time.time(); only `time` differs between two runs of
    the same command, and holds the seconds since then.
    """
    return {
        "kind": kind,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "options": dataclasses.asdict(options),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **facts,
        "time": {"began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)), "seconds": round(time.time() - began, 1)},
    }


def write(folder: str | Path, lineage: dict[str, Any]) -> None:
    """Write `lineage.json` into `folder`."""
    write_json(Path(folder) / FILE, lineage)


def read(folder: str | Path) -> dict[str, Any] | None:
    """The lineage of a folder, or None where it has none, as published models have.

    Raises UserError where the file is there but is no lineage.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    lineage = read_json(path)
    step = lineage
    while step is not None:
        if not is_step(step):
            raise UserError(f"{path}: not a lineage file; delete it, or copy it again")
        step = (step.get("parent") or {}).get("lineage")
    return lineage


def is_step(step: Any) -> bool:
    """True where what others read of a step, and of its base and parent, has the form that `describe` gives it."""
    if not isinstance(step, dict) or not isinstance(step.get("options"), dict) or "kind" not in step:
        return False
    base, parent = step.get("base") or {}, step.get("parent") or {}
    template, results = step.get("template") or {"texts": {}}, step.get("results") or {}
    data, spent = step.get("data") or {}, step.get("time") or {}
    if not all(isinstance(part, dict) for part in (base, parent, template, results, data, spent)):
        return False
    texts = [step["options"].get("output_dir", ""), step["options"].get("prompt_template_name", "")]
    texts += [part.get("name") for part in (base, parent) if part] + ([parent.get("sha256")] if parent else [])
    numbers = [results.get("train_loss"), results.get("eval_loss"), spent.get("seconds")]
    return (
        all(isinstance(text, str) for text in texts)
        and all(number is None or isinstance(number, (int, float)) for number in numbers)
        and isinstance(template.get("texts"), dict)
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
    """The lineages from the first step to that of `folder`. Raises UserError where it has none."""
    lineage = read(folder)
    if lineage is None:
        raise UserError(f"{folder}: holds no {FILE}; name an output folder of finetune.py or merge_weights.py")
    steps = [lineage]
    while parent := (steps[0].get("parent") or {}).get("lineage"):
        steps.insert(0, parent)
    return steps


def table(steps: list[dict[str, Any]]) -> str:
    """A chain as a Markdown table: step, data, records, tokens, losses, time, parent."""
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
                Path((step.get("parent") or step.get("base") or {"name": "—"})["name"]).name,
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of this room as a command."""

    folder: str = option(help="the output folder whose chain to print")


def main(options: Options) -> None:
    """Print the chain that ends in a folder."""
    print(table(chain(options.folder)))


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        sys.argv[1:] = ["--folder", sys.argv[1]]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(main, Options)
