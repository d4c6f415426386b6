"""The chat page, in a real headless Chromium, and its API, over a real tiny model."""

import gc
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import pytest
import tiny
from gradio_client import Client
from playwright.sync_api import expect, sync_playwright

from utils import chat, lineage
from utils.answerers import Answerer, resolve, with_base
from utils.chat_handlers import Handlers, steps_of
from utils.chat_labels import EN
from utils.console import UserError
from utils.conversations import Conversation, from_file
from utils.decoding import Settings
from utils.generation import Engine
from utils.modeling import place
from utils.serving import Service, TooLong

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")
ROOT = Path(__file__).parent.parent
LOCAL = chat.Address("127.0.0.1", None, None, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "base", max_position_embeddings=4096)
    tiny.llama(folder / "short", max_position_embeddings=256)
    for seed, name in enumerate(("f1", "f2")):
        tiny.adapter(folder / "base", folder / name, seed, scale=0.1)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    """A base and two adapters; it counts the tokens that it computes, and notes the settings that reach it."""
    base, answerers = resolve("", [str(folder / "f1"), str(folder / "f2")], "")
    engine = Engine(base, with_base(answerers), place(False, False))
    engine.computed, engine.asked, engine.pause, plain = 0, [], 0.0, engine.answer

    def count(*_):
        engine.computed += 1
        time.sleep(engine.pause)

    def noting(name, prompts, settings, template=""):
        engine.asked.append((name, settings, template))
        return plain(name, prompts, settings, template)

    engine.model.register_forward_hook(count)
    engine.answer = noting
    return engine


@pytest.fixture(scope="module")
def service(engine):
    return Service(engine, 2048)


@contextmanager
def served(service, lang="zh", address=LOCAL):
    page = chat.start(service, Settings(), lang, address)
    try:
        yield page
    finally:
        page.close()


@pytest.fixture(scope="module")
def url(service):
    with served(service) as page:
        yield page.local_url


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "no Chromium here; install Debian's package chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open the page in a session of its own."""
    contexts = []

    def visit(url, **options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
        page.goto(url)
        page.locator("#question textarea").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


def ask(page, question, tokens=None):
    """Ask and wait for the whole answer."""
    if tokens:
        put(page, "max_new_tokens", tokens)
    before = page.locator("#chat .bot.message").count()
    page.locator("#question textarea").fill(question)
    page.locator("#send").click()
    expect(page.locator("#chat .bot.message")).to_have_count(before + 1, timeout=30_000)
    settled(page)


def settled(page):
    """Wait until the status line, which changes with each token, stays as it is."""
    last, since = None, time.time()
    while time.time() - since < 0.7:
        now = page.locator("#status").inner_text() + page.locator("#chat").inner_text()
        if now != last:
            last, since = now, time.time()
        time.sleep(0.05)


def put(page, name, value):
    """Write a number into a setting."""
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.blur()


def choose(page, name, option):
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def answer_of(service, name, record, tokens, beams=1):
    """What the engine answers when it is asked directly."""
    *_, reply = service.reply(name, record, Settings(num_beams=beams, max_new_tokens=tokens))
    return reply.text


def plain(text):
    """A text as any rendering of it can be compared: letters and characters only."""
    return re.sub(r"[^\w]", "", text)


def reads(box, text):
    """Wait until a field holds `text`, but for what a field does to line ends and control characters."""
    until = time.time() + 20
    while plain(box.input_value()) != plain(text) and time.time() < until:
        time.sleep(0.05)
    assert plain(box.input_value()) == plain(text)


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
    page.locator("#question textarea").fill("写一首诗")
    page.locator("#send").click()
    seen = set()
    until = time.time() + 20
    while time.time() < until and len(seen) < 6:
        seen.update(len(text) for text in page.locator("#chat .bot.message").all_inner_texts())
    engine.pause = 0
    assert len(seen) >= 6


def test_stop_ends_the_computation_within_a_token(visit, url, engine):
    page = visit(url)
    put(page, "max_new_tokens", 2048)
    page.locator("#question textarea").fill("讲一个很长的故事")
    page.locator("#send").click()
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
        page.locator("#question textarea").fill(question)
        page.locator("#send").click()
        expect(page.locator("#chat .bot.message")).to_have_count(number + 1, timeout=20_000)
        expect(page.locator("#chat .bot.message").last).to_have_text(re.compile(r"\w"), timeout=20_000)
    engine.pause = 0
    settled(page)
    assert page.locator("#chat .user.message").all_inner_texts() == questions
    first = plain(page.locator("#chat .bot.message").first.inner_text())
    whole = plain(answer_of(service, "f2", {"instruction": questions[0]}, 60))
    assert whole.startswith(first) and len(first) < len(whole)


def test_a_closed_tab_ends_the_computation(visit, url, engine):
    page = visit(url)
    put(page, "max_new_tokens", 2048)
    page.locator("#question textarea").fill("再讲一个很长的故事")
    page.locator("#send").click()
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
    expect(page.locator("#chat .bot.message")).to_contain_text("束搜索进行中", timeout=20_000)
    engine.pause = 0
    expect(page.locator("#chat .bot.message")).not_to_contain_text("束搜索进行中", timeout=30_000)
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
    page.locator("#question textarea").fill("   ")
    page.locator("#send").click()
    expect(page.get_by_text("没能回答")).to_be_visible()
    assert page.locator("#chat .message").count() == 0
    page.locator("#question textarea").fill("长" * 9000)
    page.locator("#send").click()
    expect(page.get_by_text("问题太长")).to_be_visible(timeout=20_000)
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
        page.locator("#question textarea").wait_for(timeout=60_000)
        put(page, "max_new_tokens", 2048 if number == 0 else 10 + number)
        page.locator("#question textarea").fill(f"我是第{number}个人")
    for page in pages:
        page.locator("#send").click()
    pages[0].locator("#chat .bot.message").wait_for(timeout=60_000)
    pages[0].locator("#stop").click()
    for number, page in enumerate(pages[1:], 1):
        *_, reply = service.reply(
            "f2", {"instruction": f"我是第{number}个人"}, Settings(num_beams=1, max_new_tokens=10 + number)
        )
        expect(page.locator("#status")).to_contain_text(f" {reply.tokens} 个词元", timeout=60_000)
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


def test_the_api_has_names_and_a_documented_signature(url, service):
    client = Client(url, verbose=False)
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == {"/answer", "/answerers"}
    named = [parameter["parameter_name"] for parameter in described["/answer"]["parameters"]]
    assert named[:5] == ["instruction", "input", "history", "adapter", "template"]
    assert "max_new_tokens" in named
    assert "history: earlier turns" in described["/answer"]["description"]
    record = {"instruction": "你是谁？", "history": [["你好", "你好！"]]}
    job = client.submit("你是谁？", history=record["history"], adapter="f1", max_new_tokens=9, api_name="/answer")
    parts = list(job)
    assert parts[-1] == answer_of(service, "f1", record, 9)
    assert len(parts) >= 9
    assert [one["name"] for one in client.predict(api_name="/answerers")] == ["base", "f1", "f2"]
    for wrong in (
        {"adapter": "none"},
        {"max_new_tokens": 10**6},
        {"temperature": -1},
        {"num_beams": 1000},
        {"history": [["x"]]},
    ):
        with pytest.raises(Exception, match=next(iter(wrong))):
            client.predict("你好", **wrong, api_name="/answer")
    with pytest.raises(Exception, match="empty"):
        client.predict(" ", api_name="/answer")


def test_cancelling_an_api_call_ends_the_computation(url, engine):
    client = Client(url, verbose=False)
    job = client.submit("讲故事", max_new_tokens=2048, api_name="/answer")
    next(job)
    job.cancel()
    time.sleep(1.5)
    before = engine.computed
    time.sleep(1)
    assert engine.computed == before


@pytest.mark.parametrize("path", ["/etc/passwd", __file__, "../../etc/passwd"])
def test_no_file_is_read_through_the_page(url, path):
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/stream/"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}{route}{path}")
        assert refused.value.code in (403, 404, 405)


def test_no_file_is_taken_by_the_page(url):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n' + b"a" * 5000 + b"\r\n--x--\r\n"
    request = urllib.request.Request(
        f"{url}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413


def test_the_address_is_obeyed(capsys, service):
    """Pitfall 15: 127.0.0.1 by default, and nothing else; elsewhere without a password is warned about."""
    with served(service) as page:
        port = page.server_port
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
        with pytest.raises(UserError, match="--server_port"):
            chat.start(service, Settings(), "zh", chat.Address("127.0.0.1", port, None, False))
    assert "warning" not in capsys.readouterr().out
    with served(service, address=chat.Address("0.0.0.0", None, None, False)) as page:
        socket.create_connection(("127.0.0.2", page.server_port)).close()
    assert "warning" in capsys.readouterr().out
    chat.launch_options(chat.Address("0.0.0.0", None, ("me", "secret"), False))
    assert "warning" not in capsys.readouterr().out


def test_a_password_is_asked_for(service):
    with served(service, address=chat.Address("127.0.0.1", None, ("me", "secret"), False)) as page:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{page.local_url}gradio_api/info")
        assert refused.value.code == 401
        with pytest.raises(Exception, match="Could not login"):
            Client(page.local_url, auth=("me", "wrong"), verbose=False)
        client = Client(page.local_url, auth=("me", "secret"), verbose=False)
        assert client.predict("你好", max_new_tokens=3, api_name="/answer")


def test_the_script_shows_the_page_until_it_is_stopped(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    line = ["--lora_weights", f"{folder / 'f1'},{folder / 'f2'}", "--server_port", port, "--auth", "me:secret"]
    line = [sys.executable, str(ROOT / "generate.py"), *line, "--lang", "en", "--max_new_tokens", "7"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as running:
        assert any(f"http://127.0.0.1:{port}" in printed for printed in running.stdout)
        client = Client(f"http://127.0.0.1:{port}/", auth=("me", "secret"), verbose=False)
        assert client.predict("Hello", max_new_tokens=7, api_name="/answer")
        with pytest.raises(Exception, match="max_new_tokens"):
            client.predict("Hello", max_new_tokens=8, api_name="/answer")
        running.terminate()  # not SIGINT, which a program that was started in the background ignores
        running.stdout.read()
    assert running.returncode in (0, -signal.SIGTERM)


def test_one_who_asks_much_does_not_keep_others_waiting(service):
    """Answers grow in turn, a token each: a short one overtakes a long one that began before it."""
    order = []

    def run(name, tokens):
        for _ in service.reply("f1", {"instruction": name}, Settings(num_beams=1, max_new_tokens=tokens)):
            pass
        order.append(name)

    threads = [threading.Thread(target=run, args=task) for task in (("long", 400), ("short", 5))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert order == ["short", "long"]


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
