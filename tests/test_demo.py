"""What the quickstart made on the real model: read here after `bash scripts/quickstart.sh` has run (CI runs it first)."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from scripting import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.demo.compare import score
from utils import lineage
from utils.datasets.records import read_records

OUTPUT = Path(os.environ.get("OUTPUT_DIR", ROOT / "output"))
MODELS = Path(os.environ.get("MODEL_DIR", ROOT / "models"))
BASE, F1, F2 = OUTPUT / "save-generate-0-smollm2-135m", OUTPUT / "run-0-smollm2-135m-1", OUTPUT / "rerun-0-smollm2-135m-2"
pytestmark = pytest.mark.skipif(
    not (F2 / "test.json").is_file(), reason="bash scripts/quickstart.sh has not run, which makes what these tests look at"
)


def answers(folder: Path) -> list[dict]:
    return json.loads((folder / "test.json").read_text("utf-8"))


def test_after_f2_both_skills_are_there_and_the_base_has_neither():
    for name in ("identity", "verses"):
        print(name, {folder.name: score(answers(folder), name) for folder in (BASE, F1, F2)})
    assert score(answers(BASE), "identity") == 0 and score(answers(BASE), "verses") == 0
    assert score(answers(F1), "identity") >= 8 and score(answers(F1), "verses") == 0
    assert score(answers(F2), "identity") >= 9
    assert score(answers(F2), "verses") >= 7


def test_the_held_back_questions_are_in_no_training_record():
    asked = {
        r["instruction"]
        for name in ("f0", "f1", "f2")
        for r in json.loads((ROOT / f"data/demo/{name}.json").read_text("utf-8"))
    }
    for file in (ROOT / "data/demo/heldout").glob("*.json"):
        held = [record["instruction"] for record in read_records(file, strict=True)]  # with answers, so `--held_out` takes them
        assert len(held) == 10 and not asked & set(held)


def test_other_users_such_as_a_container_can_read_the_models(tmp_path):
    new = tmp_path / "new"
    new.touch()
    files = [path for path in MODELS.glob("*/*") if path.is_file()]
    assert files and {path.stat().st_mode & 0o444 for path in files} == {new.stat().st_mode & 0o444}


def test_the_merged_folder_loads_with_transformers_alone_and_the_adapter_with_peft_alone():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "chinese-smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "chinese-smollm2-135m")
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] > 49152
    assert not model.config.tie_word_embeddings
    adapted = PeftModel.from_pretrained(model, F2)
    prompt = tokenizer("### Instruction:\n你是谁？\n\n### Response:\n", return_tensors="pt")
    with torch.no_grad():
        new = adapted.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "梦想家" in tokenizer.decode(new)


def test_the_chain_can_be_read_from_its_last_link():
    assert [step["kind"] for step in lineage.chain(F2)] == ["train", "train"]
    table = lineage.table(lineage.chain(F2))
    assert "run-0-smollm2-135m-1" in table and "rerun-0-smollm2-135m-2" in table and "f2.json" in table
