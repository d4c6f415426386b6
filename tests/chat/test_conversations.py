"""Conversations, as records, files and Markdown, without a browser."""

import datetime
import json
import re
import resource
import time

import pytest

from utils.chat.conversations import CUT, WHOLE, Conversation, Talk, Turn, from_file
from utils.chat.feedback import Feedback, now
from utils.chat.markdown import answer_as_markdown, from_markdown, question_as_markdown
from utils.console import UserError

pytest_plugins = ["browsing"]  # fixtures


def test_conversations_come_from_any_record_format():
    assert from_file('[{"instruction": "a", "input": "b", "output": "c"}]').turns == (Turn("a\n\nb", "c", WHOLE),)
    assert from_file('\n{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}\n{}').turns == (
        Turn("q", "r", WHOLE),
    )
    kept = Conversation((Turn("a", "b", CUT, {"model": "f1"}), Turn("c", "d", WHOLE)), "system text")
    assert from_file(kept.to_file()) == kept
    assert from_file('{"instruction": "a", "output": ""}').turns == (Turn("a"),), "an open question"
    assert Conversation((*kept.turns, Turn("e"))).record()["history"] == [["a", "b"], ["c", "d"]]
    (record,) = json.loads(kept.to_file())
    assert record["learn"] == [False, True] and record["answers"][0] == {"model": "f1", "finish": "length"}
    assert "learn" not in json.loads(kept.to_file(unfinished=True))[0]
    assert Conversation((Turn("a", "b"), Turn("c"))).asked("d").turns == (Turn("a", "b", "stopped"), Turn("d"))
    for text in ("", "[]", "3", "{", '{"instruction": ""}', "[" * 10**5):
        with pytest.raises(ValueError):
            from_file(text)


def test_what_a_browser_sends_is_looked_at():
    talk = Talk()
    for text in ("", "[]", "3", '{"id": "x"}', '{"id": "x", "name": "", "system": "", "turns": [[1, 2, 3, {}]]}', "[" * 10**5):
        with pytest.raises((ValueError, RecursionError)):
            talk.from_browser(text)
    talk.change(Conversation((Turn("a", "b", WHOLE), Turn("c", "d")), "s"))
    talk.name, talk.thumbs = "名", {0: True, 1: False}
    other = Talk()
    other.from_browser(talk.to_browser())
    assert other.conversation == talk.conversation.stopped() != talk.conversation and other.id == talk.id
    assert other.name == "名" and not other.thumbs
    talk.change(talk.conversation.asked_again(1))  # of the first answer, which stays, the thumb stays
    assert talk.thumbs == {0: True}
    names = [json.loads(Talk(Conversation((Turn("问" * size + "\n更多"),))).to_browser())["title"] for size in (24, 25)]
    assert names == ["问" * 24, "问" * 24 + "…"]


def test_a_thumb_replaces_its_own_line_and_leaves_every_other_as_it_is(tmp_path, monkeypatch):
    feedback, path = Feedback(str(tmp_path)), tmp_path / "thumbs.jsonl"
    path.write_text('{"broken\n', "utf-8")
    record = {"instruction": '"id": "a-0", "time": ', "output": "x"}
    for key, liked in (("a-0", True), ("b-0", True), ("a-0", False), ("b-0", None)):
        feedback.thumb(key, record, {}, liked)
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    begin = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    feedback.append("votes.jsonl", {"time": now()})
    monkeypatch.undo()
    time.tzset()
    (vote,) = (tmp_path / "votes.jsonl").read_text("utf-8").splitlines()
    assert 0 <= (datetime.datetime.fromisoformat(json.loads(vote)["time"]) - begin).total_seconds() < 60
    first, second = path.read_text("utf-8").splitlines()
    assert first == '{"broken' and json.loads(second)["label"] is False


def test_feedback_for_which_there_is_no_room_leaves_the_files_as_they_were(tmp_path):
    """The system takes a part of the line before it refuses the rest."""
    feedback, paths = Feedback(str(tmp_path)), [tmp_path / "votes.jsonl", tmp_path / "thumbs.jsonl"]
    ways = (
        lambda: feedback.vote({"instruction": "q"}, {"a": "x", "b": "y"}, "a", {}, "left"),
        lambda: feedback.thumb("a-0", {"instruction": "q", "output": "x" * 100}, {}, True),
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for way, path in zip(ways, paths, strict=True):
        way()
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20 if "votes" in path.name else 20, limits[1]))
        try:
            with pytest.raises(UserError, match=rf"{path}: not written \(File too large\); free disk space"):
                way()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before and {*tmp_path.iterdir()} <= {*paths}


def test_markdown_is_escaped_where_it_must_be_and_comes_back():
    question = "# a *b* <i>\n  `c` &#042; _d_"
    assert from_markdown(question_as_markdown(question)) == question.replace("&#042;", "&#042;")
    assert not re.search(r"[#*<`_](?!0?\d+;)", re.sub(r"&#0\d+;", "", question_as_markdown(question)))
    assert "\n " not in question_as_markdown(question), "no code because of its indentation"
    assert answer_as_markdown("<b> `<b>` &lt;") == "&#060;b> `<b>` &#038;lt;"
    assert answer_as_markdown("```\n<b>").endswith("<b>\n```")
