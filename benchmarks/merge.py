"""Merging a 2.2 GB float16 model with a LoRA: ours, the usual peft recipe, and cp -r with sync, alternately.

    python -m benchmarks.merge --repeats 3

The base model has TinyLlama's dimensions, in 500 MB shards; the LoRA has rank 8 on all linear layers, and fully trained
embeddings and output layer. Compared are the tensors (equal to within one float16 rounding), the bytes of two runs, time,
and peak memory, also for a base model with twice as many layers. This needs about 12 GB of disk space in --folder.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import Figures, child, interleave, report, timed
from utils.cli import option, run

BUILD = """
import json, sys, torch, sentencepiece
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
folder, layers = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
                     num_attention_heads=32, num_key_value_heads=4)
torch.set_default_dtype(torch.float16)
model = LlamaForCausalLM(config)
torch.set_default_dtype(torch.float32)
model.save_pretrained(folder, max_shard_size="500MB")
lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM",
                                        modules_to_save=["embed_tokens", "lm_head"]))
with torch.no_grad():
    for name, parameter in lora.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.add_(torch.randn_like(parameter) * 0.01)
lora.save_pretrained(folder + "-lora")
with open(folder + "/tokenizer.model", "wb") as file:
    sentencepiece.SentencePieceTrainer.train(input="README.md", model_writer=file, vocab_size=4000, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2)
settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
"""
PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, lora, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16, low_cpu_mem_usage=True)
model = PeftModel.from_pretrained(model, lora).merge_and_unload()
model.save_pretrained(output, max_shard_size="500MB")
AutoTokenizer.from_pretrained(base).save_pretrained(output)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    repeats: int = option(3, "runs of each recipe", least=1)
    layers: int = option(22, "layers of the base model (22: 2.2 GB)", least=1)
    folder: str = option("", "folder to build the models in (default: a temporary one)")


def main(options: Options) -> None:
    """Build the models, run the recipes alternately, compare their output, and print the figures."""
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        base, double = Path(name) / "base", Path(name) / "double"
        child("-c", BUILD, base, str(options.layers))
        recipes: dict[str, Callable[[], Figures]] = {
            "plain peft": lambda: child("-c", PLAIN, base, f"{base}-lora", new(base.with_name("plain"))),
            "merge_weights.py": lambda: merged(base, new(base.with_name("ours"))),
            "cp -r and sync": lambda: timed(functools.partial(copied, base, new(base.with_name("copy")))),
        }
        medians = interleave(recipes, options.repeats)
        first = digests(base.with_name("ours"))
        merged(base, base.with_name("again"))
        facts: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in base.glob("*.safetensors"))}
        facts |= {"identical_runs": first == digests(base.with_name("again")), **differences(base)}
        for folder in ("again", "plain", "copy"):
            shutil.rmtree(base.with_name(folder))
        child("-c", BUILD, double, str(2 * options.layers))
        facts["peak_mb_of_twice_the_model"] = merged(double, double.with_name("doubled"))["peak_mb"]
    ours, plain, copy = (medians[recipe] for recipe in ("merge_weights.py", "plain peft", "cp -r and sync"))
    ratios = {
        "time, ours / plain": ours["seconds"] / plain["seconds"],
        "time, ours / copy": ours["seconds"] / copy["seconds"],
        "peak memory, ours / plain": ours["peak_mb"] / plain["peak_mb"],
    }
    report(medians, ratios, ("torch", "transformers", "peft", "safetensors"), **facts)


def new(output: Path) -> Path:
    """An output path that does not exist, with everything written before flushed to disk."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    return output


def merged(base: Path, output: Path) -> Figures:
    """Run merge_weights.py."""
    target = ("--output_dir", output, "--max_shard_size", "500MB")
    return child("merge_weights.py", "--base_model", base, "--lora_model", f"{base}-lora", *target)


def copied(base: Path, output: Path) -> None:
    """Copy the base model's folder, and flush the copy to disk."""
    subprocess.run(["cp", "-r", base, output], check=True)
    os.sync()


def digests(folder: Path) -> dict[str, str]:
    """The hash of each shard."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def differences(base: Path) -> dict[str, float]:
    """Compare our tensors with the baseline's: the share of equal values, and the largest difference.

    The difference is in float16 units in the last place (ULP) of the larger of base and result. The baseline rounds
    twice, the change and the sum.
    """
    import torch

    from utils.models.weights import Weights

    stored, ours, plain = (Weights(base.with_name(name)) for name in ("base", "ours", "plain"))
    if ours.names != plain.names:
        raise SystemExit("the recipes wrote tensors with different names")
    values = equal = 0
    largest = 0.0
    for name in ours.names:
        for start in range(0, ours.shape(name)[0], 1024):
            rows = slice(start, start + 1024)
            a, b, c = (weights.rows(name, rows).float() for weights in (ours, plain, stored))
            exponent = torch.frexp(torch.maximum(a.abs(), c.abs()).clamp(min=2**-14)).exponent
            largest = max(largest, ((a - b).abs() / torch.ldexp(torch.ones_like(a), exponent - 11)).max().item())
            values, equal = values + a.numel(), equal + (a == b).sum().item()
    if largest > 1:
        raise SystemExit(f"the recipes' results differ by {largest} units in the last place")
    return {"share_of_equal_values": equal / values, "largest_difference_in_last_places": largest}


if __name__ == "__main__":
    run(main, Options)
