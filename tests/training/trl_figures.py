"""Writes trl_figures.json: the losses and gradients that trl's own trainers give, of a tiny model and fixed batches.

    PYTHONPATH=.:tests python tests/training/trl_figures.py

trl must be installed beside the rest (made with trl 1.16.0, torch 2.13.0); the test that reads the file needs none.
"""

import json
import tempfile
from pathlib import Path

import tiny
import torch

from benchmarks import preferences, trl_losses

FILE = Path(__file__).with_suffix(".json")
PAIRS = [
    {"prompt": "你是谁？", "chosen": "我是梦想家，一个中文助手。", "rejected": "不知道。"},
    {"prompt": "春眠不觉晓，", "chosen": "处处闻啼鸟。", "rejected": "夜来风雨声，花落知多少。"},
    {"prompt": "print(", "chosen": "1, 2))", "rejected": "add"},
    {"prompt": "The quick brown fox", "chosen": " jumps over the lazy dog.", "rejected": " sleeps."},
]


def options_for(base: Path) -> preferences.Options:
    """The benchmark's options for one batch of all pairs."""
    return preferences.Options(base_model=str(base), batch_size=4, micro_batch_size=4, cutoff_len=64)


def summary(gradients: list[torch.Tensor]) -> list[list[float]]:
    """Of each gradient its norm, and its product with a fixed wave, which tells where its values stand."""
    waves = [torch.arange(gradient.numel(), dtype=torch.float64).cos() for gradient in gradients]
    both = zip(gradients, waves, strict=True)
    return [[gradient.norm().item(), (gradient.double().flatten() @ wave).item()] for gradient, wave in both]


def main() -> None:
    """Compute and write them."""
    import trl

    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = tiny.llama(Path(folder) / "base")
        options = options_for(base)
        for name in trl_losses.LOSSES:
            model = trl_losses.lora_model(options, trained=True)
            loss, _, inputs = trl_losses.trl_loss(name, options, model, PAIRS, str(Path(folder) / name))
            gradients = summary(trl_losses.gradients_of(model, loss))
            kept = {key: [[round(x, 6) for x in row] if isinstance(row, list) else row for row in value.tolist()]
                    for key, value in inputs.items()}  # fmt: skip
            found[name] = {"loss": loss.item(), "gradients": gradients, "inputs": kept}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
    FILE.write_text("{\n" + ",\n".join([f'"trl": "{trl.__version__}"', *lines]) + "\n}\n")


if __name__ == "__main__":
    main()
