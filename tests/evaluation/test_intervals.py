"""How sure results are: values worked out by hand, and those of scipy."""

import random

import pytest
from scipy import stats

from utils.evaluation.aggregate import differences, intervals
from utils.evaluation.answers import over_samples
from utils.evaluation.intervals import bootstrap, compare, compare_shares, mcnemar, wilson
from utils.evaluation.judging import Judgement
from utils.evaluation.metrics import measure
from utils.evaluation.tables import Row, Table


@pytest.mark.parametrize(("right", "total"), [(0, 10), (8, 10), (10, 10), (1, 1), (57, 335)])
def test_wilson_is_that_of_scipy(right, total):
    known = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson(right, total) == pytest.approx((100 * known.low, 100 * known.high), abs=1e-10)


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((49.02, 94.33), abs=1e-2)


def test_mcnemar_is_the_binomial_of_those_that_differ():
    assert mcnemar(1, 8) == mcnemar(8, 1) == 20 / 512  # 2 · (1 + 9) / 2⁹
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(2, 9) == pytest.approx(stats.binomtest(2, 11).pvalue)


def test_bootstrap_weighs_each_group_the_same():
    wide = [0.0, 1.0] * 50
    low, high = bootstrap([wide])
    assert (low + high) / 2 == pytest.approx(0.5, abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)  # the deviation of the mean of 100: 0.5 / 10
    low, high = bootstrap([wide, [4.0, 4.0]])
    assert (low + high) / 2 == pytest.approx(2.25, abs=0.02)
    assert high - low == pytest.approx(1.96 * 0.05, rel=0.1)
    assert bootstrap([wide]) == bootstrap([wide])
    assert bootstrap([wide, [4.0]]) is None and bootstrap([]) is None


def test_differences_are_told_in_words_only_if_they_can_be():
    assert compare("a", "b", (0.2, 3.0)).startswith("a is better than b")
    assert compare("a", "b", (-3.0, -0.2)).startswith("b is better than a")
    assert compare("a", "b", (0.0, 3.0)) == "a and b: no difference can be told (95 % interval of the difference +0.0 to +3.0)"
    assert compare("a", "b", None) == "a and b: too few prompts to tell a difference"
    better, equal = [True] * 6 + [False], [False] * 6 + [False]
    assert compare_shares({"a": better, "b": equal}) == [
        "a is better than b (only a right 6, only b right 0, McNemar p = 0.031)"
    ]
    assert "no difference can be told" in compare_shares({"a": better[1:], "b": equal[1:]})[0]  # 2 / 2⁵ = 0.0625


def test_scores_are_compared_on_the_prompts_that_both_have():
    records = [{"category": "01qa"}] * 7
    scores = [(9, 5), (8, 4), (None, 10), (7, 3), (8, 4), (8, 4), (8, 4)]
    judgements = [Judgement(n, 0, ["a", "b"], {"a": a, "b": b}, [], []) for n, (a, b) in enumerate(scores)]
    assert differences(records, ["a", "b"], judgements) == [
        "a is better than b (95 % interval of the difference +40.0 to +40.0)"
    ]
    few = [one for one in judgements if one.prompt]
    assert differences(records, ["a", "b"], few) == ["a and b: too few prompts to tell a difference"]
    found = intervals(records, ["a", "b"], judgements)
    assert found[""] == found["01qa"] and 70 <= found[""]["a"][0] <= 80 <= found[""]["a"][1] <= 90


def test_exact_numbers_are_given_with_their_doubt():
    records = [{"category": "09math", "reference": str(n)} for n in range(10)]
    answers = {"a": ["答案：" + str(n) for n in range(8)] + ["不", "不"], "b": ["不"] * 10}
    tables, notes = measure(records, {"09math": list(range(10))}, answers)
    (row,) = next(table for table in tables if table.title == "exact number (%)").rows
    assert row.intervals == {"a": pytest.approx((49.02, 94.33), abs=0.01), "b": pytest.approx((0, 27.75), abs=0.01)}
    line = "exact number (%), all 10 prompts: a is better than b (only a right 8, only b right 0, McNemar p = 0.008)"
    assert line in notes
    assert (
        "refusals (%), all 10 prompts: a and b: no difference can be told (only a yes 0, only b yes 0, McNemar p = 1.000)"
        in notes
    )


def test_measures_of_a_corpus_are_resampled_as_a_corpus():
    """BLEU and chrF are no means over answers: the interval is that of sacrebleu's own bootstrap, but for chance."""
    from sacrebleu.metrics import BLEU, CHRF

    from utils.evaluation.metrics import CLOSENESS, differences

    chance = random.Random(1)
    words = "甲乙丙丁戊己庚辛壬癸"
    texts = ["".join(chance.choices(words, k=20)) for _ in range(60)]
    pairs = [("".join(sign if chance.random() < 0.8 else "错" for sign in text), text) for text in texts]
    for name, library in (("BLEU", BLEU(tokenize="zh")), ("chrF", CHRF())):
        known = library.corpus_score([one for one, _ in pairs], [texts], n_bootstrap=2000)
        value, (low, high) = CLOSENESS[name].with_interval(pairs)
        assert value == pytest.approx(known.score) and low < value < high
        assert (high - low) / 2 == pytest.approx(known._ci, rel=0.1)
        assert CLOSENESS[name].with_interval(pairs[:1])[1] is None
    worse = [(answer.replace("甲", "错"), text) for answer, text in pairs]
    counts = {name: CLOSENESS["chrF"].count(given) for name, given in (("a", pairs), ("b", worse), ("c", pairs))}
    told = differences(CLOSENESS["chrF"], counts, False)
    assert told[0].startswith("a is better than b") and told[1].startswith("a and c: no difference can be told")


def test_samples_of_a_system_are_taken_together():
    from utils.evaluation.metrics import exact, length

    right, wrong = [("1", "1")] * 6, [("2", "1")] * 6
    counts = {"a": exact.count(right), "a#2": exact.count(wrong), "b": exact.count(wrong)}
    from utils.evaluation.metrics import differences

    assert differences(exact, counts, False) == ["a is better than b (95 % interval of the difference +50.0 to +50.0)"]
    assert differences(length, {"a": length.count([("长长", "")] * 6), "b": length.count([("短", "")] * 6)}, True) == [
        "a has more than b (95 % interval of the difference +1.0 to +1.0)"
    ]


def test_samples_of_a_system_are_one_column_of_their_mean():
    """By hand: 1, 2 and 3 have the mean 2 and the deviation 1; Student's 4.3027 / sqrt(3) is 2.4842."""
    rows = [
        Row("qa", 5, {"a": 1.0, "a#2": 2.0, "a#3": 3.0, "b": 9.0}, {"b": (8.0, 9.5)}),
        Row("none", 1, {"a": None, "b": 1.0}),
    ]
    table = over_samples(Table("BLEU", ["a", "a#2", "a#3", "b"], rows))
    assert table.title == "BLEU, mean and interval over samples: a of 3 samples" and table.systems == ["a", "b"]
    assert table.rows[0].values == {"a": 2.0, "b": 9.0} and table.rows[1].values == {"a": None, "b": 1.0}
    assert table.rows[0].intervals == {"a": pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-4), "b": (8.0, 9.5)}
    assert table.rows[1].intervals == {"a": None, "b": None}
    assert over_samples(table) is table
