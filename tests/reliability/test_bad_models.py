"""Base models, adapters, tokenizers and lineage files that are incomplete, misfitting, foreign, or written wrongly.

What is broken is a named function that breaks a copy of a whole folder. Merging reads everything without loading a
model, so most are merged; those that only transformers would look at are trained on or asked. Further ones stand beside
the rooms they belong to: tests/merging, tests/training/test_start.py, tests/inference/test_engine.py.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import has, run_cold
from safetensors.torch import load_file, save_file

Break = Callable[[Path], object]


def rewrite(file: str, change: Callable) -> Break:
    """Change what a safetensors file holds: `change(tensors)` returns the new ones."""

    def break_it(folder: Path) -> None:
        save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})

    return break_it


def one(file: str, name: str, change: Callable) -> Break:
    """Change one tensor of a safetensors file."""
    return rewrite(file, lambda tensors: tensors | {name: change(tensors[name])})


def settings(file: str, **changes: object) -> Break:
    """Change keys of a JSON file; None removes one."""

    def break_it(folder: Path) -> None:
        value = json.loads((folder / file).read_text("utf-8")) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in value.items() if value is not None}), "utf-8")

    return break_it


def text(file: str, content: str, encoding: str = "utf-8") -> Break:
    """Put another text into a file."""
    return lambda folder: (folder / file).write_text(content, encoding)


def data(file: str, change: Callable) -> Break:
    """Change a file's bytes."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def gone(file: str) -> Break:
    """Remove a file."""
    return lambda folder: (folder / file).unlink()


def index(content: object) -> Break:
    """The weights as a shard, with an index beside it."""

    def break_it(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARDS[0])
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return break_it


def beside(file: str, other: str, name: str, **index: str) -> Break:
    """A second file, which holds one tensor of the first with other values; `index`: the shards of the tensors."""

    def break_it(folder: Path) -> None:
        tensors = {name: load_file(folder / file)[name] + 1}
        torch.save(tensors, folder / other) if other.endswith(".bin") else save_file(tensors, folder / other, {"format": "pt"})
        if index:
            (folder / INDEX).write_text(json.dumps({"weight_map": index}))

    return break_it


def header(change: Callable) -> Break:
    """Change the header of a base's weights: `change(entries)` returns the new one, an object or bytes."""

    def changed(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        new = change(json.loads(content[8 : 8 + size]))
        new = new if isinstance(new, bytes) else json.dumps(new).encode()
        return struct.pack("<Q", len(new)) + new + content[8 + size :]

    return data(WEIGHTS, changed)


def entry(**changes: object) -> Break:
    """Change what the header says of one tensor."""
    return header(lambda entries: entries | {Q: entries[Q] | changes})


def pickled(value: object, change: Callable = bytes) -> Break:
    """The weights as a pickle of torch's, whose bytes are changed."""

    def break_it(folder: Path) -> None:
        for name, other in ((WEIGHTS, PICKLED), (ADAPTER, "adapter_model.bin")):
            if (folder / name).is_file():
                (folder / name).unlink()
                torch.save(value, folder / other)
                (folder / other).write_bytes(change((folder / other).read_bytes()))

    return break_it


def lineage(**facts: object) -> Break:
    """A lineage file that says this."""
    return text("lineage.json", json.dumps({"kind": "train", "options": {}} | facts))


def without(name: str) -> Callable:
    """All tensors but one."""
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def of_rank_zero(folder: Path) -> None:
    """Pairs of matrices that have no rank."""
    rewrite(ADAPTER, lambda t: {n: (v[:0] if "lora_A" in n else v[:, :0]).clone() for n, v in t.items()})(folder)


def twice(folder: Path) -> None:
    """A base in two shards, which hold different values for one tensor."""
    index({"weight_map": {Q: SHARDS[0], "other": SHARDS[1]}})(folder)
    beside(SHARDS[0], SHARDS[1], Q)(folder)


WEIGHTS, PICKLED, ADAPTER = "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"
SHARDS, INDEX = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), f"{WEIGHTS}.index.json"
Q, EMBEDDINGS = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LFS = "version https://git-lfs.github.com/spec/v1"
NO_SETTINGS = {
    "empty": "",
    "cut off": '{"model_type": "lla',
    "a list": "[]",
    "null": "null",
    "a text": '"llama"',
    "deep": "[" * 99999,
}
NAN, INFINITE = float("nan"), float("inf")
AGAIN, AGAIN_FILE = "download it again", "download the file again"
NUMBERS = ("dim", "n_layers", "n_heads", "norm_eps")
FINGERPRINT = {"architecture": {"model_type": "bloom"}, "tokenizer": None, "shapes": "0", "samples": {}}
OTHER = {"name": "bloom-7b", "fingerprint": FINGERPRINT}
BASES: dict[str, tuple] = {  # what is broken -> how, and the words of the refusal
    "config: none": (gone("config.json"), "config.json", "check the path"),
    **{f"config: {what}": (text("config.json", content), "config.json", ";") for what, content in NO_SETTINGS.items()},
    "config: UTF-16": (text("config.json", "{}", "utf-16"), "config.json", "convert the file to UTF-8"),
    "config: labels without end": (settings("config.json", num_labels=10**9), "num_labels is 1e+09", AGAIN_FILE),
    "weights: none": (gone(WEIGHTS), "holds neither", "is it a model folder?"),
    "weights: empty": (data(WEIGHTS, lambda d: b""), WEIGHTS, AGAIN),
    "weights: cut off": (data(WEIGHTS, lambda d: d[:-1000]), WEIGHTS, AGAIN),
    "weights: zeros at the end": (data(WEIGHTS, lambda d: d[:-9999] + bytes(9999)), "holds only zeros from", "v_proj", AGAIN),
    "weights: cut in the header": (data(WEIGHTS, lambda d: d[:100]), WEIGHTS, AGAIN),
    "weights: a pointer of Git LFS": (text(WEIGHTS, LFS), WEIGHTS, AGAIN),
    "weights: no tensors": (rewrite(WEIGHTS, lambda t: {}), "holds no tensors", "is it the right file?"),
    "header: of endless length": (data(WEIGHTS, lambda d: b"\xff" * 8 + b"{}"), WEIGHTS, AGAIN),
    "header: a list": (header(lambda h: []), WEIGHTS, AGAIN),
    "header: nested too deeply": (header(lambda h: b"[" * 99999), WEIGHTS, AGAIN),
    "header: tensors that overlap": (entry(data_offsets=[0, 16384]), WEIGHTS, AGAIN),
    "header: a negative shape": (entry(shape=[-64, 64]), WEIGHTS, AGAIN),
    "header: a shape beyond its bytes": (entry(shape=[640, 64]), WEIGHTS, AGAIN),
    "header: a type of 4 bits": (entry(dtype="F4", shape=[512, 64]), "F4", "float16"),
    "header: an unknown type": (entry(dtype="F7"), WEIGHTS, AGAIN),
    "index: no JSON": (index("not JSON"), INDEX, "fix the file"),
    "index: a list": (index([]), INDEX, AGAIN),
    "index: no map": (index({"metadata": {}}), INDEX, AGAIN),
    "index: a map that is a list": (index({"weight_map": [Q]}), INDEX, AGAIN),
    "index: an empty map": (index({"weight_map": {}}), INDEX, AGAIN),
    "index: numbers for files": (index({"weight_map": {Q: 1}}), INDEX, AGAIN),
    "index: a file outside": (index({"weight_map": {Q: "../../../../etc/passwd"}}), "passwd", "download them again"),
    "index: a copy of the weights": (beside(WEIGHTS, SHARDS[0], Q, **{Q: SHARDS[0]}), "hold different weights", "delete"),
    "index: a tensor in two shards": (twice, "is also in another shard, with other values", "download them again"),
    "index: a shard is missing": (index({"weight_map": {Q: SHARDS[1]}}), "shards are missing", "download them again"),
    "index: a tensor is missing": (index({"weight_map": {"more": SHARDS[0]}}), "in none of its files", "download them again"),
    "pickle: a tensor alone": (pickled(torch.zeros(3)), PICKLED, "is it the right file?"),
    "pickle: a list": (pickled([1, 2]), PICKLED, "is it the right file?"),
    "pickle: numbers for names": (pickled({1: torch.zeros(3)}), PICKLED, "is it the right file?"),
    "pickle: numbers and names": (pickled({1: torch.zeros(3), "a": torch.zeros(3)}), "tensors are missing", "check its files"),
    "pickle: no tensors": (pickled({"epoch": 3}), PICKLED, "is it the right file?"),
    "pickle: a page of HTML": (pickled({}, lambda d: b"<html>"), PICKLED, ";"),
    "pickle: empty": (pickled({}, lambda d: b""), PICKLED, AGAIN),
    "pickle: cut off": (pickled({"a": torch.zeros(9999)}, lambda d: d[:5000]), PICKLED, AGAIN),
    "pickle: a tensor without values": (pickled({Q: torch.zeros(64, 64, device="meta")}), PICKLED, "other weights"),
    "pickle: a sparse tensor": (pickled({Q: torch.eye(64).to_sparse()}), PICKLED, "other weights"),
    "quantized: by GPTQ": (settings("config.json", quantization_config={"quant_method": "gptq"}), "(gptq)", "float16"),
    "quantized: in words": (settings("config.json", quantization_config="int4"), "(int4)", "float16"),
    "quantized: somehow": (settings("config.json", quantization_config={"bits": 4}), "unnamed", "float16"),
    "a layer: missing": (rewrite(WEIGHTS, without(Q)), "1 tensors are missing", "check its files"),
    "a norm: missing": (rewrite(WEIGHTS, without("model.norm.weight")), "1 tensors are missing", "check its files"),
    "a layer: NaN": (one(WEIGHTS, Q, lambda t: t.fill_(NAN)), Q, "NaN", AGAIN),
    "a layer: of another width": (one(WEIGHTS, Q, lambda t: t[:32].clone()), "q_proj", "another size of model"),
    "a layer: of one dimension": (one(WEIGHTS, Q, lambda t: t[0].clone()), "q_proj", "another size of model"),
    "a layer: a number": (one(WEIGHTS, Q, lambda t: torch.tensor(1.0)), "q_proj", "another size of model"),
    "a layer: of integers": (one(WEIGHTS, Q, lambda t: t.to(torch.int32)), "q_proj.weight is of int32", "float16"),
    "embeddings: of no rows": (one(WEIGHTS, EMBEDDINGS, lambda t: t[:0].clone()), "has 0 rows", "LLaMA"),
    "embeddings: fewer than tokens": (
        rewrite(WEIGHTS, lambda t: t | {name: t[name][:100].clone() for name in (EMBEDDINGS, "lm_head.weight")}),
        "100 embedding rows", "49953",
    ),
    "tokenizer.json: empty": (text("tokenizer.json", ""), "tokenizer", AGAIN),
    "tokenizer.json: a list": (text("tokenizer.json", "[]"), "tokenizer", AGAIN),
    "tokenizer.json: of another program": (text("tokenizer.json", '{"model": {"type": "Magic"}}'), "tokenizer", AGAIN),
    "tokenizer.json: nested too deeply": (text("tokenizer.json", "[" * 99999), "tokenizer", AGAIN),
    "tokenizer_config.json: broken": (text("tokenizer_config.json", '{"a'), "tokenizer", AGAIN),
    "tokenizer_config.json: a list": (text("tokenizer_config.json", "[1]"), "tokenizer", AGAIN),
    "tokenizer_config.json: a length in words": (
        settings("tokenizer_config.json", model_max_length="long"), "model_max_length is 'long', not a number", "fix",
    ),
    "tokenizer.model: cut off": (text("tokenizer.model", "\x0a\x0e\x0a\x05<unk"), "tokenizer.model", AGAIN),
    "tokenizer.model: a page of HTML": (text("tokenizer.model", "\n<html>"), "tokenizer.model", AGAIN),
}  # fmt: skip
LORA = "adapter_config.json"
ADAPTERS: dict[str, tuple] = {
    "settings: none": (gone(LORA), LORA, "name the folder"),
    **{f"settings: {what}": (text(LORA, content), LORA, ";") for what, content in NO_SETTINGS.items()},
    "settings: of prefix tuning": (settings(LORA, peft_type="PREFIX_TUNING"), "LoRA", "name the folder"),
    "settings: of no type": (settings(LORA, peft_type=None), "LoRA", "name the folder"),
    "settings: a rank in words": (settings(LORA, r="eight"), "invalid value eight for r", "download the file again"),
    "settings: another rank": (settings(LORA, r=16), "has rank 4, its settings say 16", "do not belong together"),
    "settings: no rank": (settings(LORA, r=None), "invalid value None for r", "download the file again"),
    "settings: an alpha in words": (settings(LORA, lora_alpha="high"), "invalid value high", "download the file again"),
    "settings: no alpha": (settings(LORA, lora_alpha=None), "invalid value None", "download the file again"),
    "settings: an infinite alpha": (settings(LORA, lora_alpha=INFINITE), "invalid value inf", "download the file again"),
    "settings: a list of patterns": (settings(LORA, rank_pattern=["q_proj"]), "rank_pattern", "download the file again"),
    "settings: no patterns": (settings(LORA, rank_pattern={"q_proj(": 2}), "rank_pattern", "download the file again"),
    "settings: a number for layers": (settings(LORA, modules_to_save=5), "invalid value 5", "download the file again"),
    "weights: none": (gone(ADAPTER), "holds no", "name the folder of an adapter"),
    "weights: empty": (data(ADAPTER, lambda d: b""), ADAPTER, AGAIN),
    "weights: cut off": (data(ADAPTER, lambda d: d[:-100]), ADAPTER, AGAIN),
    "weights: zeros at the end": (data(ADAPTER, lambda d: d[:-1600] + bytes(1600)), "only zeros from", "lora_A", AGAIN),
    "weights: of both kinds": (beside(ADAPTER, "adapter_model.bin", A), "hold different weights", "delete the others"),
    "weights: no tensors": (rewrite(ADAPTER, lambda t: {}), "holds no LoRA weights", "saving failed"),
    "weights: of a whole model": (rewrite(ADAPTER, lambda t: {"norm": torch.ones(64)}), "no LoRA weights", "another file"),
    "tensors: half of a pair": (rewrite(ADAPTER, without(A)), "has no lora_A", "train it again"),
    "tensors: a layer too many": (
        rewrite(ADAPTER, lambda t: {n.replace("layers.1.", "layers.9."): v for n, v in t.items()}),
        "not in the base", "use the base",
    ),
    "tensors: one too many": (rewrite(ADAPTER, lambda t: t | {"extra.weight": torch.ones(2)}), "extra", "use the base"),
    "tensors: another width": (one(ADAPTER, A, lambda t: t[:, :32].clone()), "q_proj", "another size of model"),
    "tensors: halves of two sizes": (one(ADAPTER, A, lambda t: t[:2].clone()), "do not match", AGAIN),
    "tensors: one dimension": (one(ADAPTER, A, lambda t: t[0].clone()), "do not match", AGAIN),
    "tensors: NaN": (one(ADAPTER, A, lambda t: t.fill_(NAN)), "NaN", AGAIN),
    "tensors: infinite": (one(ADAPTER, A, lambda t: t.fill_(INFINITE)), "q_proj", AGAIN),
    "tensors: integers": (rewrite(ADAPTER, lambda t: {n: v.to(torch.int8) for n, v in t.items()}), "is int8", AGAIN),
    "tensors: untrained": (rewrite(ADAPTER, lambda t: {n: v * ("lora_B" not in n) for n, v in t.items()}), "changes anything"),
    "tensors: of rank zero": (of_rank_zero, "has rank 0", "do not belong together"),
    "pickle: a tensor alone": (pickled(torch.zeros(3)), "adapter_model.bin", "is it the right file?"),
    "pickle: numbers for names": (pickled({1: torch.zeros(3)}), "holds no LoRA weights", "another file"),
    "lineage: no JSON": (text("lineage.json", "{"), "lineage.json", "fix the file"),
    "lineage: a list": (text("lineage.json", "[]"), "lineage.json", "delete it"),
    "lineage: options as a list": (lineage(options=[]), "lineage.json", "delete it"),
    "lineage: a base as a text": (lineage(base="llama"), "lineage.json", "delete it"),
    "lineage: a base without fingerprint": (lineage(base={"name": "llama"}), "lineage.json", "delete it"),
    "lineage: an empty fingerprint": (lineage(base={"name": "llama", "fingerprint": {}}), "lineage.json", "delete it"),
    "lineage: a parent as a text": (lineage(parent="run-1"), "lineage.json", "delete it"),
    "lineage: a grandparent as a text": (
        lineage(parent={"name": "a", "sha256": "b", "lineage": {"kind": "train", "options": {}, "parent": "c"}}),
        "lineage.json", "delete it",
    ),
    "lineage: another base": (lineage(base=OTHER), "another base (bloom-7b)", "give that base"),
}  # fmt: skip


CONFIG, PARAMS = "config.json", "params.json"
CONFIGURATIONS: dict[str, tuple] = {  # which only the programs that load a model look at: in config.json -> the words
    "heads that do not share the width": ({"num_attention_heads": 3}, CONFIG, AGAIN_FILE),
    "no heads": ({"num_attention_heads": 0}, CONFIG, AGAIN_FILE),
    "heads in words": ({"num_attention_heads": "two"}, "num_attention_heads", AGAIN_FILE),
    "less than no heads": ({"num_attention_heads": -2}, "num_attention_heads is -2", AGAIN_FILE),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0", AGAIN_FILE),
    "less than no layers": ({"num_hidden_layers": -1}, "num_hidden_layers is -1", AGAIN_FILE),
    "more layers than any model": ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000", AGAIN_FILE),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers", AGAIN_FILE),
    "more layers than its weights": ({"num_hidden_layers": 5}, "27 tensors are missing", "check its files"),
    "another width": ({"hidden_size": 32}, "not of the shapes", "copy weights and configuration of one model"),
    "no width": ({"hidden_size": 0}, "hidden_size is 0", AGAIN_FILE),
    "a width in a list": ({"hidden_size": [64]}, "hidden_size", AGAIN_FILE),
    "a width beyond memory": ({"hidden_size": 10**12}, "hidden_size is 1000000000000", AGAIN_FILE),
    "another vocabulary": ({"vocab_size": 100}, "not of the shapes", "copy weights and configuration of one model"),
    "less than no vocabulary": ({"vocab_size": -5}, "vocab_size is -5", AGAIN_FILE),
    "a vocabulary beyond memory": ({"vocab_size": 10**12}, "vocab_size is 1000000000000", AGAIN_FILE),
    "a window in words": ({"max_position_embeddings": "long"}, "max_position_embeddings", AGAIN_FILE),
    "an epsilon in words": ({"rms_norm_eps": "small"}, "rms_norm_eps", AGAIN_FILE),
    "an unknown activation": ({"hidden_act": "magic"}, "magic", "check the model folder"),
    "an unknown family": ({"model_type": "magic"}, "model type `magic`", "a family that transformers knows"),
    "a number for a family": ({"model_type": 5}, "names no model_type", "is it the config"),
    "a list for a family": ({"model_type": ["llama"]}, "names no model_type", "is it the config"),
    "a translator": ({"model_type": "t5"}, "t5 is not a causal language model", "LLaMA or BLOOM"),
    "another family": ({"model_type": "bert"}, "reads texts in both directions", "choose a causal language model"),
    "no shared heads": ({"num_key_value_heads": 0}, "broken", "check the model folder"),
    "an unknown rotation": ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "magic", ";"),
    "a rotation in a list": ({"rope_parameters": [1]}, "rope_parameters", AGAIN_FILE),
    "an end in words": ({"eos_token_id": "end"}, "eos_token_id", AGAIN_FILE),
    "an unknown type": ({"dtype": "float99"}, "float99", AGAIN_FILE),
    "heads of an odd size": ({"head_dim": 7}, CONFIG, AGAIN_FILE),
    "a number for a quantization": ({"quantization_config": 5}, CONFIG, AGAIN_FILE),
    "padding beyond the vocabulary": ({"pad_token_id": 10**9}, "broken", ";"),
}  # fmt: skip
METAS: dict[str, tuple] = {  # a folder in Meta's layout, broken -> the words
    "params: none": (gone(PARAMS), PARAMS, "check the path"),
    **{f"params: {what}": (text(PARAMS, content), PARAMS, ";") for what, content in NO_SETTINGS.items()},
    **{f"params: no {name}": (settings(PARAMS, **{name: None}), f"{name} is None", AGAIN_FILE) for name in NUMBERS},
    **{f"params: {name} in words": (settings(PARAMS, **{name: "4"}), f"{name} is '4'", AGAIN_FILE) for name in NUMBERS},
    **{f"params: {name} is 0": (settings(PARAMS, **{name: 0}), f"{name} is 0", AGAIN_FILE) for name in NUMBERS},
    "params: layers without end": (settings(PARAMS, n_layers=10**12), "n_layers is 1000000000000", "download the file again"),
    "params: a layer too many": (settings(PARAMS, n_layers=3), "9 tensors are missing", "download it again"),
    "params: another width": (settings(PARAMS, dim=128), "64 of 128 rows", "copy all of its consolidated"),
    "params: heads that do not fit": (settings(PARAMS, n_heads=5), "not a multiple of n_heads 5", "download the file again"),
    "params: shared heads in words": (settings(PARAMS, n_kv_heads="2"), "n_kv_heads is '2'", "download the file again"),
    "params: a negative rotation": (settings(PARAMS, rope_theta=-1.0), "rope_theta is -1.0", "download the file again"),
    "params: an infinite epsilon": (settings(PARAMS, norm_eps=INFINITE), "norm_eps is inf", "download the file again"),
    "params: of Llama 3": (settings(PARAMS, use_scaled_rope=True), "Llama 3 is not read", "get it from the hub"),
    "weights: cut off": (data("consolidated.00.pth", lambda d: d[:-1000]), "consolidated.00.pth", AGAIN),
    "weights: a page of HTML": (data("consolidated.00.pth", lambda d: b"<html>"), "consolidated.00.pth", ";"),
}  # fmt: skip


@pytest.mark.parametrize("program", ["finetune.py", "generate.py"])
@pytest.mark.parametrize("what", CONFIGURATIONS)
def test_configurations_that_cannot_be_loaded(refused, world, tmp_path, what, program):
    broken, (changes, *words) = shutil.copytree(world["base"], tmp_path / "broken"), CONFIGURATIONS[what]
    settings(CONFIG, **changes)(broken)
    has(refused(program, f"--base_model {broken}"), words)


@pytest.mark.parametrize("program", ["finetune.py", "generate.py"])
def test_weights_that_are_no_numbers(refused, world, tmp_path, program):
    broken = shutil.copytree(world["base"], tmp_path / "broken")
    one(WEIGHTS, Q, lambda t: t.fill_(NAN))(broken)
    has(refused(program, f"--base_model {broken}"), ("n", "check the"))


@pytest.fixture(scope="module")
def meta(world, tmp_path_factory):
    """The good base in Meta's layout."""
    folder = tmp_path_factory.mktemp("meta") / "out"
    words = f"--base_model {world['base']} --output_type pth --output_dir {folder}"
    assert run_cold("merge_weights.py", *words.split(), cwd=folder.parent).ok()
    return folder


@pytest.mark.parametrize("what", METAS)
def test_folders_of_metas_that_cannot_be_merged_into(refused, meta, tmp_path, what):
    broken, (break_it, *words) = shutil.copytree(meta, tmp_path / "broken"), METAS[what]
    break_it(broken)
    has(refused("merge_weights.py", f"--base_model {broken}"), words)


@pytest.mark.parametrize("what", BASES)
def test_bases_that_cannot_be_merged_into(refused, world, tmp_path, what):
    broken, (break_it, *words) = shutil.copytree(world["base"], tmp_path / "broken"), BASES[what]
    break_it(broken)
    has(refused("merge_weights.py", f"--base_model {broken}"), words)


@pytest.mark.parametrize("what", ADAPTERS)
def test_adapters_that_cannot_be_merged(refused, world, tmp_path, what):
    broken, (break_it, *words) = shutil.copytree(world["adapter"], tmp_path / "broken"), ADAPTERS[what]
    break_it(broken)
    has(refused("merge_weights.py", f"--lora_model {broken}"), words)
