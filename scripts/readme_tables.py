"""Update the generated tables in docs/: the options of each script, and the memory needed for training.

    python scripts/readme_tables.py

A table is delimited by `<!-- options of finetune.py -->` (or `<!-- memory -->`) and `<!-- end -->`. options_zh.json has the
Chinese of each help text; missing ones stay English, with a warning.
"""

import functools
import importlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import describe
from utils.files import replacing

ROOT = Path(__file__).resolve().parents[1]
FILES = {"zh": ("options.md", "experiments.md"), "en": ("options_EN.md", "experiments_EN.md")}  # in docs/
HEADS = {"zh": "| 选项 | 值 | 默认 | 说明 |", "en": "| option | value | default | meaning |"}
BLOCK = re.compile(r"(<!-- (?:options of (\w+)\.py|memory) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the files in both languages."""
    for path, language in tables():
        with replacing(path) as aside:
            aside.write_text(filled(path.read_text("utf-8"), language), "utf-8")


def tables() -> list[tuple[Path, str]]:
    """The files that contain tables, with their languages."""
    return [(ROOT / "docs" / name, language) for language, names in FILES.items() for name in names]


def filled(text: str, language: str) -> str:
    """The text of a file with its tables updated."""

    def table(match: re.Match[str]) -> str:
        body = options_table(match[2], language) if match[2] else memory_table(language)
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(table, text)


def options_table(script: str, language: str) -> str:
    """The options of one script, as in its --help."""
    chinese = json.loads((ROOT / "scripts" / "options_zh.json").read_text("utf-8")) if language == "zh" else {}

    def word(text: str) -> str:
        if chinese and text and text not in chinese:
            print(f"scripts/options_zh.json: no translation of {text!r} ({script}.py)", file=sys.stderr)
        return chinese.get(text, text).replace("|", "\\|")

    rows = [HEADS[language], "|---|---|---|---|"]
    for heading, name, value, default, help in describe(importlib.import_module(script).Options):
        if heading:
            rows.append(f"| **{word(heading)}** | | | |")
        kind = f"`{value.strip('|')}`".replace("|", "\\|")
        shown = word(default) if default == "required" else f"`{default}`" if default else ""
        rows.append(f"| `{name}` | {kind} | {shown} | {word(help)} |")
    return "\n".join(rows)


def memory_table(language: str) -> str:
    """GB needed to train with the published settings, without / with gradient checkpointing."""
    first = {"zh": "模型", "en": "model"}[language]
    cells = memory_estimates()
    kinds = list(next(iter(cells.values())))
    rows = [f"| {first} | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    rows += [f"| {name} | {' | '.join(row.values())} |" for name, row in cells.items()]
    return "\n".join(rows)


@functools.cache
def memory_estimates() -> dict[str, dict[str, str]]:
    """Estimates of utils/training/memory.py for meta models of the real sizes, by model and quantization."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

    from utils.models.placement import DeviceConfig
    from utils.training.memory import estimate

    seven = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    thirteen = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    bloom = BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)
    configs = {
        "Chinese-Alpaca-7B": (LlamaConfig(vocab_size=49954, **seven), ["q_proj", "v_proj"]),
        "Chinese-Alpaca-13B": (LlamaConfig(vocab_size=49954, **thirteen), ["q_proj", "v_proj"]),
        "BLOOM-7b1": (bloom, ["query_key_value"]),
    }
    kinds = {"bfloat16": None, "8 bit": "8bit", "4 bit": "4bit"}
    cells: dict[str, dict[str, str]] = {}
    for name, (config, targets) in configs.items():
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
        cells[name] = {}
        for kind, quantize in kinds.items():
            needed = estimate(model, DeviceConfig(torch.device("cuda"), torch.bfloat16, quantize), 8, 512)
            cells[name][kind] = f"{needed.total(False) / 1e9:.0f} / {needed.total(True) / 1e9:.0f}"
    return cells


if __name__ == "__main__":
    main()
