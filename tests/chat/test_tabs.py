"""The page's other tabs in a real headless Chromium: several models side by side, votes, single instructions, and training."""

import json
import os
import re
import shutil
import time

from browsing import (
    answer_of,
    ask,
    plain,
    put,
    reads,
    served,
)
from playwright.sync_api import expect

from utils import lineage
from utils.chat.runs import read_run, runs_beside, thinned
from utils.chat.tabs import marked
from utils.datasets.preferences import read_pairs

pytest_plugins = ["browsing"]  # fixtures


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
    page.locator("#answerers label", has_text="基座模型").click()
    page.locator("#ask_all").click()
    expect(page.get_by_text("请至少选一个模型")).to_be_visible()


def test_a_list_of_prompts_goes_to_several_and_differences_are_marked(visit, url, service):
    page = visit(url)
    put(page, "max_new_tokens", 8)
    page.get_by_role("tab", name="对比").click()
    page.locator("#prompts_part > button").click()
    page.locator("#prompts textarea").fill("你是谁？\n\n <b>讲故事</b> \n")
    page.locator("#ask_list").click()
    rows = page.locator("#marked tr")
    expect(rows).to_have_count(3)
    names = [one.name for one in service.engine.answerers]
    for place, question in enumerate(("你是谁？", "<b>讲故事</b>"), 1):
        wanted = [question, *(answer_of(service, name, {"instruction": question}, 8) for name in names)]
        cells = rows.nth(place).locator("td")
        expect(cells).to_have_count(4)
        for cell, text in zip(cells.all(), wanted, strict=True):
            expect(cell).to_have_text(re.compile(r"\W*".join(map(re.escape, plain(text)))))
        assert cells.nth(1).locator("mark").count() == 0 < cells.nth(2).locator("mark").count()


def test_what_is_marked_in_long_texts_is_what_differs():
    assert marked("的" * 300, "<了>" + "的" * 300) == "<mark>&lt;了&gt;</mark>" + "的" * 300


def test_the_training_tab_follows_a_run(visit, service, monkeypatch):
    run = next(one.folder for one in service.engine.answerers if one.folder).parent / "run-1"
    run.mkdir()
    (run / "train_log.jsonl").write_text('{"step": 1, "loss": 2.25}\n')
    monkeypatch.setattr("utils.chat.page.POLLED", 0.3)
    try:
        with served(service) as server:
            page = visit(server.local_url)
            page.get_by_role("tab", name="训练").click()
            expect(page.locator("#progress")).to_contain_text("2.25")
            (run / "train_log.jsonl").write_text('{"step": 1, "loss": 2.25}\n{"step": 2, "loss": 1.75}\n')
            expect(page.locator("#progress")).to_contain_text("1.75")
    finally:
        shutil.rmtree(run)


def test_a_single_task_has_an_input(visit, url, service):
    page = visit(url)
    expect(page.get_by_role("tab", name="训练")).to_have_count(0)
    put(page, "max_new_tokens", 10)
    page.get_by_role("tab", name="单轮指令").click()
    page.locator("#instruction textarea").fill("翻译成英文")
    page.locator("#input textarea").fill("春眠不觉晓")
    page.locator("#send_task").click()
    record = {"instruction": "翻译成英文", "input": "春眠不觉晓"}
    reads(page.locator("#output textarea"), answer_of(service, "f2", record, 10))


def test_votes_and_thumbs_become_records(visit, service, tmp_path):
    with served(service, feedback=str(tmp_path)) as server:
        page = visit(server.local_url)
        ask(page, "你好", tokens=6)
        page.get_by_role("button", name="赞", exact=True).click()
        expect(page.get_by_text("已写入 thumbs.jsonl")).to_be_visible()
        (thumb,) = map(json.loads, (tmp_path / "thumbs.jsonl").read_text("utf-8").splitlines())
        assert thumb["label"] is True and thumb["instruction"] == "你好" and thumb["by"]["model"] == "f2"
        (tmp_path / "thumbs.jsonl").rename(tmp_path / "kept")
        (tmp_path / "thumbs.jsonl").mkdir()
        page.get_by_role("button", name="踩", exact=True).click()
        expect(page.locator(".toast-body.warning")).to_contain_text("没有记下")
        expect(page.locator(".toast-body.warning .toast-title")).to_have_text("注意")
        expect(page.get_by_role("button", name="已踩", exact=True)).to_have_count(0)  # only what is recorded is lit
        expect(page.get_by_role("button", name="已赞", exact=True)).to_be_visible()
        page.get_by_role("tab", name="投票").click()
        page.locator("#vote_question textarea").fill("你是谁？")
        page.locator("#send_vote").click()
        expect(page.locator("#vote_left")).to_be_enabled()
        left = page.locator("#left textarea").input_value()
        (tmp_path / "votes.jsonl").mkdir()
        page.locator("#vote_left").click()
        expect(page.locator("#voted")).to_contain_text(f"没有记下：{tmp_path}/votes.jsonl: not written (Is a directory)")
        (tmp_path / "votes.jsonl").rmdir()
        page.locator("#vote_left").click()
        expect(page.locator("#voted")).to_contain_text("A 是")
        (pair,) = read_pairs(tmp_path / "votes.jsonl")
        assert plain(pair.chosen["output"]) == plain(left) and pair.chosen["instruction"] == "你是谁？"
        (vote,) = map(json.loads, (tmp_path / "votes.jsonl").read_text("utf-8").splitlines())
        assert plain(vote["chosen"]) == plain(answer_of(service, vote["chosen_model"], {"instruction": "你是谁？"}, 6))


def test_the_training_tab_reads_running_and_finished_runs(tmp_path):
    run = tmp_path / "run-1"
    run.mkdir()
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    lines[1:1] = [{"step": 1, "answers": [{"question": "问", "answer": "早"}]}, {"step": 1, "eval_choices": 25.0}]
    lines += [{"step": 2, "answers": [{"question": "问", "answer": "晚"}]}, {"step": 2, "eval_choices": 50.0}]
    (run / "train_log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + '{"step": 3, "lo')
    (run / ".progress.json").write_text(json.dumps({"first": 1, "step": 2, "steps": 10, "seconds": 2.0}))  # gone on with
    (tmp_path / "run-0").mkdir()
    (tmp_path / "run-0/train_log.jsonl").write_bytes(b'{"step": 1, "loss": "\xe6')  # half a character
    os.utime(tmp_path / "run-0/train_log.jsonl", (0, 0))
    assert list(runs_beside([tmp_path / "adapter"]).items()) == [("run-1", run), ("run-0", tmp_path / "run-0")]
    assert read_run(tmp_path / "run-0").step == 0
    read = read_run(run)
    assert (read.state, read.step, read.steps, read.pace, read.left) == ("running", 2, 10, 2.0, 16.0)
    assert (read.loss, read.validation) == (1.0, 1.5) and read.points[-1] == (2, 1.5, "validation")
    assert (read.answered, read.answers) == ((1, 2), [("问", "早", "晚")]) and read.scores == {"right choices (%)": 50.0}
    for quiet, state in ((115, "running"), (135, "running"), (145, "stopped")):  # two minutes and ten steps of two seconds
        os.utime(run / ".progress.json", (time.time() - quiet,) * 2)
        assert read_run(run).state == state
    (run / ".progress.json").unlink()
    assert read_run(run).state == "stopped"
    lineage.write(run, {"kind": "finetune", "options": {}, "time": {"began": "", "seconds": 6.0}})
    assert (read_run(run).state, read_run(run).pace) == ("finished", 3.0)
    curve = thinned([(step, 0.0) for step in range(1200)])
    assert len(curve) <= 500 and curve[-1] == (1199, 0.0)
