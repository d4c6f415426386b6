"""Tiny random models in the layout of real ones, for tests that need a whole model folder in a second."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n你是谁？\n\n### Input:\n\n### Response:\n我是梦想家，一个中文助手。</s>",
    "The quick brown fox jumps over the lazy dog. 春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
]


def tokenizer(folder: Path, size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `<s>` before every text, `</s>` as end of sequence, `<pad>`; saved into `folder`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return fast


def llama(folder: Path, seed: int = 0, **changes) -> Path:
    """A LLaMA of 2 layers with grouped keys, its tokenizer beside it."""
    words = tokenizer(folder)
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.4,  # wide, so that scores differ clearly and answers do not repeat one token
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    LlamaForCausalLM(LlamaConfig(**settings | changes)).save_pretrained(folder)
    return folder


def qwen2(folder: Path) -> Path:
    """A Qwen2 of 2 layers, with biases on its attention."""
    return llama_like(Qwen2Config, folder)


def mistral(folder: Path) -> Path:
    """A Mistral of 2 layers, with a sliding window shorter than its texts."""
    return llama_like(MistralConfig, folder, sliding_window=16)


def llama_like(kind: type, folder: Path, **changes) -> Path:
    """A model of 2 layers of a family whose settings are named as LLaMA's."""
    words = tokenizer(folder)
    torch.manual_seed(0)
    config = kind(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=3, **changes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def bloom(folder: Path, seed: int = 0) -> Path:
    """A BLOOM of 2 layers whose vocabulary is padded beyond its tokenizer's, as BLOOM's is."""
    words = tokenizer(folder)
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=len(words) + 8, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=1, eos_token_id=2
    )
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int = 0, scale: float = 0.3, **settings) -> Path:
    """A LoRA for the model in `base` with random weights, both halves, so that it changes what the model says."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    targets = ["query_key_value"] if model.config.model_type == "bloom" else ["q_proj", "v_proj"]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"} | settings)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    wrapped.save_pretrained(folder)
    return folder
