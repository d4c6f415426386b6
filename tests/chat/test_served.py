"""From end to end with a real model served by `transformers serve`: it answers the prompts, and judges the answers."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny
import torch
from scripting import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.datasets.records import read_records
from utils.evaluation.judging import judge_prompt
from utils.files import write_json
from utils.inference.remote import last_turn

SAID = "System1 8分；解释：好。System2 6.5分；解释：短。"
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
PROMPTS = [{"instruction": "你是谁？"}, {"instruction": "译成英语。", "input": "早"}, "写一首诗。"]


def taught(folder: Path) -> Path:
    """A tiny model that was trained until it answers whatever it is asked with `SAID`."""
    tiny.llama(folder, initializer_range=0.05)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    answer = tokenizer(SAID, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    records = list(read_records(folder.parent / "prompts.json", need_output=False))
    questions = [last_turn(record) for record in records] + [judge_prompt(record, [SAID, SAID]) for record in records]
    for step in range(300):
        opening = tokenizer(f"user: {questions[step % len(questions)]}\n<s>assistant: ")["input_ids"]
        ids = torch.tensor([opening + answer])
        labels = torch.tensor([[-100] * len(opening) + answer])
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server of that model, and the model's name there."""
    folder = tmp_path_factory.mktemp("served") / "model"
    write_json(folder.parent / "prompts.json", PROMPTS)
    taught(folder)
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    log = open(folder.parent / "log", "w")
    command = [program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        until = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < until, (folder.parent / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


@pytest.mark.slow
def test_a_served_model_answers_and_judges(script, served, tmp_path):
    address, model = served
    options = ["--api_base", address, "--max_tokens", 64]
    answering = ["--answer_with", model, "--test_input_path", Path(model).parent / "prompts.json", *options]
    for name in "ab":
        out = script("judge.py", *answering, "--output_dir", tmp_path / name).ok()
        assert "3 requests (0 failed)" in out and "answers from" in out
    records = json.loads((tmp_path / "a/test.json").read_text("utf-8"))
    assert [record["output"] for record in records] == [SAID] * 3
    systems = ["--answers", f"a={tmp_path}/a", "--answers", f"b={tmp_path}/b"]
    out = script("judge.py", *systems, "--judge_model", model, "--repeats", 2, *options, "--output_dir", tmp_path / "out").ok()
    assert "6 requests (0 failed)" in out and "System1 100%, System2 0%" in out
    assert "| all | 3 | **72.5** [72.5, 72.5] | **72.5** [72.5, 72.5] |" in (tmp_path / "out/scores.md").read_text("utf-8")
