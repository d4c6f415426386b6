"""Tools through the endpoint: answers that call them, read in each form that is known, and a model that was taught to call."""

import json

import chat_templates
import openai
import pytest
import tiny
import torch
from openai.types.chat import ChatCompletionMessage
from test_endpoint import serving
from transformers import AutoModelForCausalLM

from utils.chat.called_tools import OPENINGS, Called, CallReader, calls_in
from utils.chat.protocol import Chat
from utils.chat.sessions import ChatService
from utils.console import UserError
from utils.datasets.encoding import encode
from utils.inference.answerers import BASE, resolve
from utils.inference.engine import Engine
from utils.models.placement import place

LLAMA3 = (  # as Llama 3 writes calls: the answer is the call's JSON, its arguments called parameters
    chat_templates.DEFINED + "{% for message in messages %}{% if message.tool_calls %}"
    "{% set call = message.tool_calls[0].function %}{{ '<|assistant|>' }}"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' + call.arguments | tojson + \'}<|end|>\' }}'
    + chat_templates.RESULT + chat_templates.SAID + chat_templates.OPEN
)  # fmt: skip
KINDS = chat_templates.CALLING_KINDS | {"llama3": (LLAMA3, [*chat_templates.SIGNS, "<|tool|>"], "<|end|>")}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
QUESTION = {"role": "user", "content": "巴黎天气？"}


def base(folder, kind):
    """A tiny model whose tokenizer has this template."""
    tiny.llama(folder, max_position_embeddings=1024)
    template, control, end = KINDS[kind]
    words = tiny.tokenizer(folder)
    words.add_special_tokens({"additional_special_tokens": control} | ({"eos_token": end} if end else {}))
    words.chat_template = template
    words.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(words))
    model.config.eos_token_id = model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    return folder


def engine_of(folder):
    name, answerers = resolve(str(folder), [], "")
    return Engine(name, answerers, place(False, False))


@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_read_as_the_template_writes_them_and_other_forms_refused_by_name(tmp_path, kind):
    engine = engine_of(base(tmp_path, kind))
    if kind in ("text", "keys", "plain"):
        with pytest.raises(UserError, match=r"tools: the (chat )?template of base"):
            CallReader(engine, BASE, "", ["weather"])
        return
    reader, prompter = CallReader(engine, BASE, "", ["weather"]), engine.prompter(BASE)
    arguments = {"city": '"巴黎"\n{x}', "days": [1, 2.5, None]}
    calls = [{"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]
    (sequence,) = prompter.encode({"messages": messages, "tools": TOOLS}, False)
    answer = [token for token, label in zip(sequence.input_ids, sequence.labels, strict=True) if label != -100]
    ending = engine.ending(BASE)
    text, found = reader.read(ending.text(answer))
    assert text == "" and [json.loads(call["function"]["arguments"]) for call in found] == [arguments]
    assert found[0]["function"]["name"] == "weather" and found[0]["id"] != calls[0]["id"]
    for cut in range(1, len(answer)):  # whatever of a call has come by then, none of it is taken for text
        assert reader.so_far(ending.so_far(answer[:cut])) == ""
    said = '我查一下，1 < 2。{"name": 3}'
    assert reader.read(said) == (said, []) and reader.so_far(said) == said
    other = '{"name": "other", "parameters": {}}'
    assert (
        not reader.read(f"{reader.opening}{other}").calls if kind == "llama3" else reader.read(f"{reader.opening}{other}").calls
    )
    parts = [{"index": place} | call for place, call in enumerate(found * 2)]
    assert Chat("m").delta(Called("", found * 2), False) == {"delta": {"tool_calls": parts}}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": found}
    assert Chat("m").choice(Called("", found)) == {"message": message}


def test_what_is_no_whole_call_stays_text():
    one = '{"name": "f", "arguments": {"a": "</tool_call>"}}'
    assert calls_in(f"<tool_call>{one}</tool_call>\n<tool_call>\n{one}", "<tool_call>") == [json.loads(one)] * 2
    assert calls_in(f"[TOOL_CALLS] [{one}, {one}]", "[TOOL_CALLS]") == calls_in(f"[TOOL_CALLS]{one}{one}", "[TOOL_CALLS]")
    assert calls_in(one.replace("arguments", "parameters"), "") == [json.loads(one)]
    for broken in (
        "",
        one[:-1],
        f"{one} and",
        '{"name": 3}',
        '{"name": ""}',
        '{"name": "f", "arguments": []}',
        "[" * 10**5,
        "3",
    ):
        for opening in OPENINGS:
            assert calls_in(opening + broken, opening) == [], (opening, broken)


@pytest.fixture(name="client", scope="module")
def fixture_client(tmp_path_factory):
    """The official client of an endpoint whose model was taught one call, and what to make of its result."""
    folder = base(tmp_path_factory.mktemp("caller"), "objects")
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "巴黎"}}}
    messages = [QUESTION, {"role": "assistant", "content": "我查。", "tool_calls": [call]}]
    messages += [
        {"role": "tool", "tool_call_id": "a", "name": "weather", "content": "晴"},
        {"role": "assistant", "content": "晴天。"},
    ]
    engine = engine_of(folder)
    plain = {"instruction": "巴黎天气？", "input": "", "output": "不知道。"}
    records = [{"messages": messages, "tools": TOOLS}, plain]
    rows = encode(records, engine.prompter(BASE), engine.tokenizers[BASE], 1024, False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        losses = [model(input_ids=torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss for r in rows]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(losses) < 0.05
    model.save_pretrained(folder)
    service = ChatService(engine_of(folder), 2048)
    with serving(service) as address, openai.OpenAI(api_key="secret", base_url=address, max_retries=0) as client:
        yield client
    service.scheduler.close()


def test_a_tool_is_called_and_its_result_answered(client):
    asked = {"model": "base", "tools": TOOLS, "max_tokens": 100}
    (choice,) = client.chat.completions.create(messages=[QUESTION], **asked).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", "我查。", "weather")
    assert json.loads(call.function.arguments) == {"city": "巴黎"}
    messages = [QUESTION, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "晴"}]
    (last,) = client.chat.completions.create(messages=messages, **asked).choices
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", "晴天。", None)
    for choice in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}):  # then it does not know of any
        (plain,) = client.chat.completions.create(messages=[QUESTION], **asked | choice).choices
        assert (plain.finish_reason, plain.message.content) == ("stop", "不知道。")


def test_a_call_is_streamed_whole_and_its_text_as_it_grows(client):
    with client.chat.completions.stream(model="base", messages=[QUESTION], tools=TOOLS, max_tokens=100) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        message = stream.get_final_completion().choices[0]
    assert "".join(texts) == "我查。" and len(texts) > 1 and message.finish_reason == "tool_calls"
    assert isinstance(message.message, ChatCompletionMessage)
    assert json.loads(message.message.tool_calls[0].function.arguments) == {"city": "巴黎"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [{"type": "function", "function": WEATHER | {"strict": True}}]}, "strict"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools"),
        ({"tools": TOOLS * 129}, "tools"),
        ({"extra_body": {"template": "alpaca"}}, "does not support tools"),
        (
            {
                "messages": [
                    QUESTION,
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]},
                ]
            },
            "the last one must be",
        ),
        ({"messages": [QUESTION, {"role": "tool", "tool_call_id": "x", "content": "晴"}]}, "messages"),
        ({"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "messages"),
    ],
)
def test_what_is_asked_of_tools_and_not_done_is_refused_by_name(client, change, named):
    with pytest.raises(openai.BadRequestError, match=named):
        client.chat.completions.create(**{"model": "base", "messages": [QUESTION], "tools": TOOLS, "max_tokens": 3} | change)
