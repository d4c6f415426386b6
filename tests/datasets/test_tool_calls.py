"""Dialogues with tools: the published forms as one, what is learned of them, and what a chat template has no place for."""

import copy
import json

import chat_templates
import pytest
import tiny
from record_files import RECORDS, as_lines
from transformers import AutoTokenizer

from utils.console import UserError
from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.encoding import IGNORED, encode, encode_prompt
from utils.datasets.prompts import as_asked, read_prompts
from utils.datasets.records import read_records
from utils.datasets.templates import Prompter
from utils.datasets.tool_calls import CARRIED

CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "天气", "parameters": CITY}
TOOLS = [{"type": "function", "function": WEATHER}]


def call(city: str, id: str, as_text: bool = True) -> dict:
    arguments = json.dumps({"city": city}, ensure_ascii=False) if as_text else {"city": city}
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


OPENAI = {
    "tools": TOOLS,
    "messages": [
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "巴黎和罗马的天气？"},
        {"role": "assistant", "content": None, "tool_calls": [call("巴黎", "call_abc-1"), call("罗马", "call_abc-2")]},
        {"role": "tool", "tool_call_id": "call_abc-2", "content": "晴"},
        {"role": "tool", "tool_call_id": "call_abc-1", "content": [{"type": "text", "text": "雨"}]},
        {"role": "assistant", "content": "巴黎有雨，罗马晴。"},
        {"role": "user", "content": "东京呢？"},
        {"role": "assistant", "content": "", "tool_calls": [call("东京", "call_abc-3", as_text=False)]},
    ],
}
CALLED = '{"name": "weather", "arguments": {"city": "巴黎"}}'
TURNS = [("human", "巴黎的天气？"), ("function_call", CALLED), ("observation", "雨")]
SHAREGPT = {
    "tools": json.dumps([WEATHER], ensure_ascii=False),
    "conversations": [{"from": role, "value": text} for role, text in [*TURNS, ("gpt", "有雨。")]],
}
ONE = [
    {"role": "user", "content": "巴黎的天气？"},
    {"role": "assistant", "content": "", "tool_calls": [call("巴黎", "call00001", as_text=False)]},
    {"role": "tool", "content": "雨", "tool_call_id": "call00001", "name": "weather"},
    {"role": "assistant", "content": "有雨。"},
]
LEGACY = {
    "functions": [WEATHER],
    "messages": [
        {"role": "user", "content": "巴黎的天气？"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "巴黎"}'}},
        {"role": "function", "name": "weather", "content": "雨"},
        {"role": "assistant", "content": "有雨。"},
    ],
}
SWIFT = {  # a thought, and two calls in turns of their own
    "tools": json.dumps(TOOLS, ensure_ascii=False),
    "messages": [
        {"role": "user", "content": "巴黎和罗马？"},
        {"role": "assistant", "content": "我查。", "reasoning_content": "两次"},
        {"role": "tool_call", "content": CALLED},
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "罗马"}}', "loss": False},
        {"role": "tool_response", "content": "雨"},
        {"role": "tool_response", "content": {"sky": "晴"}},
        {"role": "assistant", "content": "一雨一晴。"},
    ],
}


def read(tmp_path, items, **options):
    path = tmp_path / "records.jsonl"
    path.write_text(as_lines(items), "utf-8")
    return list(read_records(path, **options))


def test_the_published_forms_are_one(tmp_path):
    for item in (SHAREGPT, LEGACY):
        (record,) = read(tmp_path, [item], strict=True, carries=CARRIED)
        assert record["tools"] == TOOLS and record["instruction"] == "巴黎的天气？" and record["output"] == "有雨。"
        wanted = copy.deepcopy(ONE)
        if item is LEGACY:
            wanted[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "巴黎"}'  # as it stands in the file
        assert record["messages"] == wanted
    written = copy.deepcopy(SHAREGPT)
    written["conversations"][0]["value"], written["tools"] = "&quot;巴黎&quot;的天气？", [WEATHER | {"description": "&quot;"}]
    written["conversations"] += [{"from": "human", "value": "谢谢"}, {"from": "gpt", "value": "不谢"}]
    (record,) = read(tmp_path, [written], carries=CARRIED, fixes=["entities"])
    assert record["messages"][0]["content"] == '"巴黎"的天气？' and record["tools"][0]["function"]["description"] == "&quot;"
    other = copy.deepcopy(
        LEGACY
    )  # with a thought before the call, Llama's name for arguments, and a result with a name of its own
    other["messages"][1] |= {"reasoning_content": "查", "function_call": {"name": "weather", "parameters": {"city": "巴黎"}}}
    other["messages"][2] |= {"name": "station"}
    wanted = copy.deepcopy(ONE)
    wanted[1]["content"], wanted[2]["name"] = "<think>\n查\n</think>\n\n", "station"
    assert read(tmp_path, [other], strict=True, carries=CARRIED)[0]["messages"] == wanted
    (record,) = read(tmp_path, [OPENAI], strict=True, carries=CARRIED)
    assert record["system"] == "简短。" and [m["role"] for m in record["messages"]][:4] == ["user", "assistant", "tool", "tool"]
    assert [m["content"] for m in record["messages"][2:4]] == ["晴", "雨"] and record["output"] == ""
    (record,) = read(tmp_path, [SWIFT], strict=True, carries=CARRIED)
    spoken = record["messages"][1]
    assert spoken["content"] == "<think>\n两次\n</think>\n\n我查。" and len(spoken["tool_calls"]) == 2
    assert [m.get("tool_call_id") for m in record["messages"][2:4]] == ["call00001", "call00002"]
    assert record["messages"][3]["content"] == '{"sky": "晴"}' and record["learn"] == [False, True]
    for excluded in (1, 2):  # the text, or its first call
        changed = copy.deepcopy(SWIFT)
        changed["messages"][3].pop("loss")
        changed["messages"][excluded]["loss"] = False
        (record,) = read(tmp_path, [changed], strict=True, carries=CARRIED)
        assert record["learn"] == [False, True]


def test_without_a_place_for_them_calls_are_dropped_and_definitions_counted(tmp_path, capsys):
    plain = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "tools": TOOLS}
    assert read(tmp_path, [OPENAI, plain]) == [{"instruction": "问", "input": "", "output": "答"}]
    said = capsys.readouterr().out
    assert "1 dropped, 1 kept: a dialogue with tool calls" in said and "tools (1)" in said
    assert [len(one.get("messages", [])) for one in read(tmp_path, [OPENAI, plain], carries=["calls"])] == [7, 0]
    assert "tools (2)" in capsys.readouterr().out
    assert "tools" in read(tmp_path, [plain], carries=CARRIED)[0]


BROKEN = [
    (lambda m: m[2].update(tool_calls=[{"function": {"arguments": "{}"}}]), "a tool call without a name"),
    (lambda m: m[2].update(tool_calls=[call("x", "1") | {"function": {"name": "f", "arguments": "{"}}]), "is not JSON"),
    (lambda m: m[2].update(tool_calls=[call("x", "1") | {"function": {"name": "f", "arguments": "[1]"}}]), "not an object"),
    (lambda m: m.pop(2), "a tool's result without a call"),
    (lambda m: m.insert(3, {"role": "user", "content": "x"}), "out of order"),
    (lambda m: m.pop(5), "out of order"),
    (lambda m: m[5].update(content=" "), "an empty turn"),
    (lambda m: m.append({"role": "tool", "tool_call_id": "call_abc-3", "content": "x"}), "output is missing"),
    (lambda m: m.append({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}), "parts that are not text"),
]


@pytest.mark.parametrize(("damage", "cause"), BROKEN, ids=[cause for _, cause in BROKEN])
def test_broken_dialogues_are_dropped_and_counted(tmp_path, capsys, damage, cause):
    item = copy.deepcopy(OPENAI)
    damage(item["messages"])
    assert read(tmp_path, [item, RECORDS[0]], carries=CARRIED) == RECORDS[:1]
    assert "1 dropped, 1 kept: " in (said := capsys.readouterr().out) and cause in said


def learned(words, encoded) -> list[str]:
    """The answers that the labels of a sequence hold."""
    found: list[list[int]] = []
    for before, label in zip([IGNORED, *encoded.labels], encoded.labels, strict=False):
        if label != IGNORED:
            found = [*found, [label]] if before == IGNORED else [*found[:-1], [*found[-1], label]]
    return [words.decode(one) for one in found]


@pytest.mark.parametrize("kind", ["objects", "text", "keys", "short ids"])
@pytest.mark.parametrize("item", [OPENAI, SHAREGPT, SWIFT], ids=["openai", "sharegpt", "swift"])
def test_calls_and_answers_are_learned_as_the_template_writes_them_and_results_are_not(tmp_path, kind, item):
    words = chat_templates.tokenizer(tmp_path, kind)
    prompter, plain = ChatPrompter(words, [words.eos_token_id]), AutoTokenizer.from_pretrained(tmp_path)
    assert ("tools" in prompter.carries) == (kind != "text") and "calls" in prompter.carries
    (record,) = read(tmp_path, [item], carries=prompter.carries)
    sequences = encode([record], prompter, words, 10_000, False)
    texts = [text for one in sequences for text in learned(words, one)]
    spoken = [m for m in record["messages"] if m["role"] == "assistant"]
    kept = [m for m, learn in zip(spoken, record.get("learn") or [True] * len(spoken), strict=True) if learn]
    end = chat_templates.CALLING_KINDS[kind][2]
    assert len(texts) == len(kept)
    for text, message in zip(texts, kept, strict=True):
        assert text.endswith(end) and text.count(end) == 1 and "雨" not in text.replace("有雨", "").replace("一雨", "")
        for one in message.get("tool_calls", []):
            arguments = one["function"]["arguments"]
            city = (json.loads(arguments) if isinstance(arguments, str) else arguments)["city"]
            assert "weather" in text and city in text
            assert ('{"city": "' + city + '"}' in text) == (kind != "keys")
    messages = prompter._for_template(prompter.messages(record))
    ids = [one["id"] for message in messages for one in message.get("tool_calls", [])]
    assert len({*ids}) == len(ids) and (kind != "short ids" or ids == [f"call{number:05}" for number in range(1, len(ids) + 1)])
    results = [ids.index(message["tool_call_id"]) for message in messages if message["role"] == "tool"]
    assert results == ([1, 0] if item is OPENAI else [0, 1] if item is SWIFT else [0])
    tools = {"tools": TOOLS} if kind != "text" else {}
    asked = plain.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False, **tools)
    assert encode_prompt(record, prompter, words) == asked
    if not prompter.takes_system:
        return
    whole = plain.apply_chat_template(messages, tokenize=False, **tools)
    if kind != "text":  # whose prompts open a thought
        assert whole.startswith(plain.decode(sequences[-1].input_ids))
    assert ("天气" in plain.decode(sequences[0].input_ids).replace("的天气", "")) == (kind != "text")


def test_control_tokens_of_calls_stay_in_an_answers_text(tmp_path):
    from utils.inference.engine import Ending
    from utils.inference.rollouts import Sampler
    from utils.inference.sampling_params import SamplingParams

    words = chat_templates.tokenizer(tmp_path, "short ids")
    prompter = ChatPrompter(words, [words.eos_token_id])
    ids = words('[TOOL_CALLS]{"name": "f"}</s>', add_special_tokens=False)["input_ids"]
    assert Ending(words, [], prompter.ends, prompter.markers).text(ids) == '[TOOL_CALLS]{"name": "f"}'
    assert Ending(words, [], prompter.ends).text(ids) == '{"name": "f"}'
    training = Sampler(words, prompter, [], SamplingParams(), 100)
    assert training.text(ids) == '[TOOL_CALLS]{"name": "f"}', "in training, for rewards and at evaluations, too"


def test_a_prompt_with_tools_is_asked_with_them_or_that_is_printed_or_refused(tmp_path, capsys):
    """In batch, too; a template of templates/ has no place for definitions, which is counted, and none for calls."""
    from utils.inference.answerers import BASE, ChatModel
    from utils.inference.batch import Task
    from utils.inference.engine import Engine
    from utils.inference.sampling_params import SamplingParams
    from utils.models.placement import place

    tiny.llama(tmp_path / "base", vocab_size=700)
    words = chat_templates.tokenizer(tmp_path / "base", "objects")
    path = tmp_path / "asked.json"
    (tmp_path / "plain").mkdir()
    question = {"messages": [{"role": "user", "content": "问"}], "tools": TOOLS}
    path.write_text(json.dumps([question, OPENAI | {"messages": OPENAI["messages"][:5]}], ensure_ascii=False), "utf-8")
    records = read_prompts([str(path)])
    engine = Engine(str(tmp_path / "base"), [ChatModel(BASE, None, "chat", None)], place(False, False))
    task = Task(engine, BASE, tmp_path / "test.json", records, SamplingParams(num_beams=1, max_new_tokens=4))
    wanted = words.apply_chat_template(question["messages"], tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert task.prompts[0] == wanted and "晴" in words.decode(task.prompts[1])
    assert as_asked(records[1])["tools"] == TOOLS and len(as_asked(records[1])["messages"]) == 4
    engine = Engine(str(tmp_path / "base"), [ChatModel(BASE, None, "alpaca", None)], place(False, False))
    Task(engine, BASE, tmp_path / "test.json", records[:1], SamplingParams(max_new_tokens=4))
    assert "1 prompts have tools, which its template alpaca does not support" in capsys.readouterr().out
    with pytest.raises(UserError, match="tools are called in this dialogue"):
        encode_prompt(records[1], Prompter("alpaca"), words)
    assert ChatPrompter(chat_templates.tokenizer(tmp_path / "plain", "plain"), [2]).carries == frozenset()
