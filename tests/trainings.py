"""Short trainings on tiny models: their bases, their records, their options, and what they leave."""

import json
import random

import pytest
import tiny
import torch
from safetensors.torch import load_file

FAMILIES = {"llama": tiny.llama, "bloom": tiny.bloom, "qwen2": tiny.qwen2, "mistral": tiny.mistral}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny model of each family."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: build(folder / name) for name, build in FAMILIES.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty records of different lengths."""
    numbers = random.Random(0)
    records = [
        {"instruction": f"第{i}题：" + "问" * numbers.randint(1, 30), "input": "", "output": "答" * numbers.randint(1, 20)}
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return path


def options(base, data, output, **changes) -> list[str]:
    """A short run: five steps an epoch."""
    settings = {
        "base_model": base, "data_path": data, "output_dir": output, "batch_size": 8, "micro_batch_size": 2, "num_epochs": 2,
        "val_set_size": 0, "cutoff_len": 128, "learning_rate": 1e-2, "prompt_template_name": "alpaca_short",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in (settings | changes).items()]


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    """Bitwise the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text("utf-8").splitlines()]


def entries(folder, key):
    """What a run has logged as `key`, by step."""
    return {line["step"]: line[key] for line in history(folder) if key in line}


def losses(folder) -> list[float]:
    return [line["loss"] for line in history(folder) if "loss" in line]
