"""What judgements amount to, with every value worked out by hand."""

import pytest

from utils.evaluation.aggregate import agreement, by_position, differences, means_of, tabulate
from utils.evaluation.judging import Judgement
from utils.evaluation.tables import Row, Table

RECORDS = [{"category": "01qa"}, {"category": "01qa"}]


def judged(prompt, repeat, order, *scores):
    return Judgement(prompt, repeat, list(order), dict(zip(order, scores, strict=True)), [], [])


def test_each_prompt_weighs_the_same_however_many_of_its_repeats_have_a_score():
    judgements = [judged(0, repeat, "ab", 8 + repeat, 4) for repeat in range(3)]
    judgements += [judged(1, 0, "ab", 3, 4), judged(1, 1, "ab", None, 4), judged(1, 2, "ab", None, None)]
    table = tabulate("t", RECORDS, ["a", "b"], judgements)
    assert table.rows[0].values == {"a": 60.0, "b": 40.0}  # a: (9 + 3) / 2, where all four scores give 7.5


def test_a_shared_win_counts_in_parts():
    judgements = [judged(0, 0, "abc", 8, 8, 5), judged(1, 0, "bca", 7, 2, 1)]
    places = by_position([*judgements, judged(0, 1, "abc", 9, None, 1)])  # the last lacks a score and does not count
    assert [place["win_rate"] for place in places] == [0.75, 0.25, 0.0]
    assert [place["mean_score"] for place in places] == [7.5, 5.0, 3.0]


def test_repeats_that_differ_by_exactly_a_point_agree():
    judgements = [judged(0, 0, "ab", 8, 5), judged(0, 1, "ab", 7, 5), judged(1, 0, "ab", 6, 6), judged(1, 1, "ab", 4, 7)]
    found = agreement(judgements)
    assert found == {"mean_difference": pytest.approx(4 / 4), "within_one": 0.75, "same_best": 0.5}
    assert agreement(judgements[:1]) is None


def test_systems_differ_by_the_mean_of_the_categories_whatever_their_sizes():
    records = [{"category": "01qa"}] * 2 + [{"category": "02math"}] * 8
    judgements = [judged(place, 0, "ab", *((9, 5) if place < 2 else (4, 6))) for place in range(10)]
    (line,) = differences(records, ["a", "b"], judgements)  # (4 - 2) / 2 in favour of a, where all prompts together favour b
    assert line.startswith("a is better than b (95 % interval of the difference +10.0 to +10.0")


def test_a_system_without_a_value_in_a_category_has_no_mean():
    table = Table("t", ["a", "b"], [Row("x", 1, {"a": 10.0, "b": 30.0}), Row("y", 9, {"a": None, "b": 50.0})])
    assert means_of(table) == {"a": None, "b": 40.0}
