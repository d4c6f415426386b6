"""What the page shows, offers and asks for, without a browser."""

import types

import gradio as gr

from utils import lineage
from utils.chat.display import steps_of
from utils.chat.handlers import Handlers
from utils.chat.labels import EN
from utils.chat.page import TEST_DATA, examples
from utils.chat.page_api import PageApi
from utils.chat.sessions import ChatReply
from utils.datasets.prompts import read_prompts
from utils.inference.answerers import ChatModel
from utils.inference.sampling_params import STARTS, SamplingParams

pytest_plugins = ["browsing"]  # fixtures


def test_examples_are_short_prompts_of_one_kind_after_the_other_and_none_to_be_refused():
    found = examples()
    refused = {record["instruction"] for record in read_prompts([str(TEST_DATA / "08alignment.json")])}
    assert all(len(asked) <= 40 and len(given) <= 120 and asked not in refused for asked, given in found)
    assert min(map(len, refused)) <= 40
    begins = ["我国面积最大的淡水湖", "请把下面的中文翻译成", "判断下面这条酒店评论", "阅读短文，回答问题："]
    assert [asked[:10] for asked, _ in found[:4]] == begins and len(found) == 49


def test_the_pages_api_asks_for_whom_it_answers_and_exactly(service, monkeypatch):
    api, asked = PageApi(Handlers(service, EN)), []
    monkeypatch.setattr(service, "reply", lambda *given, **options: asked.append((given, options)) or iter(()))
    caller = gr.Request(client=types.SimpleNamespace(host="1.2.3.4"))
    for given in (("问", "料", [["前", "答"]], "", ""), ("问", "", None, "f1", "chinese")):
        assert list(api.typed_answer()(caller, *given, *(STARTS | {"seed": 5}).values())) == []
    settings, options = SamplingParams(**STARTS | {"seed": 5}), {"asker": "1.2.3.4", "exact": True}
    record = {"instruction": "问", "input": "料", "history": [["前", "答"]]}
    assert asked[0] == (("f2", record, settings, ""), options)
    assert asked[1] == (("f1", {"instruction": "问", "input": "", "output": None, "history": []}, settings, "chinese"), options)


def test_the_status_line_tells_the_chain_of_an_adapter(service, tmp_path, monkeypatch):
    steps = [{"kind": "finetune", "options": {"output_dir": f"output/{name}"}} for name in ("run-1", "rerun-2")]
    lineage.write(tmp_path, steps[1] | {"parent": {"name": "output/run-1", "sha256": "0", "lineage": steps[0]}})
    assert steps_of(ChatModel("rerun-2", tmp_path, "alpaca", steps[1])) == ["run-1", "rerun-2"]
    handlers = Handlers(service, EN)
    other = ChatModel("f2", tmp_path, "alpaca", steps[1])
    monkeypatch.setattr(service.engine, "answerers", [*service.engine.answerers, other])
    assert "f2 (run-1 → rerun-2) · cpu, float32 · no answer yet" in handlers.status("f2")


def test_what_is_shown_while_an_answer_has_no_text_yet_and_what_is_told_once(service, monkeypatch):
    display, told, last = Handlers(service, EN), [], (2.4, 3)
    monkeypatch.setattr(display, "tell", told.append)
    replies = [ChatReply("", 0, *last, "", 17, 2, True), ChatReply("", 0, *last, "", 17), ChatReply("", 1, *last, "", 17)]
    replies += [ChatReply("甲", 2, *last, ""), ChatReply("", 3, *last, "stop"), ChatReply("", 1, 0.1, 0, "")]
    for reply in replies:
        display.tell_dropped(reply)
    assert told == ["The conversation is too long: the oldest 3 turns were not sent to the model"]
    reading = "Reading the prompt (17 tokens, 2 s) …"
    shown = ["Waiting, 2 requests ahead …", reading, reading, "甲", "", "Reading the prompt (0 tokens, 0 s) …"]
    assert [display.text(reply, SamplingParams(num_beams=1)) for reply in replies] == shown
    assert display.text(replies[2], SamplingParams(num_beams=2)) == "Beam search, step 1 …"
