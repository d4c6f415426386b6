"""finetune.py on raw text: all linear layers by default, and the same loss as each document alone."""

import json

import torch
from peft import PeftModel
from trainings import losses, options
from transformers import AutoModelForCausalLM

from utils import lineage
from utils.models.tokenizer import load_tokenizer

TEXTS = [
    "白日依山尽，黄河入海流。",
    "欲穷千里目，更上一层楼。",
    "床前明月光",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
]


def test_raw_text_trains_all_linear_layers_with_the_loss_of_each_document_alone(script, bases, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS), "utf-8")
    settings = {"cutoff_len": 48, "learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2}
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "f1", **settings)).ok()
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert f"the adapter goes on all linear layers, {', '.join(linear)} (--lora_target_modules" in out
    assert sorted(json.loads((tmp_path / "f1" / "adapter_config.json").read_text())["target_modules"]) == sorted(linear)
    assert "raw text: each token is learned once; pieces of one document overlap by 6 tokens" in out
    found = lineage.read(tmp_path / "f1")
    assert found["data"]["stage"] == "text" and found["data"]["records"] == 4
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    tokenizer = load_tokenizer(bases["llama"])
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert abs(losses(tmp_path / "f1")[0] - total / count) < 1e-4
    record = [{"instruction": "接一句", "input": "", "output": "更上一层楼"}] * 4
    (tmp_path / "chat.json").write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    more = {"resume_from_checkpoint": tmp_path / "f1"}
    out = script("finetune.py", *options(bases["llama"], tmp_path / "chat.json", tmp_path / "f2", **settings, **more)).ok()
    assert "incremental training" in out and [step["data"]["stage"] for step in lineage.chain(tmp_path / "f2")] == [
        "text",
        "instruction",
    ]
    PeftModel.from_pretrained(model, tmp_path / "f2")
