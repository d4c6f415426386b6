"""Tiny random models of the families that transformers knows, made of its own configuration classes.

    OMP_NUM_THREADS=1 python tests/families.py

checks each family of docs/families.md and writes its table anew; names add families.
"""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import PeftModel
from scripting import ROOT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from utils.adapters import adapters, fit
from utils.adapters.lora_config import lora_config
from utils.console import UserError
from utils.datasets.encoding import IGNORED
from utils.inference.answerers import ChatModel
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams
from utils.merging.merge import write_model
from utils.merging.plan import plan_merge
from utils.models.loading import load_base
from utils.models.placement import place
from utils.models.tokenizer import load_tokenizer
from utils.training.batching import pad
from utils.training.loss import returning_loss

DOCS = ROOT / "docs"
STEPS = ("training", "answering", "merging")
WANTED: dict[str, Any] = {"lora_target_modules": [], "lora_dropout": 0.0}

# what sizes are called; a family's configuration takes those that it has
SMALL: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 32, "lru_width": 32,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64, "ffn_config": None,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 64,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "num_experts_per_token": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "n_ctx": 256, "seq_length": 256,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_ssm": 64,
    "mamba_chunk_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_mamba_heads": 2, "mamba_dt_rank": 4,
    "mamba_headdim": 16, "mamba_ngroups": 1, "ssm_state_size": 8, "chunk_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "rotary_dim": 8, "vocab_size_per_layer_input": None, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "rotary_pct": 0.5,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def shrink(name: str, vocabulary: int, **changes: Any) -> Any:
    """A tiny configuration of a family: its class's own defaults, with the sizes that it has made small."""
    kind = CONFIG_MAPPING[name]
    known = kind().to_dict()
    small = {key: copy.copy(value) for key, value in SMALL.items() if key in known and value is not None}
    return kind(**small | {"vocab_size": vocabulary} | changes)


MLA = {"num_key_value_heads": 4, "head_dim": 8}
TEXT = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
CHANGES: dict[str, dict[str, Any]] = {  # what a family needs beside the sizes
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), MLA),
    **dict.fromkeys(("youtu", "minicpm3"), MLA),
    "longcat_flash": MLA | {"num_layers": 1, "ffn_hidden_size": 64},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]} | MLA,
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]} | MLA,
    "nemotron_h": {"n_groups": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4, "mamba_headdim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "index_topk": 64},
    "recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 1000.0},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mistral": {"sliding_window": 8},
    "llama4_text": {"attention_chunk_size": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {"vocab_size_per_layer_input": 600, "num_kv_shared_layers": 0, "global_head_dim": 8},
    "gemma3n_text": {"vocab_size_per_layer_input": 600, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
                     "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {"text_config": TEXT, "vision_config": VISION},
    "llama4": {"text_config": TEXT | {"intermediate_size_mlp": 64, "num_local_experts": 2}, "vision_config": VISION},
}  # fmt: skip

PROMPTS = [[1, 40, 41, 42, 43], [1, 40, 41, 42, 43, *range(50, 65)], [1, 99], [1, *range(100, 131)], [1, 7, 8, 9]]
ROWS = [([1, *range(20, 40)], 6), ([1, *range(200, 212)], 3), ([1, *range(300, 330)], 20)]  # ids, and those not learned
CLOSE = 2e-4


def make(name: str, folder: Path) -> Path:
    """A tiny random model of a family, with a tokenizer of 600 tokens beside it."""
    tiny.tokenizer(folder)
    changes = CHANGES.get(name, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(name, 600, **changes))
    model.generation_config.pad_token_id = 3
    model.save_pretrained(folder)
    return folder


def check_training(base: Path, adapter: Path) -> None:
    """Loss and gradients of a micro-batch equal those of plain transformers and peft, record by record; saves the adapter."""
    placement = place(False, False)
    words = load_tokenizer(base)
    model = load_base(str(base), words, placement)
    torch.manual_seed(0)
    config = lora_config(model, WANTED, None)
    ours = adapters.add(model, config).eval()
    with torch.no_grad():
        for parameter in trained(ours).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tensors = {name: tensor.clone() for name, tensor in adapters.state(ours).items()}
    adapters.save(tensors, config, adapter, str(base))
    records = [{"input_ids": ids, "labels": [IGNORED] * known + ids[known:]} for ids, known in ROWS]
    with returning_loss(model):
        loss = ours(**pad(records, 1))
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained(ours).items()}

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True).eval()
    total = torch.zeros(())
    for record in records:
        logits = plain(input_ids=torch.tensor([record["input_ids"]]), use_cache=False).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(record["labels"][1:]), reduction="sum")
    total.backward()
    assert abs(loss.item() - total.item()) <= 1e-4 * abs(total.item()), f"loss {loss.item()}, not {total.item()}"
    wanted = {name: parameter.grad for name, parameter in trained(plain).items()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        other = gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert (gradient - other).abs().max() <= 1e-3 * gradient.abs().max() + 1e-5, f"gradient of {name}"


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """What trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_answers(base: Path, adapter: Path) -> None:
    """Answers of a batch, at one and at four beams, equal those of `generate`, prompt by prompt."""
    fit.check(fit.Adapter(adapter), base, grows=False)
    engine = Engine(str(base), [ChatModel("a", adapter, "alpaca", None)], place(False, False))
    engine.use("a")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    for beams in (1, 4):
        settings = SamplingParams(num_beams=beams, max_new_tokens=8, repetition_penalty=1.0, no_repeat_ngram_size=0)
        ours = {}
        for step in engine.answer("a", PROMPTS, settings):
            ours |= step.finished
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "eos_token_id": 2, "pad_token_id": 3}
            found = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
            assert ours[row] == found, f"{beams} beams, prompt {row}: {ours[row]}, not {found}"


def check_merging(base: Path, adapter: Path, merged: Path) -> None:
    """The merged folder's logits, read by plain transformers, equal those of peft's own merge."""
    plan = plan_merge(str(base), [str(adapter)], None, "huggingface", "5GB")
    merged.mkdir()
    write_model(plan, merged)
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
    found = AutoModelForCausalLM.from_pretrained(merged).eval()
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        ours, theirs = found(input_ids=ids, use_cache=False).logits, wanted(input_ids=ids, use_cache=False).logits
    assert (ours - theirs).abs().max() <= CLOSE * max(1, theirs.abs().max())


def check(name: str, folder: Path) -> dict[str, str]:
    """What works for a family: for each of training, answering and merging "" or the sentence that it is refused with.

    Raises AssertionError if a result is wrong, and whatever else is not a refusal.
    """
    base, adapter = make(name, folder / "base"), folder / "adapter"
    runs = (
        lambda: check_training(base, adapter),
        lambda: check_answers(base, adapter),
        lambda: check_merging(base, adapter, folder / "merged"),
    )
    found = dict.fromkeys(STEPS, "")
    for step, run in zip(STEPS, runs, strict=True):
        try:
            run()
        except UserError as refusal:
            if step == STEPS[0]:
                return dict.fromkeys(STEPS, str(refusal))
            found[step] = str(refusal)
    return found


def sentence(refusal: str) -> str:
    """A refusal as the table has it, without the folder; a tick where there is none."""
    return refusal.partition(": ")[2] or "✓"


def table() -> dict[str, dict[str, str]]:
    """What docs/families_EN.md says of each family."""
    rows = [line.strip("| ").split(" | ") for line in (DOCS / "families_EN.md").read_text("utf-8").splitlines()]
    return {row[0].strip("`"): dict(zip(STEPS, row[1:], strict=True)) for row in rows if row[0].startswith("`")}


def write_table(found: dict[str, dict[str, str]]) -> None:
    """Put what was found between the head and the foot of the table, in both languages."""
    rows = [f"| `{name}` | {' | '.join(sentence(found[name][step]) for step in STEPS)} |" for name in sorted(found)]
    for file in ("families.md", "families_EN.md"):
        head, _, rest = (DOCS / file).read_text("utf-8").partition("|---|---|---|---|\n")
        foot = rest.partition("\n\n")[2]
        (DOCS / file).write_text(f"{head}|---|---|---|---|\n" + "\n".join(rows) + f"\n\n{foot}", "utf-8")


def main(names: list[str]) -> None:
    """Check families (those of the table where none are named) and write the table; a wrong one ends it."""
    known = {name: {step: "" if text == "✓" else f": {text}" for step, text in row.items()} for name, row in table().items()}
    for name in names or sorted(known):
        with tempfile.TemporaryDirectory() as folder:
            known[name] = check(name, Path(folder))
    write_table(known)


if __name__ == "__main__":
    main(sys.argv[1:])
