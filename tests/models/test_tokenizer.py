"""Tokenizers: ids and texts are SentencePiece's own, whatever transformers would make of them (PITFALLS 22)."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepieces import TEXTS, chinese_alpaca, llama
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from utils.console import UserError
from utils.models.tokenizer import end_tokens, load_tokenizer, read_tokenizer, save_tokenizer, save_whole
from utils.models.tokenizer_files import copy_tokenizer, count_tokens

anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("tokenizers")
    base = llama(top / "llama")
    return {"llama": base, "alpaca": chinese_alpaca(base, top / "alpaca")}


@pytest.fixture(scope="module", params=["llama", "alpaca"])
def pair(request, folders):
    """Our tokenizer of a folder, and SentencePiece on the same model."""
    folder = folders[request.param]
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def alpaca(folders):
    return load_tokenizer(folders["alpaca"])


def test_ids_are_sentencepieces_in_batches_and_singly(pair):
    """PITFALLS 22."""
    tokenizer, reference = pair
    assert tokenizer(TEXTS, add_special_tokens=False)["input_ids"] == reference.encode(TEXTS)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == reference.encode(text)


def test_the_converted_tokenizer_would_give_other_ids(folders):
    """The reason for this room: should this fail one day, transformers has become exact."""
    plain = AutoTokenizer.from_pretrained(folders["alpaca"])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folders["alpaca"] / "tokenizer.model"))
    assert sum(plain(text, add_special_tokens=False)["input_ids"] != reference.encode(text) for text in TEXTS) > 3


@settings(max_examples=200, deadline=None)
@given(text=anything)
def test_any_text_has_sentencepieces_ids_and_its_text_back(folders, text):
    tokenizer = CACHE.setdefault("alpaca", load_tokenizer(folders["alpaca"]))
    reference = tokenizer.sp_model
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    assert found["input_ids"] == reference.encode(text)
    assert tokenizer.decode(found["input_ids"]) == reference.decode(reference.encode(text))
    ends = [end for _, end in found["offset_mapping"]]
    assert ends == sorted(ends) and (not ends or ends[-1] == len(text))


CACHE: dict = {}


def test_offsets_are_characters_of_the_text(alpaca):
    text = "世界的🙂 creates\n  x 龘。"
    row = alpaca(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    position = 0
    for token, (begin, end) in zip(alpaca.convert_ids_to_tokens(row["input_ids"]), row["offset_mapping"], strict=True):
        assert begin == position and end >= begin
        if not token.startswith("<0x"):
            assert text[begin:end] == token.replace("▁", " ") or (begin == 0 and text[:end] == token.removeprefix("▁"))
        position = end
    assert position == len(text)
    bytes_of_emoji = [pair for pair in row["offset_mapping"] if pair[0] == text.index("🙂")]
    assert bytes_of_emoji == [(3, 3), (3, 3), (3, 3), (3, 4)]


def test_offsets_after_added_tokens_and_special_ones(alpaca):
    row = alpaca("我</s>是🙂[PAD]x", return_offsets_mapping=True)
    pairs = list(zip(row["input_ids"], row["offset_mapping"], strict=True))
    assert pairs[0] == (alpaca.bos_token_id, (0, 0))
    assert (alpaca.eos_token_id, (1, 5)) in pairs and (alpaca.pad_token_id, (7, 12)) in pairs
    assert pairs[-1][1] == (12, 13)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_as_the_config_says(tmp_path, bos, eos):
    tokenizer = load_tokenizer(llama(tmp_path, add_bos_token=bos, add_eos_token=eos))
    inner = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    assert tokenizer("a cat")["input_ids"] == [1] * bos + inner + [2] * eos
    assert tokenizer([""])["input_ids"] == [[1] * bos + [2] * eos]
    row = tokenizer("a cat", return_offsets_mapping=True)
    assert len(row["offset_mapping"]) == len(row["input_ids"])
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")("a cat")["input_ids"] == [1] * bos + inner + [2] * eos


def test_settings_of_the_first_converted_weights(tmp_path):
    """Empty special tokens and a class of another name, as in the first conversions of LLaMA: the model file knows better."""
    folder = llama(tmp_path, bos_token="", eos_token="", unk_token="", tokenizer_class="LLaMATokenizer")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer("a")["input_ids"][0] == 1
    tokenizer = load_tokenizer(llama(tmp_path, bos_token="</s>"))
    assert (tokenizer.bos_token, tokenizer("a")["input_ids"][0]) == ("</s>", 2), "but settings that name a token count"


def test_pad_of_chinese_alpaca_is_the_last_token(folders, alpaca):
    """It stands in special_tokens_map.json alone; the model file has every number below it."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folders["alpaca"] / "tokenizer.model")).get_piece_size()
    assert (alpaca.pad_token_id, len(alpaca), alpaca.vocab_size) == (pieces, pieces + 1, pieces)
    assert alpaca("a[PAD]", add_special_tokens=False)["input_ids"][-1] == pieces
    assert alpaca.decode([pieces]) == "[PAD]" and alpaca.decode([pieces], skip_special_tokens=True) == ""


@pytest.mark.parametrize("source", ["added_tokens.json", "added_tokens_decoder", "tokenizer.json"])
def test_added_tokens_wherever_they_are_written(folders, tmp_path, source):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    copy_tokenizer(folders["llama"], folder)
    size = len(load_tokenizer(folder))
    token = {"content": "<|im_end|>", "special": True}
    if source == "added_tokens.json":
        (folder / source).write_text(json.dumps({"<|im_end|>": size + 1, "<|im_start|>": size}))
    elif source == "tokenizer.json":
        (folder / source).write_text(json.dumps({"added_tokens": [{"id": size + 1, **token}]}))
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {source: {str(size + 1): token}}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("hi<|im_end|>", add_special_tokens=False)["input_ids"][-1] == size + 1
    assert size + 1 not in tokenizer("hi<|im_end|>", split_special_tokens=True)["input_ids"]


def test_the_tokenizers_own_end_comes_first_and_others_are_control_tokens_of_its(tmp_path):
    words = tiny.tokenizer(tmp_path)
    end = len(words)
    words.add_tokens(["<|end|>", "<|eot|>", "<|eom|>", "<|eos|>"], special_tokens=True)
    words.save_pretrained(tmp_path)
    assert end_tokens(tmp_path, words) == [2]
    config = {"eos_token_id": [end, 2, 300], "text_config": {"eos_token_id": [1, end + 3]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end_tokens(tmp_path, words) == [2, end, end + 3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end + 1, end, 0, 99999, end + 2]}))
    assert end_tokens(tmp_path, words) == [2, end, end + 3, end + 1, end + 2]


def test_settings_beside_a_model_file_and_the_mark_of_an_editor(folders, tmp_path):
    """special_tokens_map.json comes before the configuration, unless that says which tokens were added."""
    folder = llama(tmp_path, pad_token="<unk>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>", "bos_token": ""}))
    (folder / "chat_template.jinja").write_text("\ufeff{{ messages }}", "utf-8")
    words = read_tokenizer(folder)
    assert (words.pad_token, words.bos_token, words.chat_template) == ("</s>", "<s>", "{{ messages }}")
    added = {"2": {"content": "</s>", "special": True}}
    llama(tmp_path, pad_token="<unk>", added_tokens_decoder=added)
    assert read_tokenizer(folder).pad_token == "<unk>"


@pytest.mark.parametrize(
    ("flags", "text", "parts"),
    [
        ({}, "the  <x>  cat", ["the  ", "  cat"]),
        ({"lstrip": True}, "the  <x>  cat", ["the", "  cat"]),
        ({"rstrip": True}, "the  <x>  cat", ["the  ", "cat"]),
        ({"lstrip": True, "rstrip": True}, "the  <x>  cat", ["the", "cat"]),
        ({"single_word": True}, "the <x> cat", ["the ", " cat"]),
        ({"single_word": True}, "the<x> cat", ["the<x> cat"]),
        ({"single_word": True}, "the <x>cat", ["the <x>cat"]),
    ],
)
def test_added_tokens_take_the_spaces_beside_them_or_stand_alone(tmp_path, flags, text, parts):
    words = load_tokenizer(llama(tmp_path))
    words.add_tokens([AddedToken("<x>", normalized=False, **flags)])
    ids, number = words(text, add_special_tokens=False)["input_ids"], words.convert_tokens_to_ids("<x>")
    first, *rest = (words.sp_model.encode(part) for part in parts)
    assert ids == first + [token for part in rest for token in [number, *part]]


def test_counting_tokens_needs_no_tokenizer(folders, tmp_path):
    for number, config in enumerate(({}, {"pad_token": "[PAD]"}, {"additional_special_tokens": ["<x>", "<s>"]})):
        folder = llama(tmp_path / str(number), **config)
        assert count_tokens(folder) == len(read_tokenizer(folder))
    assert count_tokens(folders["alpaca"]) == len(read_tokenizer(folders["alpaca"]))


def test_control_tokens_in_a_users_text_stay_text(alpaca):
    for text in ("</s>", "<s>[PAD]<unk>", "我</s>是"):
        ids = alpaca(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert not set(ids) & set(alpaca.all_special_ids)
        assert alpaca.decode(ids, skip_special_tokens=True) == text
    assert alpaca("我</s>是", add_special_tokens=False)["input_ids"].count(2) == 1


def test_text_after_an_added_token_with_and_without_legacy(tmp_path):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama(tmp_path / "a") / "tokenizer.model"))
    fresh = load_tokenizer(tmp_path / "a")("the</s>cat sat", add_special_tokens=False)["input_ids"]
    assert fresh == [*reference.encode("the"), 2, *reference.encode("cat sat")]
    continued = load_tokenizer(llama(tmp_path / "b", legacy=False))
    ids = continued("the</s>cat sat", add_special_tokens=False)["input_ids"]
    before, after = ids[: ids.index(2)], ids[ids.index(2) + 1 :]
    assert before == reference.encode("the"), "a text begins with a space in any case"
    assert "".join(reference.id_to_piece(after)) == "cat▁sat"
    assert continued.decode(ids) == "the</s>cat sat"


def test_of_added_tokens_that_begin_alike_the_longest_is_found(tmp_path):
    words = load_tokenizer(llama(tmp_path / "a"))
    words.add_tokens(["<im", "<im_start>"])
    assert words.tokenize("<im_start><im")[-2:] == ["<im_start>", "<im"]


def test_decoding_loses_nothing(alpaca):
    for text in TEXTS:
        if "▁" not in text:
            assert alpaca.decode(alpaca(text)["input_ids"], skip_special_tokens=True) == text
    assert alpaca.decode(alpaca("a\n🙂")["input_ids"]) == "<s>a\n🙂"
    assert alpaca.batch_decode(alpaca(["中国", "🙂"])["input_ids"], skip_special_tokens=True) == ["中国", "🙂"]
    assert alpaca.convert_tokens_to_string(alpaca.tokenize("中国 🙂\n")) == "中国 🙂\n"


def test_whole_characters_while_streaming(alpaca):
    """PITFALLS 9: what is decoded so far only grows, but for the replacement characters of a character still to come."""
    ids = alpaca("你🙂好 龘\n的", add_special_tokens=False)["input_ids"]
    so_far = ""
    for count in range(1, len(ids) + 1):
        text = alpaca.decode(ids[:count])
        whole = text.rstrip("\ufffd")
        assert whole.startswith(so_far)
        so_far = whole
    assert so_far == "你🙂好 龘\n的"


def test_rows_beyond_the_vocabulary_decode_to_nothing(alpaca):
    """Models padded to a multiple of 64 rows may give numbers that no token has."""
    assert alpaca.decode([*alpaca("中国")["input_ids"], len(alpaca) + 7], skip_special_tokens=True) == "中国"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_truncation(alpaca, side, monkeypatch):
    batch = alpaca(["中国的首都是北京", "a"], padding=True, padding_side=side, return_tensors="pt")
    short = batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()
    assert short == alpaca("a")["input_ids"] and batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][1][~batch["attention_mask"][1].bool()] == alpaca.pad_token_id).all()
    padded = alpaca.pad([{"input_ids": [1, 5]}, {"input_ids": [1]}], padding_side=side, return_tensors="pt")
    assert padded["input_ids"].tolist()[1] == ([alpaca.pad_token_id, 1] if side == "left" else [1, alpaca.pad_token_id])
    whole = alpaca("中国的首都是北京")["input_ids"]
    monkeypatch.setattr(alpaca, "truncation_side", side)
    for special in (True, False):
        cut = alpaca("中国的首都是北京", truncation=True, max_length=4, add_special_tokens=special, return_offsets_mapping=True)
        kept = whole[1:][-(4 - special) :] if side == "left" else whole[1:][: 4 - special]
        assert cut["input_ids"] == [alpaca.bos_token_id] * special + kept
        assert cut["offset_mapping"][-1][1] == (8 if side == "left" else cut["offset_mapping"][-1][1])


def test_pairs_go_the_librarys_way(alpaca):
    assert alpaca("中国", "北京")["input_ids"] == alpaca("中国")["input_ids"] + alpaca("北京")["input_ids"]


def test_chat_templates(alpaca):
    chat, template = [{"role": "user", "content": "你好</s>"}], "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    ids = alpaca.apply_chat_template(chat, chat_template=template, return_dict=False)
    assert ids == alpaca("<s>你好</s></s>", add_special_tokens=False)["input_ids"]
    clean = alpaca.apply_chat_template(chat, chat_template=template, sanitize_control_tokens=True, return_dict=False)
    assert clean.count(alpaca.eos_token_id) == 1 and alpaca.decode(clean, skip_special_tokens=True).strip() == "你好</s>"


def test_saved_folders_name_no_class_of_ours(folders, alpaca, tmp_path):
    alpaca.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and "backend" not in config and "auto_map" not in config
    assert (tmp_path / "tokenizer.model").read_bytes() == (folders["alpaca"] / "tokenizer.model").read_bytes()
    again = load_tokenizer(tmp_path)
    for option in (True, False):
        assert again(TEXTS, split_special_tokens=option) == alpaca(TEXTS, split_special_tokens=option)
    assert again.special_tokens_map == alpaca.special_tokens_map and len(again) == len(alpaca)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(plain), plain.pad_token_id, plain("a")["input_ids"][0]) == (len(alpaca), alpaca.pad_token_id, 1)


def test_a_tokenizer_saved_beside_other_files_leaves_its_chat_template_out(tmp_path):
    words = tiny.tokenizer(tmp_path / "base")
    words.chat_template = "{{ messages }}"
    (tmp_path / "out" / "tokenizer.json").mkdir(parents=True)  # what is in the way
    (tmp_path / "out" / "other").write_text("x")
    save_whole(words, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"other", "tokenizer.json", "tokenizer_config.json"} and words.chat_template == "{{ messages }}"
    again = load_tokenizer(tmp_path / "out")
    assert again.chat_template is None and again(TEXTS)["input_ids"] == words(TEXTS)["input_ids"]


def test_copies_pickles_and_types(alpaca):
    assert isinstance(alpaca, PreTrainedTokenizerBase)
    for twin in (pickle.loads(pickle.dumps(alpaca)), copy.deepcopy(alpaca)):  # noqa: S301
        assert twin(TEXTS, return_offsets_mapping=True) == alpaca(TEXTS, return_offsets_mapping=True)
        assert twin.decode(twin("🙂")["input_ids"]) == "<s>🙂"


def test_saving_says_where_transformers_alone_differs(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "utils.models.tokenizer.SAMPLES", TEXTS
    )  # the twin's few pieces do not meet in the sentences for real models
    save_tokenizer(read_tokenizer(folders["alpaca"]), folders["alpaca"], tmp_path)
    for file in folders["alpaca"].iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    plain = AutoTokenizer.from_pretrained(folders["alpaca"])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folders["alpaca"] / "tokenizer.model"))
    count = sum(plain(text, add_special_tokens=False)["input_ids"] != reference.encode(text) for text in TEXTS)
    assert capsys.readouterr().out == (
        f"{count} of {len(TEXTS)} sample texts get other ids from a plain AutoTokenizer than from SentencePiece, with which "
        "the model was trained; the right ones: utils.models.tokenizer.load_tokenizer(folder)\n"
    )


def test_settings_that_transformers_cannot_use_are_written_anew(tmp_path, capsys):
    broken = llama(tmp_path / "a", bos_token="", eos_token="", unk_token="", tokenizer_class="LLaMATokenizer")
    (tmp_path / "b").mkdir()
    save_tokenizer(read_tokenizer(broken), broken, tmp_path / "b")
    assert "rewritten" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("the cat")["input_ids"][0] == 1


def test_byte_level_tokenizers_are_transformers_own(tmp_path):
    tiny.tokenizer(tmp_path)
    plain, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert type(ours) is type(plain) and ours(TEXTS)["input_ids"] == plain(TEXTS)["input_ids"]
    row = ours("你</s>", add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    assert ours.eos_token_id not in row["input_ids"] and row["offset_mapping"][-1] == (4, 5)


def test_every_tokenizer_can_pad(tmp_path, capsys):
    tokenizer = load_tokenizer(llama(tmp_path))
    assert tokenizer.pad_token == "<unk>" and "names no padding token" in capsys.readouterr().out
    assert read_tokenizer(tmp_path).pad_token is None


def test_errors_are_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds neither tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folders["llama"] / "tokenizer.model").read_bytes()[:3000])
    with pytest.raises(UserError, match="not a complete SentencePiece model"):
        load_tokenizer(tmp_path)


def test_files_of_two_stages_are_refused(folders, tmp_path):
    """PITFALLS 5: LLaMA's added_tokens.json beside Chinese-LLaMA's model would give [PAD] the number of a Chinese piece."""
    copy_tokenizer(folders["alpaca"], tmp_path)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folders["llama"] / "tokenizer.model")).get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    with pytest.raises(UserError, match=rf"number {size} to \[PAD\].*one model"):
        load_tokenizer(tmp_path)
