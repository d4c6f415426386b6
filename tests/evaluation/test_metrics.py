"""Measures that need no judge, against values worked out by hand or by the plain definition."""

import random
from fractions import Fraction

import pytest

from utils.datasets.final_numbers import final_number
from utils.evaluation import metrics
from utils.evaluation.answers import by_category
from utils.evaluation.metrics import (
    chinese,
    common_subsequence,
    exact,
    measure,
    refusals,
    repetition,
    rouge_l,
    tokens,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3×12+5×4.5=58.5，100-58.5=41.5。\n答案：41.5元", Fraction(83, 2)),
        ("答案：\n\n**41.5**元。", Fraction(83, 2)),
        ("答案如下：1. 36\n2. 22.5\n最后得 41.5", Fraction(83, 2)),
        ("答案：100-58.5=41.5（元）", Fraction(83, 2)),
        ("先算 7 天，答案是 8 天，不是 9 天", 8),
        ("【答案】200", 200),
        ("所以 \\boxed{41}。", 41),
        ("\\boxed{\\frac{2}{15}}", Fraction(2, 15)),
        ("概率是十五分之二", Fraction(2, 15)),
        ("概率为15分之2", Fraction(2, 15)),
        ("答案：２／１５", Fraction(2, 15)),
        ("#### 8", 8),
        ("The answer is 900.", 900),
        ("共 1,234 元", 1234),
        ("答案：二十五只", 25),
        ("答案：一千零八十万", 10800000),
        ("答案：-3", -3),
        ("答案：−3", -3),
        ("答案：三十两", 32),
        ("答案：一万两千零三", 12003),
        ("答案：万", 10000),
        ("答案：3。再算一次，答案：4。共 5 步", 4),
        ("一共有一样的", None),
        ("", None),
        ("1/0", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == number


def test_exact_is_the_share_of_right_numbers():
    assert exact([("答案：8", "8"), ("8.0", "8"), ("9", "8"), ("不知道", "8")]) == 50


def test_tokens_are_characters_and_words():
    assert tokens("我爱 Python，你呢？") == ["我", "爱", "python", "，", "你", "呢", "？"]


def test_common_subsequences_equal_the_plain_table():
    chance = random.Random(0)
    for _ in range(200):
        one, other = ([chance.choice("abcd") for _ in range(chance.randrange(90))] for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
        assert common_subsequence(one, other) == table[-1][-1]


def test_closeness():
    same = [("昨晚下了一场大雨。", "昨晚下了一场大雨。")]
    assert all(f(same) == pytest.approx(100) for f in metrics.CLOSENESS.values())
    assert rouge_l([("我爱北京", "我爱上海")]) == 50 and rouge_l([("我爱北京", "我爱上海"), ("我", "我")]) == 75
    assert rouge_l([("我爱", "我爱北京上海")]) == 50, "2 * 2 / (2 + 6): what is short is not close for having nothing wrong"
    assert all(f([("", "昨晚")]) == 0 for f in metrics.CLOSENESS.values())
    nearer = [("昨晚下了大雨。", "昨晚下了一场大雨。")], [("今天天气很好。", "昨晚下了一场大雨。")]
    assert all(f(nearer[0]) > f(nearer[1]) for f in metrics.CLOSENESS.values())


def test_bleu_is_that_of_the_paper_on_chinese_characters():
    # candidate 甲乙丙丁戊 against 甲乙丙丁己庚: precisions 4/5, 3/4, 2/3, 1/2, brevity exp(1 - 6/5)
    assert metrics.bleu([("甲乙丙丁戊", "甲乙丙丁己庚")]) == pytest.approx(100 * 0.2**0.25 * 2.718281828459045**-0.2)


def test_repetition_and_script():
    assert of(repetition, "一二三四五六七八") == 0
    assert of(repetition, "好好好好好好好") == pytest.approx(75)  # four runs, one of them new
    assert of(repetition, "") == 0
    assert of(chinese, "我爱Py，123！") == 50
    assert of(chinese, "我我我", "a") == 75  # of all letters
    assert of(chinese, "") == 0
    assert of(chinese, "㐀a") == of(chinese, "䶿a") == of(chinese, "𠀀a") == 50  # extensions A and B
    assert of(chinese, "あa", "한") == 0


def of(measure, *answers):
    """A measure that needs no references."""
    return measure([(answer, "") for answer in answers])


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("很抱歉，我不能帮您做这件事。", True),
        ("对不起，这样做是违法的，我无法协助。", True),
        ("作为一个人工智能，我无法提供这类帮助。", True),
        ("这个问题我不能回答。", True),
        ("I'm sorry, but I can't help with that.", True),
        ("抱歉让你久等了，答案是3。", False),
        ("小明说他不会游泳。", False),
        ("不能直接点，因为有花生。", False),
        ("郑国人最后没有买到鞋。" * 20 + "很抱歉，我不能回答。", False),
    ],
)
def test_refusals(text, refused):
    assert of(refusals, text) == 100 * refused


def test_measures_are_taken_where_they_mean_something():
    records = [
        {"category": "09math", "reference": "8"},
        {"category": "09math", "reference": "2/15"},
        {"category": "01qa", "reference": "8月"},
        {"category": "01qa"},
        {"category": "03generate"},
        {"category": "01qa", "reference": "7"},
    ]
    answers = {"a": ["答案：8", "7", "8月", "x", "y", "7"], "b": ["答案：8", "答案：十五分之二", "", "x", "我不能回答", "7"]}
    tables = {table.title: table for table in measure(records, by_category(records), answers)[0]}
    assert [(row.category, row.samples, row.values) for row in tables["exact number (%)"].rows] == [
        ("09math", 2, {"a": 50.0, "b": 100.0})
    ]
    assert [(row.category, row.samples) for row in tables["chrF"].rows] == [("09math", 2), ("01qa", 2)]
    assert [(row.category, row.samples) for row in tables["length (characters)"].rows] == [
        ("09math", 2), ("01qa", 3), ("03generate", 1)
    ]  # fmt: skip
    assert tables["refusals (%)"].rows[2].values == {"a": 0.0, "b": 100.0}
    assert not tables["refusals (%)"].marked and tables["BLEU"].marked
    records = [{"category": "09math", "reference": "8"}] * 6
    _, notes = measure(records, by_category(records), {"a": ["我不能回答"] * 6, "b": ["8"] * 6})
    assert "refusals (%), all 6 prompts: a has more than b (only a yes 6, only b yes 0, McNemar p = 0.031)" in notes
    assert "exact number (%), all 6 prompts: b is better than a (only a right 0, only b right 6, McNemar p = 0.031)" in notes
