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
    fixture_browser,  # noqa: F401 (a fixture)
    fixture_engine,  # noqa: F401 (a fixture)
    fixture_folder,  # noqa: F401 (a fixture)
    fixture_service,  # noqa: F401 (a fixture)
    fixture_url,  # noqa: F401 (a fixture)
    fixture_visit,  # noqa: F401 (a fixture)
    plain,
    put,
    reads,
    send,
    served,
    settled,
)
from playwright.sync_api import expect

from utils import lineage
from utils.answerers import Answerer, resolve
from utils.chat_handlers import Handlers, steps_of
from utils.chat_labels import EN
from utils.conversations import Conversation, from_file
from utils.decoding import Settings
from utils.generation import Engine
from utils.modeling import place
from utils.serving import Service, TooLong


def test_a_question_is_answered_as_the_engine_answers(visit, url, service):
    page = visit(url)
    ask(page, "你是谁？", tokens=24)
    expected = answer_of(service, "f2", {"instruction": "你是谁？"}, 24)
    assert plain(page.locator("#chat .bot.message").inner_text()) == plain(expected)
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
    send(page, "讲一个很长的故事")
    page.locator("#chat .bot.message").wait_for()
    page.locator("#stop").click()
    time.sleep(1)
    before = engine.computed
    time.sleep(1)
    assert engine.computed == before
    shown = page.locator("#chat .bot.message").inner_text()
    ask(page, "接着说", tokens=8)  # the part that was there is kept, and part of the next prompt
    assert page.locator("#chat .bot.message").first.inner_text().startswith(shown)


def test_a_question_asked_while_an_answer_grows_ends_that_answer(visit, url, engine, service):
    page = visit(url)
    put(page, "max_new_tokens", 60)
    engine.pause = 0.5  # seconds a token: no answer comes to its end by itself before the next question
    questions = [f"第{number}问" for number in range(4)]
    for number, question in enumerate(questions):
        send(page, question)
        expect(page.locator("#chat .bot.message")).to_have_count(number + 1)
        expect(page.locator("#chat .bot.message").last).to_have_text(re.compile(r"\w"))
    engine.pause = 0
    settled(page)
    assert page.locator("#chat .user.message").all_inner_texts() == questions
    first = plain(page.locator("#chat .bot.message").first.inner_text())
    whole = plain(answer_of(service, "f2", {"instruction": questions[0]}, 60))
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
    second = page.locator("#chat .bot.message").last.inner_text()
    assert plain(second) == plain(answer_of(service, "f2", record, 12))
    assert plain(second) != plain(answer_of(service, "f2", {"instruction": "我叫什么？"}, 12))


def test_each_setting_reaches_the_engine_by_its_name(visit, url, engine):
    """Pitfall 14."""
    page = visit(url)
    values = {"max_new_tokens": 5, "temperature": 0.8, "top_p": 0.6, "top_k": 7, "repetition_penalty": 1.2}
    for name, value in values.items():
        put(page, name, value)
    page.locator("#do_sample input").check()
    choose(page, "adapter", "f1")
    choose(page, "template", "chinese")
    ask(page, "你好")
    name, settings, template = engine.asked[-1]
    assert (name, template, settings.do_sample, settings.num_beams) == ("f1", "chinese", True, 1)
    assert {key: getattr(settings, key) for key in values} == values
    assert "5 个词元" in page.locator("#status").inner_text()
    assert "f1" in page.locator("#status").inner_text()


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
    assert plain(page.locator("#chat .bot.message").inner_text()) == plain(expected)


def test_regenerate_edit_undo_and_clear(visit, url):
    page = visit(url)
    ask(page, "第一问", tokens=8)
    ask(page, "第二问")
    page.locator("#do_sample input").check()
    put(page, "temperature", 2)
    before = page.locator("#chat .bot.message").last.inner_text()
    page.locator("#retry").click()
    settled(page)
    assert page.locator("#chat .bot.message").count() == 2
    assert page.locator("#chat .bot.message").last.inner_text() != before
    page.get_by_role("button", name="edit").first.click()
    page.locator("#chat textarea").fill("改过的第一问")
    page.get_by_role("button", name="submit").first.click()
    settled(page)
    assert page.locator("#chat .user.message").all_inner_texts() == ["改过的第一问"]
    assert page.locator("#chat .bot.message").count() == 1
    page.get_by_role("button", name="undo").click()
    expect(page.locator("#question textarea")).to_have_value("改过的第一问")
    ask(page, "再问")
    page.locator("#clear").click()
    expect(page.locator("#chat .message")).to_have_count(0)


def test_compare_shows_adapters_and_base_side_by_side(visit, url, service):
    page = visit(url)
    put(page, "max_new_tokens", 10)
    page.get_by_role("tab", name="对比").click()
    page.locator("#compared_question textarea").fill("你是谁？")
    page.locator("#ask_all").click()
    for column, name in enumerate(("base", "f1", "f2")):
        reads(page.locator(f"#column_{column} textarea"), answer_of(service, name, {"instruction": "你是谁？"}, 10))
    assert len({page.locator(f"#column_{column} textarea").input_value() for column in range(3)}) == 3
    page.locator("#answerers label", has_text="f1").click()
    expect(page.locator("#column_1")).to_be_hidden()
    page.locator("#answerers label", has_text="f2").click()
    page.locator("#answerers label", has_text="底座").click()
    page.locator("#ask_all").click()
    expect(page.get_by_text("请至少选一个回答者")).to_be_visible()


def test_a_single_task_has_an_input(visit, url, service):
    page = visit(url)
    put(page, "max_new_tokens", 10)
    page.get_by_role("tab", name="单项任务").click()
    page.locator("#instruction textarea").fill("翻译成英文")
    page.locator("#input textarea").fill("春眠不觉晓")
    page.locator("#send_task").click()
    record = {"instruction": "翻译成英文", "input": "春眠不觉晓"}
    reads(page.locator("#output textarea"), answer_of(service, "f2", record, 10))


def test_wrong_input_is_told_and_changes_nothing(visit, url):
    page = visit(url)
    send(page, "   ")
    expect(page.get_by_text("没能回答")).to_be_visible()
    assert page.locator("#chat .message").count() == 0
    send(page, "长" * 9000)
    expect(page.get_by_text("问题太长")).to_be_visible()
    assert page.locator("#chat .message").count() == 0
    expect(page.locator("#question textarea")).to_have_value("长" * 9000)
    ask(page, "<img src=x onerror=alert(1)><script>alert(2)</script>", tokens=3)


def test_a_conversation_is_saved_as_a_record_and_loaded_again(visit, url, tmp_path):
    page = visit(url)
    page.locator("#save").click()
    expect(page.get_by_text("还没有可以保存的对话")).to_be_visible()
    ask(page, "第一问", tokens=8)
    ask(page, "第二问")
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "saved.json")
    (record,) = json.loads((tmp_path / "saved.json").read_text("utf-8"))
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


def test_the_page_speaks_english(visit, service):
    with served(service, "en") as page:
        seen = visit(page.local_url)
        expect(seen.locator("#settings")).to_contain_text("Who answers")
        assert not re.search(r"[\u4e00-\u9fff]", seen.locator("#settings").inner_text())


def test_the_status_line_tells_the_chain_of_an_adapter(service, tmp_path):
    steps = [{"kind": "finetune", "options": {"output_dir": f"output/{name}"}} for name in ("run-1", "rerun-2")]
    lineage.write(tmp_path, steps[1] | {"parent": {"name": "output/run-1", "sha256": "0", "lineage": steps[0]}})
    assert steps_of(Answerer("rerun-2", tmp_path, "alpaca", steps[1])) == ["run-1", "rerun-2"]
    handlers = Handlers(service, EN)
    handlers.answerers["f2"] = Answerer("f2", tmp_path, "alpaca", steps[1])
    assert "f2 (run-1 → rerun-2) · cpu, float32 · no answer yet" in handlers.status("f2")


def test_nothing_is_fetched_from_elsewhere(browser, url):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.locator("#question textarea").wait_for()
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    page.close()


def test_an_over_long_conversation_loses_its_oldest_turns_and_says_so(folder, visit, tmp_path):
    base, answerers = resolve(str(folder / "short"), [], "alpaca_short")
    engine = Engine(base, answerers, place(False, False))
    short = Service(engine, 2048)
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
        ids, dropped = short.fit("base", asked, Settings(max_new_tokens=6))
        assert 0 < dropped < 13 and len(ids) <= 250
        assert f"最早的 {dropped} 轮" in seen.locator("#status").inner_text()
        with pytest.raises(TooLong):
            short.fit("base", {"instruction": "长" * 300}, Settings())


def test_twenty_sessions_at_once_keep_apart(browser, url, service):
    """One's conversation, settings and stop button never reach another's."""
    contexts = [browser.new_context() for _ in range(20)]
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
            "f2", {"instruction": f"我是第{number}个人"}, Settings(num_beams=1, max_new_tokens=10 + number)
        )
        expect(page.locator("#status")).to_contain_text(f" {reply.tokens} 个词元")
        assert page.locator("#chat .user.message").all_inner_texts() == [f"我是第{number}个人"]
        expect(page.locator("#chat .bot.message")).to_have_count(1)
        assert plain(page.locator("#chat .bot.message").inner_text()) == plain(reply.text)
    assert "2048" not in pages[0].locator("#status").inner_text()
    for context in contexts:
        context.close()


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


def test_conversations_come_from_any_record_format():
    assert from_file('[{"instruction": "a", "input": "b", "output": "c"}]').turns == (("a\n\nb", "c"),)
    assert from_file('{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}\n{}').turns == (
        ("q", "r"),
    )
    kept = Conversation((("a", "b"), ("c", "d")), "system text")
    assert from_file(kept.to_file()) == kept
    assert Conversation((("a", "b"), ("c", ""))).asked("d").turns == (("a", "b"), ("d", ""))
    for text in ("", "[]", "3", "{", '{"instruction": ""}', "[" * 10**5):
        with pytest.raises(ValueError):
            from_file(text)
