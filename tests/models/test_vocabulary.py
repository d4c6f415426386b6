"""Extending a vocabulary: what Chinese-LLaMA did for SentencePiece, whole tokens beside a byte-level BPE, and new rows."""

import json
import sys

import pytest
import sentencepiece
import tiny
import torch
from sentencepieces import CHINESE, TEXTS, chinese, chinese_alpaca, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import extend_vocab
from utils.cli import parse
from utils.console import UserError
from utils.models.loading import fit_embeddings
from utils.models.tokenizer import load_tokenizer
from utils.models.vocabulary import (
    extend_bytes,
    grow_embeddings,
    pieces_of_new_tokens,
    read_pieces,
    read_texts,
    train_pieces,
)


def extend(*arguments: str) -> None:
    extend_vocab.main(parse(extend_vocab.Options, list(map(str, arguments))))


def test_sentencepiece_is_extended_as_chinese_llama_did_it(tmp_path, capsys):
    base, model = llama(tmp_path / "base"), chinese(tmp_path / "chinese.model")
    (base / "tokenizer.json").write_text("{}")  # which would hold the old vocabulary
    extend("--base_model", base, "--sp_model", model, "--output_dir", tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    wanted = (chinese_alpaca(base, tmp_path / "by_hand") / "tokenizer.model").read_bytes()
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == wanted
    old, new = (sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / n / "tokenizer.model")) for n in ("base", "new"))
    size = old.get_piece_size()
    counts = f"{size} tokens and {new.get_piece_size() - size} new ones, {new.get_piece_size()} in all"
    assert capsys.readouterr().out == f"{tmp_path}/new: {counts}\n"
    assert [old.id_to_piece(i) for i in range(size)] == [new.id_to_piece(i) for i in range(size)]
    assert {new.get_score(i) for i in range(size, new.get_piece_size())} == {0.0}
    assert load_tokenizer(tmp_path / "new")(TEXTS, add_special_tokens=False)["input_ids"] == new.encode(TEXTS)
    assert len(new.encode("世界的影响")) < len(old.encode("世界的影响"))
    assert (tmp_path / "new" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_byte_level_bpe_gets_whole_tokens_that_transformers_alone_reads(tmp_path):
    base = tmp_path / "base"
    tiny.tokenizer(base)
    (tmp_path / "text.txt").write_text("\n".join(CHINESE))
    extend("--base_model", base, "--text", tmp_path / "text.txt", "--vocab_size", "12", "--output_dir", tmp_path / "new")
    old, new, plain = load_tokenizer(base), load_tokenizer(tmp_path / "new"), AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(old) < len(new) <= len(old) + 12
    for text in [*TEXTS, "我是梦想家</s>"]:
        for split in (True, False):
            ids = new(text, split_special_tokens=split, add_special_tokens=False)["input_ids"]
            assert ids == plain(text, split_special_tokens=split, add_special_tokens=False)["input_ids"]
            assert new.decode(ids) == old.decode(old(text, add_special_tokens=False)["input_ids"])
    assert len(new("世界的影响")["input_ids"]) < len(old("世界的影响")["input_ids"])
    english = "The quick brown fox creates 2023 things_to_do."
    assert new(english)["input_ids"] == old(english)["input_ids"], "tokens without Latin letters leave English as it was"
    assert all(min(map(ord, token)) > 0x143 for token in new.get_added_vocab() if token not in old.get_added_vocab())


def test_the_same_text_gives_the_same_tokenizer(tmp_path):
    llama(tmp_path / "base")
    (tmp_path / "records.json").write_text(json.dumps([{"instruction": text, "output": text} for text in CHINESE]))
    for name in ("a", "b"):
        extend("--base_model", tmp_path / "base", "--text", tmp_path / "records.json", "--output_dir", tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()
    new = load_tokenizer(tmp_path / "a").get_vocab()
    assert not any("instruction" in token for token in new), "the keys of JSON records are no text"


def test_so_many_pieces_are_learned_as_are_asked_for_of_those_used_more_than_once(tmp_path, capsys):
    text = "".join(CHINESE[:4])
    (tmp_path / "text.txt").write_text(f"\ufeff{text}", "utf-8")
    few, all_of_them = (train_pieces(tmp_path / "text.txt", most) for most in (5, 2000))
    assert len(few) == 5 and all_of_them and all(text.count(piece) > 1 for piece in all_of_them if piece != "▁")
    assert f"{tmp_path}/text.txt: 5 pieces learned from {len(text)} characters" in capsys.readouterr().out.splitlines()


def test_pieces_are_learned_as_llama_s_were(tmp_path, monkeypatch):
    """So that those of both models match: digits apart, spaces as they are, bytes and words of the user's for rare signs."""
    asked = []
    train = sentencepiece.SentencePieceTrainer.train

    def noted(sentence_iterator, model_writer, **settings):
        texts = list(sentence_iterator)
        asked.append((texts, settings))
        train(sentence_iterator=iter(texts), model_writer=model_writer, **settings)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", noted)
    (tmp_path / "text.txt").write_text("\n".join([*CHINESE, "2023年 2023年 2023年"]), "utf-8")
    pieces = train_pieces(tmp_path / "text.txt", 300)
    assert pieces and not any(sum(map(str.isdigit, piece)) > 1 for piece in pieces)
    [(texts, settings)] = asked
    assert texts == [*CHINESE, "2023年 2023年 2023年"]
    assert settings == {
        "vocab_size": 300 + len(set("".join(texts))), "model_type": "bpe", "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": True, "split_digits": True,
        "allow_whitespace_only_pieces": True, "character_coverage": 0.9999, "max_sentence_length": 2**20,
        "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip


def test_the_pieces_of_a_model_are_its_ordinary_ones(tmp_path):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    kinds = ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "BYTE", "UNUSED", "NORMAL")
    for number, kind in enumerate(kinds):
        model.pieces.add(piece=f"p{number}", type=getattr(ModelProto.SentencePiece, kind))
    (tmp_path / "a.model").write_bytes(model.SerializeToString())
    assert read_pieces(tmp_path / "a.model") == ["p0", "p3", "p6"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "一\n \n 二 "),
        ("a.json", '[{"x": "一", "y": [{"z": " 二 "}, 3, ""]}]'),
        ("a.jsonl", '\ufeff{"x": "一"}\n\n[" 二 "]\n'),
    ],
)
def test_the_texts_to_learn_from(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    assert read_texts(tmp_path / name) == ["一", " 二 "]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_what_they_replace(tmp_path, tied):
    base = tiny.llama(tmp_path / "base", tie_word_embeddings=tied)
    (tmp_path / "text.txt").write_text("\n".join(CHINESE))
    extend("--base_model", base, "--text", tmp_path / "text.txt", "--vocab_size", "40", "--output_dir", tmp_path / "new")
    old, new = load_tokenizer(base), load_tokenizer(tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(base)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    grow_embeddings(model, old, new)
    after = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (after[0] is after[1]) == tied and model.config.vocab_size == len(new)
    for weight, grown in zip(before, after, strict=True):
        assert torch.equal(grown[: len(weight)], weight)
        for index in range(len(weight), len(new)):
            ids = old(new.decode([index]), add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(grown[index], weight[ids].mean(0))


def test_rows_without_a_token_are_told_and_rows_for_new_ones_are_made(tmp_path, capsys):
    base = tiny.bloom(tmp_path / "base")
    words = load_tokenizer(base)
    count = len(words)
    fit_embeddings(AutoModelForCausalLM.from_pretrained(base), words, str(base))
    assert capsys.readouterr().out == f"{base}: {count + 8} embedding rows, of which {count} have tokens\n"
    words.add_tokens([f"梦{number}" for number in range(11)])
    model = AutoModelForCausalLM.from_pretrained(base)
    fit_embeddings(model, words, str(base))
    told = f"{base}: 3 embedding rows added for new tokens, each the mean of the rows it replaces\n"
    assert capsys.readouterr().out == told and len(model.get_output_embeddings().weight) == count + 11


def test_pieces_of_sentencepiece_tokens_have_no_space_of_their_own(tmp_path):
    base = llama(tmp_path / "base")
    old, new = load_tokenizer(base), load_tokenizer(chinese_alpaca(base, tmp_path / "new"))
    pieces = pieces_of_new_tokens(old, new)
    assert sorted(pieces) == list(range(len(old), len(new)))
    for index, ids in pieces.items():
        piece = new.convert_ids_to_tokens(index)
        assert "".join(old.convert_ids_to_tokens(ids)).startswith("▁") == piece.startswith("▁")
        assert old.continuing_model.decode(ids) == piece.replace("▁", " ")


def test_a_text_of_two_tokens_becomes_one_and_one_of_a_token_stays(tmp_path):
    words = tiny.tokenizer(tmp_path)
    counts = {text: len(words.tokenize(text)) for text in sorted(set("".join(tiny.TEXTS))) if ord(text) > 0x143}
    one, two = (next(text for text, count in counts.items() if count == wanted) for wanted in (1, 2))
    assert extend_bytes(words, [one, two, f"▁{two}", "", "a中", "中 国"], tmp_path) == 1
    assert words.tokenize(f"{one}{two}") == [*words.tokenize(one), two]


def test_a_tokenizer_that_is_no_extension_is_refused(tmp_path):
    old, new = load_tokenizer(llama(tmp_path / "a")), tiny.tokenizer(tmp_path / "b")
    with pytest.raises(UserError, match="not an extension"):
        pieces_of_new_tokens(old, new)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of them"),
        (("--sp_model", "x", "--text", "y"), "give one of them"),
        (("--sp_model", "nothing.model"), "cannot be read"),
        (("--sp_model", __file__), "is not a SentencePiece model"),
        (("--text", "nothing.txt"), "cannot be read"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(tmp_path, arguments, message):
    llama(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        extend("--base_model", tmp_path / "base", "--output_dir", tmp_path / "new", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_nothing_new_and_tokens_in_the_way_are_said(tmp_path):
    base, model = llama(tmp_path / "base"), chinese(tmp_path / "chinese.model")
    with pytest.raises(UserError, match="has all of these"):
        extend("--base_model", base, "--sp_model", base / "tokenizer.model", "--output_dir", tmp_path / "new")
    padded = chinese_alpaca(base, tmp_path / "padded")
    with pytest.raises(UserError, match=r"tokens after the pieces.*\[PAD\]"):
        extend("--base_model", padded, "--sp_model", model, "--output_dir", tmp_path / "new")
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="--overwrite"):
        extend("--base_model", base, "--sp_model", model, "--output_dir", tmp_path / "new")
    with pytest.raises(UserError, match="is the base model's folder; choose another one"):
        extend("--base_model", base, "--sp_model", model, "--output_dir", base / ".." / "base", "--overwrite")
    with pytest.raises(UserError, match="holds no tokenizer"):
        extend("--base_model", base, "--sp_model", model, "--output_dir", tmp_path / "new", "--overwrite")
    assert "torch" in sys.modules and not list((tmp_path / "new").iterdir())
