"""judge.py: the published prompt, fair orders, scores asked again, runs that were stopped, and the evaluation prompts."""

import csv
import itertools
import json
import re
import signal
from fractions import Fraction

import pytest
from api_server import asked, fair, shown
from scripting import ROOT, warm

from utils.datasets.final_numbers import final_number
from utils.datasets.prompts import read_prompts
from utils.evaluation.answers import add_references
from utils.evaluation.judging import judge_prompt, shown_order
from utils.inference.remote import messages

warm("matplotlib.pyplot", "openai")

CATEGORIES = ["01qa", "02translate", "03generate", "04analyse", "05understanding", "06chinese", "07code", "08alignment"]
CATEGORIES += ["09math", "10dialogue"]
WORTH = {"one": [8, 7, 6, 9, 5, 10], "two": [7, 8.5, 6, 3, 5, 9], "three": [0, 8.5, 7, 9, 5, 1]}


@pytest.fixture
def systems(tmp_path):
    """Three systems' answers to six prompts in two categories; the options that name them."""
    options = []
    for name, worth in WORTH.items():
        records = [
            {"instruction": f"问题{n}", "output": f"{name} 的回答，worth {w}", "category": "01qa" if n < 4 else "mine"}
            for n, w in enumerate(worth)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
        options += ["--answers", f"{name}={tmp_path / name}.json"]
    return options


def judged(script, server, folder, *options):
    return script("judge.py", *options, "--judge_model", "m", "--api_base", server.url, "--output_dir", folder)


def scores(folder):
    return json.loads((folder / "scores.json").read_text("utf-8"))


# The evaluation prompts


def test_ten_categories_of_ten_prompts():
    records = read_prompts([str(ROOT / "test_data")])
    counts = {category: len(list(group)) for category, group in itertools.groupby(records, lambda r: r["category"])}
    assert counts == dict.fromkeys(CATEGORIES, 10)
    assert len({json.dumps([r["instruction"], r["input"], r.get("history")]) for r in records}) == 100
    assert all(2 <= len(r["history"]) <= 4 for r in records if r["category"] == "10dialogue")
    assert all(r.get("reference") for r in records if r["category"] in ("01qa", "02translate", "04analyse", "05understanding"))
    assert all(Fraction(r["reference"]) == final_number(r["reference"]) for r in records if r["category"] == "09math")


def test_mathematics_is_right():
    given = [Fraction(r["reference"]) for r in read_prompts([str(ROOT / "test_data/09math.json")])]
    even = [n for n in range(100, 500) if n % 2 == 0 and len(set(str(n))) == 3 and set(str(n)) <= set("01234")]
    swapped = [n for n in range(10, 100) if n // 10 + n % 10 == 11 and n % 10 * 10 + n // 10 == n + 27]
    red = [pair for pair in itertools.permutations(range(10), 2) if max(pair) < 4]
    rabbits = [r for r in range(41) if 4 * r + 2 * (40 - r) == 112]
    assert given == [
        Fraction("100") - 3 * 12 - 5 * Fraction("4.5"),
        120 * 1000 // 60 - 1800,
        (1 - 4 * (Fraction(1, 12) + Fraction(1, 18))) * 18,
        rabbits[0],
        240 / (Fraction(12, 10) * Fraction(8, 10)),
        Fraction(len(red), 90),
        sum(7 + 4 * n for n in range(20)),
        next(n for n in range(100) if n * n == 9 * 9 + 40 * 40),
        swapped[0],
        len(even),
    ]


def test_python_in_the_references_does_what_is_asked():
    references = [r.get("reference", "") for r in read_prompts([str(ROOT / "test_data/07code.json")])]
    names: dict = {}
    for reference in references:
        for code in re.findall(r"^def .*?(?=\n\n\S|\Z)", reference, re.S | re.M):
            exec(code, names)
    assert names["is_palindrome"]("A man, a plan, a canal: Panama") and not names["is_palindrome"]("ab")
    assert [names["search"]([1, 3, 5, 7], n) for n in (1, 7, 4)] == [0, 3, -1]
    assert [names["fib"](n) for n in range(8)] == [0, 1, 1, 2, 3, 5, 8, 13]
    date = re.compile(next(r for r in references if r.startswith("^")))
    assert date.search("2023-04-09") and not date.search("2023-13-09") and not date.search("2023-04-32")


# The prompt, and the order


@pytest.mark.parametrize(("systems", "count"), enumerate("两三四五六七八", 2))
def test_the_published_prompt(systems, count):
    text = judge_prompt({"instruction": "把它译成英语。", "input": "你好"}, [f"回答{n}" for n in range(1, systems + 1)])
    assert text == (
        f"以下是{count}个类似 ChatGPT 的系统的输出。请以 10 分制为每一项打分，并给出解释以证明您的分数。"
        "输出结果格式为：System 分数；System 解释。\nPrompt: 把它译成英语。\n你好\n答案：\n"
        + "\n".join(f"System{n}: 回答{n}" for n in range(1, systems + 1))
    )


def test_a_dialogue_is_shown_and_asked_with_its_turns():
    record = {"instruction": "再见", "input": "", "history": [["你好", "你好！"]], "system": "简短"}
    assert "Prompt: 用户：你好\n助手：你好！\n用户：再见\n答案：\n" in judge_prompt(record, ["a", "b"])
    assert [message["role"] for message in messages(record)] == ["system", "user", "assistant", "user"]


def test_each_system_is_shown_at_each_position():
    orders = [shown_order(["a", "b", "c"], 42, 0, repeat) for repeat in range(3)]
    assert all(sorted(place) == ["a", "b", "c"] for place in zip(*orders, strict=True))
    firsts = [shown_order(["a", "b", "c"], 42, prompt, 0)[0] for prompt in range(300)]
    assert min(firsts.count(name) for name in "abc") > 60
    assert shown_order(["a", "b", "c"], 1, 0, 0) == shown_order(["a", "b", "c"], 1, 0, 0)
    assert any(shown_order(["a", "b", "c"], 1, n, 0) != shown_order(["a", "b", "c"], 2, n, 0) for n in range(9))


# Whole runs


def test_scores_go_back_to_the_systems_they_belong_to(script, serve, systems, tmp_path):
    server = serve(fair)
    out = judged(script, server, tmp_path / "out", *systems, "--repeats", 3).ok()
    assert len(server.bodies) == 18
    assert len({tuple(w for _, w in shown(body)) for body in server.bodies}) > 6  # the order did change
    lines = (tmp_path / "out/scores.md").read_text("utf-8").splitlines()
    assert "| 类别 | 样本数 | one | two | three |" in lines
    assert "| 知识问答 | 4 | **75** [65, 85] | 61.2* [40, 78.8] | 61.2* [21.2, 87.5] |" in lines
    assert "| mine | 2 | **75** [50, 100] | 70* [50, 90] | 30 [10, 50] |" in lines
    assert "scores by " in out and "\n| mine | 2 | **75** [50, 100] " in out, "the table is printed, too"
    assert "6 prompts, judged 3 times, the order of the systems shuffled for each\n" in out
    assert "知识问答 (4), mine (2)" in out and "means scaled to 100" in out
    assert "repeats differ by 0.00 points in the mean, 100% by at most one; 100% have the same best" in out
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open(encoding="utf-8")))
    assert rows[0]["one"] == "75" and rows[0]["best"] == "one" and rows[0]["second"] == "two; three"
    found = json.loads((tmp_path / "out/judgements.json").read_text("utf-8"))
    assert sorted((one["prompt"], one["repeat"]) for one in found) == [(n, m) for n in range(1, 7) for m in range(1, 4)]
    assert all(one["scores"] == {name: WORTH[name][one["prompt"] - 1] for name in WORTH} for one in found)
    assert (tmp_path / "out/scores.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_judge_that_likes_the_first_is_found_out(script, serve, systems, tmp_path):
    server = serve(lambda number, body: "\n".join(f"System{s} {9 if s == 1 else 5}分" for s, _ in shown(body)))
    out = judged(script, server, tmp_path / "out", *systems, "--repeats", 3).ok()
    assert "wins by position shown (an unbiased judge: 33% each): System1 100%, System2 0%, System3 0%" in out
    assert "repeats differ by 2.67 points" in out and "; 0% have the same best" in out
    table = scores(tmp_path / "out")["tables"][0]["rows"]
    assert len(set(table[0]["values"].values())) == 1  # three repeats, each system first once


def test_scores_that_are_not_certain_are_asked_again_twice_then_missing(script, serve, systems, tmp_path):
    def judge(number, body):
        text = fair(number, body)
        if "问题0" in asked(body) and "无法确定" not in asked(body):
            return text.replace("System2", "System1", 1)  # double, and missing: repaired when asked again
        if "问题5" in asked(body):
            text = re.sub(r"System3 [\d.]+分", "System3 11分", text)  # never repaired: the first of three like texts counts
            return re.sub(r"System1 [\d.]+分", "System1 2分", text) if "无法确定" in asked(body) else text
        return text

    server = serve(judge)
    out = judged(script, server, tmp_path / "out", *systems).ok()
    assert len(server.bodies) == 6 + 1 + 2
    again = [asked(body) for body in server.bodies if "无法确定" in asked(body)]
    assert sum("System1、System2的分数无法确定" in text for text in again) == 1
    found = next(one for one in json.loads((tmp_path / "out/judgements.json").read_text("utf-8")) if one["prompt"] == 6)
    third = found["order"][2]
    assert found["scores"][third] is None and len(found["answers"]) == 3
    assert found["problems"] == ["System3: 11 is out of range"]
    assert all(found["scores"][name] == WORTH[name][5] for name in found["order"][:2])
    assert f"{third}: 1 of 6 scores are missing and not in its means (mine 1)" in out


def test_an_answer_cut_off_by_its_length_is_no_score(script, serve, systems, tmp_path):
    whole = "问题1"  # whose scores were all written before
    server = serve(
        lambda number, body: {
            "content": fair(number, body) if whole in asked(body) else "System1 8分；解释：很",
            "finish": "length",
        }
    )
    out = judged(script, server, tmp_path / "out", *systems).ok()
    assert len(server.bodies) == 5 * 3 + 1
    found = json.loads((tmp_path / "out/judgements.json").read_text("utf-8"))
    assert found[0]["problems"] == ["System2: no score", "System3: no score", "cut off (--max_tokens)"]
    assert found[1]["problems"] == [] and None not in found[1]["scores"].values()
    assert "mean over the categories" in out


def test_a_judgement_that_the_server_refuses_is_missing(script, serve, systems, tmp_path):
    refusal = {"status": 400, "body": b'{"error": {"message": "content filter"}}'}
    server = serve(lambda number, body: refusal if "问题2" in asked(body) else fair(number, body))
    assert judged(script, server, tmp_path / "out", *systems).ok()
    found = json.loads((tmp_path / "out/judgements.json").read_text("utf-8"))
    assert set(found[2]["scores"].values()) == {None}
    assert found[2]["problems"] == ["refused: status 400: content filter"]


RESULTS = ("scores.md", "scores.csv", "scores.json", "scores.png", "judgements.json")


def test_a_killed_run_goes_on_and_ends_the_same(script, serve, systems, tmp_path):
    """Pitfall 16."""

    def slowly(number, body):
        return {"content": fair(number, body), "sleep": 0.05}

    whole = serve(slowly)
    assert judged(script, whole, tmp_path / "whole", *systems, "--repeats", 4).ok()
    server = serve(slowly)
    options = [*systems, "--repeats", 4, "--judge_model", "m", "--api_base", server.url, "--output_dir", tmp_path / "out"]
    for wanted in (3, 9, 17):
        running = script.start("judge.py", *options)
        running.wait_until(lambda wanted=wanted: len(server.bodies) >= wanted)
        running.kill()
        assert running.wait().status == -9
        assert not (tmp_path / "out/scores.md").exists()
    assert script("judge.py", *options).ok()
    assert len(server.bodies) <= 24 + 3 * 4  # what was under way at a kill is asked again, nothing else
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    before = len(server.bodies)
    assert script("judge.py", *options).ok()
    assert len(server.bodies) == before


def test_ctrl_c_waits_for_what_is_under_way(script, serve, systems, tmp_path):
    server = serve(lambda number, body: {"content": fair(number, body), "sleep": 0.3})
    options = [*systems, "--judge_model", "m", "--api_base", server.url, "--output_dir", tmp_path / "out", "--concurrency", 2]
    running = script.start("judge.py", *options)
    running.wait_until(lambda: len(server.bodies) >= 3)
    running.kill(signal.SIGINT)
    ended = running.wait()
    assert ended.status == 130 and "Traceback" not in ended.err and "the same command resumes" in ended.out
    kept = (tmp_path / "out/judge.jsonl").read_text("utf-8").count('"answer"')
    assert kept == len(server.bodies)
    assert script("judge.py", *options).ok()
    assert len(server.bodies) == 6


def test_a_budget_stops_before_it_and_more_of_it_goes_on(script, serve, systems, tmp_path):
    server = serve(fair)
    error = judged(script, server, tmp_path / "out", *systems, "--budget", 4).error
    assert "--budget 4: used up" in error and len(server.bodies) == 4
    assert not (tmp_path / "out/scores.md").exists()
    assert judged(script, server, tmp_path / "out", *systems, "--budget", 6).ok()
    assert len(server.bodies) == 6


def test_other_settings_do_not_go_on_in_the_same_folder(script, serve, systems, tmp_path):
    server = serve(fair)
    assert judged(script, server, tmp_path / "out", *systems).ok()
    assert "seed" in judged(script, server, tmp_path / "out", *systems, "--seed", 7).error
    (tmp_path / "known.json").write_text(json.dumps([{"instruction": "问题1", "reference": "标准"}]), "utf-8")
    known = ["--test_input_path", tmp_path / "known.json"]
    assert "references" in judged(script, server, tmp_path / "out", *systems, *known, "--show_references").error
    assert not any("参考答案" in asked(body) for body in server.bodies)
    assert judged(script, server, tmp_path / "shown", *systems, *known, "--show_references").ok()
    assert sum("参考答案：标准\n答案：" in asked(body) for body in server.bodies) == 1
    (tmp_path / "one.json").write_text((tmp_path / "two.json").read_text("utf-8"), "utf-8")
    assert "prompts and answers" in judged(script, server, tmp_path / "out", *systems).error
    assert len(server.bodies) == 12


def test_more_repeats_cost_only_the_new_ones(script, serve, systems, tmp_path):
    server = serve(fair)
    assert judged(script, server, tmp_path / "out", *systems).ok()
    assert judged(script, server, tmp_path / "out", *systems, "--repeats", 2).ok()
    assert len(server.bodies) == 12


def test_a_model_answers_the_prompts(script, serve, tmp_path):
    """Pitfall 9: Chinese stays Chinese in the file."""
    server = serve(lambda number, body: f"答：{asked(body)}")
    options = ["--answer_with", "m", "--api_base", server.url, "--output_dir", tmp_path / "m"]
    assert "--budget 7: used up" in script("judge.py", *options, "--budget", 7).error
    assert not (tmp_path / "m/test.json").exists()
    out = script("judge.py", *options, "--price_in", 1, "--price_out", 2).ok()
    assert len(server.bodies) == 100
    assert "100 requests (0 failed), 10,000 tokens sent and 1,000 received, cost 0.0120" in out
    assert "答：我国面积最大" in (tmp_path / "m/test.json").read_text("utf-8")
    records = json.loads((tmp_path / "m/test.json").read_text("utf-8"))
    prompts = read_prompts([str(ROOT / "test_data")])
    kept = ("instruction", "input", "history", "system", "category")
    plain = [{key: record[key] for key in record if key != "output"} for record in records]
    assert plain == [{key: prompt[key] for key in kept if prompt.get(key)} for prompt in prompts]
    assert {r["category"] for r in records} == set(CATEGORIES)
    other = script("judge.py", *options, "--test_input_path", ROOT / "test_data/09math.json").error
    assert "answers.jsonl: belongs to an unfinished run with other settings (prompts)" in other
    assert records[10]["output"] == f"答：{records[10]['instruction']}\n{records[10]['input']}"
    turns = next(body["messages"] for body in server.bodies if asked(body) == records[-1]["instruction"])
    assert [m["content"] for m in turns[:-1]] == [text for pair in records[-1]["history"] for text in pair]
    assert all(list(r)[-2:] == ["output", "category"] for r in records)
    ended = script("judge.py", "--answers", f"a={tmp_path}/m", "--answers", f"b={tmp_path}/m", "--metrics",
                   "--output_dir", tmp_path / "metrics")  # fmt: skip
    assert "71 of 100 prompts have a reference" in ended.ok()


def test_answers_of_another_run_are_not_overwritten(script, serve, tmp_path):
    """Pitfall 16."""
    server = serve(fair)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/test.json").write_text("[]", "utf-8")
    error = script("judge.py", "--answer_with", "m", "--api_base", server.url, "--output_dir", tmp_path / "m").error
    assert "choose another --output_dir" in error and not server.bodies


# What a user can fix


def test_different_prompts_are_named(script, systems, tmp_path):
    records = json.loads((tmp_path / "two.json").read_text("utf-8"))
    records[1]["instruction"] = "别的问题"
    (tmp_path / "two.json").write_text(json.dumps(records), "utf-8")
    error = script("judge.py", *systems, "--metrics", "--output_dir", tmp_path / "out").error
    assert f"only in {tmp_path}/one.json: '问题1'" in error and f"only in {tmp_path}/two.json: '别的问题'" in error
    assert not (tmp_path / "out").exists()


def test_prompts_in_another_order_are_put_side_by_side(script, serve, systems, tmp_path):
    records = json.loads((tmp_path / "two.json").read_text("utf-8"))
    (tmp_path / "two.json").write_text(json.dumps(records[::-1]), "utf-8")
    assert judged(script, serve(fair), tmp_path / "out", *systems).ok()
    assert scores(tmp_path / "out")["tables"][0]["rows"][0]["values"]["two"] == 61.25


def test_what_a_prompt_lacks_is_that_of_the_first_record_that_asks_the_same():
    known = [{"instruction": "问", "category": "x", "reference": "一"}, {"instruction": "问", "reference": "二"}]
    prompts = [{"instruction": "问"}, {"instruction": "问", "category": "own"}, {"instruction": "问", "input": "题"}]
    prompts.append({"instruction": "问", "history": [["前", "答"]]})
    found = [
        {"category": "x", "reference": "一"},
        {"category": "own", "reference": "一"},
        {"category": "all"},
        {"category": "all"},
    ]
    assert add_references(prompts, known) == [one | more for one, more in zip(prompts, found, strict=True)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--output_dir: missing"),
        (["--output_dir", "{}/out"], "--answers or --chain: missing"),
        (["--answers", "a={}/one.json", "--output_dir", "{}/out"], "--judge_model, --votes or --metrics: missing"),
        (["--answers", "{}/one.json", "--metrics", "--output_dir", "{}/out"], "not NAME=PATH"),
        (["--answers", "={}/one.json", "--metrics", "--output_dir", "{}/out"], "not NAME=PATH"),
        (["--answers", "a={}/none.json", "--metrics", "--output_dir", "{}/out"], "none.json"),
        (["--answers", "a={}/empty.json", "--metrics", "--output_dir", "{}/out"], "empty.json"),
        (["--answers", f"a={ROOT}/test_data/01qa.json", "--metrics", "--output_dir", "{}/out"], "without outputs"),
        (["--answers", "a={}/cut.json", "--metrics", "--output_dir", "{}/out"], "cut.json"),
        (["--answers", "a={}/one.json", "--judge_model", "m", "--api_base", "http://a:1", "--output_dir", "{}/out"], "2 to 8"),
        (["--answers", "a={}/one.json", "--judge_model", "m", "--output_dir", "{}/out"], "OPENAI_API_KEY: not set"),
        (["--answers", "a={}/one.json", "--judge_model", "m", "--api_base", "x", "--output_dir", "{}/out"], "--api_base x"),
        (["--answers", "a={}/one.json", "--metrics", "--test_input_path", "{}/none", "--output_dir", "{}/out"], "none"),
        (["--answer_with", "m", "--metrics", "--api_base", "http://localhost:1", "--output_dir", "{}/out"], "--answer_with"),
        (["--answer_with", "m", "--api_base", "x", "--output_dir", "{}/out"], "--api_base x"),
        (["--answers", "a={}/one.json", "--metrics", "--pairwise", "--output_dir", "{}/out"], "--pairwise: needs"),
        (["--answers", "a={}/one.json", "--metrics", "--second_judge", "m", "--output_dir", "{}/out"], "is for --pairwise"),
        (["--answers", "a={}/one.json", "--metrics", "--held_out", "f=x", "--output_dir", "{}/out"], "--held_out: names"),
        (["--chain", "{}", "--output_dir", "{}/out"], "holds no lineage.json"),
        (["--answers", "a={}/one.json", "--judge_modle", "m", "--output_dir", "{}/out"], "did you mean --judge_model?"),
        (["--answers", "a={}/one.json", "--metrics", "--repeats", "0", "--output_dir", "{}/out"], "--repeats"),
        (["--answers", "a={}/one.json", "--metrics", "--budget", "x", "--output_dir", "{}/out"], "--budget"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(script, systems, tmp_path, monkeypatch, options, told):
    """Pitfall 13."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "empty.json").write_text("[]", "utf-8")
    (tmp_path / "cut.json").write_text('[{"instruction": "a", "outp', "utf-8")
    assert told in script("judge.py", *[option.replace("{}", str(tmp_path)) for option in options]).error
    assert not (tmp_path / "out").exists()


def test_nine_systems_are_too_many(script, systems, tmp_path):
    many = [part for n in range(9) for part in ("--answers", f"s{n}={tmp_path}/one.json")]
    address = ["--api_base", "http://localhost:1/v1", "--output_dir", tmp_path / "out"]
    assert "2 to 8 systems, not 9" in script("judge.py", *many, "--judge_model", "m", *address).error
