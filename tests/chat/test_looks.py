"""How the page looks in a real headless Chromium: languages, phones, contrast and names, and what is rendered or not."""

import json
import re

from browsing import (
    ask,
    served,
)
from playwright.sync_api import expect

pytest_plugins = ["browsing"]  # fixtures


def test_the_page_speaks_english(visit, service):
    with served(service, "en") as page:
        seen = visit(page.local_url)
        expect(seen.locator("#settings")).to_contain_text("Model")
        assert not re.search(r"[\u4e00-\u9fff]", seen.locator("#settings").inner_text())


def test_nothing_is_fetched_from_elsewhere(browser, url):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.locator("#question textarea").wait_for()
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    page.close()


def test_thoughts_are_folded_and_formulas_are_set(visit, url, tmp_path):
    page = visit(url)
    answer = "<think>\n先想一想\n</think>\n\n行内 \\(a^2\\)，独立成行\n\n\\[b^2\\]\n\n$$c^2$$\n\n而 `\\(d\\)` 是代码，$5 是钱"
    (tmp_path / "talk.json").write_text(json.dumps([{"instruction": "？", "input": "", "output": answer}]), "utf-8")
    with page.expect_file_chooser() as chooser:
        page.locator("#load").click()
    chooser.value.set_files(tmp_path / "talk.json")
    expect(page.locator("#chat .katex-display")).to_have_count(2)
    expect(page.locator("#chat .katex")).to_have_count(3)
    expect(page.locator("#chat code", has_text="(d")).to_have_count(1)
    expect(page.locator("#chat")).to_contain_text("$5 是钱")
    thought = page.locator("#chat").get_by_text("先想一想")
    expect(thought).to_be_hidden()
    page.locator("#chat").get_by_text("思考过程").click()
    expect(thought).to_be_visible()


def test_questions_are_shown_and_copied_as_they_were_typed(visit, url):
    page = visit(url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    question = "1. <b>粗</b> *斜* $$a^2$$ &lt;\n\n    缩进 `码`"
    ask(page, question, tokens=3)
    assert page.locator("#chat .user.message").inner_text() == question
    page.locator("#chat .user-row + * button").first.click()
    page.wait_for_function("text => navigator.clipboard.readText().then(now => now === text)", arg=question)
    named = "text => [...document.querySelectorAll('#chat [aria-label]')].some(one => one.ariaLabel === text)"
    page.wait_for_function(named, arg="问题：" + question)  # so it is read out, too
    assert page.evaluate(ENGLISH) == []


def test_on_a_phone_nothing_is_wider_than_the_screen_and_all_has_names_and_contrast(visit, service):
    with served(service, "en") as server:
        page = visit(server.local_url, locale="zh-CN")
        page.set_viewport_size({"width": 390, "height": 844})
        ask(page, "x" * 300 + " https://" + "y" * 200, tokens=6)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate(PALE) == []
        assert page.evaluate(CUT) == []
        boxes = [one.bounding_box() for one in page.locator("#send, #stop, #go_on, .reset-button").all()]
        assert min(side for box in boxes for side in (box["width"], box["height"])) >= 44
        assert page.get_by_role("button", name="Retry").count()  # gradio's own words, in the page's language


ENGLISH = """[...document.querySelectorAll("[aria-label], [title]")].flatMap(one => [one.ariaLabel, one.title]).filter(
  name => name && /[a-z]{3}/.test(name) && !/[\\u4e00-\\u9fff]|^(base|f1|f2)$/.test(name))"""
UNNAMED = """[...document.querySelectorAll("button, input, textarea, select")].filter(one => one.checkVisibility() &&
  !(one.getAttribute("aria-label") || one.title || one.labels?.length && one.labels[0].innerText.trim() || one.innerText?.trim()
    || one.getAttribute("aria-labelledby"))).map(one => one.outerHTML.slice(0, 120))"""
CUT = """[...document.querySelectorAll("button[role=tab], #go_on, #retry, #clear, #save, #load")].filter(one =>
  one.scrollWidth > one.clientWidth || one.getBoundingClientRect().right > innerWidth).map(one => one.innerText)"""
PALE = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] / 255 + below[i] * (1 - top[3] / 255));
  const pale = [];
  for (const one of document.querySelectorAll("p, span, small, label, button, h1, h3, textarea, input")) {
    const text = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()) || one.matches("textarea, input");
    if (!text || !one.checkVisibility({opacityProperty: true, visibilityProperty: true}) || one.closest("[disabled]")) continue;
    let below = [255, 255, 255];
    const around = [];
    for (let up = one; up; up = up.parentElement) around.unshift(up);
    for (const up of around) below = over(rgb(getComputedStyle(up).backgroundColor), below);
    const see = around.reduce((all, up) => all * getComputedStyle(up).opacity, 1);
    const color = rgb(getComputedStyle(one).color);
    const front = over([...color.slice(0, 3), color[3] * see], below);
    const [high, low] = [light(front), light(below)].sort((a, b) => b - a);
    if ((high + 0.05) / (low + 0.05) < 4.5) pale.push(one.outerHTML.slice(0, 120));
  }
  return pale;
})()"""
