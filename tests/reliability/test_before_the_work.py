"""What each script finds out before its long work: outputs, room, rights, window, end token, target names, parents' settings.

One row per kind of mistake and script. Each is refused in one line before any weights are loaded and any record is encoded.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from cases import GOOD, has, refusal, run_cold
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

ROOTLESS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
PARENT = "--resume_from_checkpoint"
TARGETS = "--lora_target_modules"
UNFIT = {  # an adapter: the words of its refusal
    "{wide}": ("q_proj.weight is 96 x 96", "use the base model that the adapter was trained on"),
    "{pissa}": ("changed by pissa", "save it with"),
}
LONGER = ("embedding rows for a tokenizer of", "tokens")
OUTPUTS = {  # an option's end: the words of the refusal
    "{data}/a/b": ("data.json: is not a folder", "give another"),
    "{full}/out": ("MB are needed and 0 MB are free", "make room"),
    "{mine}/out": ("mine: cannot be written to", "give another"),
}
WAYS = {script: "--output_path" if script == "generate.py" else "--output_dir" for script in GOOD}
TABLE = [
    *(("output", script, f"{WAYS[script]} {end}", *words) for script in GOOD for end, words in OUTPUTS.items()),
    ("output", "finetune.py", "--output_dir {blocked}", ": is a folder with the name of a file", "give another --output_dir"),
    ("output", "judge.py", "--output_dir {blocked}", ": is a folder with the name of a file", "give another --output_dir"),
    ("output", "generate.py", "--output_path {blocked}/a.json", "a.yaml: is a folder", "give another --output_path"),
    ("output", "generate.py", "--output_path {tmp}", "is a folder", "name a file"),
    ("output", "merge_weights.py", "--output_dir {tmp}", "is not empty", "--overwrite"),
    ("output", "extend_vocab.py", "--output_dir {tmp}", "exists", "--overwrite"),
    ("output", "finetune.py", "--output_dir {adapter} --resume_from_checkpoint {adapter}", "is the output folder itself"),
    ("room", "finetune.py", "--output_dir {small}/out --lora_r 512", "4 MB are needed and 2 MB are free", "make room"),
    ("window", "finetune.py", "--base_model {brief} --cutoff_len 65", "brief has 64 positions", "give 64 or less"),
    ("end token", "finetune.py", "--base_model {endless}", "names no eos_token", "put it into tokenizer_config.json"),
    ("end token", "finetune.py", "--tokenizer {endless}", "names no eos_token", "put it into tokenizer_config.json"),
    ("tokens", "finetune.py", "--tokenizer {longer}", *LONGER, "give --modules_to_save '[embed_tokens,lm_head]'"),
    ("tokens", "finetune.py", "--tokenizer {longer} --dry_run", *LONGER, "give --modules_to_save '[embed_tokens,lm_head]'"),
    ("tokens", "finetune.py", "--tokenizer {another} --modules_to_save [lm_head]", "token 4 is", "not an extension"),
    ("tokens", "generate.py", "--base_model {longer}", *LONGER, "use model and tokenizer of one stage"),
    ("tokens", "merge_weights.py", "--base_model {longer}", *LONGER, "use model and tokenizer of one stage"),
    ("targets", "finetune.py", f"{TARGETS} [query_key_value]", "no layer query_key_value", "q_proj"),
    ("targets", "finetune.py", f"{TARGETS} [1,2]", "model.layers.1 is a LlamaDecoderLayer", "q_proj"),
    ("targets", "finetune.py", f"{TARGETS} [layers.9.self_attn.q_proj]", "no layer layers.9.self_attn.q_proj", "q_proj"),
    ("targets", "finetune.py", f"{TARGETS} [self_attn]", "is a LlamaAttention, which cannot have a LoRA", "q_proj"),
    ("targets", "finetune.py", f"{TARGETS} 'q_proj.*'", "no layer q_proj.*", "q_proj"),
    ("targets", "finetune.py", f"{TARGETS} '(q_proj|v_proj'", "not a regular expression", "or names"),
    ("targets", "finetune.py", f"{TARGETS} [q_proj,all-linear]", "all-linear is a pattern", "give it alone"),
    ("targets", "finetune.py", "--modules_to_save [wte]", "no layer wte", "q_proj"),
    ("targets", "finetune.py", f"{TARGETS} [q_proj] --modules_to_save [q_proj]", "q_proj is in both", "name it in one"),
    *(("parent", "finetune.py", f"{PARENT} {name}", *words) for name, words in UNFIT.items()),
    *(("parent", "generate.py", f"--lora_weights {name}", *words) for name, words in UNFIT.items()),
    *(("parent", "merge_weights.py", f"--lora_model {name}", *words) for name, words in UNFIT.items()),
    ("parent", "finetune.py", f"{PARENT} {{adapter}} --lora_r 64", "--lora_r is 64, the adapter's is 4", "leave these"),
    ("parent", "finetune.py", f"{PARENT} {{adapter}} {TARGETS} [k_proj]", "is [k_proj], the adapter's is [q_proj,v_proj]"),
    ("parent", "finetune.py", f"{PARENT} {{base}}", "holds no", "name the folder of an adapter"),
    ("parent", "generate.py", "--lora_weights {base}", "adapter_config.json: no such file", "name the folder of an adapter"),
    ("parent", "merge_weights.py", "--lora_model {base}", "adapter_config.json", "name the folder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(world, tmp_path_factory) -> Iterator[dict[str, Path]]:
    """What the rows name, beside the world's good things."""
    top = tmp_path_factory.mktemp("places")
    words = tiny.tokenizer(top / "brief")
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=len(words), **sizes, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(top / "brief")
    shutil.copytree(world["base"], top / "endless")
    settings = json.loads((top / "endless" / "tokenizer_config.json").read_text())
    (top / "endless" / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    for name in ("longer", "another"):
        shutil.copytree(world["base"], top / name)
        words = AutoTokenizer.from_pretrained(top / name)
        words.add_tokens(["梦想家"])
        words.save_pretrained(top / name)
    words = json.loads((top / "another" / "tokenizer.json").read_text("utf-8"))
    swapped = {4: 5, 5: 4}
    words["model"]["vocab"] = {token: swapped.get(index, index) for token, index in words["model"]["vocab"].items()}
    (top / "another" / "tokenizer.json").write_text(json.dumps(words), "utf-8")
    tiny.adapter(tiny.llama(top / "other", hidden_size=96, num_attention_heads=6), top / "wide")
    shutil.copytree(world["adapter"], top / "pissa")
    settings = json.loads((top / "pissa" / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (top / "pissa" / "adapter_config.json").write_text(json.dumps(settings))
    for name in ("lineage.json", "a.yaml"):
        (top / "blocked" / name).mkdir(parents=True)
    (top / "mine").mkdir(mode=0o500)
    disks = {"full": "4k", "small": "2m"}
    for name, size in disks.items():
        (top / name).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", top / name], check=False)
    if (top / "full").is_mount():
        (top / "full" / "all").write_bytes(bytes(4096))
    yield world | {path.name: path for path in top.iterdir()}
    for name in disks:
        subprocess.run(["umount", "--lazy", top / name], check=False)


@pytest.mark.parametrize("row", [pytest.param(row, id=" ".join(row[1::-1] + row[2:3])) for row in TABLE])
def test_mistakes_are_found_before_the_long_work(cold_or_forked, places, tmp_path, row):
    kind, script, options, *words = row
    if any(f"{{{name}}}" in options and not places[name].is_mount() for name in ("full", "small")):
        pytest.skip("a small disk cannot be mounted here")
    run, more = (run_cold, {"before": ROOTLESS}) if "{mine}" in options else (cold_or_forked, {})
    # how much room a run needs is known once its model is there
    line = refusal(run, script, f"{GOOD[script]} {options}", tmp_path, places, at_once=kind != "room", **more)
    has(line, tuple(words))
