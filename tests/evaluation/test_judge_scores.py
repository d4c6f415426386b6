"""Scores out of what a judge writes: the many ways to write one, and everything that is not a score."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.evaluation.judge_scores import read_scores

ANSWERS = [
    ("System1 8分；解释。\nSystem2 7分", [8.0, 7.0]),
    ("System 1: 8/10；好。System 2: 7/10；差", [8.0, 7.0]),
    ("**System1**：8.5\n**System2**：9", [8.5, 9.0]),
    ("Ｓｙｓｔｅｍ１：８分；好\nＳｙｓｔｅｍ２：７．５分；", [8.0, 7.5]),
    ("System1 分数：8；System1 解释：比 System2 好 2 分。\nSystem2 分数：6；System2 解释：有3处错误", [8.0, 6.0]),
    ("| System | 分数 | 解释 |\n|---|---|---|\n| System1 | 8 | 好 |\n| System2 | 7 | 差 |", [8.0, 7.0]),
    ("| | System1 | System2 |\n|---|---|---|\n| 分数 | 8 | 7 |\n| 解释 | a | b |", [8.0, 7.0]),
    ("| 系统 | 准确 | 流畅 | 总分 |\n|---|---|---|---|\n| 1 | 9 | 8 | 8.5 |\n| 2 | 5 | 6 | 5.5 |", [8.5, 5.5]),
    ("| System | 内容分 | 语言分 | 总分 |\n|---|---|---|---|\n| System1 | 9 | 7 | 8 |\n| System2 | 6 | 4 | 5 |", [8.0, 5.0]),
    ('```json\n{"System1": 8, "System2": "7/10"}\n```', [8.0, 7.0]),
    ('[{"system":"System1","score":8,"explanation":"2个"},{"system":"System2","score":7}]', [8.0, 7.0]),
    ('{"System1": {"分数": 8, "解释": "x"}, "System2": {"分数": 7}}', [8.0, 7.0]),
    ('{"System1 分数": 8, "System1 解释": "x", "System2 分数": 7}', [8.0, 7.0]),
    ('{"scores": [8, 7]}', [8.0, 7.0]),
    ('{"scores": [8, 7, 6]}', [None, None]),
    ("System1: 11\nSystem2: 7", [None, 7.0]),
    ("System1: -1\nSystem2: 7", [None, 7.0]),
    ("System1: 8\nSystem1: 9\nSystem2: 7", [None, 7.0]),
    ("System1: 8\nSystem2: 7\n总结：System1 8分", [8.0, 7.0]),
    ("### System 1\n**分数：** 8/10\n**解释：** 有 2 个\n\n### System 2\n**分数：** 6\n", [8.0, 6.0]),
    ("System1：\n1. 内容准确\n2. 流畅\n得分：8分\nSystem2：\n1. 分数: 7\n2. 解释", [8.0, 7.0]),
    ("排名：\n1. System2\n2. System1", [None, None]),
    ("System1：3个错误，得分 8 分\nSystem2：没有错误。9/10", [8.0, 9.0]),
    ("System1：十分准确\nSystem2：八分；好", [None, 8.0]),
    ("系统一：九分半；\n系统二：8 points", [9.5, 8.0]),
    ("System1 8 System2 7", [8.0, 7.0]),
    ("System1: 8-9分\nSystem2: 4/5", [None, None]),
    ("System1: 80/100\nSystem2: 80%", [None, None]),
    ("给 System1 打 8 分，给 System2 打 7 分", [8.0, 7.0]),
    ("System1（8分）：好\nSystem2（7分）：差", [8.0, 7.0]),
    ("System1 - 8分 - 好\nSystem2 — 7 — 差", [8.0, 7.0]),
    ("<think>System1 3分</think>System1 8分\nSystem2 7分", [8.0, 7.0]),
    ("<think>System1 3分 System2 4分", [None, None]),
    ("System1: 8,5\nSystem2 18分", [None, None]),
    ("System18分\nSystem2 7分", [None, 7.0]),
    ("1. System1：8分，因为2023年…\n2. System2：7分", [8.0, 7.0]),
    ("- **System 1:** **8**/10 \n- **System 2:** 7 out of 10", [8.0, 7.0]),
    ("System1 得分为 8 分；System2 的得分是7分", [8.0, 7.0]),
    ("System3 略逊于 System1，7 分\nSystem1 8分;System2 5分", [8.0, 5.0]),
    ("System1；8分；好\nSystem2；7分；差", [8.0, 7.0]),
    ("System1,8,好\nSystem2,7,差", [8.0, 7.0]),
    ("System1\t8\t好\nSystem2\t7\t差", [8.0, 7.0]),
    ('{"System1": 8, "System2": 7, "Sys', [8.0, 7.0]),
    ("System1: 8分/10分\nSystem2: 7分（满分10分）", [8.0, 7.0]),
    ("System1: 8分（满分100分）\nSystem2: 0分", [None, 0.0]),
    ("", [None, None]),
    ("System1: 10\nSystem2: 0", [10.0, 0.0]),
    ("System | 分数\n--- | ---\nSystem1 | 8\nSystem2 | 7", [8.0, 7.0]),
    ("| System1 | 8 | 好 |\n| System2 | 7 | 差 |", [8.0, 7.0]),
    ("| 1 | System2 |\n| 2 | System1 |", [None, None]),
    ("System1：准确性得分：9，流畅性得分：7，总分：8\nSystem2：准确性得分：9，流畅性得分：7", [8.0, None]),
    ("System1: Score 8/10. Explanation: 3 errors\nSystem2: Rating: 7", [8.0, 7.0]),
    ("System1 8分.\nSystem2 7.", [8.0, 7.0]),
    ("System1: 8. Good.\nSystem2: 1. 准确 2. 流畅", [8.0, None]),
    ("System1：8分钟就写完了\nSystem2：7分", [None, 7.0]),
    ("**System1：8分**\n**System2：7分**", [8.0, 7.0]),
    ("System1 分数: 8 解释: 好\nSystem2 分数: 7 解释: 差", [8.0, 7.0]),
    ("System1：8分；System2：9分；System1 解释：2个问题；System2 解释：无", [8.0, 9.0]),
    ("System 1：8分，System 2：7分。", [8.0, 7.0]),
    ("System1=8\nSystem2=7", [8.0, 7.0]),
    ("System1 8/10（解释：比 System2 的 7/10 高）\nSystem2 7/10", [8.0, 7.0]),
    ("System 8分\nSystem 7分", [None, None]),
    ("System1：8．5 分\nSystem2：７ ／ １０", [8.5, 7.0]),
    ("System1: N/A\nSystem2: 7", [None, 7.0]),
    ("System1-8分\nSystem2-7分", [8.0, 7.0]),
    ("System1\n8\n\nSystem2\n**7.5**\n", [8.0, 7.5]),
    ("Score for System1: 8\nScore for System 2: 7 (out of 10)", [8.0, 7.0]),
    ("对 System1 的评分：8 分；对 System2 的评分：7 分", [8.0, 7.0]),
    ("System1: 8 (out of 100)\nSystem2: **得分**：**7** 分", [None, 7.0]),
    ("System1：★★★★☆ 8/10\nSystem2：`7`/10", [8.0, 7.0]),
    ("System1：8分（比System2高1分）\nSystem2：7分。System2 比 System1 低 1 分", [8.0, 7.0]),
    ("System1、System2 都是 8 分", [None, None]),
    ("我认为 System1 优于 System2，8 分。", [None, None]),
    ("System1: 8\nSystem2: 7\n平均分: 7.5", [8.0, 7.0]),
    ("System_1: 8\nsystem-2: 7", [8.0, 7.0]),
    ("System1: 8 -> 修正为 7\nSystem2: 6", [None, 6.0]),
    ("System1：8分，改为7分\nSystem2：5 (corrected to 4)", [None, None]),
    ("System1: 8 -> 解释：3 处错误\nSystem2: 5", [8.0, 5.0]),
]


@pytest.mark.parametrize(("text", "scores"), ANSWERS, ids=range(len(ANSWERS)))
def test_scores_of_two_systems(text, scores):
    assert read_scores(text, 2).scores == scores


def test_each_missing_score_has_its_reason():
    text = "System1：8分\nSystem1：9分\nSystem2：12分\nSystem3：4/5\nSystem5：7分"
    reading = read_scores(text, 5)
    assert reading.scores == [None, None, None, None, 7.0]
    assert reading.problems == [
        "System1: more than one score (8, 9)",
        "System2: 12 is out of range",
        "System3: a range, a score that is changed, or a scale other than 0 to 10",
        "System4: no score",
    ]


def test_a_long_answer_of_the_published_kind():
    text = (
        "System1 8分；System1 解释：回答准确，列出了3个要点，比System2多1个。\n\n"
        "System2 6.5分；System2 解释：只写了2点，第2点与System1重复。\n\n"
        "System3 9 分；System3 解释：2023年的资料也提到了，满分10分的话可以给9分。\n\n"
        "System4 0分；System4 解释：拒绝回答。\n\n"
        "System5 10分；System5 解释：与System3相比，多给出1个例子。"
    )
    assert read_scores(text, 5) == ([8.0, 6.5, 9.0, 0.0, 10.0], [])


@pytest.mark.parametrize(
    "write",
    [
        lambda k, s: f"System{k} {s}分；解释：第{k}个回答有{k}处错误。",
        lambda k, s: f"System {k}: {s}/10；比 System{k % 8 + 1} 好。",
        lambda k, s: f"**System{k}**：{s}",
        lambda k, s: f"系统{'一二三四五六七八'[k - 1]}（{s} 分）：还不错",
        lambda k, s: f"{k}. **System {k}** - {s}/10\n   - 优点：3个\n   - 缺点：无",
        lambda k, s: f"### System{k}\n分数：{s}\n解释：写了 2 段。",
        lambda k, s: f"System{k} 分数：{s}分；System{k} 解释：1. 准确；2. 通顺。",
    ],
)
def test_each_way_to_write_is_read_for_all_systems(write):
    random_scores = random.Random(7)
    for systems in range(2, 9):
        scores = [random_scores.choice([0, 1, 2, 5.5, 7, 8, 8.5, 9, 10]) for _ in range(systems)]
        text = "\n".join(write(number, f"{score:g}") for number, score in enumerate(scores, 1))
        assert read_scores(text, systems) == ([float(score) for score in scores], [])


PIECES = [
    "System",
    "系统",
    "1",
    "2",
    " ",
    "\n",
    "分",
    "/10",
    "：",
    "|",
    "---",
    "{",
    "}",
    "[",
    '"',
    ",",
    "得分",
    "8",
    ".",
    "-",
    "<think>",
    "十",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=40).map("".join), st.integers(2, 8))
def test_any_text_gives_scores_in_range_or_a_reason(text, systems):
    reading = read_scores(text, systems)
    assert len(reading.scores) == systems
    assert all(score is None or 0 <= score <= 10 for score in reading.scores)
    assert len(reading.problems) == reading.scores.count(None)


@pytest.mark.parametrize("text", ["[" * 3000, "System1" + "-" * 20000, "System1: " + "得分：\n" * 3000, "System1 " * 3000])
def test_an_answer_that_loops_is_read_to_its_end(text):
    assert read_scores(text, 2).scores == [None, None]
