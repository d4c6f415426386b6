"""Templates, records, scores, options, lineage files, headers, made up by hypothesis: only UserError may come out.

A few examples each by default; RELIABILITY=full (as scripts/soak.sh sets it) tries very many. What was found has an
`@example` of its own.
"""

import dataclasses
import json
import math
import struct

import pytest
import torch
from cases import FULL
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import extend_vocab
import finetune
import generate
import judge
import merge_weights
from utils import cli, lineage
from utils.adapters.settings import read_config
from utils.chat.conversations import Conversation, from_file
from utils.console import UserError
from utils.datasets.file_formats import read_items
from utils.datasets.record_writer import write_records
from utils.datasets.records import read_records
from utils.datasets.templates import Prompter, parse
from utils.evaluation.judge_scores import read_scores
from utils.files import read_json
from utils.journal import Journal
from utils.merging import shards
from utils.models.weights import Weights
from utils.training.checkpoints import is_whole

pytestmark = pytest.mark.filterwarnings("ignore")
fuzzed = settings(
    max_examples=2000 if FULL else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=True,
)
TEXT = st.text(max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def object_of(*names: str):
    """Objects that have these keys, or some of them, with anything in them."""
    return st.dictionaries(st.sampled_from(names) | TEXT, ANYTHING, max_size=len(names) + 1)


def allowed(function, *arguments):
    """What a function returns; None where it raised UserError, in one line that says something."""
    try:
        return function(*arguments)
    except UserError as error:
        assert str(error).strip()
        return None


# ---- templates

PIECES = st.sampled_from(
    ["{instruction}", "{input}", "{{", "}}", "{", "}", "{0}", "{instruction.__class__}", "{input!r}", "{instruction:>9}",
     "{input[0]}", "### Response:", "\n\n", "Below.", "{instruction"]
) | UNICODE  # fmt: skip
BODY = st.lists(PIECES, max_size=8).map("".join)
QUESTION = BODY.map(lambda text: text + "{instruction}### Response:")


@fuzzed
@given(st.dictionaries(st.sampled_from(["prompt_input", "prompt_no_input", "response_split", "turn_input"]) | TEXT, ANYTHING))
def test_any_object_as_a_template(tmp_path, texts):
    (tmp_path / "t.json").write_text(json.dumps(texts), "utf-8")
    allowed(Prompter, str(tmp_path / "t.json"))


@fuzzed
@given(BODY, BODY, UNICODE, UNICODE)
@example("", "", "{instruction.__class__}", "{output}")
@example("{{", "}}", "{input!r}", "{0}")
def test_what_a_template_is_filled_with_stands_in_it_untouched(tmp_path, before, after, question, given_input):
    """Templates that are taken render any record, and nothing in a record is taken for a placeholder."""
    texts = {
        "prompt_input": f"{before}{{instruction}}|{{input}}|{after}### Response:",
        "prompt_no_input": f"{before}{{instruction}}|{after}### Response:",
        "response_split": "### Response:",
    }
    (tmp_path / "t.json").write_text(json.dumps(texts), "utf-8")
    prompter = allowed(Prompter, str(tmp_path / "t.json"))
    if prompter is None:
        return
    (turn,) = prompter.turns({"instruction": question, "input": given_input})
    assert f"{question}|" in turn.prompt and (not given_input or f"|{given_input}|" in turn.prompt)
    literal = "".join(text + ("{" + field + "}" if field else "") for text, field in parse(before, "here"))
    if "{" not in before.replace("{{", "").replace("}}", ""):
        assert turn.prompt.startswith(literal)


# ---- records

RECORD = object_of("instruction", "input", "output", "history", "system", "category", "conversations", "messages")
TURN = object_of("from", "value", "role", "content")
DIALOGUE = st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=3)}) | st.fixed_dictionaries(
    {"messages": st.lists(TURN, max_size=3)}
)


@fuzzed
@given(st.lists(RECORD | DIALOGUE | ANYTHING, max_size=4), st.sampled_from(["array", "lines", "indented"]), st.booleans())
@example([{"instruction": "a", "output": "b", "history": [["c", "\ud83d"]]}], "array", True)
@example([{"instruction": 10**30, "output": math.nan}], "lines", True)
def test_any_records(tmp_path, items, form, need_output):
    """What is read are records, and they are written and read again as they were."""
    path = tmp_path / "any.json"
    if form == "lines":
        path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    else:
        path.write_text(json.dumps(items, indent=1 if form == "indented" else None), "utf-8")
    found = allowed(lambda: list(read_records(path, need_output)))
    for record in found or []:
        assert all(type(record[name]) is str for name in ("instruction", "input", "output"))
        assert record["instruction"].strip() and (record["output"].strip() or not need_output)
    if found:
        write_records(path, found)
        assert list(read_records(path, need_output, strict=True)) == found


@fuzzed
@given(st.binary(max_size=200), st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz", ""]))
@example(b"[" * 5000, ".json")
@example(b"[" + b"9" * 5000 + b"]", ".json")
@example(b"\x1f\x8b\x08", ".gz")
@example(b"PAR1PAR1", ".parquet")
def test_any_bytes_as_a_file(tmp_path, content, ending):
    path = tmp_path / f"any{ending}"
    path.write_bytes(content)
    allowed(lambda: list(read_items(path)))
    allowed(lambda: list(read_records(path)))
    allowed(read_json, path)


@fuzzed
@given(TEXT | ANYTHING.map(json.dumps) | st.lists(RECORD, max_size=2).map(json.dumps))
@example("9" * 5000)
@example('{"instruction": "a", "output": "b", "system": 1}')
def test_any_text_as_a_conversation(text):
    """ValueError, whose text the page shows, is what a bad file gives."""
    try:
        conversation = from_file(text)
    except ValueError:
        return
    assert isinstance(conversation, Conversation)
    assert all(isinstance(part, str) for turn in conversation.turns for part in turn[:3])  # the fourth says who answered


# ---- scores

NAME = st.sampled_from(
    ["System1", "system 2", "系统3", "模型一", "System", "system10", "**System2**", '"System1"', "System1和System2"]
)
SAID = st.sampled_from(
    ["8", "8分", "8/10", "8.5", "八分", "-1", "11", "80/100", "7-8", "1e999", "：", ":", " ", "\n", "|", "| --- |", "评分",
     "{", "}", "[", "]", ",", '"score"', "<think>", "</think>", "nan", "NaN", "Infinity", "解释", "第1个", "9" * 20, "。"]
)  # fmt: skip


@fuzzed
@given(st.lists(NAME | SAID | UNICODE, max_size=25).map("".join), st.integers(2, 8))
@example('{"System1": NaN, "System2": Infinity}', 2)
@example('{"System1": ' + "9" * 400 + "}", 2)
@example("[" * 3000, 2)
@example("System1: " + "9" * 400 + "分", 2)
def test_any_answer_of_a_judge(text, systems):
    """A score is a number from 0 to 10, or missing with a reason; there is one for each system."""
    reading = read_scores(text, systems)
    assert len(reading.scores) == systems
    assert all(score is None or 0 <= score <= 10 for score in reading.scores)
    assert len(reading.problems) == reading.scores.count(None)


@fuzzed
@given(st.lists(st.integers(0, 20).map(lambda half: half / 2), min_size=2, max_size=8), st.sampled_from(range(4)))
def test_scores_in_a_usual_form_are_read(scores, form):
    lines = [
        "\n".join(f"System{number} {score:g}分；System{number} 解释：很好。" for number, score in enumerate(scores, 1)),
        "\n".join(f"**System{number}**：{score:g}/10\n解释：不错。" for number, score in enumerate(scores, 1)),
        json.dumps({f"System{number}": score for number, score in enumerate(scores, 1)}),
        "| 系统 | 分数 |\n|---|---|\n" + "\n".join(f"| System{number} | {score:g} |" for number, score in enumerate(scores, 1)),
    ]
    assert read_scores(lines[form], len(scores)).scores == scores


# ---- options

SCRIPTS = [finetune, generate, merge_weights, judge, extend_vocab]
OPTION_NAMES = sorted({field.name for script in SCRIPTS for field in dataclasses.fields(script.Options)})
WORD = st.one_of(
    st.sampled_from(OPTION_NAMES).map(lambda name: f"--{name}"),
    st.tuples(st.sampled_from(OPTION_NAMES), TEXT).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    st.sampled_from(OPTION_NAMES).map(lambda name: f"--no{name}"),
    st.sampled_from(["1", "0", "-1", "1e9", "nan", "None", "True", "[a,b]", "[a", "(a)", "{a:1}", "--", "-", "---x", "auto"]),
    st.integers().map(str),
    st.floats().map(str),
    TEXT,
)


@fuzzed
@given(st.sampled_from(SCRIPTS), st.lists(WORD, max_size=8))
@example(finetune, ["--lora_target_modules", "[" * 300])
@example(finetune, ["--lora_target_modules", "[1+" * 200 + "]" * 200])
@example(finetune, ["--batch_size", "9" * 5000])
@example(finetune, ["--lora_target_modules", "[__import__('os').getcwd()]"])
def test_any_command_line(script, words):
    """What is taken has the types that the options declare."""
    options = allowed(cli.parse, script.Options, words)
    for field in dataclasses.fields(script.Options) if options else ():
        value = getattr(options, field.name)
        assert isinstance(value, (str, bool, int, float, list, type(None)))
        assert not isinstance(value, list) or all(isinstance(one, str) for one in value)
        assert not isinstance(value, float) or math.isfinite(value)


@fuzzed
@given(st.data())
def test_options_mean_what_was_written(data):
    """Each value, written as text, is read as itself."""
    kinds = {int: st.integers(1, 10**6), bool: st.booleans(), float: st.floats(0, 1e6)}
    names = {"batch_size": int, "num_epochs": int, "learning_rate": float, "group_by_length": bool, "bf16": bool}
    chosen = data.draw(st.fixed_dictionaries({}, optional={name: kinds[kind] for name, kind in names.items()}))
    texts = data.draw(st.lists(UNICODE.filter(lambda text: text and not cli.FLAG.match(text)), min_size=2, max_size=2))
    words = ["--base_model", texts[0], f"--data_path={texts[1]}"]
    for name, value in chosen.items():
        words += [f"--{name}", str(value)] if data.draw(st.booleans()) else [f"--{name}={value}"]
    options = cli.parse(finetune.Options, words)
    assert (options.base_model, options.data_path) == tuple(texts)
    assert {name: getattr(options, name) for name in chosen} == chosen


# ---- lineage files, and others that the scripts write for themselves

FINGERPRINT = object_of("architecture", "tokenizer", "shapes", "samples")
BASE = object_of("name", "fingerprint") | st.fixed_dictionaries({"name": TEXT, "fingerprint": FINGERPRINT})
STEP = st.recursive(
    object_of("kind", "options", "base", "parent", "data", "results", "time", "template"),
    lambda inner: st.fixed_dictionaries(
        {"kind": st.just("train"), "options": object_of("output_dir", "prompt_template_name") | st.just({})},
        optional={
            "base": BASE | ANYTHING,
            "parent": st.fixed_dictionaries({"name": TEXT, "sha256": TEXT, "lineage": inner | ANYTHING}),
            "results": object_of("train_loss", "eval_loss"),
            "data": object_of("files", "train", "tokens"),
            "time": object_of("seconds"),
            "template": object_of("texts"),
        },
    ),
    max_leaves=3,
)
OWN = {"architecture": {"model_type": "llama"}, "tokenizer": None, "shapes": "0", "samples": {"a": [0.0] * 4}}


@fuzzed
@given(STEP)
@example({"kind": "train", "options": {}, "base": {"name": "a", "fingerprint": {}}})
@example({"kind": "train", "options": {}, "parent": "run-1"})
@example({"kind": "train", "options": {}, "time": {"seconds": None}, "results": {"train_loss": math.nan}})
@example({"kind": "train", "options": {}, "base": {"name": "a", "fingerprint": OWN | {"samples": {"a": [1.0]}}}})
def test_any_lineage(tmp_path, step):
    from utils.chat.display import steps_of
    from utils.evaluation.chain import chain_folders
    from utils.inference.answerers import ChatModel, choose_template, named_base

    (tmp_path / lineage.FILE).write_text(json.dumps(step), "utf-8")
    known = allowed(lineage.read, tmp_path)
    if known is None:
        return
    lineage.table(lineage.chain(tmp_path))
    allowed(lineage.check_same_base, known, OWN, "adapter", "base")
    allowed(choose_template, "", known, "adapter")
    allowed(chain_folders, tmp_path)
    named_base({}, known)
    steps_of(ChatModel("a", tmp_path, "alpaca", known))


@fuzzed
@given(st.lists(st.binary(max_size=30) | ANYTHING.map(lambda value: json.dumps(value).encode()), max_size=4))
@example([b'{"a": 1}', b"{}"])
@example([b"[]"])
def test_any_journal(tmp_path, lines):
    path = tmp_path / "journal"
    path.write_bytes(b"".join(line.replace(b"\n", b"") + b"\n" for line in lines))
    journal = allowed(Journal, path, {"run": 1})
    if journal:
        journal.put("k", "v")
        journal.close(done=False)
        assert Journal(path, {"run": 1}).values["k"] == "v"


@fuzzed
@given(object_of("run", "files"))
@example({"run": {}, "files": {"../checkpoint.json": 3}})
def test_any_manifest_of_a_checkpoint(tmp_path, manifest):
    (tmp_path / "checkpoint.json").write_text(json.dumps(manifest), "utf-8")
    assert allowed(is_whole, tmp_path) in (True, False, None)


SETTING = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "use_rslora"]
)


@fuzzed
@given(st.dictionaries(SETTING, ANYTHING, max_size=4))
@example({"rank_pattern": {"(": 1}})
@example({"target_modules": {"q_proj": 1}})
def test_any_settings_of_an_adapter(tmp_path, changes):
    from utils.merging.adapter_deltas import Adapter

    matrices = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    tensors = {f"base_model.model.q_proj.lora_{part}.weight": matrix for part, matrix in matrices.items()}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(tensors))
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(usual | changes), "utf-8")
    adapter = allowed(Adapter, tmp_path)
    if adapter:
        allowed(adapter.scaling, "q_proj", 2)
        adapter.is_trained_copy("lm_head.weight")
    allowed(read_config, tmp_path)


# ---- headers

ENTRY = object_of("dtype", "shape", "data_offsets") | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "F4", "F8_E4M3", "C64", "X"]),
        "shape": st.lists(st.integers(-2, 5) | st.integers(2**62, 2**65), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 70) | st.integers(2**62, 2**65), max_size=3),
    }
)
HEADER = st.dictionaries(TEXT | st.just("__metadata__"), ENTRY | ANYTHING, max_size=3).map(
    lambda value: json.dumps(value).encode()
)


@fuzzed
@given(HEADER | st.binary(max_size=60), st.none() | st.integers(0, 2**64 - 1), st.binary(max_size=64))
@example(b"[" * 10_000, None, b"")
@example(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', None, b"")
@example(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', None, bytes(4))
def test_any_header_of_a_safetensors_file(tmp_path, text, length, content):
    file = tmp_path / "any.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    weights = allowed(Weights, tmp_path, [file])
    for name in weights.names if weights else ():
        allowed(weights.tensor, name)


@fuzzed
@given(
    st.dictionaries(UNICODE.filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 4), max_size=3), max_size=4)
)
def test_tensors_are_read_as_they_were_written(tmp_path, shapes):
    """By our writer and by the library's, whatever the tensors' names and shapes."""
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    file = tmp_path / "own.safetensors"
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    pieces = shards.write_safetensors(file, kinds, [shards.block_of(*pair) for pair in tensors.items()])
    shards.read_back(file, kinds, pieces)
    for written in (file.read_bytes(), save(tensors)):
        file.write_bytes(written)
        weights = Weights(tmp_path, [file])
        assert weights.names == sorted(tensors)
        assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors.items())
