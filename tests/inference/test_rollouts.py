"""Answers that are drawn while training: those of the model as it answers, each by its own seed, whatever the others."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from utils.datasets.templates import Prompter
from utils.inference import rollouts
from utils.models.tokenizer import load_tokenizer

PROMPTS, SEEDS = [[5, 6, 7], [8, 9], [7, 5, 9, 6], [6]], [3, 5, 3, 9]


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """A model in training, with dropout and a `forward` that gives a loss; and its sampler."""
    base = tiny.llama(tmp_path_factory.mktemp("rollouts") / "base", max_position_embeddings=14)
    settings = LoraConfig(target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).get_base_model().train()
    options = SimpleNamespace(
        base_model=str(base),
        prompt_template_name="alpaca",
        max_new_tokens=12,
        temperature=0.7,
        micro_batch_size=4,
        cutoff_len=16,
    )
    return model, rollouts.make_sampler(options, load_tokenizer(base))


def test_each_answer_is_drawn_by_its_own_seed_without_dropout_in_any_company(drawing, monkeypatch):
    model, sampler = drawing
    model.eval()
    alone = [sampler(model, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert not model.training and sampler.room == 16 * 4 * 16
    model.train()
    model.forward = loss = lambda **_: None
    assert sampler(model, PROMPTS, SEEDS) == alone and model.training and model.forward is loss
    plain, sizes = rollouts.decode, []

    def short(model, asked, *rest):
        sizes.append(len(asked))
        if len(asked) > 1:
            raise torch.OutOfMemoryError
        return plain(model, asked, *rest)

    monkeypatch.setattr(rollouts, "decode", short)
    assert sampler(model, PROMPTS, SEEDS) == alone and sizes.count(1) == len(PROMPTS)
    del model.forward


def test_all_tokens_can_be_drawn_and_answers_end_with_the_window(drawing):
    model, sampler = drawing
    kept = dataclasses.asdict(sampler.settings)
    assert (kept["do_sample"], kept["temperature"], kept["top_p"], kept["top_k"]) == (True, 0.7, 1.0, 0)
    sampler = rollouts.Sampler(sampler.ending.tokenizer, Prompter("alpaca"), [], sampler.settings, 10**6, window=8)
    assert [len(ids) for ids in sampler(model, PROMPTS, SEEDS)] == [8 - len(prompt) for prompt in PROMPTS]
    assert all(map(sampler.is_cut, sampler(model, PROMPTS, SEEDS)))
