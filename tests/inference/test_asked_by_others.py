"""What was trained is what travels: adapters and merged models, asked by plain transformers with their folders alone."""

import json

import chat_templates
import pytest
import tiny
import torch
from peft import PeftModel
from scripting import warm
from trainings import options
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

warm("transformers.trainer")

QUESTIONS = [{"instruction": "第3题：问问"}, {"instruction": "Q", "system": "S"}]


def base(folder, kind):
    """A tiny LLaMA with the chat template of a kind, and a second end token in its generation config."""
    words = chat_templates.tokenizer(folder, kind)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    settings = {"eos_token_id": [2, 300], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def plain_answers(model, words, ends, questions):
    """What transformers alone answers, as the ids of prompt and answer."""
    found = []
    for question in questions:
        system = [{"role": "system", "content": question["system"]}] if "system" in question else []
        messages = [*system, {"role": "user", "content": question["instruction"]}]
        asked = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**asked, max_new_tokens=12, do_sample=False, eos_token_id=ends)[0, asked["input_ids"].shape[1] :]
        found.append(words.decode(ids, skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize(("kind", "template"), [("llama3", "chat"), ("qwen3", "chat"), ("chatml", "alpaca_short")])
def test_adapter_and_merged_folder_answer_elsewhere_as_here(script, data, tmp_path, kind, template):
    model = base(tmp_path / "base", kind)
    out, merged, asked = tmp_path / "out", tmp_path / "merged", tmp_path / "asked.json"
    changes = {"prompt_template_name": template, "max_steps": 2, "train_on_inputs": False, "learning_rate": 3e-2}
    script("finetune.py", *options(model, data, out, **changes)).ok()
    script("merge_weights.py", "--base_model", model, "--lora_model", out, "--output_dir", merged).ok()
    asked.write_text(json.dumps(QUESTIONS), "utf-8")
    ask = ["--test_input_path", asked, "--is_ui", "False", "--num_beams", "1", "--max_new_tokens", "12"]
    script("generate.py", "--lora_weights", out, *ask).ok()
    said = script("generate.py", "--base_model", merged, "--output_path", tmp_path / "m.json", *ask).ok()
    assert "has a chat template" in said
    ours = [record["output"] for record in json.loads((out / "test.json").read_text("utf-8"))]
    learned = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(chat_templates.KINDS[kind][2])
    ends = [2, learned]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out)
    assert plain_answers(adapted, AutoTokenizer.from_pretrained(out), ends, QUESTIONS) == ours
    assert [record["output"] for record in json.loads((tmp_path / "m.json").read_text("utf-8"))] == ours
    assert (merged / "chat_template.jinja").read_text() == (out / "chat_template.jinja").read_text()
    taught = [learned] if template == "chat" else []
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [2, 300, *taught]


def test_several_templates_of_a_tokenizer_travel_together(script, data, tmp_path):
    """`tool_use` is what transformers takes where tools are given."""
    model, out, merged = base(tmp_path / "base", "chatml"), tmp_path / "out", tmp_path / "merged"
    words = AutoTokenizer.from_pretrained(model)
    first = words.chat_template
    words.chat_template = {"default": first, "tool_use": "{% if tools %}T{{ tools | length }}{% endif %}" + first}
    words.save_pretrained(model)
    told = script("finetune.py", *options(model, data, out, prompt_template_name="chat", max_steps=1)).ok()
    assert "has several chat templates (default, tool_use); default is used, and tool_use for records with tools" in told
    script("merge_weights.py", "--base_model", model, "--lora_model", out, "--output_dir", merged).ok()
    for folder in (out, merged):
        assert AutoTokenizer.from_pretrained(folder).chat_template == words.chat_template
    ask = ["--test_input_path", data, "--is_ui", "False", "--num_beams", "1", "--max_new_tokens", "2"]
    script("generate.py", "--lora_weights", out, *ask).ok()


def test_a_prompt_that_the_template_refuses_is_one_line_before_anything_is_written(script, tmp_path):
    model = base(tmp_path / "base", "chatml")
    path, asked, out = model / "chat_template.jinja", tmp_path / "asked.json", tmp_path / "out.json"
    refuse = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    path.write_text(refuse + path.read_text("utf-8"), "utf-8")
    asked.write_text(json.dumps(["good", "bad"]))
    ask = ["--base_model", model, "--test_input_path", asked, "--is_ui", "False", "--output_path", out]
    ended = script("generate.py", *ask, "--prompt_template", "chat")
    assert ended.error == "generate.py: error: 'bad': the chat template cannot render this dialogue (no); change it"
    assert sorted(tmp_path.glob("*out.json*")) == []


def test_ends_of_the_generation_config_end_an_answer_and_numbers_of_others_do_not(tmp_path):
    from utils.models.loading import load_base
    from utils.models.placement import place
    from utils.models.tokenizer import end_tokens, load_tokenizer

    folder = tiny.llama(tmp_path)
    words = chat_templates.tokenizer(tmp_path, "llama3")
    wanted = words.convert_tokens_to_ids("<|eot_id|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, wanted, 77, 10**6]}))
    tokenizer = load_tokenizer(folder)
    assert end_tokens(folder, tokenizer) == [2, wanted]
    model = load_base(str(folder), tokenizer, place(False, False))
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [2, wanted]
