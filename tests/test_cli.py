"""Options: written in all of Fire's ways, typed, checked before anything heavy is imported or written."""

import dataclasses
import json
import subprocess
import sys

import pytest
from scripting import ROOT

import finetune
from utils import cli
from utils.cli import option, parse
from utils.console import UserError
from utils.options_file import write_options


@dataclasses.dataclass(frozen=True)
class Options:
    """One of each kind."""

    name: str = option(help="a text")
    count: int = option(3, "a number", least=1, most=9)
    rate: float = option(0.5, "a rate", least=0)
    flag: bool = option(True, "a switch")
    auto: bool | None = option(None, "a switch with a third state")
    size: int | float = option(2000, "a count or a share", least=0)
    parts: list[str] = option(["a"], "a list")
    answers: list[str] = option([], "a list that is collected", many=True)
    kind: str = option("x", "a choice", choices=("x", "y"), heading="What kind")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--count", "5"], {"count": 5}),
        (["--count=5"], {"count": 5}),
        (["-count", "5"], {"count": 5}),
        (["--count", "5", "--count", "6"], {"count": 6}),
        (["--count", "1"], {"count": 1}),
        (["--count", "9"], {"count": 9}),
        (["--flag"], {"flag": True}),
        (["--flag", "False"], {"flag": False}),
        (["--flag=false"], {"flag": False}),
        *((["--flag", word], {"flag": False}) for word in ("0", "no", "OFF")),
        *((["--noflag", "--flag", word], {"flag": True}) for word in ("1", "Yes", "on", "true")),
        *(([word], {"flag": False}) for word in ("--noflag", "--no_flag", "--no-flag")),
        (["--noauto"], {"auto": False}),
        (["--auto", "None"], {"auto": None}),
        (["--rate", "1e-4"], {"rate": 1e-4}),
        (["--rate", "-0.0"], {"rate": 0.0}),
        (["--size", "20"], {"size": 20}),
        (["--size", "0.1"], {"size": 0.1}),
        (["--parts", "[q_proj,v_proj]"], {"parts": ["q_proj", "v_proj"]}),
        (["--parts=['q_proj', \"v_proj\"]"], {"parts": ["q_proj", "v_proj"]}),
        (["--parts", "q_proj,v_proj"], {"parts": ["q_proj", "v_proj"]}),
        (["--parts", "q_proj, v_proj"], {"parts": ["q_proj", "v_proj"]}),
        (["--parts", "[]"], {"parts": []}),
        (["--parts", "(a,b)"], {"parts": ["a", "b"]}),
        (["--parts", "(q|k)_a,b"], {"parts": ["(q|k)_a", "b"]}),
        (["--parts", "[.*_proj, a.b]"], {"parts": [".*_proj", "a.b"]}),
        (["--parts", "[a]", "--parts", "[b]"], {"parts": ["b"]}),
        (["--answers", "a=1", "--answers", "b=2"], {"answers": ["a=1", "b=2"]}),
        (["--name", "1e4"], {"name": "1e4"}),
        (["--name", "13"], {"name": "13"}),
        (["--name", "a=b"], {"name": "a=b"}),
        (["--name=a=b"], {"name": "a=b"}),
        (["--kind", "y"], {"kind": "y"}),
    ],
)
def test_every_way_to_write_an_option(argv, expected):
    """Row 13: values are read by the option's type, not by their looks."""
    parsed = parse(Options, ["--name", "n", *argv])
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--name: missing; give it, or see --help"),
        (["--name", ""], "--name: missing; give it, or see --help"),
        (["--nam", "x"], "--nam: no such option; did you mean --name?"),
        (["--counts=5"], "--counts: no such option; did you mean --count?"),
        (["--xyz=5"], "--xyz: no such option; see --help for all options"),
        (["--name", "n", "--count", "five"], "--count five: not a whole number; see --help"),
        (["--name", "n", "--count", "5.5"], "--count 5.5: not a whole number; see --help"),
        (["--name", "n", "--count", "0"], "--count 0: too small; give at least 1"),
        (["--name", "n", "--count", "10"], "--count 10: too large; give at most 9"),
        (["--name", "n", "--count", "9" * 81], f"--count {'9' * 81}: too large; give at most 9"),
        (["--name", "n", "--count", "x" * 81], f"--count {'x' * 80}…: not a whole number; see --help"),
        (["--name", "n", "--rate", "nan"], "--rate nan: not a number; see --help"),
        (["--name", "n", "--size", "x"], "--size x: not a whole number or a number; see --help"),
        (["--name", "n", "--flag", "maybe"], "--flag maybe: not true or false; see --help"),
        (["--name", "n", "--auto", "maybe"], "--auto maybe: not true or false; see --help"),
        (["--name", "n", "--auto", "none"], "--auto none: not true or false; see --help"),
        (["--name", "n", "--count", "None"], "--count None: not a whole number; see --help"),
        (["--name", "n", "--count"], "--count: has no value; write --count VALUE"),
        (["--name", "n", "--config"], "--config: has no value; write --config VALUE"),
        (["--name", "n", "stray"], "stray: unexpected; options are written --name value"),
        (["--name", "n", "--kind", "z"], "--kind z: not one of x, y; choose one of these"),
        (["--name", "n", "--nocount"], "--nocount: no such option; did you mean --count?"),
    ],
)
def test_mistakes_are_named_with_the_fix(argv, said):
    with pytest.raises(UserError) as caught:
        parse(Options, argv)
    assert str(caught.value) == said
    two = dataclasses.make_dataclass("Two", [("one", str, option()), ("two", str, option())])
    with pytest.raises(UserError, match=r"^--one, --two: missing; give them, or see --help$"):
        parse(two, [])
    assert parse(Options, ["--name", "n", "--parts", "{a:1}"]).parts == ["{a:1}"]


def test_an_alpaca_lora_command_means_what_it_meant():
    argv = [
        "--base_model", "decapoda-research/llama-7b-hf", "--data_path", "yahma/alpaca-cleaned", "--output_dir", "./lora-alpaca",
        "--batch_size", "128", "--micro_batch_size", "4", "--num_epochs", "3", "--learning_rate", "1e-4", "--cutoff_len", "512",
        "--val_set_size", "2000", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0.05",
        "--lora_target_modules", "[q_proj,v_proj]", "--train_on_inputs", "--group_by_length", "--wandb_watch", "gradients",
        "--wandb_log_model", "true", "--resume_from_checkpoint", "./old", "--add_eos_token", "False",
    ]  # fmt: skip
    parsed = parse(finetune.Options, argv)
    assert parsed.train_on_inputs is True and parsed.group_by_length is True and parsed.learning_rate == 1e-4
    assert parsed.lora_target_modules == ["q_proj", "v_proj"] and parsed.resume_from_checkpoint == "./old"
    plain = parse(finetune.Options, ["--base_model", "b", "--data_path", "d"])
    defaults = {
        "output_dir": "./lora-alpaca", "batch_size": 128, "micro_batch_size": 4, "num_epochs": 3, "learning_rate": 3e-4,
        "cutoff_len": 256, "val_set_size": 2000, "lora_dropout": 0.05, "train_on_inputs": True, "add_eos_token": False,
        "group_by_length": False, "wandb_project": "", "resume_from_checkpoint": None, "prompt_template_name": "alpaca",
    }  # fmt: skip
    assert {name: getattr(plain, name) for name in defaults} == defaults


@pytest.mark.parametrize("name", ["finetune.py", "generate.py", "merge_weights.py", "judge.py"])
def test_help_and_typos_answer_at_once_and_import_nothing_heavy(name, tmp_path):
    """Row 13: `--lerning_rate` is refused before torch is imported; nothing is written."""
    probe = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'gradio', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    for words, status in ((["--help"], 0), (["--lerning_rate", "1"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", probe, ROOT / name, *words], capture_output=True, text=True, cwd=tmp_path, check=False,
            env={"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert "Assertion" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_misspelt_option_of_finetune_is_suggested(script, tmp_path):
    error = script("finetune.py", "--base_model", "b", "--data_path", "d", "--lerning_rate", "1", cwd=tmp_path).error
    assert "--lerning_rate: no such option; did you mean --learning_rate?" in error
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".run")]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 10, "micro_batch_size": 4}, ["--batch_size 10", "--micro_batch_size 4", "give 8"]),
        ({"batch_size": 2, "micro_batch_size": 4}, ["--batch_size 2", "--micro_batch_size 4", "give 4"]),
        ({"bf16": True, "fp16": True}, ["--bf16", "--fp16"]),
        ({"load_8bit": True, "load_4bit": True, "val_set_size": 2}, ["--load_8bit", "--load_4bit"]),
        ({"wandb_project": "x"}, ["--wandb_project", "pip install wandb"]),
        ({"report_to": "[nothing]"}, ["--report_to nothing", "tensorboard"]),
        ({"base_model": "/no/such/folder"}, ["/no/such/folder", "no such folder"]),
        ({"data_path": "no.json"}, ["no.json"]),
        ({"prompt_template_name": "alpacca"}, ["alpacca", "alpaca_short"]),
        ({"val_set_size": 4000}, ["--val_set_size 4000", "30 records"]),
        ({"val_set_size": 1.0}, ["--val_set_size 1.0", "fraction"]),
        ({"cutoff_len": 4, "val_set_size": 2}, ["--cutoff_len 4", "leaves no answer"]),
    ],
)
def test_mistakes_that_finetune_names(script, tmp_path, tiny_llama, changes, words):
    settings = {"base_model": tiny_llama, "data_path": ROOT / "data/demo/f1.json", "output_dir": tmp_path / "out"} | changes
    error = script("finetune.py", *[f"--{name}={value}" for name, value in settings.items()]).error
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_batch_size_is_checked_over_all_processes(script, tmp_path):
    """Row 18."""
    error = script(
        "finetune.py", "--base_model=b", "--data_path=d", "--batch_size=128", "--micro_batch_size=4", WORLD_SIZE="3"
    ).error
    assert "4 x 3 processes = 12" in error and "give 120" in error


HELP = """what it is for

Options:
  --config FILE.yaml          {}
  --name TEXT                 a text (required)
  --count N                   a number [3]
  --rate X                    a rate [0.5]
  --flag true|false           a switch [True]
  --auto true|false           a switch with a third state
  --size N|X                  a count or a share [2000]
  --parts '[A,B]'             a list [[a]]
  --answers '[A,B]'           a list that is collected

What kind:
  --kind x|y                  a choice [x]"""
WHOLE = "read options from a file; those on the command line win"


@pytest.mark.parametrize(
    ("columns", "first"),
    [(40, WHOLE.replace("; ", ";\n" + " " * 30)), (60, WHOLE.replace("; ", ";\n" + " " * 30)), (300, WHOLE)],
)
def test_the_help_text_has_every_option_with_its_default_and_fits_the_terminal(monkeypatch, columns, first):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.help_text(Options, "\nwhat it is for\n") == HELP.format(first)
    assert max(map(len, cli.help_text(finetune.Options, "").splitlines())) <= max(60, min(100, columns))


RECORD = {"instruction": "a", "input": "", "output": "b"}


def test_a_name_with_commas_is_one_name(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert parse(Options, ["--name", "n", "--parts", f"{tmp_path}/a,b"]).parts == [f"{tmp_path}/a,b"]


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(tmp_path, closed):
    """What is printed goes into no file that was opened in their place."""
    (tmp_path / "data.json").write_text(json.dumps([RECORD | {"instruction": ""}, RECORD]))
    command = f"{sys.executable} {ROOT}/data/alpaca_gpt4/prepare.py --raw data.json --output_dir out {closed}"
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, stdout=subprocess.DEVNULL, check=False)
    assert ended.returncode == 0
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == [RECORD]


def test_a_reader_that_has_seen_enough_ends_the_program_without_a_word():
    line = f"'{sys.executable}' generate.py --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == 141


ENDS = """
import logging, os, sys
sys.path.insert(0, {root!r})
from utils import cli
from utils.console import UserError
class Options: pass
def main(options):
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)  # of kernels that nobody asked for
    raise {error}
cli.parse = lambda *_: None
cli.run(main, Options, [])
"""
PLACE = "free disk space, fix the permissions, or choose another path, then rerun"
MEMORY = "give --load_8bit or --load_4bit, fewer tokens or records at once, or use a machine with more"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("UserError('one\\n two\\x1b[1m')", "one two\\x1b[1m"),
        *(
            (f"OSError(os.errno.{name}, 'no more', 'out/a')", f"out/a: no more; {PLACE}")
            for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "ENAMETOOLONG")
        ),
        ("OSError(os.errno.ENOSPC, 'no more')", f"output: no more; {PLACE}"),
        ("ValueError('written in Rust (os error 28)')", f"output: No space left on device; {PLACE}"),
        ("MemoryError()", f"out of memory (MemoryError); {MEMORY}"),
        (
            "RuntimeError('CUDA error: out of memory, it says\\nmore')",
            f"out of memory (CUDA error: out of memory, it says); {MEMORY}",
        ),
        ("OSError(os.errno.ENOENT, 'no such file', 'out/a')", ""),
        ("ValueError('written in Rust (os error 2)')", ""),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_what_is_not_a_traceback(script, tmp_path, error, said):
    (tmp_path / "ends.py").write_text(ENDS.format(root=str(ROOT), error=error.replace("os.errno", "__import__('errno')")))
    ended = script(tmp_path / "ends.py")
    if said:
        assert (ended.status, ended.out, ended.err) == (2, "", f"ends.py: error: {said}\n")
    else:
        assert ended.status == 1 and ended.err.startswith("Traceback")


# --config

CONFIG = """
name: 甲
count: 5
rate: 1e-4
flag: false
auto:
parts: [q_proj, v_proj]
answers: [a=1, b=2]
"""


def config(folder, text) -> str:
    (folder / "run.yaml").write_text(text, "utf-8")
    return str(folder / "run.yaml")


def test_options_from_a_file_are_typed_and_the_line_wins(tmp_path):
    path = config(tmp_path, CONFIG)
    plain = Options("甲", 5, 1e-4, False, None, 2000, ["q_proj", "v_proj"], ["a=1", "b=2"])
    assert parse(Options, ["--config", path]) == plain
    for argv in (["--config", path, "--count=7", "--answers", "c=3"], ["--count=7", "--answers", "c=3", f"--config={path}"]):
        assert parse(Options, argv) == dataclasses.replace(plain, count=7, answers=["c=3"])


def test_texts_in_a_file_are_taken_as_they_are_written(tmp_path):
    read = parse(Options, ["--config", config(tmp_path, "name: 010\ncount: 007\nflag: no\nparts: [no, 1_0, 2024-01-01, ~]\n")])
    assert (read.name, read.count, read.flag, read.parts) == ("010", 7, False, ["no", "1_0", "2024-01-01", "~"])
    assert parse(Options, ["--config", config(tmp_path, "name: 'null'\ncount: null\nauto: ~\nparts: []")]).name == "null"


def test_what_a_run_writes_is_what_it_was_given(tmp_path):
    made = Options("名: b", 5, 1e-4, False, True, 0.25, [], ["x"])
    write_options(dataclasses.asdict(made), tmp_path / "run.yaml")
    assert parse(Options, ["--config", str(tmp_path / "run.yaml")]) == made
    written = "name: '名: b'\ncount: 5\nrate: 0.0001\nflag: false\nauto: true\nsize: 0.25\nparts: []\nanswers:\n- x\nkind: x\n"
    assert (tmp_path / "run.yaml").read_text("utf-8") == written
    write_options({"auth": "me:secret", "api_key": "k", "name": "a"}, tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == "name: a\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("cuont: 5", "run.yaml: cuont: no such option; did you mean count?"),
        ("count: x", "--count x: not a whole number"),
        ("count: 12", "too large"),
        ("count: {a: 1}", "not a plain value"),
        ("parts: [[a]]", "not a plain value"),
        ("a: b: c", "is not YAML"),
        ("- a", "holds no options"),
        ("", "holds no options"),
        ("count: 5\ncount: 6", "count: is given twice"),
        ("count: 1:30", "--count 1:30: not a whole number"),
        ("count: 5\n---\ncount: 6", "run.yaml"),
        ("parts: " + "[" * 500_000, "not a plain value"),
        ("count: 5\n? [name]\n: a\nflag: true", "names an option by a list"),
        ("count: !!python/object/apply:os.system [true]", "is not YAML"),
        ("a: &x [1]\nb: " + "*x, " * 400_000, "larger than a megabyte"),
        ("count: &x 5\nname: *x", "repeats values by *name"),
        (
            "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60))]),
            "not a plain value",
        ),
    ],
)
def test_a_file_of_options_that_is_wrong_is_named(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        parse(Options, ["--name", "a", "--config", config(tmp_path, text)])
    assert words in str(error.value) and "run.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_options_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml: cannot be read"):
        parse(Options, ["--config", str(tmp_path / "no.yaml")])
