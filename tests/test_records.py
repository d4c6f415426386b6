"""utils/records.py, formats.py and sources.py: what is read, what is dropped and said, what is written."""

import contextlib
import gzip
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import formats
from utils.console import UserError
from utils.formats import Broken, read_items
from utils.records import (
    Mended,
    Tally,
    all_good,
    as_record,
    one_by_one,
    read_records,
    write_records,
)
from utils.sources import data_files, sources

ROOT = Path(__file__).parent.parent
RECORDS = [
    {"instruction": "写一句诗，\n要押韵", "input": "", "output": '床前"明月"光'},
    {"instruction": "翻译😀", "input": "good, morning", "output": "早上好\t\\"},
    {"instruction": "Say hi", "input": "", "output": "hi"},
]


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def as_csv(records, separator=","):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    rows = [separator.join(map(cell, record.values())) for record in records]
    return "\r\n".join([separator.join(records[0]), *rows]) + "\r\n"


def as_parquet(records, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path.read_bytes()


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


DIRTY = [
    (b'{"input": "x", "output": "y"}', "instruction is missing"),
    (b'{"instruction": null, "output": "y"}', "instruction is missing"),
    (b'{"instruction": "  ", "output": "y"}', "instruction is empty"),
    (b'{"instruction": "x"}', "output is missing"),
    (b'{"instruction": "x", "output": "\\n"}', "output is empty"),
    (b'{"instruction": 5, "output": "y"}', "instruction is a number"),
    (b'{"instruction": "x", "output": ["y"]}', "output is a list"),
    (b'{"instruction": "x", "input": {}, "output": "y"}', "input is an object"),
    (b'{"instruction": "x", "output": true}', "output is true or false"),
    (b'{"instruction": "x", "system": 1, "output": "y"}', "system is a number"),
    (b'{"instruction": "x", "output": "y", "history": "z"}', "history is not a list"),
    (b'{"instruction": "x", "output": "y", "history": [["a"]]}', "history is not a list of pairs of texts"),
    (b'{"instruction": "x", "output": "y", "history": [["a", ""]]}', "history holds an empty turn"),
    (b'["x", "y"]', "a list, not an object"),
    (b"null", "null, not an object"),
    (b'{"instruction": "x", "outp', "not JSON"),
    (b'{"instruction": "\xff", "output": "y"}', "not UTF-8"),
    (b'{"instruction": "\\ud83d", "output": "y"}', "a lone surrogate"),
    (b'{"instruction": "x", "output": "y", "more": ' + b"[" * 3000 + b"]" * 3000 + b"}", "nested too deeply"),
    (b'{"conversations": [{"from": "human", "value": "x"}]}', "output is missing"),
    (b'{"conversations": []}', "a dialogue without turns"),
    (b'{"conversations": "x"}', "a dialogue that is not a list of turns"),
    (b'{"conversations": [{"from": "gpt", "value": "x"}]}', "a dialogue whose turns are out of order"),
    (b'{"conversations": [{"from": "parrot", "value": "x"}]}', "a dialogue with the unknown role 'parrot'"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]}', "turns are out of order"),
    (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "x"}]}',
        "a dialogue with parts that are not text",
    ),
    (b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "x"}]}', "instruction is missing"),
]


@pytest.mark.parametrize(("line", "cause"), DIRTY)
def test_dirty_records_are_counted_by_cause_and_dropped(tmp_path, capsys, line, cause):
    path = tmp_path / "a.jsonl"
    good = json.dumps(RECORDS[0]).encode()
    path.write_bytes(b"\n".join([good, line, good, line, good]) + b"\n")
    assert list(read_records(path)) == [RECORDS[0]] * 3
    said = capsys.readouterr().out
    assert "2 dropped, 3 kept: " in said
    assert cause in said
    assert f"first: {path}, line 2: " in said
    with pytest.raises(UserError, match=f"{path}, line 2: .*{cause.split('(')[0]}.*--strict"):
        list(read_records(path, strict=True))


@pytest.mark.parametrize(("line", "cause"), [pair for pair in DIRTY if pair[1] not in ("not JSON", "nested too deeply")])
def test_dirty_records_in_an_array(tmp_path, capsys, line, cause):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + json.dumps(RECORDS[0]).encode() + b",\n" + line + b"]")
    assert list(read_records(path)) == [RECORDS[0]]
    assert cause in (said := capsys.readouterr().out)
    assert f"{path}, line 2: " in said


def test_dirty_record_in_an_array_on_one_line(tmp_path, capsys):
    """As baize's files are written: the line would always be 1."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([RECORDS[0], RECORDS[0], {"instruction": "a"}]))
    assert len(list(read_records(path))) == 2
    assert f"first: {path}, line 1, item 3: " in capsys.readouterr().out


def test_what_is_said_can_be_printed_whatever_the_record_holds(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"instruction": "\\ud83d\\u001b[31m", "output": "'
        + b"x" * 1000
        + b'"}\n\x1b[31m\xff\n{"instruction": "a", "output": "b"}'
    )
    assert len(list(read_records(path))) == 1
    said = capsys.readouterr().out
    said.encode()
    assert "\x1b" not in said
    assert max(map(len, said.splitlines())) < 200 + 2 * len(str(path))


def test_crlf_and_byte_order_marks_within_texts_are_mended_and_counted(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    dirty = {"instruction": "\ufeffa", "output": "b\r\nc\rd", "history": [["q\r\n", "a"]], "system": "s\r\n"}
    path.write_text(as_lines([dirty, RECORDS[0]]), "utf-8", newline="")
    assert list(read_records(path)) == [
        {"instruction": "a", "input": "", "output": "b\nc\nd", "history": [["q\n", "a"]], "system": "s\n"},
        RECORDS[0],
    ]
    assert "1 mended, 2 kept: CRLF or byte-order mark within a text" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: CRLF or byte-order mark"):
        list(read_records(path, strict=True))


def test_text_of_byte_order_marks_alone_is_empty(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "\ufeff", "output": "a"}, {"instruction": "a", "output": "\ufeff \ufeff"}]))
    with pytest.raises(UserError, match="instruction is empty: 1, output is empty: 1"):
        list(read_records(path))


FIELD = st.sampled_from(["a", "长", "", " ", "\u3000", "a\r\nb", "\ufeff", "\ufeffa", None, 1, ["a"]])
ITEM = st.one_of(
    st.fixed_dictionaries(
        {"instruction": FIELD, "input": FIELD, "output": FIELD},
        optional={"category": FIELD, "system": FIELD, "history": st.just([["a", "b"]])},
    ),
    st.dictionaries(st.sampled_from(["instruction", "input", "output", "x"]), FIELD),
    st.just(["instruction", "input", "output"]),
    st.just(Broken("not JSON", None)),
)
GOOD = st.fixed_dictionaries({"instruction": st.just("a"), "input": FIELD, "output": st.sampled_from(["b", ""])})


@settings(max_examples=300, deadline=None)
@given(items=st.lists(ITEM, max_size=3) | st.lists(GOOD, max_size=3), need_output=st.booleans(), convert=st.booleans())
def test_a_batch_taken_at_once_is_what_it_would_be_one_by_one(items, need_output, convert):
    converter = as_record if convert else lambda item: Mended(item, "put right")
    batch = list(enumerate(items, 1))
    at_once = all_good(batch, converter, need_output)
    tally = Tally()
    slow = [record for _, record in one_by_one("file", batch, converter, tally, need_output, None)]
    if at_once is not None:
        assert at_once == slow
        assert [list(record) for record in at_once] == [list(record) for record in slow]
        assert len(slow) == len(items)
        tally.kept = 1
        tally.report("file")
        assert not tally._found


def test_byte_order_mark_amid_a_file_of_joined_parts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines(RECORDS) + "\ufeff" + as_lines(RECORDS), "utf-8")
    assert list(read_records(path, strict=True)) == RECORDS * 2


DIALOGUES = {
    "sharegpt": {
        "id": "1",
        "conversations": [
            {"from": "system", "value": "你是助手"},
            {"from": "human", "value": "甲"},
            {"from": "gpt", "value": "乙"},
            {"from": "Human", "value": "丙"},
            {"from": "assistant", "value": "丁"},
        ],
    },
    "sharegpt with system beside": {
        "system": "你是助手",
        "conversations": [
            {"from": "user", "value": "甲"},
            {"from": "bard", "value": "乙"},
            {"from": "user", "value": "丙"},
            {"from": "chatgpt", "value": "丁"},
        ],
    },
    "openai": {
        "messages": [
            {"role": "system", "content": "你是助手"},
            {"role": "user", "content": "甲"},
            {"role": "assistant", "content": "乙"},
            {"role": "user", "content": "丙"},
            {"role": "assistant", "content": "丁"},
        ]
    },
    "openai in parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "你是"}, {"type": "text", "text": "助手"}]},
            {"role": "user", "content": [{"type": "text", "text": "甲"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "乙"}]},
            {"role": "user", "content": [{"type": "text", "text": "丙"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "丁"}]},
        ]
    },
    "alpaca": {"instruction": "丙", "input": None, "output": "丁", "history": [["甲", "乙"]], "system": "你是助手"},
}


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("parquet", [False, True], ids=["json", "parquet"])
def test_dialogue_formats_become_one(tmp_path, name, parquet):
    path = tmp_path / "dialogue"
    if parquet:
        as_parquet([DIALOGUES[name]], path)
    else:
        path.write_text(as_lines([DIALOGUES[name]]))
    expected = {"instruction": "丙", "input": "", "output": "丁", "history": [["甲", "乙"]], "system": "你是助手"}
    assert list(read_records(path, strict=True)) == [expected]


def test_two_different_system_texts_drop_the_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([DIALOGUES["sharegpt"] | {"system": "另一个"}]))
    with pytest.raises(UserError, match="two system texts: 1"):
        list(read_records(path))


def test_prompts_need_no_output(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(
        json.dumps(["你是谁？", {"instruction": "译", "input": "a", "output": None, "reference": "甲", "category": "x"}])
    )
    assert list(read_records(path, need_output=False)) == [
        {"instruction": "你是谁？", "input": "", "output": ""},
        {"instruction": "译", "input": "a", "output": "", "category": "x", "reference": "甲"},
    ]
    with pytest.raises(UserError, match="output is missing: 2"):
        list(read_records(path))


def test_dialogue_that_waits_for_its_answer_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.json"
    turns = [{"from": "human", "value": "甲"}, {"from": "gpt", "value": "乙"}, {"from": "human", "value": "丙"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    expected = {"instruction": "丙", "input": "", "output": "", "history": [["甲", "乙"]]}
    assert list(read_records(path, need_output=False)) == [expected]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANY_RECORD = st.fixed_dictionaries(
    {"instruction": TEXT, "input": TEXT, "output": TEXT},
    optional={"history": st.lists(st.lists(TEXT, min_size=2, max_size=2), min_size=1, max_size=2), "system": TEXT},
)


@settings(max_examples=100, deadline=None)
@given(records=st.lists(ANY_RECORD, max_size=4))
def test_written_file_is_what_json_would_write(tmp_path_factory, records):
    """Pitfall 9: UTF-8, nothing escaped."""
    path = tmp_path_factory.getbasetemp() / "written.json"
    assert write_records(path, iter(records)) == len(records)
    assert path.read_text("utf-8") == json.dumps(records, ensure_ascii=False, indent=1) + "\n"


def test_written_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "out.json"

    def failing():
        yield RECORDS[0]
        raise UserError("bad input")

    for before in (None, "old"):
        if before:
            path.write_text(before)
        with pytest.raises(UserError):
            write_records(path, failing())
        assert (path.read_text() if path.exists() else None) == before
        assert [file.name for file in tmp_path.iterdir()] == (["out.json"] if before else [])


def write(path, count, name="r"):
    records = [{"instruction": f"{name}{number}", "input": "", "output": "x"} for number in range(count)]
    write_records(path, records)
    return records


def test_file_names_with_commas_and_colons(tmp_path):
    path = tmp_path / "a,b:0.5.json"
    write(path, 2)
    assert data_files(str(path)) == [path]
    colon = tmp_path / "c:2"
    write(colon, 1)
    assert [(source.files, source.weight) for source in sources(f"{colon},{colon}:3")] == [([colon], 1), ([colon], 3)]


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ("", "names no file"),
        ("{good},", "names no file"),
        ("{good}:0", "0 is not a weight"),
        ("{good}:-1", "-1 is not a weight"),
        ("{good}:nan", "nan is not a weight"),
        ("{good}:1e9", "1e9 is not a weight"),
        ("{good}:half", "half is not a weight"),
        ("{folder}", "is a folder; name files in it (good.json)"),
        ("{folder}/god.json", "no such file; did you mean {folder}/good.json?"),
        ("{folder}/sub/good.json", "no such file; check the path"),
        ("{folder}/link.json", "is a broken link"),
        ("{folder}/pipe", "is not a plain file"),
        ("data/nowhere.json", "data/nowhere.json: no such file"),
        ("datasets/firefly", "not to be had from the hub"),
        ("./owner/name", "no such file"),
        ("just_a_name", "no such file"),
        ("x" * 5000, "no such file"),
        ("bad\0name", "no such file"),
    ],
)
def test_data_path_that_leads_nowhere(tmp_path, monkeypatch, data_path, message):
    folder = tmp_path / "folder"
    good = folder / "good.json"
    write(good, 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "link" in data_path:
        (folder / "link.json").symlink_to("gone.json")
    if "pipe" in data_path:
        os.mkfifo(folder / "pipe")
    with pytest.raises(UserError) as error:
        for file in data_files(data_path.format(good=good, folder=folder)):
            list(read_records(file))
    assert message.format(folder=folder) in str(error.value)


def test_name_under_an_existing_folder_is_a_path_and_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "firefly_train").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file; did you mean datasets/firefly_train\?"):
        data_files("datasets/firefly_trian")


SHA = "1" * 40
HUB = {
    "README.md": b"---\nlicense: mit\n---\n",
    "dataset_infos.json": b"{}",
    "data/train-0.jsonl": as_lines(RECORDS[:2]).encode(),
    "data/train-1.json.gz": gzip.compress(json.dumps(RECORDS[2:]).encode()),
    "data/test.jsonl": as_lines([{"instruction": "held", "output": "back"}]).encode(),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching a data set needs."""

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/owner/name"):
            siblings = [{"rfilename": name} for name in HUB]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": SHA} for name, data in HUB.items()]
            found = tree if "/tree/" in path else {"id": "owner/name", "sha": SHA, "siblings": siblings}
            self.answer(200, json.dumps(found).encode(), body)
        elif path.startswith("/datasets/owner/name/resolve/"):
            self.answer(200, HUB[path.split("/", 6)[6]], body)
        else:
            self.answer(404, b'{"error": "Repository not found"}', body)

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer(self, status, data, body):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "ETag": f'"{hash(data) & 0xFFFF}"', "X-Repo-Commit": SHA}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_hub_name_is_fetched_and_then_found_without_network(tmp_path):
    program = (
        "import json, sys\nfrom utils.records import read_records\nfrom utils.sources import data_files\n"
        "from utils.console import UserError\n"
        "try: files = data_files(sys.argv[1]); "
        "print(json.dumps([[r for file in files for r in read_records(file)], list(map(str, files))]))\n"
        "except UserError as error: print(json.dumps(str(error)))"
    )

    def load(name, offline="0"):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": offline,
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", program, name], env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
        )
        *said, last = done.stdout.splitlines()
        return "\n".join(said), json.loads(last)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said, (records, files) = load("owner/name")
        assert records == RECORDS
        assert "taken for a data set of the Hugging Face hub" in said
        assert "reads 2 of its 3 files: data/train-0.jsonl, data/train-1.json.gz" in said
        assert [Path(file).name for file in files] == ["train-0.jsonl", "train-1.json.gz"]
        _, error = load("owner/other")
        assert error.startswith("owner/other: no such file, and not to be had from the hub (")
        server.shutdown()
    assert load("owner/name", offline="1")[1] == [records, files]
    _, error = load("owner/other", offline="1")
    assert error.startswith("owner/other: no such file, and not to be had from the hub (")


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


def huge(size):
    """A record of so many characters, of those that JSON escapes, too."""
    return {"instruction": "x", "input": "", "output": "".join(random.Random(0).choices('一二三\n"\\', k=size - 1))}


def test_huge_text_takes_linear_time_and_is_kept(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([huge(1_000_000)] * 6, ensure_ascii=False), "utf-8")
    assert list(read_records(path)) == [huge(1_000_000)] * 6


def test_a_record_longer_than_any_window_is_dropped_and_counted(tmp_path, capfd):
    path = tmp_path / "a.json"
    pair, system = ["问" * 500_000, "答" * 500_000], "长" * 10**6
    long = [huge(1_000_001), RECORDS[0] | {"history": [pair]}, RECORDS[0] | {"system": system}]
    path.write_text(json.dumps([RECORDS[0], *long], ensure_ascii=False), "utf-8")
    assert list(read_records(path)) == [RECORDS[0]]
    assert "3 dropped, 1 kept: more than 1,000,000 characters; first: " in capfd.readouterr().out


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
