"""The chat page over a real tiny model, and a real headless Chromium to open it in, for the tests of it."""

import dataclasses
import re
import shutil
import time
from contextlib import contextmanager

import pytest
import tiny
from playwright.sync_api import expect, sync_playwright
from scripting import free_port

from utils.chat import server
from utils.chat.sessions import ChatService
from utils.inference.answerers import resolve, with_base
from utils.inference.engine import Engine
from utils.inference.sampling_params import SamplingParams
from utils.models.placement import place

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")
PATIENCE = 180_000  # milliseconds for what is to appear on the page: a busy machine takes its time
LOCAL = server.Address("127.0.0.1", None, None, False)


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "base", max_position_embeddings=4096)
    tiny.llama(folder / "short", max_position_embeddings=256)
    for seed, name in enumerate(("f1", "f2")):
        tiny.adapter(folder / "base", folder / name, seed, scale=0.1)
    return folder


@pytest.fixture(name="engine", scope="module")
def fixture_engine(folder):
    """A base and two adapters; it counts the tokens that it computes, and notes the settings that reach it."""
    base, answerers = resolve("", [str(folder / "f1"), str(folder / "f2")], "")
    engine = Engine(base, with_base(answerers), place(False, False))
    engine.computed, engine.asked, engine.pause = 0, [], 0.0

    def count(*_):
        engine.computed += 1
        time.sleep(engine.pause)

    engine.model.register_forward_hook(count)
    return engine


@pytest.fixture(name="service", scope="module")
def fixture_service(engine):
    service = ChatService(engine, 2048)
    plain = service.scheduler.submit

    def noting(request, changed):
        engine.asked.append((request.name, request.settings, request.template))
        return plain(request, changed)

    service.scheduler.submit = noting
    yield service
    service.scheduler.close()


@contextmanager
def served(service, lang="zh", address=LOCAL, feedback=""):
    address = dataclasses.replace(address, port=address.port or free_port())
    page = server.start(service, SamplingParams(), lang, address, feedback_dir=feedback)
    try:
        yield page
    finally:
        page.close()


@pytest.fixture(name="url", scope="module")
def fixture_url(service):
    with served(service) as page:
        yield page.local_url


@pytest.fixture(name="browser", scope="module")
def fixture_browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "no Chromium here; install Debian's package chromium"
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(name="visit")
def fixture_visit(browser):
    """Open the page in a session of its own."""
    contexts = []

    def visit(url, **options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        contexts[-1].set_default_timeout(PATIENCE)
        page = contexts[-1].new_page()
        page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
        page.goto(url)
        page.locator("#question textarea").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


def send(page, question):
    """Write a question and send it, without waiting."""
    page.locator("#question textarea").fill(question)
    page.locator("#send").click()


def ask(page, question, tokens=None):
    """Ask and wait for the whole answer."""
    if tokens:
        put(page, "max_new_tokens", tokens)
    before = page.locator("#chat .bot.message").count()
    send(page, question)
    expect(page.locator("#chat .bot.message")).to_have_count(before + 1)
    settled(page)


def settled(page):
    """Wait until the status line, which changes with each token, stays as it is."""
    last, since = None, time.time()
    while time.time() - since < 0.7:
        now = page.locator("#status").inner_text() + page.locator("#chat").inner_text()
        if now != last:
            last, since = now, time.time()
        time.sleep(0.05)


def said(message):
    """An answer's text, without the line below it that says who gave it."""
    by = message.locator(".by")
    return message.inner_text().removesuffix(by.inner_text() if by.count() else "")


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
    *_, reply = service.reply(name, record, SamplingParams(num_beams=beams, max_new_tokens=tokens))
    return reply.text


def plain(text):
    """A text as any rendering of it can be compared: letters and characters only."""
    return re.sub(r"[^\w]", "", text)


def reads(box, text):
    """Wait until a field holds `text`, but for what a field does to line ends and control characters."""
    until = time.time() + PATIENCE / 1000
    while plain(box.input_value()) != plain(text) and time.time() < until:
        time.sleep(0.05)
    assert plain(box.input_value()) == plain(text)
