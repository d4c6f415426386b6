"""Compares a merged model with the base and the adapters it was made from, by their predictions."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from utils.adapters.settings import read_config
from utils.console import UserError, say
from utils.merging.plan import MergePlan
from utils.merging.tensor_recipes import Grow
from utils.models import meta_layout
from utils.models.loading import NO_ADAPTER
from utils.models.tokenizer import read_tokenizer
from utils.models.vocabulary import grow_embeddings
from utils.models.weights import size_of

PROMPTS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n你是谁？\n\n### Response:\n我是一个人工智能助手，",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
)
# the most that rounding each weight once may change the scores
MOST = {torch.float32: 0.001, torch.float16: 0.02, torch.bfloat16: 0.1}


@torch.no_grad()
def compare_logits(plan: MergePlan, folder: Path) -> None:
    """Compare the scores of the merged model in `folder` with those of base and adapters, both computed in float32.

    Prints by how much they differ (root mean square, relative to the scores' own spread). Raises UserError if that is
    more than rounding the weights explains.
    """
    if plan.tokenizer:
        prompts = [torch.tensor([ids]) for ids in read_tokenizer(plan.tokenizer)(list(PROMPTS))["input_ids"]]
    else:
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(plan.rows[-1], (1, 32), generator=generator) for _ in PROMPTS]
    model = with_adapters(plan).eval()
    expected = torch.cat([model(prompt).logits[0] for prompt in prompts])
    del model
    merged = load_float32(folder).eval()
    found = torch.cat([merged(prompt).logits[0] for prompt in prompts])
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    difference = ((found - expected).square().mean().sqrt() / spread).item()
    agreeing = (found.argmax(-1) == expected.argmax(-1)).sum().item()
    text = f"scores differ by {difference:.2%}, the next token is the same at {agreeing} of {len(expected)} places"
    largest = max((part.kind for parts in plan.files.values() for part in parts.values()), key=size_of)
    if not difference <= MOST.get(largest[1], 0.1):
        raise UserError(f"--verify: {text}; the merged model does not match base and adapters, nothing was kept")
    say(f"verified on {len(prompts)} prompts: {text}")


def with_adapters(plan: MergePlan) -> PreTrainedModel | PeftModel:
    """The base with its adapters loaded by peft, which merges all but the last."""
    model: PreTrainedModel | PeftModel = load_float32(plan.base)
    for adapter, rows in zip(plan.adapters, plan.rows[1:], strict=True):
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        if rows > model.get_input_embeddings().weight.shape[0]:
            if any(isinstance(change, Grow) for recipe in plan.recipes.values() for change in recipe.changes):
                grow_embeddings(model, read_tokenizer(plan.base), read_tokenizer(plan.tokenizer or plan.base))
            else:
                model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, str(adapter.folder), config=read_config(adapter.folder))
    return model


def load_float32(folder: Path) -> PreTrainedModel:
    """A model in float32, from either layout."""
    if not meta_layout.is_meta(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, adapter_kwargs=NO_ADAPTER)
        return model.dequantize(dtype=torch.float32).float() if getattr(model, "is_quantized", False) else model
    config, weights = meta_layout.open_model(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.load_state_dict({name: weights.tensor(name) for name in weights.names})
    return model
