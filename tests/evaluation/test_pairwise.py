"""Two answers at a time: verdicts read, ratings against closed forms, agreement and biases counted by hand, the script."""

import json
import math

import numpy
import pytest
from scipy import stats
from scipy.optimize import minimize

from utils.chat.feedback import Feedback
from utils.console import UserError
from utils.evaluation import pairwise
from utils.evaluation.pairwise import Comparison, agreement, cohen, compare_prompt, length_notes, notes, read_verdict
from utils.evaluation.ratings import SCALE, WEIGHT, Verdict, ratings
from utils.files import write_json

SYSTEMS = {"good": "很好的回答，内容最长最全", "fair": "一般的回答", "poor": "差"}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("A 更完整。\n结论：A", 1.0), ("**结论：B**", 0.0), ("结论: 平局", 0.5), ("结论：回答A", 1.0), ("【结论】：B。", 0.0),
        ("<think>结论：A</think>\n结论：B", 0.0), ("结论：A\n结论：B", None), ("都不错", None), ("结论：Apple", None),
        ("结论：A 不如 B", None), ("结论：A和B一样好", None), ("结论：A 错误太多，B 更好", None), ("结论：B更好（略长）", 0.0),
        ("", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_or_missing(text, outcome):
    assert read_verdict(text) == outcome


def test_two_systems_have_the_ratings_of_their_odds(monkeypatch):
    monkeypatch.setattr("utils.evaluation.ratings.WEIGHT", 1e-6)
    verdicts = [Verdict(prompt, "a", "b", outcome) for prompt, outcome in enumerate([1.0] * 6 + [0.0] * 2 + [0.5] * 2)]
    found = ratings(["a", "b"], verdicts)
    assert found["a"][0] - found["b"][0] == pytest.approx(400 * math.log10(7 / 3), abs=0.1)  # 6 + 1 wins to 2 + 1
    assert found["a"][0] + found["b"][0] == pytest.approx(2000)
    assert found["a"][1][0] < found["a"][0] < found["a"][1][1]
    both = [Verdict(0, "a", "b", 1.0), Verdict(0, "b", "a", 0.0)]  # of one prompt, which alone shows no doubt
    assert [interval for _, interval in ratings(["a", "b"], both).values()] == [None, None]


def test_three_systems_have_the_likeliest_ratings():
    wins = numpy.array([[0, 7, 9], [3, 0, 6.5], [1, 3.5, 0]])
    verdicts = [
        Verdict(number, "abc"[one], "abc"[other], 1.0)
        for one in range(3)
        for other in range(3)
        for number in range(int(wins[one, other]))
    ]
    verdicts.append(Verdict(20, "b", "c", 0.5))
    assert WEIGHT == 0.1

    def loss(values):  # of the wins, and those that each is given over each other
        odds = values[:, None] - values[None, :]
        return ((wins + WEIGHT) * numpy.logaddexp(0, -odds) * (1 - numpy.eye(3))).sum()

    best = minimize(lambda values: loss(values) + values.sum() ** 2, numpy.zeros(3)).x
    found = ratings(["a", "b", "c"], verdicts)
    assert [found[name][0] for name in "abc"] == pytest.approx((1000 + SCALE * best).tolist(), abs=1)


def test_who_always_wins_has_a_finite_rating_that_is_in_doubt():
    """By hand: the share of the prompt that is a tie is Beta(1, n) / 2, half of it losses."""
    for count in (5, 40):
        found = ratings(["a", "b"], [Verdict(prompt, "a", "b", 1.0) for prompt in range(count)])
        assert 1000 < found["a"][0] < 2500 and found["b"][0] < 1000
        losses = [stats.beta.ppf(share, 1, count) / 2 + WEIGHT / count for share in (0.975, 0.025)]
        by_hand = [1000 + SCALE * math.log((1 + 2 * WEIGHT / count - lost) / lost) / 2 for lost in losses]
        low, high = found["a"][1]
        assert low == pytest.approx(by_hand[0], abs=25) and high == pytest.approx(max(found["a"][0], by_hand[1]), abs=25)


def test_who_was_not_compared_has_no_rating_beside_the_others():
    pairs = [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")]
    given = [Comparison(n, *pair, outcome, [], "") for n, pair in enumerate(pairs) for outcome in (1.0, 0.5)]
    records = [{"instruction": str(n), "category": "x"} for n in range(4)]
    (wins, rating) = pairwise.tabulate("votes", records, list("abcde"), given)
    assert rating.rows[0].values["e"] is rating.rows[0].intervals["e"] is wins.rows[0].values["e"] is None
    assert rating.rows[0].values["a"] == pytest.approx(1000)
    line = "votes: no comparison links a and b; c and d; e: ratings can be compared only within these"
    assert line in notes("votes", records, {name: [name] * 4 for name in "abcde"}, given)
    given = [Comparison(n, "a", "b", 1.0, [], "") for n in range(4)]
    (wins, _) = pairwise.tabulate("votes", records, ["a", "b"], given)  # Wilson's of 4 of 4: resampling shows no doubt at all
    assert wins.rows[0].intervals == {"a": pytest.approx((51.01, 100), abs=0.01), "b": pytest.approx((0, 48.99), abs=0.01)}


def test_kappa_by_hand():
    pairs = [("win", "win")] * 20 + [("win", "loss")] * 5 + [("loss", "win")] * 10 + [("loss", "loss")] * 15
    assert cohen(pairs) == pytest.approx(0.4)  # the example of Wikipedia's article: 0.7 observed, 0.5 at random
    assert cohen([("win", "win")] * 3) is None
    mine = [
        Comparison(0, "a", "b", 1.0, [""], ""),
        Comparison(0, "b", "a", 0.0, [""], ""),
        Comparison(1, "a", "b", 1.0, [""], ""),
    ]
    theirs = [Comparison(0, "b", "a", 0.0, [], ""), Comparison(1, "b", "a", 1.0, [], "")]
    (line,) = agreement({"m": mine, "votes": theirs})
    assert line == "m and votes agree in 50 % [9, 91] of 2 comparisons, Cohen's kappa 0.00"


def test_biases_are_counted():
    answers = {"a": ["长长长", "长长长"], "b": ["短", "短"]}
    given = [
        Comparison(0, "a", "b", 1.0, [""], ""), Comparison(0, "b", "a", 1.0, [""], ""),  # the first, both times
        Comparison(1, "a", "b", 1.0, [""], ""), Comparison(1, "b", "a", None, [""], "no readable verdict"),
    ]  # fmt: skip
    lines = notes("m", [{"category": "x", "instruction": "?"}] * 2, answers, given)
    assert lines[0] == "m: 3 of 4 comparisons of 2 prompts have a verdict"
    assert "m: 1 comparisons: no readable verdict" in lines
    assert "m: both orders agree in 0 % [0, 79] of 1" in lines
    assert "m: position: the answer shown first wins 100 % [44, 100] of 3 decided" in lines
    assert "m: length: the longer answer wins 67 % [21, 94] of 3 decided" in lines
    assert "m: a and b: no difference can be told (a: 1 prompts won, 0 lost, 1 tied, McNemar p = 1.000)" in lines
    assert not length_notes("m", {"a": ["好"], "b": ["坏"]}, given[:2]), "of two that are equally long none is the longer"


def test_so_many_prompts_must_be_won_for_a_difference():
    """By the exact test of signs: p is 2 / 2⁶ for six of six, and 2 × 10 / 2⁹ for eight of nine."""
    for won, lost, line in (
        (6, 0, "m: a is better than b (a: 6 prompts won, 0 lost, 0 tied, McNemar p = 0.031)"),
        (1, 8, "m: b is better than a (a: 1 prompts won, 8 lost, 0 tied, McNemar p = 0.039)"),
        (7, 1, "m: a and b: no difference can be told (a: 7 prompts won, 1 lost, 0 tied, McNemar p = 0.070)"),
    ):
        given = [Comparison(place, "a", "b", float(place < won), [""], "") for place in range(won + lost)]
        assert pairwise.differences("m", ["a", "b"], given) == [line]


@pytest.fixture
def systems(tmp_path):
    """Three systems' answers to six prompts, one of them with a reference; the options that name them."""
    options = []
    for name, answer in SYSTEMS.items():
        records = [{"instruction": f"问题{n}", "output": answer if n else "一样", "category": "01qa"} for n in range(6)]
        write_json(tmp_path / f"{name}.json", records)
        options += ["--answers", f"{name}={tmp_path / name}.json"]
    write_json(tmp_path / "references.json", [{"question": "问题1", "std_answer": "标准的回答", "class": "qa"}])
    return [*options, "--test_input_path", tmp_path / "references.json"]


def best(number, body):
    """A judge that prefers good to fair to poor."""
    text = body["messages"][-1]["content"]
    places = {name: text.index(answer) for name, answer in SYSTEMS.items() if answer in text.partition("[A 的回答]")[2]}
    ranked = [name for name in SYSTEMS if name in places][:2]
    return "理由\n结论：" + ("A" if places[ranked[0]] < places[ranked[1]] else "B")


def test_systems_are_compared_in_both_orders(script, serve, systems, tmp_path):
    server = serve(best)
    options = ["judge.py", *systems, "--pairwise", "--judge_model", "m", "--api_base", server.url]
    out = script(*options, "--output_dir", tmp_path / "out").ok()
    assert len(server.bodies) == 5 * 6  # the first prompt's answers are equal: ties, which nobody is paid for
    assert "m: 6 comparisons: the answers are equal" in out and "m: both orders agree in 100 %" in out
    assert "m: good and fair: no difference can be told (good: 5 prompts won, 0 lost, 1 tied, McNemar p = 0.062)" in out
    assert "30 requests to send, about" in out
    shown = [body["messages"][-1]["content"] for body in server.bodies]
    assert sum("[参考答案]\n标准的回答\n[参考答案完]" in text for text in shown) == 6  # BELLE's form
    tables = {
        table["title"].partition(" · ")[0]: table
        for table in json.loads((tmp_path / "out/pairwise.json").read_text("utf-8"))["tables"]
    }
    wins = tables["wins in %, a tie is half a win, by m"]["rows"][0]["values"]
    assert wins == {"good": pytest.approx(100 * 22 / 24), "fair": 50, "poor": pytest.approx(100 * 2 / 24)}
    rating = tables["Bradley–Terry rating by m"]["rows"][0]
    assert rating["values"]["good"] > rating["values"]["fair"] > rating["values"]["poor"]
    assert all(rating["intervals"][name][0] <= rating["values"][name] <= rating["intervals"][name][1] for name in SYSTEMS)
    again = script(*options, "--output_dir", tmp_path / "out").ok()
    assert len(server.bodies) == 30 and "30 requests were sent before" in again


def test_votes_are_read_as_the_page_writes_them(tmp_path, capsys):
    """Wins and ties, by the page's own functions; a tie on another answer is counted as not counted."""
    page = Feedback(str(tmp_path))
    asked = [{"instruction": f"问{n}", "input": ""} for n in range(4)]
    answers = {"f1": ["甲", "乙", "丙", "丁"], "f2": ["子", "丑", "寅", "卯"], "f3": ["一", "二", "三", "丁"]}
    page.vote(asked[0], {"f2": "子", "f1": "甲"}, "f1", {}, "left")
    page.vote(asked[1], {"f1": "乙", "f2": "丑"}, "f2", {}, "right")
    page.vote(asked[3], {"f1": "丁", "f2": "卯"}, "f1", {}, "left")  # or f3's
    page.vote(asked[2], {"f1": "丙", "f2": "寅"}, "", {}, "both")
    page.vote(asked[2], {"f1": "丙", "f2": "别的"}, "", {}, "neither")
    prompts = [{"instruction": one["instruction"], "category": "all"} for one in asked]
    found = pairwise.read_votes([str(tmp_path / "votes.jsonl"), str(tmp_path / "ties.jsonl")], prompts, answers)
    assert [one[:4] for one in found] == [(0, "f1", "f2", 1.0), (1, "f2", "f1", 1.0), (2, "f1", "f2", 0.5)]
    counts = {
        "votes": "2 votes counted; not counted: 0 on other prompts or answers, 1",
        "ties": "1 votes counted; not counted: 1",
    }
    counts["ties"] += " on other prompts or answers, 0"
    lines = [f"{tmp_path}/{name}.jsonl: {count} on answers that several systems gave" for name, count in counts.items()]
    assert capsys.readouterr().out.splitlines() == lines
    write_json(tmp_path / "other.json", [{"instruction": "别的", "chosen": "甲", "rejected": "乙"}])
    with pytest.raises(UserError, match=r"other\.json: holds no votes on these systems' answers"):
        pairwise.read_votes([str(tmp_path / "votes.jsonl"), str(tmp_path / "other.json")], prompts, answers)
    (wins, _) = pairwise.tabulate("votes", prompts, ["f1", "f2"], found)
    assert wins.rows[0].values == {"f1": 50.0, "f2": 50.0}
    low, high = wins.rows[0].intervals["f1"]
    assert low == 0 and high == 100  # three prompts, one of them each way


def test_votes_and_a_second_judge_beside_the_first(script, serve, systems, tmp_path):
    server = serve(lambda number, body: best(number, body) if body["model"] == "m" else "结论：A")
    votes = [{"instruction": f"问题{n}", "chosen": SYSTEMS["good"], "rejected": SYSTEMS["poor"]} for n in (1, 2)]
    votes.append({"instruction": "别的", "chosen": "甲", "rejected": "乙"})
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(vote, ensure_ascii=False) + "\n" for vote in votes), "utf-8")
    options = ["judge.py", *systems, "--votes", tmp_path / "votes.jsonl", "--output_dir", tmp_path / "out"]
    judges = ["--pairwise", "--judge_model", "m", "--second_judge", "first", "--api_base", server.url]
    out = script(*options, *judges, "--report").ok()
    assert "2 votes counted; not counted: 1 on other prompts or answers" in out
    assert "votes and m agree in 100 % [34, 100] of 2 comparisons" in out
    assert "first: both orders agree in 0 %" in out and "first: position: the answer shown first wins 100 %" in out
    assert "m and first agree in" in out
    found = json.loads((tmp_path / "out/comparisons.json").read_text("utf-8"))
    assert {one["judge"] for one in found} == {"votes", "m", "first"}
    shown = [(one["prompt"], one["instruction"], one["first"], one["outcome"]) for one in found if one["judge"] == "votes"]
    assert shown == [(2, "问题1", "good", 1.0), (3, "问题2", "good", 1.0)]
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert "<title>out</title>" in page and "votes: good before poor: good" in page
    assert "<li>votes and m agree in 100 % [34, 100] of 2 comparisons" in page, "notes, too"
    alone = script("judge.py", *systems, "--votes", tmp_path / "votes.jsonl", "--output_dir", tmp_path / "alone").ok()
    assert "Bradley–Terry rating by votes" in alone


def test_nothing_is_sent_beyond_what_it_may_cost(script, serve, systems, tmp_path):
    """Of two judges and verdicts on refusals together: all is estimated first, and no answers under way exceed the limit."""
    usage = {"prompt_tokens": 200, "completion_tokens": 100}  # at these prices 0.03 an answer, more than the estimate
    server = serve(
        lambda number, body: {"content": best(number, body), "usage": usage} if "助手对" in str(body) else "结论：拒绝"
    )
    options = ["judge.py", *systems, "--pairwise", "--judge_model", "m", "--second_judge", "n", "--refusals", "--api_base"]
    options += [server.url, "--output_dir", tmp_path / "out", "--max_tokens", 100, "--concurrency", 16, "--max_cost"]
    assert "--max_cost: needs prices" in script(*options, 1).error
    options += [1.0, "--price_in", 100, "--price_out"]
    assert "--second_judge m: is the first judge" in script(*options, 100, "--second_judge", "m").error
    error = script(*options, 100, "--max_cost", 0.8).error
    assert "--max_cost 0.8: sending the prompts alone costs about" in error and not server.bodies
    error = script(*options, 100).error
    known = len(server.bodies)
    assert "is spent, and the next answer may cost 0.03" in error and 30 <= known <= 33  # 33 cost 0.99
    assert script(*options, 100).error and len(server.bodies) == known, "what was spent before counts, whoever it was paid to"
    assert script(*options, 100, "--max_cost", 5).ok() and len(server.bodies) == 30 + 30 + 18


def test_references_are_shown_in_either_way_of_judging(systems):
    record = {"instruction": "问题", "category": "x", "reference": "标准"}
    assert "[参考答案]\n标准" in compare_prompt(record, "甲", "乙", True)
    assert "参考答案" not in compare_prompt(record, "甲", "乙", False)
    from utils.evaluation.judging import judge_prompt

    assert "参考答案：标准\n答案：" in judge_prompt(record, ["甲", "乙"], True) and "参考答案" not in judge_prompt(
        record, ["甲", "乙"]
    )
    assert pairwise.question(record) == "问题"
