"""What only a card can tell; scripts/gpu_check.sh runs this, and prints the lines that begin with "figure:"."""

import time

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from trainings import losses, options
from transformers import AutoModelForCausalLM, LlamaConfig

from utils.adapters import adapters
from utils.models.placement import place
from utils.training.loss import returning_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: bash scripts/gpu_check.sh")
WAYS = {"8bit": {"load_8bit": True}, "4bit": {"load_4bit": True}, "half": {"load_8bit": False}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "embeddings"])
def test_families_train_on_the_card(script, bases, data, tmp_path, family, way, whole):
    names = {"llama": "[embed_tokens,lm_head]", "bloom": "[word_embeddings,lm_head]"}
    changes = WAYS[way] | {"max_steps": 5} | ({"modules_to_save": names[family]} if whole else {})
    script("finetune.py", *options(bases[family], data, tmp_path / "out", **changes)).ok()
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]


def test_deterministic_runs_are_the_same_bit_for_bit(script, bases, data, tmp_path):
    for name in ("one", "two"):
        run = options(bases["llama"], data, tmp_path / name, load_8bit=False, deterministic=True, max_steps=4)
        script("finetune.py", *run).ok()
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_layers_in_main_memory_answer_and_train(script, bases, data, tmp_path):
    tiny.adapter(bases["llama"], tmp_path / "adapter")
    script(
        "finetune.py", *options(bases["llama"], data, tmp_path / "out", load_8bit=False, device_map="auto", max_steps=2)
    ).ok()


def test_a_step_of_7b_shapes():
    """Random weights in the shapes of LLaMA-7B, four records of 512 tokens, gradient checkpointing."""
    placement = place(False, False)
    if torch.cuda.mem_get_info(placement.device)[0] < 22e9:
        pytest.skip("needs 22 GB of free memory on the card")
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(config, dtype=placement.dtype)
    base.to_empty(device=placement.device)
    for tensor in base.parameters():
        tensor.data.normal_(std=0.02)
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(placement.device)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model = adapters.add(base, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()
    ids = torch.randint(10, 30000, (4, 512), device=placement.device)
    places = torch.arange(ids.numel(), device=placement.device).view(4, 512)[:, :-1].flatten()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", placement.dtype), returning_loss(base):
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model(input_ids=ids, labels=ids, places=places).backward()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"\nfigure: a step of 7B shapes in {placement.dtype_name}: {ids.numel() / seconds:.0f} tokens/s, peak {peak:.1f} GB")
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
