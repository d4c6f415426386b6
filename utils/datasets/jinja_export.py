"""A template from `templates/` as the Jinja text that other programs render, checked to give the ids of training."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from utils.console import say
from utils.datasets.chat_templates import OTHER
from utils.datasets.encoding import encode_prompt, opening_ids
from utils.datasets.records import Record
from utils.datasets.templates import CHAT, Parts, Prompter
from utils.files import read_json, replacing, write_json
from utils.models.tokenizer_files import CONFIG, TEMPLATE

Message = dict[str, Any]
SAMPLES: list[Record] = [  # one turn and several, with input and system, odd whitespace, several scripts
    {"instruction": "你是谁？"},
    {"instruction": "Translate to Chinese.", "input": "Good morning, 世界!"},
    {"instruction": "  two  spaces\n\nand lines\t\n", "input": "\n x  "},
    {"instruction": "😀 café 龘", "system": "Answer in one word."},
    {"instruction": " leading", "input": "表格", "system": "请简短回答。\n"},
    {"instruction": "And then?", "history": [["Who are you? ", "我是梦想家。 "], ["\n为什么", " 因为……\n"]]},
    {"instruction": "继续👍", "input": "1\t2", "history": [["{{ x }}", "{% y %}"]], "system": "s"},
]
GAPS = (("", ""), ("", " "), (" ", " "))  # before the first turn and later ones: some SentencePiece tokenizers need a space
FURTHER = "additional_chat_templates"  # where transformers looks for templates with other names


def messages_of(record: Record) -> list[Message]:
    """The record's dialogue up to its open question, in the form of chat templates; an input is a field of its question."""
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    earlier = [
        {"role": role, "content": text}
        for pair in record.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    question = {"role": "user", "content": record["instruction"]}
    return [*system, *earlier, question | ({"input": record["input"]} if record.get("input") else {})]


def jinja(prompter: Prompter, tokenizer: PreTrainedTokenizerBase, gaps: tuple[str, str] = ("", "")) -> str:
    """The template as Jinja: the tokenizer's opening, each question, each answer and its end of sequence.

    `gaps` are put before the first question and before later ones.
    """
    opening = "".join(tokenizer.convert_ids_to_tokens(opening_ids(tokenizer)))
    first, later = gaps
    cases = [
        ("loop.first and system", prompter.parts["turn_input"], prompter.parts["turn_no_input"], first, True),
        ("loop.first", prompter.parts["prompt_input"], prompter.parts["prompt_no_input"], first, False),
        ("", prompter.parts["turn_input"], prompter.parts["turn_no_input"], later, False),
    ]
    lines = [
        "{%- if messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
        "{%- else -%}",
        "{%- set system = '' -%}{%- set turns = messages -%}",
        "{%- endif -%}",
        *([f"{{{{- {quoted(opening)} -}}}}"] if opening else []),
        "{%- for message in turns -%}",
        "{%- if message['role'] == 'user' -%}",
    ]
    for number, (condition, with_input, without, gap, after_system) in enumerate(cases):
        lines.append(f"{{%- {'elif' if number else 'if'} {condition} -%}}" if condition else "{%- else -%}")
        opens = f"{quoted(gap)} ~ " if gap else ""
        opens += f"system ~ {quoted(chr(10) * 2)} ~ " if after_system else ""
        texts = [expression(parts, after_system) for parts in (with_input, without)]
        lines.append(f"{{%- if message['input'] -%}}{{{{- {opens}{texts[0]} -}}}}")
        lines.append(f"{{%- else -%}}{{{{- {opens}{texts[1]} -}}}}{{%- endif -%}}")
    lines += [
        "{%- endif -%}",
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- message['content'] ~ {quoted(str(tokenizer.eos_token))} -}}}}",
        "{%- else -%}",
        "{{- raise_exception('a message is of the user, of the assistant, or a first one of the system') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(lines)


def expression(parts: Parts, stripped: bool) -> str:
    """The text of a question as a Jinja expression; `stripped`: without leading whitespace."""
    fields = {"instruction": "message['content']", "input": "message['input']"}
    pieces: list[str] = []
    for literal, field in parts:
        leads = stripped and not pieces
        text = literal.lstrip() if leads else literal
        if text:
            pieces.append(quoted(text))
        if field:
            pieces.append(fields[field] + (".lstrip()" if leads and not text else ""))
    return " ~ ".join(pieces)


def quoted(text: str) -> str:
    """A text as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)


def proven(prompter: Prompter, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """The Jinja text with which transformers' own tokenizer in `folder` gives the ids of training for all samples.

    None if there is none, since that tokenizer splits texts differently.
    """
    if tokenizer.eos_token is None:
        return None
    plain = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    wanted = [encode_prompt(sample, prompter, tokenizer) for sample in SAMPLES]
    for gaps in GAPS:
        text = jinja(prompter, tokenizer, gaps)
        settings = {"chat_template": text, "return_dict": False}
        if all(plain.apply_chat_template(messages_of(s), **settings) == ids for s, ids in zip(SAMPLES, wanted, strict=True)):
            return text
    return None


def write_chat_template(name: str, texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the template used in training into the folder of a tokenizer, and remove any other.

    `name` and `texts` are what a lineage records of it. If no Jinja text gives its ids, that is printed.
    """
    text = texts.get("chat_template") if name == CHAT else proven(Prompter(name, texts), tokenizer, folder)
    (folder / TEMPLATE).unlink(missing_ok=True)
    shutil.rmtree(folder / FURTHER, ignore_errors=True)
    if (folder / CONFIG).is_file() and "chat_template" in (config := read_json(folder / CONFIG)):
        write_json(folder / CONFIG, {key: value for key, value in config.items() if key != "chat_template"})
    if text is None:
        say(
            f"{folder}: gets no {TEMPLATE}, since transformers' own tokenizer gives other ids than training "
            f"with the template {name}; use generate.py to ask the model"
        )
        return
    written = {folder / TEMPLATE: text}
    for key, other in texts.items():
        if key.startswith(OTHER):
            name = re.sub(r"[^-.\w]", "_", key.removeprefix(OTHER))  # it may come from somebody else's file
            written[folder / FURTHER / f"{name}.jinja"] = other
    for path, template in written.items():
        with replacing(path) as aside:
            aside.write_text(template, "utf-8")
