"""utils/datasets/documents.py and stages.py: which texts are read, how they are cut, and that each token is learned once."""

import gzip
import itertools
import json

import pytest

from utils.console import UserError
from utils.datasets.documents import read_documents
from utils.datasets.encoding import IGNORED, encode_documents
from utils.datasets.stages import INSTRUCTION, READERS, TEXT, stage_of
from utils.models.tokenizer import load_tokenizer

LINE = "白日依山尽，黄河入海流。\n"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_documents_of_every_kind_of_file(tmp_path, capsys):
    items = ({"text": "甲"}, {"text": " "}, {"text": "乙", "id": 3}, {"other": 1})
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    path = write(tmp_path / "a.jsonl", lines)
    assert list(read_documents(path)) == ["甲", "乙"]
    said = f"{path}: 2 of 4 documents dropped, which have no text (the first: {path}, line 2)\n"
    assert capsys.readouterr().out == said
    assert list(read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + LINE.encode()))) == [LINE]
    assert list(read_documents(write(tmp_path / "gbk.txt", (LINE * 3).encode("gb18030")))) == [LINE * 3]
    assert "gbk.txt: is not UTF-8; read as GB18030 (GBK)" in capsys.readouterr().out
    assert list(read_documents(write(tmp_path / "A.MD.gz", gzip.compress(LINE.encode())))) == [LINE]
    open_end = LINE + LINE.strip()
    assert list(read_documents(write(tmp_path / "b.txt", open_end))) == [open_end]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", LINE.encode() * 9 + b"\xff\xfe", "bytes that are not UTF-8"),
        ("a.md", " \n ", "holds no text"),
        ("in.txt", "春 江\n", "is one half of couplets; first run python data/couplets/prepare.py"),
        ("a.jsonl", '{"text": ""}', "holds no text"),
    ],
)
def test_what_holds_no_text_is_one_line(tmp_path, name, content, words):
    (tmp_path / "out.txt").write_text("秋 月\n")
    with pytest.raises(UserError, match=words):
        assert stage_of(str(write(tmp_path / name, content))) == TEXT
        list(read_documents(tmp_path / name))


def test_a_large_text_is_read_in_parts_that_end_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.datasets.documents.LONGEST", 100)
    parts = list(read_documents(write(tmp_path / "a.txt", LINE * 10)))
    assert parts == [LINE * 2, LINE * 3, LINE * 3, LINE * 2]  # of 37 bytes each, read 100 at a time
    assert capsys.readouterr().out == f"{tmp_path}/a.txt: read as 4 documents, since it is longer than 0 MB\n"


@pytest.mark.parametrize("cutoff_len", [16, 17, 64])
def test_every_token_is_learned_once_after_what_stands_before_it(tiny_llama, cutoff_len):
    tokenizer = load_tokenizer(tiny_llama)
    text = LINE * 5
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces = encode_documents([text, "短"], tokenizer, cutoff_len)
    *long, short = pieces
    learned = [label for piece in long for label in piece.labels if label != IGNORED]
    assert learned == ids
    overlap = cutoff_len // 8
    for before, after in itertools.pairwise(long):
        assert len(before.input_ids) == cutoff_len and after.input_ids[:overlap] == before.input_ids[-overlap:]
        assert after.labels[:overlap] == [IGNORED] * overlap and after.labels[overlap:] == after.input_ids[overlap:]
    assert short.input_ids == short.labels and short.input_ids[-1] == tokenizer.eos_token_id


def test_a_document_that_just_fits_is_one_piece(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    length = len(tokenizer(LINE, add_special_tokens=False)["input_ids"]) + 2
    assert len(encode_documents([LINE], tokenizer, length)) == 1
    assert [len(piece.input_ids) for piece in encode_documents([LINE], tokenizer, length - 1)] == [
        length - 1,
        (length - 1) // 8 + 1,
    ]


def test_the_form_of_the_records_says_the_stage(tmp_path):
    text, chat = (
        write(tmp_path / "a.jsonl", '{"text": "甲"}'),
        write(tmp_path / "b.json", '[{"instruction": "a", "output": "b"}]'),
    )
    both = write(tmp_path / "c.json", '[{"instruction": "a", "output": "b", "text": "Below is …"}]')
    assert stage_of(str(text)) == TEXT and stage_of(f"{chat},{both}") == INSTRUCTION
    with pytest.raises(UserError, match=r"a\.jsonl holds raw text, .*b\.json holds questions and answers"):
        stage_of(f"{text},{chat}")


ITEMS = {
    "raw text": {"text": "甲"},
    "questions and answers": {"instruction": "甲", "output": "乙"},
    "preferences": {"instruction": "甲", "chosen": "乙", "rejected": "丙"},
    "answers with a label": {"instruction": "甲", "output": "乙", "label": False},
}


@pytest.mark.parametrize("first", ITEMS)
def test_of_a_file_of_mixed_records_the_first_decides_and_the_others_are_announced_and_counted(tmp_path, capsys, first):
    others = [name for name in ITEMS if name != first]
    items = [ITEMS[name] for name in (first, *others, first)]
    path = write(tmp_path / "a.jsonl", "\n".join(["{broken", *map(json.dumps, items)]))
    stage = stage_of(str(path), "instruction" if first == "questions and answers" else "")
    told = capsys.readouterr().out
    read_as_such = {"answers with a label": "preferences", "questions and answers": "answers with a label"}.get(first)
    for line, name in enumerate(others, 3):
        assert (f"it also holds {name} (the first: {path}, line {line})" in told) == (name != read_as_such)
    assert len(list(READERS[stage](path, ()))) == (4 if first == "answers with a label" else 2)  # a pair is two of them
    assert "dropped" in capsys.readouterr().out
    for count, announced in ((999, True), (1000, False)):  # of a long file its first thousand records are looked at
        write(
            path,
            "\n".join(
                json.dumps(one) for one in [*[ITEMS[first]] * count, ITEMS["raw text" if "raw" not in first else others[0]]]
            ),
        )
        stage_of(str(path), "instruction" if first == "questions and answers" else "")
        assert ("it also holds" in capsys.readouterr().out) == announced
