"""utils/datasets/preferences.py: pairs in the forms in which they are published."""

import json

import pytest

from utils.console import UserError
from utils.datasets.preferences import read_judged, read_pairs
from utils.datasets.stages import READERS, stage_of

USER = {"role": "user", "content": "问"}
SYSTEM = {"role": "system", "content": "甲"}
CHOSEN, REJECTED = {"role": "assistant", "content": "好"}, {"role": "assistant", "content": "坏"}
OLD = [{"from": "human", "value": "前"}, {"from": "gpt", "value": "答"}, {"from": "human", "value": "问"}]
GPT = {"from": "gpt"}
FORMS = {
    "ours": {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
    "messages as answers": {"instruction": "问", "chosen": CHOSEN, "rejected": [REJECTED]},
    "LLaMA-Factory": {"conversations": OLD, "chosen": GPT | {"value": "好"}, "rejected": GPT | {"value": "坏"}},
    "trl, standard": {"prompt": "问", "chosen": "好", "rejected": "坏"},
    "trl, conversational": {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
    "trl, implicit prompt": {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    "messages up to an answer": {"messages": [USER, CHOSEN], "chosen": "好", "rejected": "坏"},
    "UltraFeedback": {"prompt": "问", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED], "messages": [USER, CHOSEN]},
}  # fmt: skip


def write(path, items):
    path.write_text(json.dumps(items, ensure_ascii=False), "utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
    for beside in ({}, {"system": "护士"}):
        (pair,) = read_pairs(write(tmp_path / "pairs.json", [FORMS[form] | beside]))
        more = ({"history": [["前", "答"]]} if form == "LLaMA-Factory" else {}) | beside
        assert list(pair) == [{"instruction": "问", "input": "", "output": output} | more for output in "好坏"]


def test_what_is_no_pair_is_dropped_by_cause(tmp_path, capsys):
    good = FORMS["ours"]
    same = good | {"rejected": "好 "}
    items = [good, same, good | {"rejected": ""}, {"instruction": "问", "chosen": "好"}, good | {"chosen": 3},
             {"chosen": [USER, CHOSEN], "rejected": [USER | {"content": "别的"}, REJECTED]}, "text",
             {"chosen": "好", "rejected": "坏"}, FORMS["trl, conversational"] | {"prompt": [USER, CHOSEN]},
             {"prompt": [SYSTEM, USER], "chosen": "好", "rejected": "坏", "system": "乙"},
             {"chosen": [SYSTEM, USER, CHOSEN], "rejected": [SYSTEM, USER, REJECTED], "system": "乙"}]  # fmt: skip
    path = write(tmp_path / "pairs.json", items)
    assert len(list(read_pairs(path))) == 1
    causes = {
        "chosen or rejected is missing": (2, 4),
        "two system texts": (2, 10),
        "both answers are the same": (1, 2),
        "output is empty": (1, 3),
        "chosen is not a text": (1, 5),
        "the answers are to different questions": (1, 6),
        "the question is missing": (1, 8),
        "a dialogue whose turns are out of order": (1, 9),
    }
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: {count} of 11 pairs dropped: {cause} (the first: {path}, line 1, item {place})"
        for cause, (count, place) in causes.items()
    ]
    with pytest.raises(UserError, match="no pair in it can be used"):
        list(read_pairs(write(tmp_path / "pairs.json", items[1:])))


def test_labelled_answers(tmp_path):
    """trl's and LLaMA-Factory's forms of one answer with a label; and both of a pair."""
    forms = [
        {"prompt": "问", "completion": "好", "label": True},
        {"prompt": [USER], "completion": [CHOSEN], "label": True},
        {"messages": [USER, CHOSEN], "label": True},
        {"messages": [USER, CHOSEN], "kto_tag": True},
        {"instruction": "问", "input": "", "output": "坏", "label": False},
    ]
    found = list(read_judged(write(tmp_path / "labelled.json", forms)))
    assert [one.good for one in found] == [True] * 4 + [False]
    assert [(one.record["instruction"], one.record["output"]) for one in found] == [("问", "好")] * 4 + [("问", "坏")]
    both = list(read_judged(write(tmp_path / "pairs.json", [FORMS["ours"]])))
    assert [(one.record["output"], one.good) for one in both] == [("好", True), ("坏", False)]


def test_what_is_trained_follows_from_the_records_unless_they_leave_a_choice(tmp_path):
    pairs = str(write(tmp_path / "pairs.json", [FORMS["ours"]]))
    labelled = str(write(tmp_path / "labelled.json", [{"prompt": "问", "completion": "好", "label": True}]))
    chat = str(write(tmp_path / "chat.json", [{"instruction": "问", "input": "", "output": "答"}]))
    assert [stage_of(path) for path in (pairs, labelled, chat)] == ["preference", "labelled", "instruction"]
    assert stage_of(pairs, preference_loss="kto") == "labelled" and stage_of(labelled, "instruction") == "instruction"
    assert stage_of(chat, rewards=True) == stage_of(chat, "reward", rewards=True) == "reward"
    asked = write(tmp_path / "asked.json", [{"instruction": "问"}])
    assert [record["instruction"] for record in READERS["reward"](asked, ())] == ["问"], "rewards need no answers"
    for path, asked, loss, rewards, words in (
        (pairs, "text", "", False, "--stage text: .* holds preferences"),
        (chat, "preference", "", False, "holds questions and answers"),
        (pairs, "", "", True, "--rewards: .* holds preferences"),
        (chat, "reward", "", False, "without --rewards"),
        (chat, "instruction", "", True, "with --rewards"),
        (labelled, "", "simpo", False, "compares two answers"),
        (chat, "", "dpo", False, "--preference_loss dpo: is for preferences, and .* holds questions and answers"),
        (labelled, "instruction", "kto", False, "--preference_loss kto: is for preferences"),
    ):
        with pytest.raises(UserError, match=words):
            stage_of(path, asked, loss, rewards)
