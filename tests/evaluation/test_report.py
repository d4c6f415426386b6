"""The report: whole in one file, everything escaped, readable on a phone and on paper; looked at in Chromium."""

import re

import pytest
from browsing import FLAGS
from playwright.sync_api import sync_playwright

from utils.evaluation import report
from utils.evaluation.charts import draw
from utils.evaluation.report import Findings
from utils.evaluation.tables import Row, Table
from utils.files import write_json

EVIL = '<script>document.title="pwned"</script><img src=x onerror="document.title=\'pwned\'">\'"&</details>'

A4 = 703  # pixels between its margins
BACK = "getComputedStyle(document.body).backgroundColor"
COUNTING = "addEventListener('beforeprint', () => window.opened = document.querySelectorAll('details[open]').length)"
WIDENING = """for (const row of document.querySelectorAll("tr"))
  for (let column = 0; column < 9; column++) row.append(row.lastChild.cloneNode(true))"""


@pytest.fixture
def folder(tmp_path):
    """A report of a chain with four questions, one of them hostile."""
    rows = [
        Row("01qa", 2, {"base": 20.0, "f1": 80.0, "f2": 60.5}, {"f1": (61.2, 91.0)}),
        Row(EVIL, 2, {"base": 1.0, "f1": None}),
        Row("09math", 1, {"base": 9.0, "f1": 1.0, "f2": 2.5}),
    ]
    table = Table(f"scores {EVIL}", ["base", "f1", "f2"], rows)
    draw(Table("t", ["f1"], [Row("01qa", 2, {"f1": 80.0})]), tmp_path / "scores.png")
    step = {
        "format": 1, "kind": "train", "options": {"output_dir": "out/f1"}, "base": None, "parent": None,
        "data": {"files": {"f1.json": "0"}, "train": 8, "tokens": 99}, "results": {"train_loss": 1.25, "eval_loss": 1.5},
    }  # fmt: skip
    write_json(tmp_path / "f1/lineage.json", step)
    questions = [
        {"category": category, "texts": {"问题": text, "参考": "参照"}, "answers": answers, "remarks": [f"评委：{EVIL}"]}
        for category, text, answers in [
            ("01qa", "天是什么颜色？", {"f1": "蓝色", "f2": "蓝色"}),
            ("01qa", "你是谁？", {"f1": "我是梦想家", "f2": "一个助手"}),
            ("09math", "一加一？" + "很长" * 300, {"f1": "二", "f2": "三"}),
            (EVIL, EVIL, {"f1": EVIL, "f2": "\ud800 半个字符"}),
        ]
    ]
    pictures = [("scores", tmp_path / "scores.png"), ("none", tmp_path / "none.png")]
    parent = {"name": str(tmp_path / "f1"), "sha256": "0", "lineage": step}
    write_json(tmp_path / "f2/lineage.json", step | {"options": {"output_dir": "out/f2"}, "parent": parent})
    length = Table("length", ["base", "f1"], [Row("01qa", 2, {"base": 20.0, "f1": 80.0})], marked=False)
    folders = {name: tmp_path / name for name in ("f1", "f2")}
    findings = Findings([table, length], [f"note {EVIL}"], pictures, questions, ["base", "f1", "f2"], folders)
    report.write(tmp_path, "评测 " + EVIL, "judge.py --report", findings)
    return tmp_path


def test_the_report_stands_alone_and_nothing_in_it_is_markup(folder):
    text = (folder / "report.html").read_text("utf-8")
    assert EVIL not in text and text.count("<script>") == 1 and "onerror=&quot;" in text
    assert not re.search(r'(src|href)="(?!data:image/png)', text) and "url(" not in text and "@import" not in text
    assert "<td class=best>80<small> [61.2, 91]</small></td>" in text and ">60.5*<small>" in text
    assert "+60</td>" in text and "−19.5</td>" in text and "−6.5</td>" in text  # the steps, and what was lost since the best
    assert text.count("遗忘 forgotten") == 1, "of what is neither better nor worse nothing is forgotten"
    assert text.count("1.2500") == 2 and "f1.json" in text and text.count("data:image/png;base64,") == 1  # each step once
    assert "| 知识问答 | 2 | 20 | **80** [61.2, 91] | 60.5* |" in (folder / "report.md").read_text("utf-8")
    assert (
        (folder / "report.csv")
        .read_text("utf-8")
        .startswith("table,category,label,samples,base,f1,f2,best,second,f1 low,f1 high")
    )


def test_the_page_is_searched_filtered_read_on_a_phone_and_printed(folder):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(viewport={"width": 375, "height": 720})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(f"file://{folder}/report.html")
        assert page.title().startswith("评测 <script>") and not errors
        assert all(url.startswith(("file://", "data:")) for url in asked)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375  # nothing sticks out on a phone
        shown = "details[data-category]:visible"
        assert page.locator(shown).count() == 4 and page.locator("#count").inner_text() == "4 / 4"
        page.fill("#find", "梦想家")
        assert page.locator(shown).count() == 1
        page.fill("#find", "")
        page.select_option("#kind", "09math")
        assert page.locator(shown).count() == 1
        page.select_option("#kind", EVIL)
        assert page.locator(shown).count() == 1
        page.select_option("#kind", "*")
        page.check("#differ")
        assert page.locator(shown).count() == 3
        page.locator(shown).first.click()
        boxes = [page.locator(f"details[open] .answers > div >> nth={number}").bounding_box() for number in (0, 1)]
        assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] < boxes[1]["y"]  # one below the other on a phone
        page.set_viewport_size({"width": 1200, "height": 800})
        boxes = [page.locator(f"details[open] .answers > div >> nth={number}").bounding_box() for number in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # side by side on a screen
        page.evaluate(COUNTING)
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(BACK) != "rgb(255, 255, 255)"
        assert page.pdf()[:5] == b"%PDF-" and page.evaluate("opened") == 4  # what is folded up is open on paper
        assert page.locator("details[data-category][open]").count() == 1
        page.emulate_media(color_scheme="dark", media="print")
        page.set_viewport_size({"width": A4, "height": 1000})
        assert page.evaluate(BACK) == "rgb(255, 255, 255)" and page.locator("nav").is_hidden()
        page.evaluate(WIDENING)
        assert page.evaluate("document.documentElement.scrollWidth") <= A4
        browser.close()
