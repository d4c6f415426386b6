"""Prompt a model folder with the held-out questions using plain transformers, and compare with the answers in a test.json.

    python data/demo/ask_plain.py models/demo-chat-smollm2-135m output/demo-chat-2/test.json

Only the folder's own chat_template.jinja and plain greedy `generate` are used. Exits with 1 if any text differs.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import show_any_character

TOKENS = 40  # as in the demo's scripts


def ask(folder: str, questions: list[str]) -> list[str]:
    """The greedy answers of the model in `folder`."""
    words, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        asked = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = model.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
        answers.append(words.decode(new, skip_special_tokens=True).strip())
    return answers


def is_same(ours: str, plain: str) -> bool:
    """True if both texts are the same; ours leaves out a character that the token limit cut in half."""
    return ours in (plain, plain.rstrip("\ufffd").strip())


def main(folder: str, path: str) -> int:
    """Print how many texts are the same, and those that are not; 1 if there are any."""
    given = json.loads(Path(path).read_text("utf-8"))
    answers = ask(folder, [record["instruction"] for record in given])
    others = [(record, answer) for record, answer in zip(given, answers, strict=True) if not is_same(record["output"], answer)]
    for record, answer in others:
        print(f"{record['instruction']}\n  {path}: {record['output']}\n  {folder}: {answer}")
    print(f"{folder}, asked by transformers alone: {len(given) - len(others)} of {len(given)} texts are those of {path}")
    return 1 if others else 0


if __name__ == "__main__":
    show_any_character()
    sys.exit(main(*sys.argv[1:]))
