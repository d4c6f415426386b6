"""One home for decoding options: what a field of SamplingParams says is what script, page and endpoint have."""

import dataclasses
import re

import pytest

import generate
from utils.chat.labels import LANGUAGES
from utils.chat.tabs import MOST_PROMPTS
from utils.console import UserError
from utils.inference.sampling_params import CONTROLS, KINDS, SHOWN, STARTS, SamplingParams, bounded


def test_the_script_has_each_setting_as_it_is_described():
    options = {field.name: field for field in dataclasses.fields(generate.Options)}
    for field in dataclasses.fields(SamplingParams):
        assert options[field.name].default == field.default and options[field.name].metadata == field.metadata
    assert generate.decoding(generate.Options(top_k=7, seed=3)) == SamplingParams(top_k=7, seed=3)


def test_each_control_has_a_chinese_label_and_bounds_that_hold():
    texts = {text for name in SHOWN for text in (CONTROLS[name].label, CONTROLS[name].info) if text}
    assert set(LANGUAGES["zh"].controls) == texts and not LANGUAGES["en"].controls
    same = [name for name, text in vars(LANGUAGES["zh"]).items() if text == getattr(LANGUAGES["en"], name)]
    assert same == ["status"], "these have no Chinese"
    chinese, english = LANGUAGES["zh"], LANGUAGES["en"]
    assert all(str(MOST_PROMPTS) in one.prompts_hint for one in (chinese, english))
    assert [chinese.votes[name] for name in ("left", "right", "both", "neither")] == ["A 更好", "B 更好", "都好", "都不好"]
    for one in (chinese, english):  # each takes what the page fills in
        fields = {name: set(re.findall(r"{(\w+)", text)) for name, text in vars(one).items() if isinstance(text, str)}
        assert fields == {name: set(re.findall(r"{(\w+)", getattr(english, name))) for name in fields}
    bounded(STARTS, 2048)
    edges = {name: (max(control.least, 0), control.most) for name, control in CONTROLS.items()} | {"max_new_tokens": (1, 2048)}
    for place in (0, 1):
        bounded({name: KINDS[name](edge[place]) for name, edge in edges.items()}, 2048)
    for name in STARTS:
        for wrong in ("x", None, 10**10, -1, True if KINDS[name] is not bool else 1):
            with pytest.raises(UserError, match=name):
                bounded(STARTS | {name: wrong}, 2048)
    with pytest.raises(UserError, match=r"max_new_tokens 9: .* 1 to 8"):
        bounded({"max_new_tokens": 9}, 8)
    with pytest.raises(UserError, match="top_k"):
        bounded({"top_k": 1.5}, 8)
    assert type(bounded({"top_k": 40.0}, 8).top_k) is int
    ways = [SamplingParams(do_sample=drawn, temperature=heat).samples for drawn in (False, True) for heat in (0.0, 0.5)]
    assert ways == [False, False, False, True]
