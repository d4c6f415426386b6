"""scripts/: every step parses, says what it needs, and runs the commands that it should."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripting import ROOT

from utils.cli import parse

SCRIPTS = ROOT / "scripts"
STEP = re.compile(r"(run|rerun|generate|save-generate|merge)-(\d-)?([a-z0-9]+-[a-z0-9]+)(-\d(-\d)?)?")
STEPS = sorted(file.stem for file in SCRIPTS.glob("*.sh") if STEP.fullmatch(file.stem))
TRAINING = [name for name in STEPS if name.startswith(("run-", "rerun-"))]
PART1 = "COIG/human_value_alignment_instructions_part1.json"
TRANSLATED = "COIG/translated_instructions.json"
PSYQA = "psyQA/psyqa-5.json"
FIREFLY = "firefly/firefly-train-0.json"
BELLE = "belle/Belle_open_source_0.5M.json"
# base, data, step that is trained on, records to validate with, whether questions are learned
PUBLISHED = {
    "run-1-alpaca-13b-1": ("chinese-alpaca-13b", PART1, None, 200, False),
    "rerun-1-alpaca-13b-2": ("chinese-alpaca-13b", TRANSLATED, "run-1-alpaca-13b-1", 500, True),
    "rerun-1-alpaca-13b-3-1": ("chinese-alpaca-13b", PSYQA, "rerun-1-alpaca-13b-2", 200, True),
    "run-2-alpaca-13b-1": ("chinese-alpaca-13b", FIREFLY, None, 2000, False),
    "rerun-2-alpaca-13b-2": ("chinese-alpaca-13b", PART1, "run-2-alpaca-13b-1", 200, True),
    "rerun-2-alpaca-13b-2-2": ("chinese-alpaca-13b", TRANSLATED, "rerun-2-alpaca-13b-2", 500, True),
    "rerun-2-alpaca-13b-3": ("chinese-alpaca-13b", PSYQA, "rerun-2-alpaca-13b-2-2", 200, True),
    "run-4-alpaca-7b-1": ("chinese-alpaca-7b", FIREFLY, None, 2000, False),
    "run-5-bloom-7b1-1": ("bloom-7b1", BELLE, None, 2000, False),
}
CHAINS = {
    "D13b-1-3-1": "rerun-1-alpaca-13b-3-1",
    "D13b-2-2-2": "rerun-2-alpaca-13b-2-2",
    "D13b-2-3": "rerun-2-alpaca-13b-3",
    "D7b-4-1": "run-4-alpaca-7b-1",
    "B7b-5-1": "run-5-bloom-7b1-1",
    "demo": "rerun-0-smollm2-135m-2",
}


def bash(script, *argv, cwd=None, **env):
    """Run a shell script to its end."""
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *argv],
        cwd=cwd,
        env=os.environ | {"MODEL_DIR": "M", "DATA_DIR": "D", "OUTPUT_DIR": "O"} | env,
        text=True,
        capture_output=True,
    )


def planned(script, *argv, **env):
    """The commands that a script would run: the Python script, and its parsed options."""
    found = []
    for line in bash(f"{script}.sh", *argv, PLAN="1", **env).stdout.splitlines():
        if not line.startswith("missing: "):
            words = shlex.split(line)
            file = next(word for word in words if word.endswith(".py"))
            options = importlib.import_module(Path(file).stem).Options
            found.append((words, parse(options, words[words.index(file) + 1 :])))
    return found


# What the scripts say


@pytest.mark.cli
@pytest.mark.slow
def test_shellcheck():
    scripts = [*SCRIPTS.glob("*.sh"), *(ROOT / "benchmarks").glob("*.sh"), ROOT / ".ci" / "run"]
    shellcheck = Path(sys.executable).parent / "shellcheck"
    ended = subprocess.run([shellcheck, *scripts], cwd=ROOT, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stdout


def test_soak_goes_on_for_its_time_and_says_how_to_repeat_a_failure():
    """With a program in the place of Python that succeeds, or fails, at once."""
    ended = bash("soak.sh", "0.0004", PYTHON="true", SEED="5")
    assert ended.returncode == 0 and "round 1, seed 5\nsoak: round 2, seed 6\n" in ended.stdout
    ended = bash("soak.sh", "9", PYTHON="false", SEED="5")
    assert ended.returncode == 1 and "SEED=5 bash scripts/soak.sh" in ended.stderr and "seed 6" not in ended.stdout
    assert bash("soak.sh", "PYTHON").returncode == 2


def test_the_quickstart_sets_up_runs_the_chain_and_compares_its_three_models(tmp_path):
    """With programs in the places of its own, which print what they are given."""
    for name in ("quickstart.sh", "env.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / name).write_bytes((SCRIPTS / name).read_bytes())
    for name in ("setup", "chain"):
        (tmp_path / "scripts" / f"{name}.sh").write_text(f'echo {name} "$@"\n')
    ended = subprocess.run(
        ["bash", tmp_path / "scripts" / "quickstart.sh"],
        env=os.environ | {"OUTPUT_DIR": "O", "PYTHON": "echo"}, text=True, capture_output=True,
    )  # fmt: skip
    answers = {"base": "save-generate-0-smollm2-135m", "f1": "run-0-smollm2-135m-1", "f2": "rerun-0-smollm2-135m-2"}
    compared = " ".join(f"{name}=O/{step}/test.json" for name, step in answers.items())
    assert ended.stdout.splitlines() == [
        "setup", "chain demo", f"{tmp_path}/data/demo/compare.py {compared}",
        "Chat with it: bash scripts/generate-0-smollm2-135m-2.sh",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "tier"),
    [([], "-m not slow"), (["--fast"], "-m not (slow or page or cli or reliability or demo)"), (["--all", "-x"], "-x"),
     (["-k", "merging"], "-m not slow -k merging")],
)  # fmt: skip
def test_the_tests_are_run_in_their_tiers_behind_the_linters(tmp_path, words, tier):
    """With programs in the places of those that it runs, which print what they are given."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=lambda _, names: set(names) - {"test.sh", "env.sh"})
    (tmp_path / "scripts" / "setup.sh").write_text('echo setup "$@"\n')
    for name in ("ruff", "mypy", "python", "chromium"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VERSIONS": "newest", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(["bash", tmp_path / "scripts" / "test.sh", *words], env=env, text=True, capture_output=True)
    run = "python -m pytest -n 2 --dist loadscope --max-worker-restart 0"
    assert ended.stdout.splitlines() == ["setup dev newest", "ruff check .", "ruff format --check .", "mypy", f"{run} {tier}"]


def test_names():
    """Every script is a step by the naming rule, or one of the tools; every adapter can be talked to and answers prompts."""
    tools = {"env", "setup", "quickstart", "test", "soak", "gpu_check", "offline_bundle", "chain", "get-smollm2-135m"}
    tools |= {
        "demo-chat-1",
        "demo-chat-2",
        "get-gemma3-270m",
        "expert",
        *(f"expert-{name}" for name in ("counsellor", "assistant", "tutor")),
    }
    assert {file.stem for file in SCRIPTS.glob("*.sh")} == tools | set(STEPS)
    merges = {f"merge-{size}-{kind}" for size in ("7b", "13b") for kind in ("llama", "alpaca")}
    assert merges < set(STEPS)
    for step in set(TRAINING) - {"run-0-smollm2-135m-0"}:
        for kind in ("generate", "save-generate"):
            assert f"{kind}-{step.partition('-')[2]}" in STEPS


@pytest.mark.parametrize("step", STEPS)
def test_each_step_parses_and_passes_options_on(step):
    more = {
        "r": ("--num_epochs", "7"),
        "g": ("--max_new_tokens", "7"),
        "s": ("--max_new_tokens", "7"),
        "m": ("--dtype", "float16"),
    }
    name, value = more[step[0]]
    words, options = planned(step, name, value)[-1]
    assert str(getattr(options, name[2:])) == value
    assert words[-2:] == [name, value]


@pytest.mark.parametrize("step", PUBLISHED)
def test_the_published_hyperparameters(step):
    base, data, parent, validation, inputs = PUBLISHED[step]
    [(_, options)] = planned(step)
    assert (options.base_model, options.data_path, options.output_dir) == (f"M/{base}", f"D/{data}", f"O/{step}")
    assert options.resume_from_checkpoint == (parent and f"O/{parent}")
    assert (options.val_set_size, options.train_on_inputs, options.group_by_length) == (validation, inputs, True)
    assert (options.batch_size, options.micro_batch_size, options.num_epochs, options.cutoff_len) == (256, 8, 3, 512)
    assert (options.learning_rate, options.warmup_steps, options.prompt_template_name) == (1e-4, 100, "alpaca")
    assert (options.lora_r, options.lora_alpha, options.lora_dropout) == (8, 16, 0.05)
    assert options.lora_target_modules == ([] if "bloom" in step else ["q_proj", "v_proj"])


def test_processes_and_gpus_come_from_the_environment():
    words, _ = planned("run-4-alpaca-7b-1", NPROC="4")[0]
    assert words[:6] == ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert planned("run-4-alpaca-7b-1")[0][0][1].endswith("finetune.py")
    assert planned("run-4-alpaca-7b-1", TRAIN_OPTIONS="--seed 7")[0][1].seed == 7
    assert planned("save-generate-4-alpaca-7b-1", ANSWER_OPTIONS="--seed 7")[0][1].seed == 7
    assert planned("save-generate-4-alpaca-7b-1", OUTPUT_DIR="my O")[0][1].lora_weights == ["my O/run-4-alpaca-7b-1"]


@pytest.mark.parametrize("chain", CHAINS)
def test_the_plan_of_a_chain(chain):
    """Each step follows the one that it needs, and answers follow each adapter; nothing is run."""
    ended = bash("chain.sh", chain, "--plan")
    steps = re.findall(r"^== (\S+):", ended.stdout, re.MULTILINE)
    assert ended.returncode == 0 and set(steps) <= {*STEPS, "get-smollm2-135m"}
    assert steps[-2:] == [CHAINS[chain], f"save-generate-{CHAINS[chain].partition('-')[2]}"]
    for place, step in enumerate(steps):
        for maker in re.findall(r"bash scripts/(\S+)\.sh makes it", bash(f"{step}.sh", PLAN="1").stdout):
            assert maker in steps[:place], (step, maker)


OF_DEMO = (
    "--prompt_template_name alpaca_short --batch_size 10 --micro_batch_size 10 --val_set_size 0 --lora_r 8 --lora_alpha 16 "
    "--lora_dropout 0.05"
)
LEARNED = "--num_epochs 8 --learning_rate 2e-3 --lora_target_modules [q_proj,v_proj] --train_on_inputs False"
ASKED = "--num_beams 1 --max_new_tokens 40"
HELD_OUT = "--is_ui False --test_input_path data/demo/heldout"
DEMO = {
    "run-0-smollm2-135m-0": f"""
extend_vocab.py --base_model M/smollm2-135m --text data/demo/f0.json --vocab_size 60
 --output_dir M/smollm2-135m-chinese-tokenizer
finetune.py --base_model M/smollm2-135m --data_path data/demo/f0.json --output_dir O/run-0-smollm2-135m-0 {OF_DEMO}
 --tokenizer M/smollm2-135m-chinese-tokenizer --num_epochs 3 --learning_rate 5e-4
 --lora_target_modules [q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj] --modules_to_save [embed_tokens,lm_head]""",
    "run-0-smollm2-135m-1": f"""
finetune.py --base_model M/chinese-smollm2-135m --data_path data/demo/f1.json --output_dir O/run-0-smollm2-135m-1
 {OF_DEMO} {LEARNED}""",
    "rerun-0-smollm2-135m-2": f"""
finetune.py --base_model M/chinese-smollm2-135m --data_path data/demo/f2.json --output_dir O/rerun-0-smollm2-135m-2
 --resume_from_checkpoint O/run-0-smollm2-135m-1 {OF_DEMO} {LEARNED}""",
    "save-generate-0-smollm2-135m": f"""
generate.py --base_model M/chinese-smollm2-135m --output_path O/save-generate-0-smollm2-135m/test.json {HELD_OUT}
 --prompt_template alpaca_short {ASKED}""",
    "save-generate-0-smollm2-135m-1": f"""
generate.py --base_model M/chinese-smollm2-135m --lora_weights O/run-0-smollm2-135m-1 {HELD_OUT} {ASKED}""",
    "save-generate-0-smollm2-135m-2": f"""
generate.py --base_model M/chinese-smollm2-135m --lora_weights O/rerun-0-smollm2-135m-2 {HELD_OUT} {ASKED}""",
    "generate-0-smollm2-135m-1": """
generate.py --base_model M/chinese-smollm2-135m --lora_weights O/run-0-smollm2-135m-1""",
    "generate-0-smollm2-135m-2": """
generate.py --base_model M/chinese-smollm2-135m --lora_weights O/run-0-smollm2-135m-1,O/rerun-0-smollm2-135m-2""",
    "merge-0-smollm2-135m": """
merge_weights.py --base_model M/smollm2-135m --lora_model O/run-0-smollm2-135m-0 --output_dir M/chinese-smollm2-135m""",
    "demo-chat-1": f"""
finetune.py --base_model M/smollm2-135m --data_path data/demo/f1.json --output_dir O/demo-chat-1 {OF_DEMO}
 --prompt_template_name chat {LEARNED}
generate.py --base_model M/smollm2-135m --lora_weights O/demo-chat-1 {HELD_OUT} {ASKED}""",
    "demo-chat-2": f"""
finetune.py --base_model M/smollm2-135m --data_path data/demo/f2.json --output_dir O/demo-chat-2
 --resume_from_checkpoint O/demo-chat-1 {OF_DEMO} --prompt_template_name chat {LEARNED}
generate.py --base_model M/smollm2-135m --lora_weights O/demo-chat-2 {HELD_OUT} {ASKED}
merge_weights.py --base_model M/smollm2-135m --lora_model O/demo-chat-2 --output_dir M/demo-chat-smollm2-135m
data/demo/ask_plain.py M/demo-chat-smollm2-135m O/demo-chat-2/test.json
data/demo/compare.py f1=O/demo-chat-1/test.json f2=O/demo-chat-2/test.json""",
}


def test_the_commands_of_all_other_steps():
    wanted = {step: text.replace("\n ", " ").split("\n")[1:] for step, text in DEMO.items()}
    for size in ("7b", "13b"):
        for kind in ("llama", "alpaca"):
            lora = f"--lora_model M/chinese-{kind}-lora-{size} --output_dir M/chinese-{kind}-{size}"
            wanted[f"merge-{size}-{kind}"] = [f"merge_weights.py --base_model M/llama-{size} {lora}"]
    for step, (base, *_) in PUBLISHED.items():
        command, name = f"generate.py --base_model M/{base} --lora_weights O/{step}", step.partition("-")[2]
        wanted[f"generate-{name}"] = [f"{command} --load_8bit True"]
        wanted[f"save-generate-{name}"] = [f"{command} --is_ui False --test_input_path test_data --load_8bit True"]
    assert wanted.keys() == set(STEPS) - PUBLISHED.keys() | {"demo-chat-1", "demo-chat-2"}
    for step, commands in wanted.items():
        lines = [line for line in bash(f"{step}.sh", PLAN="1").stdout.splitlines() if not line.startswith("missing: ")]
        found = [" ".join(shlex.split(line.replace(f"{ROOT}/", "")))[len("python ") :] for line in lines]
        assert found == commands, step


EXPERT = """
clean.py --data_path F/dialogues.json --output_path O/expert-tutor-clean/dialogues.json --against F/heldout.json
finetune.py --base_model M/{base} --data_path F/texts.txt --output_dir O/expert-tutor-1 {settings} --num_epochs 3
generate.py --base_model M/{base} --lora_weights O/expert-tutor-1 {asked}
finetune.py --base_model M/{base} --data_path O/expert-tutor-clean/dialogues.json --output_dir O/expert-tutor-2
 --resume_from_checkpoint O/expert-tutor-1 {settings} --num_epochs 10 --train_on_inputs False
generate.py --base_model M/{base} --lora_weights O/expert-tutor-2 {asked}
{third}
generate.py --base_model M/{base} --lora_weights O/expert-tutor-3 {asked}
judge.py --chain O/expert-tutor-3 --test_input_path F/heldout.json --output_dir O/expert-tutor-measured
"""
PREFERRED = """\
finetune.py --base_model M/{base} --data_path F/preferences.json --output_dir O/expert-tutor-3
 --resume_from_checkpoint O/expert-tutor-2 {settings} --num_epochs 4 --learning_rate 5e-4 --preference_sft 0.5"""
REPLAYED = """\
clean.py --data_path F/more.json --output_path O/expert-tutor-clean/more.json --against F/heldout.json
finetune.py --base_model M/{base} --data_path O/expert-tutor-clean/more.json --output_dir O/expert-tutor-3
 --resume_from_checkpoint O/expert-tutor-2 {settings} --num_epochs 10 --train_on_inputs False --replay 0.5"""
OF_ANOTHER_BASE = (
    "--batch_size 32 --micro_batch_size 8 --val_set_size 0 --learning_rate 1e-4 --cutoff_len 512 --group_by_length"
)


@pytest.mark.parametrize(
    ("words", "base", "settings", "third"),
    [
        ([], "chinese-smollm2-135m", f"{OF_DEMO} --learning_rate 2e-3 --cutoff_len 128", PREFERRED),
        (["--base", "seven", "--replay", "0.5"], "seven", OF_ANOTHER_BASE, REPLAYED),
    ],
)
def test_the_steps_of_an_expert(tmp_path, words, base, settings, third):
    for name in ("dialogues.json", "heldout.json", "preferences.json", "more.json", "texts.txt"):
        (tmp_path / name).touch()
    asked = "--is_ui False --test_input_path F/heldout.json --num_beams 1 --max_new_tokens 96"
    text = EXPERT.format(base=base, settings=settings, asked=asked, third=third.format(base=base, settings=settings))
    page = f"generate.py --base_model M/{base} --lora_weights O/expert-tutor-3"
    for more, wanted in ((["--no-page"], text), ([], f"{text}{page}\n")):
        lines = bash("expert-tutor.sh", str(tmp_path), *words, *more, PLAN="1").stdout.splitlines()
        ran = [line.replace(f"{tmp_path}", "F").strip() for line in lines if not line.startswith("missing: ")]
        found = [re.sub(r"^python \S+/(\w+\.py)", r"\1", line) for line in ran]
        assert found == wanted.strip().replace("\n ", " ").splitlines()
    for more, told in (
        (["--replay"], "--replay: give a share"),
        (["--pages"], "expert-tutor: error: --pages: unknown; bash scripts/expert-tutor.sh [FOLDER] "),
        ([str(tmp_path / "none")], f"expert-tutor: error: {tmp_path}/none is not there; name the folder"),
        ([str(tmp_path / "empty")], f"expert-tutor: error: {tmp_path}/empty holds no dialogues*.json"),
        ([str(tmp_path / "some"), "--replay", "1"], f"expert-tutor: error: {tmp_path}/some holds no more*.json"),
    ):
        for name in ("empty", "some"):
            (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "some" / "dialogues.jsonl").touch()
        ended = bash("expert-tutor.sh", *more)
        assert ended.returncode in (1, 2) and told in ended.stderr and not ended.stdout


@pytest.mark.parametrize(
    ("step", "missing", "fix"),
    [
        ("merge-7b-llama", "M/llama-7b", "README.md"),
        ("rerun-2-alpaca-13b-3", "M/chinese-alpaca-13b", "bash scripts/merge-13b-alpaca.sh"),
        ("save-generate-5-bloom-7b1-1", "M/bloom-7b1", "README.md"),
    ],
)
def test_a_missing_model_is_one_line(tmp_path, step, missing, fix):
    ended = bash(f"{step}.sh", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert missing in ended.stderr and fix in ended.stderr and not list(tmp_path.iterdir())


def test_a_missing_adapter_or_data_set_is_one_line(tmp_path):
    (tmp_path / "M" / "chinese-alpaca-13b").mkdir(parents=True)
    ended = bash("rerun-2-alpaca-13b-2.sh", cwd=tmp_path)
    assert ended.returncode == 2 and f"D/{PART1} is missing; python data/COIG/prepare.py" in ended.stderr
    (tmp_path / "D" / PART1).parent.mkdir(parents=True)
    (tmp_path / "D" / PART1).touch()
    ended = bash("rerun-2-alpaca-13b-2.sh", cwd=tmp_path)
    assert ended.returncode == 2 and "bash scripts/run-2-alpaca-13b-1.sh makes it" in ended.stderr


def test_an_unknown_chain_and_missing_raw_material(tmp_path):
    assert bash("chain.sh", "D13b-9", cwd=tmp_path).returncode == 2
    assert bash("chain.sh", cwd=tmp_path).returncode == 2
    ended = bash("chain.sh", "D13b-2-3", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == "" and not list(tmp_path.iterdir())
    for thing in ("M/llama-13b", "M/chinese-alpaca-lora-13b", FIREFLY, PART1, TRANSLATED, PSYQA):
        assert thing in ended.stderr
    assert "makes it" in ended.stderr and "bash scripts/" not in ended.stderr
    lines = ended.stderr.splitlines()
    assert lines == sorted(set(lines)) and all(line.startswith("chain: error: missing: ") for line in lines)


@pytest.mark.parametrize("file", (SCRIPTS / "accelerate").glob("*.yaml"), ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.distributed_type == "FSDP" and config.fsdp_config
