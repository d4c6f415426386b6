"""All stages in one chain, by the scripts: raw text, instructions, preferences, rewards, merged, asked, measured."""

import itertools
import json

import pytest
from trainings import tensors

from utils import lineage
from utils.files import write_json

pytestmark = pytest.mark.slow

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
