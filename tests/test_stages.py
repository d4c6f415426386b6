"""All stages in one chain, by the scripts: raw text, instructions, preferences, rewards, merged, asked, measured."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripting import ROOT
from trainings import history, tensors

from data.demo.compare import score
from utils import lineage
from utils.datasets.records import read_records
from utils.files import write_json

pytestmark = pytest.mark.slow

DEMO = Path(os.environ.get("MODEL_DIR", ROOT / "models")) / "chinese-smollm2-135m"

QUESTIONS = [(f"{a}加{b}等于几？", str(a + b)) for a in range(1, 5) for b in range(1, 5)]
STEPS = {
    "text": ([{"text": f"{question}{answer}。" * 3} for question, answer in QUESTIONS], []),
    "instruction": ([{"instruction": question, "input": "", "output": answer} for question, answer in QUESTIONS], []),
    "preference": (
        [{"instruction": question, "input": "", "chosen": answer, "rejected": "不知道"} for question, answer in QUESTIONS],
        [],
    ),
    "reward": (
        [{"instruction": question, "input": "", "output": answer} for question, answer in QUESTIONS],
        ["--rewards", "number", "--group_size", 4, "--max_new_tokens", 8],
    ),
}


def test_a_chain_of_all_stages(script, tiny_llama, tmp_path):
    before: list[str] = []
    for stage, (records, more) in STEPS.items():
        write_json(tmp_path / f"{stage}.json", records)
        out = script(
            "finetune.py", "--base_model", tiny_llama, "--data_path", tmp_path / f"{stage}.json", "--val_set_size", 0,
            "--output_dir", tmp_path / "out" / stage, "--batch_size", 8, "--micro_batch_size", 8, "--max_steps", 3,
            "--learning_rate", 1e-3, "--lora_target_modules", "[q_proj,v_proj]", *more, *before,
        ).ok()  # fmt: skip
        before = ["--resume_from_checkpoint", tmp_path / "out" / stage]
        assert "training loss" in out or stage == "reward"
    chain = lineage.chain(tmp_path / "out/reward")
    assert [step["data"]["stage"] for step in chain] == list(STEPS)
    weights = [tensors(tmp_path / "out" / stage) for stage in STEPS]
    for earlier, later in itertools.pairwise(weights[:3]):  # with rewards nothing changes where no answer earned one
        assert any((earlier[name] != later[name]).any() for name in earlier), "each stage has changed the adapter"

    merged, prompts = tmp_path / "merged", tmp_path / "heldout.json"
    script("merge_weights.py", "--base_model", tiny_llama, "--lora_model", tmp_path / "out/reward", "--output_dir", merged).ok()
    write_json(prompts, [{"instruction": question, "reference": answer} for question, answer in QUESTIONS[:4]])
    asked = ["--is_ui", False, "--test_input_path", prompts, "--max_new_tokens", 8, "--num_beams", 1]
    script("generate.py", "--base_model", merged, "--output_path", tmp_path / "merged.json", *asked).ok()
    script("generate.py", "--lora_weights", tmp_path / "out/reward", *asked).ok()
    answers = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "merged.json", tmp_path / "out/reward/test.json")]
    assert answers[0] == answers[1], "the merged model answers as the adapter"

    systems = ["--answers", f"merged={tmp_path}/merged.json", "--answers", f"adapter={tmp_path}/out/reward"]
    out = script("judge.py", *systems, "--metrics", "--test_input_path", prompts, "--output_dir", tmp_path / "judged").ok()
    assert "exact number (%), all 4 prompts: merged and adapter: no difference can be told" in out


@pytest.mark.long
@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo's merged model is not there; bash scripts/quickstart.sh makes it")
def test_on_the_demo_each_stage_teaches_its_own_and_leaves_what_came_before(script, tmp_path):
    """Measured once: loss on text 4.50 to 1.88; "who are you" 0, 10 and 10 of 10 right; margin of the pairs -0.02 to 3.68."""
    first, second = (list(read_records(ROOT / f"data/demo/{name}.json")) for name in ("f1", "f2"))
    write_json(tmp_path / "text.json", [{"text": record["instruction"] + record["output"]} for record in second])
    write_json(tmp_path / "instruction.json", first)
    pairs = [{"instruction": r["instruction"], "chosen": r["output"], "rejected": "我是一个大语言模型。"} for r in first]
    write_json(tmp_path / "preference.json", pairs)
    before: list[str | Path] = []
    logs, right = {}, {}
    for stage, epochs, rate in (("text", 4, 2e-3), ("instruction", 8, 2e-3), ("preference", 3, 2e-4)):
        out = tmp_path / "out" / stage
        script(
            "finetune.py", "--base_model", DEMO, "--data_path", tmp_path / f"{stage}.json", "--output_dir", out,
            "--prompt_template_name", "alpaca_short", "--val_set_size", 0, "--batch_size", 10, "--micro_batch_size", 10,
            "--lora_r", 8, "--lora_target_modules", "[q_proj,v_proj]", "--train_on_inputs", False, "--cutoff_len", 128,
            "--num_epochs", epochs, "--learning_rate", rate, *before,
        ).ok()  # fmt: skip
        before = ["--resume_from_checkpoint", out]
        asked = ["--test_input_path", ROOT / "data/demo/heldout", "--num_beams", 1, "--max_new_tokens", 40]
        script("generate.py", "--is_ui", False, "--lora_weights", out, *asked).ok()
        logs[stage] = history(out)
        right[stage] = score(json.loads((out / "test.json").read_text("utf-8")), "identity")
    print(right, {stage: (log[0], log[-1]) for stage, log in logs.items()})
    assert logs["text"][-1]["loss"] < 0.6 * logs["text"][0]["loss"]
    assert right["text"] == 0 and right["instruction"] >= 8 and right["preference"] >= 8
    assert logs["preference"][0]["reward_accuracy"] < 1 == logs["preference"][-1]["reward_accuracy"]
    assert logs["preference"][-1]["reward_margin"] > 1


@pytest.mark.parametrize(
    ("name", "third"),
    [
        pytest.param("counsellor", "preference", marks=pytest.mark.long),
        ("assistant", "preference"),
        pytest.param("tutor", "replay", marks=pytest.mark.long),
    ],
)
def test_one_command_makes_an_expert_of_a_folder_on_another_base(tiny_llama, tmp_path, name, third):
    """Cleaned, trained in three steps of one update each, asked what was held back, and measured."""
    models, output, folder = tmp_path / "models", tmp_path / "output", tmp_path / "mine"
    models.mkdir()
    (models / "tiny").symlink_to(tiny_llama)
    shutil.copytree(ROOT / "data" / "experts" / name, folder)
    write_json(folder / "more.json", [{"instruction": f"{n}是新的吗？", "input": "", "output": "是。"} for n in "甲乙丙丁"])
    env = {"MODEL_DIR": models, "OUTPUT_DIR": output, "PYTHON": sys.executable, "TRAIN_OPTIONS": "--max_steps 1",
           "ANSWER_OPTIONS": "--max_new_tokens 4"}  # fmt: skip
    command = ["bash", ROOT / "scripts" / f"expert-{name}.sh", folder, "--base", "tiny", "--no-page"]
    command += ["--replay", "0.5"] if third == "replay" else []
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {k: str(v) for k, v in env.items()})
    assert ended.returncode == 0, ended.stderr[-3000:]
    chain = lineage.chain(output / f"expert-{name}-3")
    assert [step["data"]["stage"] for step in chain] == [
        "text", "instruction", "instruction" if third == "replay" else "preference"
    ]  # fmt: skip
    assert ("2 of" in ended.stdout and "learned again" in ended.stdout) == (third == "replay")
    assert "expert-" in chain[1]["data"]["path"] and "clean" in chain[1]["data"]["path"]
    for step in range(1, 4):
        assert len(json.loads((output / f"expert-{name}-{step}" / "test.json").read_text("utf-8"))) == 10
    assert f"expert-{name}-3" in (output / f"expert-{name}-measured" / "chain.md").read_text("utf-8")
