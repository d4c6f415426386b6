"""The chat page in a real headless Chromium: a conversation as it is asked, shown, stopped, changed, saved and kept apart."""

import gc
import json
import re
import time

import gradio as gr
import pytest
from browsing import (
    PATIENCE,
    answer_of,
    ask,
    choose,
    plain,
    put,
    said,
    send,
    served,
    settled,
)
from playwright.sync_api import expect

from utils.chat.labels import ZH
from utils.chat.sessions import ChatService, TooLong
from utils.inference.answerers import resolve
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams
from utils.models.placement import place

pytest_plugins = ["browsing"]  # fixtures


def test_a_question_is_answered_as_the_engine_answers(visit, url, service):
    page = visit(url)
    ask(page, "你是谁？", tokens=24)
    expected = answer_of(service, "f2", {"instruction": "你是谁？"}, 24)
    assert plain(said(page.locator("#chat .bot.message"))) == plain(expected)
    assert "24 个词元" in page.locator("#status").inner_text()
    assert page.title() == "梦想家"
    assert "base" in page.locator("#status").inner_text() and "cpu, float32" in page.locator("#status").inner_text()


def test_answers_stream(visit, url, engine):
    page = visit(url)
    put(page, "max_new_tokens", 60)
    engine.pause = 0.1
    send(page, "写一首诗")
    seen = set()
    until = time.time() + 20
    while time.time() < until and len(seen) < 6:
        seen.update(len(text) for text in page.locator("#chat .bot.message").all_inner_texts())
    engine.pause = 0
    assert len(seen) >= 6


def test_stop_ends_the_computation_within_a_token(visit, url, engine):
    page = visit(url)
    put(page, "max_new_tokens", 2048)
    engine.pause = 0.1  # so that the answer does not come to its end by itself
    send(page, "讲一个很长的故事")
    expect(page.locator("#chat .bot.message .by")).to_be_visible()
    page.locator("#stop").click()
    time.sleep(1)
    engine.pause = 0
    before = engine.computed
    time.sleep(1)
    assert engine.computed == before
    expect(page.locator("#chat .bot.message")).to_contain_text("已停止")
    shown = said(page.locator("#chat .bot.message"))
    ask(page, "接着说", tokens=8)  # the part that was there is kept, and part of the next prompt
    assert said(page.locator("#chat .bot.message").first).startswith(shown)


@pytest.mark.slow
def test_a_question_asked_while_an_answer_grows_ends_that_answer(visit, url, engine, service):
    page = visit(url)
    put(page, "max_new_tokens", 300)
    engine.pause = 0.5  # seconds a token, minutes an answer: none comes to its end before the next question
    questions = [f"第{number}问" for number in range(4)]
    for number, question in enumerate(questions):
        send(page, question)
        expect(page.locator("#chat .bot.message")).to_have_count(number + 1)
        expect(page.locator("#chat .bot.message .by")).to_have_count(number + 1)
    page.locator("#stop").click()
    engine.pause = 0
    settled(page)
    assert page.locator("#chat .user.message").all_inner_texts() == questions
    first = plain(said(page.locator("#chat .bot.message").first))
    whole = plain(answer_of(service, "f2", {"instruction": questions[0]}, 300))
    assert whole.startswith(first) and len(first) < len(whole)


def test_a_closed_tab_ends_the_computation(visit, url, engine):
    page = visit(url)
    put(page, "max_new_tokens", 2048)
    send(page, "再讲一个很长的故事")
    page.locator("#chat .bot.message").wait_for()
    page.close()
    time.sleep(2)
    before = engine.computed
    time.sleep(1)
    assert engine.computed == before


def test_a_follow_up_is_asked_with_what_went_before(visit, url, service):
    page = visit(url)
    ask(page, "我叫小明。", tokens=12)
    ask(page, "我叫什么？")
    first = answer_of(service, "f2", {"instruction": "我叫小明。"}, 12)
    record = {"instruction": "我叫什么？", "history": [["我叫小明。", first]]}
    second = said(page.locator("#chat .bot.message").last)
    assert plain(second) == plain(answer_of(service, "f2", record, 12))
    assert plain(second) != plain(answer_of(service, "f2", {"instruction": "我叫什么？"}, 12))


def test_each_setting_reaches_the_engine_by_its_name(visit, url, engine):
    """Pitfall 14."""
    page = visit(url)
    values = {"max_new_tokens": 5, "temperature": 0.8, "top_p": 0.6, "top_k": 7, "repetition_penalty": 1.2}
    expect(page.locator("#temperature input[type=number]")).to_be_disabled()  # without an effect while greedy
    page.locator("#do_sample input").check()
    for name, value in values.items():
        put(page, name, value)
    choose(page, "adapter", "f1")
    choose(page, "template", "chinese")
    ask(page, "你好")
    name, settings, template = engine.asked[-1]
    assert (name, template, settings.do_sample, settings.num_beams) == ("f1", "chinese", True, 1)
    assert {key: getattr(settings, key) for key in values} == values
    assert "5 个词元" in page.locator("#status").inner_text()
    assert "f1" in page.locator("#status").inner_text()


def test_presets_set_what_they_name_and_nothing_else(visit, url):
    page = visit(url)
    values = {name: page.locator(f"#{name} input[type=number]") for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
    put(page, "max_new_tokens", 33)
    choose(page, "preset", "发散")
    expect(page.locator("#do_sample input")).to_be_checked()
    for name, value in {"temperature": "1.1", "top_p": "0.95", "top_k": "100", "max_new_tokens": "33"}.items():
        expect(values[name]).to_have_value(value)
    expect(values["temperature"]).to_be_enabled()
    choose(page, "preset", "精确（贪心）")
    expect(page.locator("#do_sample input")).not_to_be_checked()
    expect(values["temperature"]).to_be_disabled()


def test_a_system_prompt_is_chosen_seen_and_sent(visit, url, service):
    page = visit(url)
    page.locator("#system_part > button").click()
    choose(page, "persona", "翻译")
    system = ZH.personas["翻译"]
    expect(page.locator("#system textarea")).to_have_value(system)
    ask(page, "你是谁？", tokens=12)
    record = {"instruction": "你是谁？", "system": system}
    assert plain(said(page.locator("#chat .bot.message"))) == plain(answer_of(service, "f2", record, 12))
    assert answer_of(service, "f2", record, 12) != answer_of(service, "f2", {"instruction": "你是谁？"}, 12)


def test_beams_answer_at_once_and_say_so(visit, url, engine, service):
    page = visit(url)
    put(page, "num_beams", 3)
    assert "无法逐字显示" in page.locator("#num_beams").inner_text()
    put(page, "max_new_tokens", 60)
    page.locator("#question textarea").fill("你好")
    engine.pause = 0.1
    page.locator("#send").click()
    expect(page.locator("#chat .bot.message")).to_contain_text("束搜索进行中")
    engine.pause = 0
    expect(page.locator("#chat .bot.message")).not_to_contain_text("束搜索进行中")
    assert engine.asked[-1][1].num_beams == 3
    expected = answer_of(service, "f2", {"instruction": "你好"}, 60, beams=3)
    assert plain(said(page.locator("#chat .bot.message"))) == plain(expected)


def test_regenerate_edit_undo_and_clear(visit, url):
    page = visit(url)
    ask(page, "第一问？", tokens=8)
    ask(page, "第二问")
    page.locator("#do_sample input").check()
    put(page, "temperature", 2)
    before = said(page.locator("#chat .bot.message").last)
    page.locator("#retry").click()
    settled(page)
    assert page.locator("#chat .bot.message").count() == 2
    assert said(page.locator("#chat .bot.message").last) != before
    page.get_by_role("button", name="编辑").first.click()
    expect(page.locator("#chat textarea")).to_have_value("第一问？")
    page.locator("#chat textarea").fill("改过的第一问")
    page.locator("#chat textarea").press("Enter")
    settled(page)
    assert page.locator("#chat .user.message").all_inner_texts() == ["改过的第一问"]
    assert page.locator("#chat .bot.message").count() == 1
    page.get_by_role("button", name="撤销").click()
    expect(page.locator("#question textarea")).to_have_value("改过的第一问")
    ask(page, "再问")
    page.locator("#clear").click()
    expect(page.locator("#chat .message")).to_have_count(0)


def test_wrong_input_is_told_and_changes_nothing(visit, url):
    page = visit(url)
    send(page, "   ")
    expect(page.get_by_text("无法回答")).to_be_visible()
    assert page.locator("#chat .message").count() == 0
    send(page, "长" * 9000)
    expect(page.get_by_text("问题太长")).to_be_visible()
    assert page.locator("#chat .message").count() == 0
    expect(page.locator("#question textarea")).to_have_value("长" * 9000)
    ask(page, "<img src=x onerror=alert(1)><script>alert(2)</script>", tokens=3)
    send(page, "一问")
    page.locator("#question textarea").fill("写到一半的下一问")  # before or after the first is taken: it stays
    settled(page)
    expect(page.locator("#question textarea")).to_have_value("写到一半的下一问")


def test_a_conversation_is_saved_as_a_record_and_loaded_again(visit, url, tmp_path):
    page = visit(url)
    page.locator("#save").click()
    expect(page.get_by_text("没有可以保存的对话")).to_be_visible()
    ask(page, "第一问", tokens=8)
    ask(page, "第二问")
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "saved.json")
    (record,) = json.loads((tmp_path / "saved.json").read_text("utf-8"))
    assert [(one["model"], one["finish"], one["settings"]["do_sample"]) for one in record["answers"]] == [
        ("f2", "length", False)
    ] * 2
    assert (record["instruction"], len(record["history"]), record["history"][0][0]) == ("第二问", 1, "第一问")
    other = visit(url)
    with other.expect_file_chooser() as chooser:
        other.locator("#load").click()
    chooser.value.set_files(tmp_path / "saved.json")
    expect(other.locator("#chat .user.message")).to_have_text(["第一问", "第二问"])
    assert other.locator("#chat .bot.message").count() == 2
    (tmp_path / "bad.json").write_text('{"no": "record"}')
    with other.expect_file_chooser() as chooser:
        other.locator("#load").click()
    chooser.value.set_files(tmp_path / "bad.json")
    expect(other.get_by_text("没有对话")).to_be_visible()
    assert other.locator("#chat .bot.message").count() == 2


def test_examples_fill_the_question(visit, url):
    page = visit(url)
    page.get_by_text("最大的淡水湖").first.click()
    expect(page.locator("#question textarea")).to_have_value(re.compile("淡水湖"))


def test_an_over_long_conversation_loses_its_oldest_turns_and_says_so(folder, visit, tmp_path):
    base, answerers = resolve(str(folder / "short"), [], "alpaca_short")
    engine = Engine(base, answerers, place(False, False))
    short = ChatService(engine, 2048)
    turns = [[f"问题{number}", "回答" * 8] for number in range(12)]
    record = {"instruction": "最后", "output": "好。", "history": turns}
    (tmp_path / "long.json").write_text(json.dumps([record]))
    with served(short) as page:
        seen = visit(page.local_url)
        with seen.expect_file_chooser() as chooser:
            seen.locator("#load").click()
        chooser.value.set_files(tmp_path / "long.json")
        expect(seen.locator("#chat .user.message")).to_have_count(13)
        ask(seen, "还记得吗？", tokens=6)
        asked = {"instruction": "还记得吗？", "history": [*turns, ["最后", "好。"]]}
        ids, dropped = short.fit("base", asked, SamplingParams(max_new_tokens=6))
        assert 0 < dropped < 13 and len(ids) <= 250
        assert f"最早的 {dropped} 轮" in seen.locator("#status").inner_text()
        with pytest.raises(TooLong):
            short.fit("base", {"instruction": "长" * 300}, SamplingParams())


@pytest.mark.slow
def test_sessions_at_once_keep_apart(browser, url, service):
    """One's conversation, settings and stop button never reach another's."""
    contexts = [browser.new_context() for _ in range(6)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(url, wait_until="commit")
    for number, page in enumerate(pages):
        page.locator("#question textarea").wait_for(timeout=PATIENCE)
        put(page, "max_new_tokens", 2048 if number == 0 else 10 + number)
        page.locator("#question textarea").fill(f"我是第{number}个人")
    for page in pages:
        page.locator("#send").click()
    pages[0].locator("#chat .bot.message").wait_for(timeout=PATIENCE)
    pages[0].locator("#stop").click()
    for number, page in enumerate(pages[1:], 1):
        *_, reply = service.reply(
            "f2", {"instruction": f"我是第{number}个人"}, SamplingParams(num_beams=1, max_new_tokens=10 + number)
        )
        expect(page.locator("#status")).to_contain_text(f" {reply.tokens} 个词元")
        assert page.locator("#chat .user.message").all_inner_texts() == [f"我是第{number}个人"]
        expect(page.locator("#chat .bot.message")).to_have_count(1)
        assert plain(said(page.locator("#chat .bot.message"))) == plain(reply.text)
    assert "2048" not in pages[0].locator("#status").inner_text()
    for context in contexts:
        context.close()


@pytest.mark.slow
def test_a_turn_leaves_no_component_behind(visit, url):
    """Where a value follows a skipped one, gradio keeps one more component for as long as the session."""
    page = visit(url)

    def components():
        gc.collect()
        return sum(isinstance(one, (gr.Textbox, gr.Markdown, gr.Chatbot)) for one in gc.get_objects())

    ask(page, "一", tokens=4)
    before = components()
    for _ in range(3):
        ask(page, "二")
    assert components() == before


def test_a_cut_answer_is_continued_as_if_it_had_not_been_cut(visit, url, service):
    page = visit(url)
    page.locator("#go_on").click()
    expect(page.get_by_text("不需要继续")).to_be_visible()
    ask(page, "讲故事", tokens=8)
    expect(page.locator("#chat .bot.message")).to_contain_text("达到长度上限")
    page.locator("#go_on").click()
    whole = answer_of(service, "f2", {"instruction": "讲故事"}, 16)
    expect(page.locator("#status")).to_contain_text("8 个词元")
    settled(page)
    text = plain(said(page.locator("#chat .bot.message")))
    assert text.startswith(plain(answer_of(service, "f2", {"instruction": "讲故事"}, 8))) and len(text) > len(plain(whole)) / 2


@pytest.mark.slow
def test_dialogues_survive_a_refresh_and_have_names(visit, url):
    page = visit(url)
    ask(page, "第一段对话", tokens=6)
    shown = page.locator("#chat .bot.message").inner_text()
    assert "f2 · 贪心 · 6 个词元" in shown
    page.reload()
    expect(page.locator("#chat .bot.message")).to_have_text(shown)
    expect(page.locator("#dialogues input")).to_have_value("第一段对话")
    page.locator("#name input, #name textarea").first.fill("我的对话")
    page.locator("#new").click()
    expect(page.locator("#chat .message")).to_have_count(0)
    ask(page, "第二段对话", tokens=6)
    other = page.context.new_page()  # another tab begins with the newest, and takes nothing from the first
    other.goto(url)
    expect(other.locator("#chat .user.message")).to_have_text("第二段对话")
    choose(page, "dialogues", "我的对话")
    expect(page.locator("#chat .user.message")).to_have_text("第一段对话")
    page.locator("#clear").click()
    page.wait_for_function("dreamer.stored().length === 1")
    page.reload()
    page.locator("#question textarea").wait_for()
    page.locator("#dialogues input").click()
    expect(page.get_by_role("option")).to_have_count(1)
    expect(page.get_by_role("option")).to_contain_text("第二段对话")
