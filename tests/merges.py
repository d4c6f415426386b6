"""Merges of tiny models, and the same by peft, for the tests of merging."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import merge_weights
from utils.adapters.settings import read_config
from utils.cli import parse

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def merge(base, adapters, output, *options) -> Path:
    """Run merge_weights.py in this process."""
    adapters = adapters if isinstance(adapters, list) else [adapters]
    arguments = ["--base_model", base, "--output_dir", output, *options]
    if adapters:
        arguments += ["--lora_model", ",".join(map(str, adapters))]
    merge_weights.main(parse(merge_weights.Options, list(map(str, arguments))))
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def with_peft(base: Path, *adapters: Path):
    """Base and adapters in float32, as peft computes them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        model = PeftModel.from_pretrained(model, adapter, config=read_config(adapter))
    return model.eval()


@torch.no_grad()
def same_logits(one, other, atol=2e-3) -> bool:
    ids = torch.randint(4, one.config.get_text_config().vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    first, second = one(ids).logits, other(ids).logits
    return first.shape == second.shape and torch.allclose(first, second, atol=atol, rtol=1e-3)


def loaded(folder: Path):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.fixture(name="base", scope="module")
def fixture_base(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("merging") / "base")


@pytest.fixture(name="adapter", scope="module")
def fixture_adapter(base):
    return tiny.adapter(base, base.parent / "adapter", target_modules=LINEAR)


def rewrite(base: Path, folder: Path, layout: str, dtype: torch.dtype) -> Path:
    """The model of `base` in another layout and type."""
    folder.mkdir()
    for file in base.glob("*.json"):
        shutil.copy(file, folder)
    found = {name: tensor.to(dtype) for name, tensor in tensors(base).items()}
    names = sorted(found)
    parts = [names] if "sharded" not in layout else [names[::3], names[1::3], names[2::3]]
    stem, save = ("model", save_file) if "safetensors" in layout else ("pytorch_model", torch.save)
    ending = "safetensors" if "safetensors" in layout else "bin"
    files = [f"{stem}.{ending}"] if len(parts) == 1 else [f"{stem}-{i:05}-of-00003.{ending}" for i in (1, 2, 3)]
    for file, part in zip(files, parts, strict=True):
        options = {"_use_new_zipfile_serialization": False} if "old" in layout else {}
        save({name: found[name] for name in part}, folder / file, **options)
    if len(parts) > 1:
        homes = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": homes}))
    return folder
