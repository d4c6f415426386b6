"""Random dialogues through unlike chat templates: what is asked and learned, compared with the template itself."""

import random

import chat_templates
import pytest
from transformers import AutoTokenizer

from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.encoding import IGNORED, encode, encode_prompt
from utils.datasets.templates import split_thinking

ALL = chat_templates.KINDS | chat_templates.MORE_KINDS
PIECES = [
    *"：-'\"\n\t ",
    "你好",
    "世界。",
    "word",
    "  ",
    "\n\n",
    "😀",
    "café",
    "{{ x }}",
    "{% y %}",
    "<b>",
    "</b>",
    "[INST",
    "\\n",
]
PIECES += ["1+1=2", "### ", "user", "ｆｕｌｌ"]
TAKES_NO_SYSTEM = {"gemma", "strict"}
KEYS = {"qwen3": "reasoning_content", "apart": "reasoning_content", "harmony": "thinking"}  # of thoughts beside an answer
ROUNDS = 12


def text(numbers: random.Random, length: int = 6) -> str:
    """A text of a few odd pieces, with at least one letter in it."""
    return "".join([*numbers.choices(PIECES, k=numbers.randint(0, length)), "字", *numbers.choices(PIECES, k=2)])


def dialogue(seed: int) -> dict:
    """A record of one to four turns, some answers with thoughts, some not to be learned."""
    numbers = random.Random(seed)

    def answer() -> str:
        thought = f"<think>\n{text(numbers).strip()}\n</think>\n\n" if numbers.random() < 0.3 else ""
        return thought + (text(numbers).lstrip() if thought else text(numbers))

    history = [[text(numbers), answer()] for _ in range(numbers.randint(0, 3))]
    record: dict = {"instruction": text(numbers), "output": answer(), "history": history}
    record["input"] = numbers.choice(["", text(numbers)])
    learn = [numbers.random() < 0.8 for _ in history] + [True]
    return record | ({"system": text(numbers)} if numbers.random() < 0.5 else {}) | ({} if all(learn) else {"learn": learn})


def plain_messages(kind: str, record: dict) -> list[dict]:
    """The record as one would write it for transformers."""
    question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    pairs = [*record["history"], [question, record["output"]]]
    found = [{"role": role, "content": said} for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)]
    for message in found:
        thought, _ = split_thinking(message["content"])
        if kind in KEYS and thought and message["role"] == "assistant":
            message |= {"content": message["content"].partition("</think>")[2].lstrip("\n"), KEYS[kind]: thought}
            if kind == "qwen3":  # whose twin here reads them out of the text
                message["content"] = f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"
    if record.get("system") and kind in TAKES_NO_SYSTEM:
        found[0]["content"] = f"{record['system']}\n\n{found[0]['content']}"
    elif record.get("system"):
        found.insert(0, {"role": "system", "content": record["system"]})
    return found


def runs(labels: list[int]) -> list[tuple[int, int]]:
    """Where each run of labels begins and ends."""
    found: list[tuple[int, int]] = []
    for place in (place for place, label in enumerate(labels) if label != IGNORED):
        start = found.pop()[0] if found and found[-1][1] == place else place
        found.append((start, place + 1))
    return found


@pytest.mark.parametrize("kind", list(ALL))
def test_what_is_asked_and_learned_is_what_the_template_writes(kind, tmp_path):
    """Each prompt's ids are transformers'; each learned answer stands after its prompt, is what the template writes there up to
    its first end token, and holds the record's whole answer."""
    words = chat_templates.tokenizer(tmp_path, kind)
    prompter, plain = ChatPrompter(words, [words.eos_token_id]), AutoTokenizer.from_pretrained(tmp_path)
    assert prompter.takes_system == (kind not in TAKES_NO_SYSTEM)
    end = ALL[kind][2] or "</s>"
    for seed in range(ROUNDS):
        record = dialogue(seed)
        messages = plain_messages(kind, record)
        asked = plain.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert encode_prompt(record, prompter, words) == asked, record
        sequences = encode([record], prompter, words, 10_000, False)
        found = [(one.input_ids, *run) for one in sequences for run in runs(one.labels)]
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        kept = [place for place, learn in zip(answers, record.get("learn") or [True] * len(answers), strict=True) if learn]
        assert len(found) == len(kept)
        for (ids, start, stop), place in zip(found, kept, strict=True):
            check_answer(kind, plain, messages[: place + 1], ids[:start], ids[start:stop], end)


def check_answer(kind, plain, messages, before, learned, end):
    """One learned answer, after the ids `before`."""
    said = plain.decode(learned)
    thought, answer = split_thinking(messages[-1]["content"])
    thought = thought or messages[-1].get(KEYS.get(kind, ""), "")
    assert said.endswith(end) and said.count(end) == 1
    body = said.removesuffix(end)
    assert answer.strip() in body and thought in body and ("</think>" in body or "analysis" in body) == bool(thought)
    switch = {"enable_thinking": True} if thought else {}
    prompt = plain.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False, **switch)
    whole = plain.apply_chat_template(messages, tokenize=False, **switch)
    read = plain.decode(before)
    assert read in (prompt, prompt + "\n</think>\n\n"), (read, prompt)
    if kind != "collapsed" and whole.startswith(prompt) and not (thought and kind == "r1"):
        written = whole[len(read) :] if whole.startswith(read) else whole[len(prompt) :]
        empty = not thought and chat_templates.without_empty_thought(written) != written
        body, written = [text.lstrip("\n") for text in (body, written.split("</think>")[1])] if empty else (body, written)
        assert written.partition(end)[0] == body, (written, said)
    if kind in ("qwen3", "opened") and not thought:
        assert said == messages[-1]["content"] + end
