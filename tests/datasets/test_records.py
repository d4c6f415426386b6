"""utils/datasets/records.py: what is dropped, what is repaired and said, dialogues of every kind, and what is written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import RECORDS, as_lines, as_parquet, huge

from utils.console import UserError
from utils.datasets.item_formats import as_record
from utils.datasets.items import UnreadableItem
from utils.datasets.record_writer import write_records
from utils.datasets.records import Repaired, Tally, all_good, one_by_one, read_records
from utils.datasets.text_faults import FAULTS, faults_in

# ---- what is dropped, repaired and said

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
    (b'{"instruction": "x", "output": "y", "history": true}', "history is not a list"),
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
    assert capsys.readouterr().out.endswith(f'first: {path}, line 1, item 3: {{"instruction": "a"}}\n')


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
    assert max(map(len, said.splitlines())) < 200 + 2 * len(str(path)) and "xxx…\n" in said


def test_crlf_and_byte_order_marks_within_texts_are_mended_and_counted(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    dirty = {"instruction": "\ufeffa", "output": "b\r\nc\rd", "history": [["q\r\n", "a"]], "system": "s\r\n"}
    path.write_text(as_lines([dirty, RECORDS[0]]), "utf-8", newline="")
    assert list(read_records(path)) == [
        {"instruction": "a", "input": "", "output": "b\nc\nd", "history": [["q\n", "a"]], "system": "s\n"},
        RECORDS[0],
    ]
    assert "1 repaired, 2 kept: CRLF or byte-order mark within a text" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: CRLF or byte-order mark"):
        list(read_records(path, strict=True))


def test_latex_whose_backslashes_json_took_is_dropped_or_restored(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    latex = r'{"instruction": "求", "output": "$a \rightarrow b$，$\frac{1}{2}$，$\beta$，$x \times y$，$\tau\neg$，\tau"}'
    price = RECORDS[0] | {"output": "价 $5，\tau"}  # one dollar encloses no formula
    path.write_text(latex + "\n" + as_lines([RECORDS[0], RECORDS[0] | {"output": "页\f二"}, price]), "utf-8")
    assert list(read_records(path)) == [RECORDS[0], RECORDS[0] | {"output": "页二"}, price]
    said = capsys.readouterr().out
    assert "1 dropped, 3 kept: control characters in a text where LaTeX has a backslash" in said
    assert "1 repaired, 3 kept: control characters within a text, removed" in said
    restored, *_ = read_records(path, fixes=["latex"])
    assert restored["output"] == r"$a \rightarrow b$，$\frac{1}{2}$，$\beta$，$x \times y$，$\tau\neg$，" + "\tau"
    assert len(list(read_records(path, need_output=False))) == 4, "a model's answers are never dropped"


FOUND = {
    "entities": "&quot; &amp; &lt; &gt; &nbsp; &apos; &ldquo; &rdquo; &lsquo; &rsquo; "
    "&hellip; &mdash; &middot; &times; &#34; &#x4e;",
    "zero_width": "\u200b \u2060",
    "placeholders": "{{name}} {{姓名}}",
    "lost": "\ufffd 锟斤拷 烫烫烫 屯屯屯",
    "control_tokens": "<|im_end|> <｜User｜> </s> <start_of_turn> <end_of_turn>",
    "empty": "nan NaN None null NULL <NA> <noinput> <nooutput> undefined #N/A #NAME? #VALUE! #REF!",
}


@pytest.mark.parametrize("fault", FOUND)
def test_each_kind_of_a_fault_is_found(fault):
    for text in FOUND[fault].split(" "):
        assert faults_in({"instruction": "问", "output": text}) == [fault], text
    both = [faults_in({"output": text}) for text in ("<no input>", "<no output>", "[object Object]", "一般的文字")]
    assert both == [["empty"]] * 3 + [[]]


def test_texts_broken_on_their_way_are_counted_and_fixed_if_asked(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    kinds = {
        "entities": ("说&quot;好&quot;", '说"好"'),
        "zero_width": ("零\u200b宽", "零宽"),
        "lines": ("一\\n二", "一\n二"),
        "placeholders": ("你好，{{name}}", None),
        "latex_kept": (r"$\nabla \nu$", r"$\nabla \nu$"),
    }
    records = [{"instruction": name, "input": "", "output": broken} for name, (broken, _) in kinds.items()]
    records.append({"instruction": "empty", "input": "<noinput>", "output": "好"})
    records.append({"instruction": "gone", "input": "", "output": "nan"})
    path.write_text(as_lines(records), "utf-8")
    assert list(read_records(path)) == records
    said = capsys.readouterr().out
    for name, count in {"entities": 1, "zero_width": 1, "lines": 1, "placeholders": 1, "empty": 2}.items():
        way = f"data/clean.py --fix_texts {name} {'drops' if name == 'placeholders' else 'fixes'} them"
        assert f"{count} kept unchanged, with {FAULTS[name].what}; {way}; first: {path}, line " in said
    fixed = {record["instruction"]: record for record in read_records(path, fixes=["all"])}
    assert {name: record["output"] for name, record in fixed.items()} == {
        name: right for name, (_, right) in kinds.items() if right
    } | {"empty": "好"}
    assert fixed["empty"]["input"] == ""


@pytest.mark.parametrize("layout", ["{0}\n{1}\n", "{0},\n{1},", "[{0},\n{1}]"], ids=["lines", "lines with commas", "array"])
def test_key_twice_in_a_record_is_counted(tmp_path, capsys, layout):
    twice = '{"instruction": "一", "output": "好", "output": "坏 \\"x\\": 1"}'
    same = '{"instruction": "二", "output": "好", "output" : "好"}'
    path = tmp_path / "a.json"
    path.write_text(layout.format(twice, same), "utf-8")
    assert [record["instruction"] for record in read_records(path)] == ["二"]
    assert "1 dropped, 1 kept: two different values for output" in capsys.readouterr().out


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
    st.just(UnreadableItem("not JSON", None)),
)
GOOD = st.fixed_dictionaries({"instruction": st.just("a"), "input": FIELD, "output": st.sampled_from(["b", ""])})


@settings(max_examples=300, deadline=None)
@given(items=st.lists(ITEM, max_size=3) | st.lists(GOOD, max_size=3), need_output=st.booleans(), convert=st.booleans())
def test_a_batch_taken_at_once_is_what_it_would_be_one_by_one(items, need_output, convert):
    converter = as_record if convert else lambda item: Repaired(item, "put right")
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


def test_a_record_longer_than_any_window_is_dropped_and_counted(tmp_path, capfd):
    path = tmp_path / "a.json"
    pair, system = ["问" * 500_000, "答" * 500_000], "长" * 10**6
    long = [huge(1_000_001), RECORDS[0] | {"history": [pair]}, RECORDS[0] | {"system": system}]
    path.write_text(json.dumps([RECORDS[0], *long], ensure_ascii=False), "utf-8")
    assert list(read_records(path)) == [RECORDS[0]]
    assert "3 dropped, 1 kept: more than 1,000,000 characters; first: " in capfd.readouterr().out
    for size, kept in ((1_000_000, 2), (1_000_001, 1)):  # in a batch with no other fault, too
        path.write_text(json.dumps([RECORDS[0], huge(size)], ensure_ascii=False), "utf-8")
        assert len(list(read_records(path))) == kept


# ---- dialogues and prompts

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
        json.dumps(
            ["你是谁？", {"instruction": "译", "input": "a", "output": None, "reference": "甲", "category": "x", "loss": 0}]
        )
    )
    assert list(read_records(path, need_output=False)) == [
        {"instruction": "你是谁？", "input": "", "output": ""},
        {"instruction": "译", "input": "a", "output": "", "category": "x", "reference": "甲", "learn": [False]},
    ]
    with pytest.raises(UserError, match="output is missing: 2"):
        list(read_records(path))


def test_dialogue_that_waits_for_its_answer_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.json"
    turns = [{"from": "human", "value": "甲"}, {"from": "gpt", "value": "乙"}, {"from": "human", "value": "丙"}]
    path.write_text(json.dumps([{"conversations": turns}]))
    expected = {"instruction": "丙", "input": "", "output": "", "history": [["甲", "乙"]]}
    assert list(read_records(path, need_output=False)) == [expected]


# ---- what is written

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
    records = [*records, *({"instruction": "甲", name: ["一"]} for name in ("learn", "choices", "groups", "tools", "messages"))]
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
