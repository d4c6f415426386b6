"""utils/datasets/file_formats.py: every format gives the same records, broken files are one line, long ones little memory."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import RECORDS, ROOT, as_csv, as_lines, as_parquet, huge

from utils.console import UserError
from utils.datasets import json_items
from utils.datasets.csv_items import delimiter_of
from utils.datasets.file_formats import read_items
from utils.datasets.items import UnreadableItem
from utils.datasets.records import read_records

FORMATS = {
    "array.json": lambda path: json.dumps(RECORDS, ensure_ascii=False, indent=1),
    "one_line.json": lambda path: json.dumps(RECORDS),
    "crlf.json": lambda path: json.dumps(RECORDS, indent=4).replace("\n", "\r\n"),
    "lines.jsonl": lambda path: as_lines(RECORDS),
    "lines.json": lambda path: as_lines(RECORDS),
    "crlf.jsonl": lambda path: as_lines(RECORDS).replace("\n", "\r\n").rstrip(),
    "table.csv": lambda path: as_csv(RECORDS),
    "table.tsv": lambda path: as_csv(RECORDS, "\t"),
    "bom.json": lambda path: "\ufeff" + json.dumps(RECORDS),
    "bom.jsonl": lambda path: "\ufeff" + as_lines(RECORDS),
    "bom.csv": lambda path: "\ufeff" + as_csv(RECORDS),
    "table.parquet": lambda path: as_parquet(RECORDS, path),
}
ONE_LINE = [1, "line 1, item 2", "line 1, item 3"]
# as messages name the records
PLACES = {".csv": [2, 4, 5], ".tsv": [2, 4, 5], ".jsonl": [1, 2, 3], ".parquet": ["row 1", "row 2", "row 3"]}
PLACES |= {"lines.json": [1, 2, 3], "one_line.json": ONE_LINE, "bom.json": ONE_LINE, ".json": [2, 7, 12]}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name, zipped):
    content = FORMATS[name](tmp_path / name)
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert list(read_records(path, strict=True)) == RECORDS
    assert [place for place, _ in read_items(path)] == PLACES.get(name, PLACES.get(Path(name).suffix))


def test_format_is_told_by_content_not_by_name(tmp_path):
    path = tmp_path / "download"
    path.write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    assert list(read_records(path)) == RECORDS


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 1, 4]),
    ascii=st.booleans(),
    chunk=st.integers(1, 40),
    ending=st.sampled_from(["", "\n", "\r\n \t"]),
)
def test_array_is_parsed_the_same_however_it_is_cut_into_chunks(tmp_path_factory, items, indent, ascii, chunk, ending):
    path = tmp_path_factory.getbasetemp() / "chunks.json"
    text = json.dumps(items, indent=indent, ensure_ascii=ascii) + ending
    path.write_text(text, "utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_items, "CHUNK", chunk)
        assert [item for _, item in read_items(path)] == items


@settings(max_examples=60, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 40))
def test_array_that_is_cut_off_is_an_error(tmp_path_factory, data, chunk):
    path = tmp_path_factory.getbasetemp() / "cut.json"
    text = json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()
    path.write_bytes(text[: data.draw(st.integers(1, len(text) - 1))])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="cut off in line"):
        patch.setattr(json_items, "CHUNK", chunk)
        list(read_items(path))


def test_lines_of_items(tmp_path):
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps(RECORDS, indent=1))
    lines.write_text("\n" + as_lines(RECORDS).replace("\n", "\n\n"))
    assert [line for line, _ in read_items(array)] == [2, 7, 12]
    assert [line for line, _ in read_items(lines)] == [2, 4, 6]
    lines.write_text(as_lines(RECORDS * 1000))  # which are read in several parts
    assert [line for line, _ in read_items(lines)] == list(range(1, 3001))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "no record in it can be used (it holds none)"),
        (b"[]", "no record in it can be used (it holds none)"),
        (b"\x89PNG\r\n\x1a\n", "is neither UTF-8 nor surely GB18030"),
        ("你好\n".encode(), "is neither JSON"),
        ("[1]".encode("utf-16"), "(a number, not an object: 1)"),
        (b'{\n "instruction": "a",\n "output": "b"\n}', "one JSON object over several lines"),
        (b'[{"instruction": "a"} {"instruction": "b"}]', "a , is missing) in line 1"),
        (b'[{"instruction": "a"\n, nonsense}]', "is not JSON (Expecting property name enclosed in double quotes) in line 2"),
        (b'[{"instruction": "a", "output": "b"}]\n1', "continues after the end of its array in line 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b"PAR1 and nothing else", "cut off or damaged (Parquet"),
        (gzip.compress(json.dumps(RECORDS).encode(), mtime=0)[:-20], "cut off or damaged (gzip)"),
        (b"\x1f\x8b\x08garbage and more garbage", "gzip"),
        (b'{"data": [1]}\n', "no record in it can be used (instruction is missing: 1)"),
        (b"not json\n" * 3, "is neither JSON"),
    ],
)
def test_file_that_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_records(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_csv_without_the_right_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("问题,答案\na,b\n")
    with pytest.raises(UserError, match="called instruction; it has '问题', '答案': rename these"):
        list(read_records(path))
    path.write_text('instruction,output\na,b\nc\n"unclosed,d\n')
    with pytest.raises(UserError, match="is not CSV"):
        list(read_records(path))


def test_csv_rows_that_do_not_fit_and_cells_that_hold_history(tmp_path, capsys):
    path = tmp_path / "a.csv"
    history = json.dumps([["q", "a"]]).replace('"', '""')
    path.write_text(f'instruction,output,history\na,b,"{history}"\nc\nd,e,,\n"f\nf",{"g" * 200_000},\n')
    assert list(read_records(path)) == [
        {"instruction": "a", "input": "", "output": "b", "history": [["q", "a"]]},
        {"instruction": "f\nf", "input": "", "output": "g" * 200_000},
    ]
    said = capsys.readouterr().out
    assert f"1 dropped, 2 kept: fewer cells than the header; first: {path}, line 3" in said
    assert f"1 dropped, 2 kept: more cells than the header; first: {path}, line 4" in said


def test_lines_that_end_with_a_comma_are_records_too(tmp_path):
    (tmp_path / "a.jsonl").write_text("\ufeff" + as_lines(RECORDS).replace("\n", " ,\n"), "utf-8")
    assert list(read_records(tmp_path / "a.jsonl")) == RECORDS


def test_a_tsv_file_written_without_quoting_keeps_its_rows(tmp_path, capsys):
    path = tmp_path / "a.TSV"
    path.write_text('instruction\tinput\toutput\n"一\t材料\t二\n三\t材料\t四\n五"\t材料\t六\n"七"\t\t八\n', "utf-8")
    assert [record["instruction"] for record in read_records(path)] == ['"一', "三", '五"', '"七"']
    assert "quotation marks do not enclose cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "header", "delimiter"),
    [
        ("a.tsv", "问;x,\t答,y", "\t"),
        ("a.csv", "问\t答,;", ","),
        ("a.tsv", "question,answer", ","),
        ("a.csv", "question;answer", ";"),
    ],
)
def test_the_delimiter_is_the_usual_one_unless_another_gives_names_that_are_known(tmp_path, name, header, delimiter):
    assert delimiter_of(tmp_path / name, io.BytesIO(header.encode())) == delimiter


def test_a_quoted_table_keeps_line_breaks_in_cells_which_are_counted(tmp_path, capsys):
    path = tmp_path / "a.tsv"
    path.write_text('Instruction\t Output\n"一\n二"\t"a\tb"\n"c ""d"""\te\n', "utf-8")
    assert [(record["instruction"], record["output"]) for record in read_records(path)] == [("一\n二", "a\tb"), ('c "d"', "e")]
    assert "1 rows have a line break in a cell" in capsys.readouterr().out
    path.write_text('instruction\toutput\n"c ""d"""\te\nf\tg\n', "utf-8")  # the doubled ones tell that it is quoted
    assert [record["instruction"] for record in read_records(path)] == ['c "d"', "f"] and not capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        'instruction,output\r"a, ""b""",c\rd,e\r',
        '\n\r\ninstruction,output\n"a, ""b""",c\nd,e\n',
        'instruction,output\n"a, \\"b\\"",c\nd,e\n',
    ],
    ids=["CR", "blank lines first", "backslashes"],
)
def test_tables_as_old_and_other_programs_write_them(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert [(one["instruction"], one["output"]) for one in read_records(tmp_path / "a.csv")] == [('a, "b"', "c"), ("d", "e")]


def test_the_separator_is_found_and_a_column_twice_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt;response;messages\na,b;c;\n")
    assert list(read_records(path)) == [{"instruction": "a,b", "input": "", "output": "c"}]
    path.write_text("instruction,output,output\na,b,c\n")
    with pytest.raises(UserError, match="two columns are called output"):
        list(read_records(path))


TEXTS = [{"instruction": f"第{number}个问题：卢拳", "input": "", "output": "剩下的回答"} for number in range(9)]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_an_encoding_is_the_files_and_printed(tmp_path, capsys, encoding, name):
    """GBK bytes of 卢拳 are valid UTF-8 (two Cyrillic letters), so that no row may be decided by itself."""
    path = tmp_path / name
    content = json.dumps(TEXTS, ensure_ascii=False) if name == "a.json" else as_csv(TEXTS) if "csv" in name else as_lines(TEXTS)
    data = content.encode(encoding)
    path.write_bytes(gzip.compress(data) if "gz" in name else data)
    assert list(read_records(path)) == TEXTS
    assert ("is not UTF-8; read as" in capsys.readouterr().out) == (encoding != "utf-8-sig")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("big5", "臺灣的問題與這個國語詞彙"),
        ("shift_jis", "これはにほんごのテキストです"),
        ("euc_jp", "東京の歴史を紹介してください"),
        ("euc_kr", "서울의 역사를 소개해 주세요"),
    ],
)
def test_text_in_an_unknown_encoding_is_refused(tmp_path, encoding, text):
    """Also where its bytes could be Chinese characters that nobody would write one after the other."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines([{"instruction": text, "output": text}] * 3).encode(encoding))
    with pytest.raises(UserError, match="neither UTF-8 nor surely GB18030"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04....", "zip archive or an Excel file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel or Word file"),
        (b"%PDF-1.7", "is a PDF"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
        (b"Rar!\x1a\x07", "is a RAR archive"),
        (b"BZh91AY", "bunzip2"),
        (b"\xfd7zXZ\0", "unxz"),
        (b"\x28\xb5\x2f\xfd\x24", "unzstd"),
        (b"ORC\x08", "is an ORC table"),
        (b"\x93NUMPY\x01", "is a NumPy array"),
        (b"SQLite format 3\0", "is an SQLite database"),
        (b"a.json".ljust(257, b"\0") + b"ustar", "is a tar archive; unpack it"),
        (b"\x80\x04\x95", "is a Python pickle"),
        (b"<!DOCTYPE html><html>", "web page"),
        (gzip.compress(b"<html>", mtime=0), "web page"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, words):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_records(path))


def test_lists_of_turns_and_objects_that_hold_records(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = {"instruction": "a", "input": "", "output": "b"}
    for content, count in (
        (as_lines([turns] * 3), 3),
        (json.dumps([[record] * 2]), 2),
        (as_lines([{"data": [record] * 4}]), 4),
    ):
        path.write_text(content)
        assert list(read_records(path, strict=True)) == [record] * count


def test_byte_order_mark_amid_a_file_of_joined_parts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(RECORDS) + "\ufeff" + as_lines(RECORDS), "utf-8")
    assert list(read_records(path, strict=True)) == RECORDS * 2


def test_broken_lines_do_not_join_their_neighbours(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}, {"a": 2}\n{"a": [1\n2]}\n{"a": 3}')
    items = [item for _, item in read_items(path)]
    assert [isinstance(item, UnreadableItem) for item in items] == [True, True, True, False]


def test_closing_early_closes_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(RECORDS))
    with contextlib.closing(read_items(path)) as items:
        next(items)
    assert str(path) not in {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}


@pytest.mark.parametrize("name", ["big.json", "big.jsonl", "big.csv", "big.json.gz"])
def test_memory_stays_flat_however_long_the_file(tmp_path, name):
    record = {"instruction": "问" * 200, "input": "", "output": "答" * 800}
    if "csv" in name:
        content = as_csv([record] * 15_000)
    else:
        content = as_lines([record] * 15_000) if "jsonl" in name else json.dumps([record] * 15_000, ensure_ascii=False)
    (tmp_path / name).write_bytes(gzip.compress(content.encode(), 1) if name.endswith("gz") else content.encode())
    program = (
        "import re, sys\nfrom utils.datasets.records import read_records\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10\n"
        "before = peak()\nprint(sum(1 for _ in read_records(sys.argv[1])), peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    count, grown = map(int, done.stdout.split())
    assert count == 15_000
    assert grown < 25, f"{len(content.encode()) >> 20} MB were read with {grown} MB"


def test_huge_text_takes_linear_time_and_is_kept(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([huge(1_000_000)] * 6, ensure_ascii=False), "utf-8")
    assert list(read_records(path)) == [huge(1_000_000)] * 6
