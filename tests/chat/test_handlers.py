"""What the page shows, offers and asks for, without a browser."""

import json
import types

import gradio as gr
import pytest

from utils import lineage
from utils.chat.conversations import Conversation, Talk, Turn
from utils.chat.display import Pace, steps_of
from utils.chat.feedback import Feedback
from utils.chat.handlers import Handlers
from utils.chat.labels import EN
from utils.chat.page import TEST_DATA, examples
from utils.chat.page_api import PageApi
from utils.chat.sessions import ChatReply
from utils.chat.tabs import Tabs, spelled
from utils.datasets.prompts import read_prompts
from utils.inference.answerers import ChatModel
from utils.inference.sampling_params import CONTROLS, SHOWN, STARTS, SamplingParams

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


KNOBS = {name: STARTS[name] for name in SHOWN} | {"do_sample": False, "seed": -1, "num_beams": 1, "max_new_tokens": 8}


@pytest.fixture(name="page")
def fixture_page(service, tmp_path, monkeypatch):
    """The functions of the page; `said` keeps what they tell."""
    handlers = Handlers(service, EN, Feedback(str(tmp_path)))
    handlers.said = []
    for way in ("tell", "warn"):
        monkeypatch.setattr(handlers, way, handlers.said.append)
    return handlers


def test_below_an_answer_stands_who_gave_it_and_how(page):
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 5}
    cut, stopped = "⚠ cut at the token limit", "⚠ stopped"
    for by, finish, note in (
        ({"model": "f1", "settings": {"num_beams": 1}, "tokens": 12, "speed": 3.46}, "stop", "f1 · greedy · 12 tokens, 3.5/s"),
        ({"model": "base", "settings": {"num_beams": 4}}, "length", f"base model · Beams 4 · {cut}"),
        ({"model": "<b>", "settings": drawn}, "", "&lt;b> · sampled: temperature 0.7, top-p 0.9, top-k 40, seed 5"),
        ({}, "stopped", stopped),
    ):
        assert page.note(Turn("问", "答", finish, by)) == note
    works = {"do_sample": False, "num_beams": 1, "max_new_tokens": 9, "repetition_penalty": 1.0, "seed": 3}
    settings = SamplingParams(num_beams=1, max_new_tokens=9, seed=3)
    given = page.giver("f1", "", settings, {"model": "f1"})
    shown = {name: value for name, value in works.items() if name in SHOWN and not CONTROLS[name].only}
    assert given == {"model": "f1", "template": "alpaca", "settings": shown}
    other = page.giver("f1", "chinese", settings, {"model": "f2"})
    assert (other["model"], other["template"]) == ("f2 + f1", "chinese")
    dropped = ChatReply("甲", 4, 2.0, 3, "stop")
    told = "4 tokens, 2.0/s · The conversation is too long: the oldest 3 turns were not sent to the model"
    assert page.status("f1", dropped).endswith(told)


def test_an_answer_is_drawn_where_the_likeliest_would_be_the_same(page):
    knobs = KNOBS | {"temperature": 1.5, "top_p": 0.5, "top_k": 100}
    assert page.drawing(knobs) == {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 100}
    assert page.settings(**KNOBS).seed != page.settings(**KNOBS).seed and page.settings(**KNOBS | {"seed": 7}).seed == 7
    talk, greedy = Talk(), {"model": "f1", "settings": {"do_sample": False}}
    exact = [page.way(talk, KNOBS | more) for more in ({"seed": 5}, {"do_sample": True}, {"do_sample": True, "seed": 5})]
    assert exact == [{"asker": id(talk), "exact": one} for one in (False, False, True)]
    for adapter, by, changed, more, varied in (
        ("f1", greedy, "", {}, True),
        ("f1", greedy, "问", {}, True),
        ("f2", greedy, "", {}, False),
        ("f1", greedy, "别的", {}, False),
        ("f1", greedy, "", {"do_sample": True}, False),
        ("f1", greedy, "", {"num_beams": 2}, False),
        ("f1", {"model": "f1", "settings": {"do_sample": True}}, "", {}, False),
    ):
        talk.change(Conversation((Turn("问", "答", "stop", by),)))
        page.take_again(talk, 0, changed, "", adapter, "", **KNOBS | more)
        assert talk.vary == varied and talk.conversation.turns == (Turn(changed or "问"),)
    assert page.said == ["Greedy decoding would give the same answer, so this one is sampled"] * 2


def test_a_conversation_is_kept_with_its_name_and_continued(page):
    talk = Talk()
    wanted, _, kept, box = page.ask(talk, "问", "护士", " 名 ", "f1", "", **KNOBS)
    assert (wanted, box["value"], talk.conversation) == (1, "问", Conversation((Turn("问"),), "护士"))
    assert json.loads(kept["value"]) == json.loads(talk.to_browser()) and talk.name == "名"
    assert page.ask(talk, "长" * 20_001, "", "名", "f1", "", **KNOBS)[3]["value"] == "" and len(page.said) == 1
    for answer, finish, begun in (("", "", False), ("答", "length", True), ("答", "stopped", True)):
        talk.change(Conversation((Turn("问", answer, finish),)))
        page.go_on(talk)
        assert talk.begun == begun and talk.wanted == talk.changes
    talk.change(Conversation((Turn("问", "答", "stop"),)))
    assert page.go_on(talk)[0] == gr.skip() and page.said[1:] == ["The last answer is complete; there is nothing to continue"]
    _, kept, name = page.begin(talk, "新名")
    assert (
        json.loads(kept["value"])["name"] == "新名" and not talk.conversation.turns and (talk.name, name["value"]) == ("", "")
    )
    listed = page.listed(talk, json.dumps([["甲", "1"], ["", talk.id]]))
    assert (listed["choices"], listed["value"]) == ([("甲", "1"), ("—", talk.id)], talk.id)
    assert page.listed(Talk(), json.dumps([["甲", "1"]]))["value"] is None
    page.load(talk, '{"instruction": "问", "output": "' + "答" * 1_000_000 + '"}')
    assert not talk.conversation.turns and page.said[2:] == ["No conversation in this file: > 1000000"]


def test_a_continued_answer_stays_while_the_model_reads(page, monkeypatch):
    replies = [ChatReply("", 0, 0.0, 0, ""), ChatReply("我是谁", 1, 1.0, 0, "stop")]
    monkeypatch.setattr(page.service, "reply", lambda *given, **options: iter(replies))
    talk = Talk(Conversation((Turn("问", "我是", "length", {"model": "f2"}),)), begun=True)
    shown = [talk.conversation.turns[0].answer for _ in page.grow(talk, "f1", "", **KNOBS)]
    (turn,) = talk.conversation.turns
    assert shown[0] == "我是" and turn[:3] == ("问", "我是谁", "stop") and turn.by["model"] == "f2 + f1"


def test_what_the_model_reads_is_shown_for_the_question_or_else_the_last(page, service):
    talk = Talk(Conversation((Turn("一", "二", "stop"), Turn("三", "四", "stop"))))
    before = [["一", "二"]]
    for question, record in (
        (" ", {"instruction": "三", "history": before}),
        ("五", {"instruction": "五", "history": [*before, ["三", "四"]]}),
    ):
        ids = service.engine.encode("f1", record)
        prompt, pieces, counted = page.tokens(talk, question, "", "f1", "", **KNOBS)
        assert prompt["value"] == service.engine.tokenizers["f1"].decode(ids)
        assert [int(line.partition("\t")[0]) for line in pieces["value"].splitlines()] == ids
        assert counted["value"] == f"**{len(ids)}** tokens, window 4096"


def test_a_thumb_is_for_the_answer_at_which_it_is(page, tmp_path):
    talk = Talk(Conversation((Turn("一", "二", "stop", {"model": "f1"}), Turn("三", "四", "stop"))))
    event = types.SimpleNamespace(index=1, liked=True)
    list(page.like(event, talk=talk))
    thumb = json.loads((tmp_path / "thumbs.jsonl").read_text("utf-8"))
    assert {key: thumb[key] for key in thumb if key != "time"} == {
        "instruction": "一", "input": "", "output": "二", "label": True, "by": {"model": "f1"}, "id": f"{talk.id}-0",
    }  # fmt: skip
    assert talk.thumbs == {0: True} and page.thumbs(talk) == ["Like", None]


def test_votes_are_for_whom_they_name_and_given_once(page, tmp_path):
    tabs, named = Tabs(page), "A is **f1**, B is **base model** · "
    for vote, answers, told in (
        ("left", ("甲", "乙"), "Written to votes.jsonl"),
        ("right", ("甲", "乙"), "Written to votes.jsonl"),
        ("both", ("甲", "乙"), "Written to ties.jsonl"),
        ("neither", ("甲", "甲"), "Written to ties.jsonl"),
        ("left", ("甲 ", "甲"), "Both answers are the same; not recorded"),
        ("right", ("甲", ""), "Written to ties.jsonl"),
    ):
        duel = {
            "question": "问",
            "names": ("f1", "base"),
            "answers": dict(zip(("f1", "base"), answers, strict=True)),
            "settings": {},
        }
        assert tabs.vote(duel, vote)[0]["value"] == named + told
        if "Written" in told:
            assert tabs.vote(duel, vote)[0]["value"] == "Ask first, and vote once both answers are complete"
    votes, ties = (
        [json.loads(line) for line in (tmp_path / name).read_text("utf-8").splitlines()]
        for name in ("votes.jsonl", "ties.jsonl")
    )
    keys = ("chosen", "rejected", "chosen_model", "rejected_model")
    assert [tuple(vote[key] for key in keys) for vote in votes] == [("甲", "乙", "f1", "base"), ("乙", "甲", "base", "f1")]
    assert [vote["vote"] for vote in ties] == ["both", "neither", "right"]


def test_a_list_is_a_table_with_a_row_for_each_question(page, monkeypatch):
    tabs, settings = Tabs(page), SamplingParams(num_beams=1)

    def replies(talk, question, names, *_):
        texts = {"f1": "<一>二", "f2": "<一>三"} if question == "问&" else {}
        return iter([(settings, {name: ChatReply(text, 1, 1.0, 0, "stop") for name, text in texts.items()})] if texts else [])

    monkeypatch.setattr(tabs, "replies", replies)
    *_, table = tabs.compare_list(Talk(), "坏\n\n 问& \n", ["f1", "f2"], "", **KNOBS)
    heads = "<tr><th scope=col>Question</th><th scope=col>f1</th><th scope=col>f2</th></tr>"
    rows = "<tr><td>坏</td><td></td><td></td></tr>"
    rows += "<tr><td>问&amp;</td><td>&lt;一&gt;二</td><td>&lt;一&gt;<mark>三</mark></td></tr>"
    assert table == f"<table>{heads}{rows}</table>"
    for count, told in ((50, []), (51, ["At most 50 prompts"])):
        assert list(tabs.compare_list(Talk(), "问\n" * count, ["f1", "f2"], "", **KNOBS)) == [] and page.said == told
    assert [one["visible"] for one in tabs.choose(["f1"])] == [False, True, False]
    assert [spelled(seconds) for seconds in (59.6, 3725.4, 90_000)] == ["0:01:00", "1:02:05", "25:00:00"]
    pace = Pace(1000)
    assert [pace.is_due(done) for done in (True, False, True)] == [True, False, True]
