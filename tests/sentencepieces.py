"""SentencePiece models built for the tests: one with LLaMA's settings, and one with Chinese pieces to extend it by."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

ENGLISH = [
    "The quick brown fox creates and recreates a world of influence; the cat sat on the mat.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    def __init__(self):\n        self.value = 2023\n",
    "<b>bold</b> and http://example.com/?q=1&r=2 -- 3.14159, 100%",
] * 4  # fmt: skip
CHINESE = [
    "世界的影响力正在改变，我们应该怎样面对未来的挑战？",
    "中国的首都是北京，中国最长的河是长江。",
    "我是梦想家，一个中文助手。你是谁？我是梦想家。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "creates influence world 世界 影响 creates",
] * 4
TEXTS = [
    *ENGLISH[:4],
    *CHINESE[:5],
    "世界的影响creates the world 世界影响力  中国",
    "    four spaces,\ttab\n\n\n  two  and   three    runs     of spaces ",
    "龘靐齉 rare, emoji 🙂👩‍👩‍👧 and é ü ß, full-width Ａ１，。",
    " leading space",
    "\n",
    "  ",
    "▁underline▁of▁its▁own",
    "<0x0A> looks like a byte",
    "0123456789 １２３ 二〇二三",
    "a" * 200,
    "混合mixed文本text和和code()代码",
]


def train(texts: list[str], size: int, **settings) -> bytes:
    """A SentencePiece model with LLaMA's settings, or with these in their place."""
    model = io.BytesIO()
    like_llama: dict[str, Any] = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": True,
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99, "unk_surface": " ⁇ ", "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=size, **like_llama | settings
    )
    return model.getvalue()


def llama(folder: Path, **config) -> Path:
    """A folder with the small twin of LLaMA's tokenizer, and a tokenizer_config.json of these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train(ENGLISH + CHINESE[:1], 420))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | roles | config))
    return folder


def chinese(file: Path) -> Path:
    """The small twin of the Chinese model, whose pieces Chinese-LLaMA added."""
    file.write_bytes(train(CHINESE, 420))
    return file


def chinese_alpaca(base: Path, folder: Path) -> Path:
    """`base` extended as Chinese-LLaMA did it (with score 0); `[PAD]` stands in special_tokens_map.json alone."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    folder.mkdir(parents=True, exist_ok=True)
    model = ModelProto.FromString((base / "tokenizer.model").read_bytes())
    added = ModelProto.FromString(train(CHINESE, 420))
    known = {piece.piece for piece in model.pieces}
    for piece in added.pieces:
        if piece.piece not in known:
            model.pieces.add(piece=piece.piece, score=0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text())
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    return folder
