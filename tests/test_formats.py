"""utils/formats.py: every format gives the same records, broken files are one line, and long ones take little memory."""

import contextlib
import gzip
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import RECORDS, ROOT, as_csv, as_lines, as_parquet, huge

from utils import formats
from utils.console import UserError
from utils.formats import Broken, read_items
from utils.records import read_records

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


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name, zipped):
    content = FORMATS[name](tmp_path / name)
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert list(read_records(path, strict=True)) == RECORDS


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
        patch.setattr(formats, "CHUNK", chunk)
        assert [item for _, item in read_items(path)] == items


@settings(max_examples=60, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 40))
def test_array_that_is_cut_off_is_an_error(tmp_path_factory, data, chunk):
    path = tmp_path_factory.getbasetemp() / "cut.json"
    text = json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()
    path.write_bytes(text[: data.draw(st.integers(1, len(text) - 1))])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="cut off in line"):
        patch.setattr(formats, "CHUNK", chunk)
        list(read_items(path))


def test_lines_of_items(tmp_path):
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps(RECORDS, indent=1))
    lines.write_text("\n" + as_lines(RECORDS).replace("\n", "\n\n"))
    assert [line for line, _ in read_items(array)] == [2, 7, 12]
    assert [line for line, _ in read_items(lines)] == [2, 4, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "no record in it can be used (it holds none)"),
        (b"[]", "no record in it can be used (it holds none)"),
        (b"\x89PNG\r\n\x1a\n", "is neither JSON"),
        ("你好\n".encode(), "is neither JSON"),
        ("[1]".encode("utf-16"), "is UTF-16"),
        (b'{\n "instruction": "a",\n "output": "b"\n}', "one JSON object over several lines"),
        (b'[{"instruction": "a"} {"instruction": "b"}]', "a , is missing) in line 1"),
        (b'[{"instruction": "a"\n, nonsense}]', "is not JSON (Expecting property name enclosed in double quotes) in line 2"),
        (b'[{"instruction": "a", "output": "b"}]\n[1]', "goes on after the end of its array in line 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b"PAR1 and nothing else", "cut off or damaged (Parquet"),
        (gzip.compress(json.dumps(RECORDS).encode())[:-20], "cut off or damaged (gzip)"),
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
    path.write_text("question,answer\na,b\n")
    with pytest.raises(UserError, match="no column of its first line is called instruction"):
        list(read_records(path))
    path.write_text('instruction,output\na,b\nc\n"unclosed,d\n')
    with pytest.raises(UserError, match="is not CSV"):
        list(read_records(path))


def test_csv_rows_that_do_not_fit_and_cells_that_hold_history(tmp_path, capsys):
    path = tmp_path / "a.csv"
    history = json.dumps([["q", "a"]]).replace('"', '""')
    path.write_text(f'instruction,output,history\na,b,"{history}"\nc\nd,e,,\n"f\nf",g,\n')
    assert list(read_records(path)) == [
        {"instruction": "a", "input": "", "output": "b", "history": [["q", "a"]]},
        {"instruction": "f\nf", "input": "", "output": "g"},
    ]
    said = capsys.readouterr().out
    assert f"1 dropped, 2 kept: fewer cells than the header; first: {path}, line 3" in said
    assert f"1 dropped, 2 kept: more cells than the header; first: {path}, line 4" in said


def test_byte_order_mark_amid_a_file_of_joined_parts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(RECORDS) + "\ufeff" + as_lines(RECORDS), "utf-8")
    assert list(read_records(path, strict=True)) == RECORDS * 2


def test_broken_lines_do_not_join_their_neighbours(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}, {"a": 2}\n{"a": [1\n2]}\n{"a": 3}')
    items = [item for _, item in read_items(path)]
    assert [isinstance(item, Broken) for item in items] == [True, True, True, False]


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
        "import re, sys\nfrom utils.records import read_records\n"
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
