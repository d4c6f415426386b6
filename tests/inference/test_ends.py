"""Where answers end: after training, each answer ends by itself, and none goes on as the user."""

import copy
import json

import chat_templates
import pytest
import tiny
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from utils.console import say_once
from utils.datasets.encoding import IGNORED, encode, encode_prompt
from utils.datasets.prompters import make_prompter
from utils.datasets.templates import TEMPLATES
from utils.inference.answerers import BASE, ChatModel
from utils.inference.decoding import decode
from utils.inference.engine import Ending, Engine
from utils.inference.sampling_params import SamplingParams
from utils.models.placement import place
from utils.models.tokenizer import load_tokenizer
from utils.training.batching import pad

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.json"))
CHATS = ["chatml", "gemma", "glm", "mistral", "hunyuan", "text end", "no end"]
ALL = chat_templates.KINDS | chat_templates.MORE_KINDS
RECORDS = [
    {"instruction": "春", "input": "", "output": "处处闻啼鸟。"},
    {"instruction": "夜", "input": "x", "output": "花落\n多少。"},
    {"instruction": "谁", "input": "", "output": "梦想家。", "history": [["你", "好"]], "system": "简短"},
]
GREEDY = SamplingParams(num_beams=1, max_new_tokens=40, repetition_penalty=1.0, no_repeat_ngram_size=0)
MOST_STEPS = 400


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory):
    """A tiny model that has learned RECORDS by heart with every template, its tokenizer, and the templates by name."""
    folder = tmp_path_factory.mktemp("by_heart")
    tiny.llama(folder, vocab_size=700, initializer_range=0.1)
    words = chat_templates.tokenizer(folder, "chatml")
    words.add_tokens([AddedToken(token, normalized=False, special=True) for kind in CHATS for token in ALL[kind][1]])
    prompters = {name: make_prompter(name, words, [2]) for name in NAMES}
    for kind in CHATS:
        words.chat_template = ALL[kind][0]
        prompters[kind] = make_prompter("chat", copy.deepcopy(words), [2])
    rows = [row for prompter in prompters.values() for row in encode(RECORDS, prompter, words, 500, train_on_inputs=False)]
    batch = pad([{"input_ids": row.input_ids, "labels": row.labels} for row in rows], 1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(MOST_STEPS):
        loss = model(**batch, num_items_in_batch=(batch["labels"] != IGNORED).sum()).loss
        if loss < 0.01:
            return model.eval(), words, prompters
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"not learned: {loss}")


def answers(by_heart, template: str, stops=()) -> list[tuple[str, bool]]:
    """The text of each answer, and whether a token that was learned as its end ended it."""
    model, words, prompters = by_heart
    prompter = prompters[template]
    ending = Ending(words, [*prompter.stop_strings, *stops], getattr(prompter, "ends", [2]))
    prompts = [encode_prompt(record | {"output": ""}, prompter, words) for record in RECORDS]
    found = {}
    for step in decode(model, prompts, [GREEDY.max_new_tokens] * len(prompts), GREEDY, ending, [0] * len(prompts)):
        found |= step.finished
    return [(ending.text(found[row]), found[row][-1] in ending.ends) for row in range(len(RECORDS))]


@pytest.mark.parametrize("template", [*NAMES, *CHATS])
def test_after_training_every_answer_ends_by_itself_with_every_template(template, by_heart):
    """With an end that was learned, not by a stop string; only the template that ends answers with a text stops at that."""
    assert answers(by_heart, template) == [(record["output"], template != "text end") for record in RECORDS]


def test_texts_given_as_stop_end_an_answer_and_are_not_in_it(by_heart):
    assert [text for text, _ in answers(by_heart, "chatml", ["闻", "多少"])] == ["处处", "花落", "梦想家。"]


def test_each_end_token_of_the_base_ends_an_answer(tmp_path):
    """Those of generation_config.json, too, and that of the template."""
    tiny.llama(tmp_path, vocab_size=700)
    words = chat_templates.tokenizer(tmp_path, "chatml")
    config = AutoModelForCausalLM.from_pretrained(tmp_path)
    other = words.convert_tokens_to_ids("<|im_start|>")
    config.generation_config.eos_token_id = [2, other]
    config.save_pretrained(tmp_path)
    engine = Engine(str(tmp_path), [ChatModel(BASE, None, "chat", None)], place(False, False))
    end = words.convert_tokens_to_ids("<|im_end|>")
    assert engine.ending(BASE).ends == {2, other, end}
    assert all(engine.ending(BASE)([40, token]) for token in (2, other, end)) and not engine.ending(BASE)([40, 41])


@pytest.mark.parametrize(
    ("named", "configured", "ends", "words"),
    [
        (None, 2, {2}, "the tokenizer names no eos_token; answers end with </s>, from config.json"),
        ("", 2, {2}, "answers end with </s>"),
        (None, None, set(), "neither tokenizer nor config.json names a token to end answers with"),
    ],
)
def test_a_tokenizer_that_names_no_end(tmp_path, capsys, named, configured, ends, words):
    """Said once, also where several answer; "" would mean the unknown token."""
    say_once.cache_clear()
    base = tiny.llama(tmp_path / "base")
    for name, changes in (
        ("tokenizer_config", {"eos_token": named, "pad_token": None}),
        ("config", {"eos_token_id": configured}),
    ):
        path = base / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (base / "generation_config.json").unlink()
    engine = Engine(str(base), [ChatModel(name, None, "alpaca", None) for name in (BASE, "other")], place(False, False))
    assert engine.ending(BASE).ends == ends and capsys.readouterr().out.count(words) == 1
    assert load_tokenizer(base).eos_token_id is None  # which training refuses
