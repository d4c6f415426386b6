"""Requests to a real server that is slow, wrong, rate-limited and cut off; budgets, journals, refusals."""

import asyncio
import dataclasses
import datetime
import email.utils
import json
import os
import signal
import threading
import time

import httpx
import openai
import pytest
from api_server import Server, asked, completion

import judge
from utils.console import UserError
from utils.evaluation import setup
from utils.inference.openai_client import ModelServer, Unusable, retry_after
from utils.inference.requests import RequestLimits, Spent, asking, tokens_in

QUICK = RequestLimits(concurrency=2, backoff=0.01)


def ask(server, tmp_path, count=3, terms=QUICK, **service):
    """Ask `count` questions; returns the replies."""
    with asking(ModelServer("m", server.url, **service), terms, tmp_path / "j.jsonl", {}) as endpoint:
        jobs = [endpoint.ask(f"q{number}", [{"role": "user", "content": f"question {number}"}]) for number in range(count)]
        return endpoint.gather(jobs, "asking")


def echo(number, body):
    return asked(body).replace("question", "answer")


def journal(tmp_path):
    return [json.loads(line) for line in (tmp_path / "j.jsonl").read_text("utf-8").splitlines()[1:]]


def test_answers_come_in_order_and_are_journaled_with_their_requests(serve, tmp_path, capsys):
    server, before = serve(echo), signal.getsignal(signal.SIGINT)
    assert [reply.text for reply in ask(server, tmp_path, 5)] == [f"answer {number}" for number in range(5)]
    assert signal.getsignal(signal.SIGINT) is before
    entries = {entry["key"]: entry["value"] for entry in journal(tmp_path)}
    assert entries["q3"]["messages"] == [{"role": "user", "content": "question 3"}]
    assert entries["q3"]["answer"] == "answer 3" and entries["q3"]["max_tokens"] == 1024
    assert "5 requests (0 failed), 500 tokens sent and 50 received" in capsys.readouterr().out


def test_in_a_notebook_which_runs_a_loop_of_its_own(serve, tmp_path):
    """Stopped there, what is under way is still waited for and kept."""

    def interrupt(number, body):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {"sleep": 0.2, "content": echo(number, body)}

    async def cell(behave, count):
        return [reply.text for reply in ask(serve(behave), tmp_path, count)]

    notebook = asyncio.new_event_loop()
    assert notebook.run_until_complete(cell(echo, 3)) == [f"answer {number}" for number in range(3)]
    (tmp_path / "j.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        notebook.run_until_complete(cell(interrupt, 9))
    notebook.close()
    assert len(journal(tmp_path)) == QUICK.concurrency


def test_what_is_journaled_is_not_asked_again(serve, tmp_path):
    server = serve(echo)
    ask(server, tmp_path, 3)
    assert [reply.text for reply in ask(server, tmp_path, 5)] == [f"answer {number}" for number in range(5)]
    assert sorted(map(asked, server.bodies)) == [f"question {number}" for number in range(5)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": 500, "body": b"oops", "headers": {"Content-Type": "text/plain"}},
        {"status": 503, "body": b"{}"},
        {"status": 408, "body": b"{}"},
        {"status": 409, "body": b"{}"},
        {"status": 429, "body": b'{"error": {"message": "slow down"}}', "headers": {"Retry-After": "0"}},
        {"content": "a long answer " * 100, "cut": 300},
        {"cut": 0},
        {"body": b'{"choices": [{"mess'},
        {"body": b"\xff\xfe"},
        {"body": b"<html>", "headers": {"Content-Type": "text/html"}},
        {"body": b"null"},
        {"body": b"[]"},
        {"body": b"{}"},
        {"body": b'{"choices": []}'},
        {"body": b'{"choices": [{"message": null}]}'},
        {"body": b'{"choices": [{"message": {"content": ["x"]}}]}'},
        {"content": "too late", "sleep": 1.5},
    ],
    ids=str,
)
def test_a_failure_that_may_pass_is_tried_again(serve, tmp_path, wrong):
    server = serve(lambda number, body: wrong if number == 1 else echo(number, body))
    replies = ask(server, tmp_path, 3, timeout=1.0)
    assert [reply.text for reply in replies] == ["answer 0", "answer 1", "answer 2"]
    assert len(server.bodies) == 4
    assert sum("error" in entry["value"] for entry in journal(tmp_path)) == 1


def test_the_server_says_how_long_to_wait(serve, tmp_path):
    limited = {"status": 429, "body": b'{"error": {"message": "slow down"}}', "headers": {"Retry-After": "1"}}
    server = serve(lambda number, body: limited if number == 0 else echo(number, body))
    ask(server, tmp_path, 4, RequestLimits(concurrency=1, backoff=0.01))
    assert min(server.times[1:]) - server.times[0] >= 1
    assert len(server.bodies) == 5


def test_who_asks_to_wait_for_hours_ends_the_run(serve, tmp_path):
    server = serve(lambda *_: {"status": 429, "body": b"{}", "headers": {"Retry-After": "36000"}})
    with pytest.raises(UserError, match=r"asks to wait 10\.0 hours"):
        ask(server, tmp_path)
    soon = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90), usegmt=True)

    def limited(**headers):
        response = httpx.Response(429, headers=headers, request=httpx.Request("POST", server.url))
        return openai.RateLimitError("", response=response, body=None)

    waits = [limited(**{"retry-after-ms": "1500", "Retry-After": "2"}), limited(**{"Retry-After": "7"})]
    waits += [limited(**{"Retry-After": "-1"}), limited(**{"Retry-After": "later"}), limited(), ValueError()]
    assert [retry_after(one) for one in waits] == [1.5, 7, 0, None, None, None]
    assert retry_after(limited(**{"Retry-After": soon})) == pytest.approx(89, abs=2)
    with asking(ModelServer("m", server.url), QUICK, tmp_path / "less.jsonl", {}) as endpoint:
        asyncio.run(endpoint._wait(limited(**{"Retry-After": "3000"}), 1))
        asyncio.run(endpoint._wait(limited(**{"Retry-After": "5"}), 1))  # which does not shorten the other
        assert endpoint.resume_at > time.monotonic() + 2000


def test_a_server_that_always_fails_ends_the_run(serve, tmp_path):
    server = serve(lambda number, body: echo(number, body) if number == 0 else {"status": 500, "body": b"{}"})
    with pytest.raises(UserError, match="no answer after 8 tries"):
        ask(server, tmp_path, 3, RequestLimits(concurrency=1, backoff=0.001))
    assert len(server.bodies) == 9


def test_a_wrong_address_is_known_at_once(tmp_path):
    server = Server(echo)
    server.close()
    with pytest.raises(UserError, match="no answer after 2 tries"):
        ask(server, tmp_path)


@pytest.mark.parametrize(
    ("response", "told"),
    [
        ({"status": 401, "body": b'{"error": {"message": "bad key"}}'}, "status 401: bad key; check OPENAI_API_KEY"),
        ({"status": 403, "body": b"{}"}, "check what your key may do"),
        ({"status": 404, "body": b'{"error": {"message": "no model m"}}'}, "no model m; check the model's name"),
        ({"status": 429, "body": b'{"error": {"message": "spent", "code": "insufficient_quota"}}'}, "top up the account"),
        ({"status": 400, "body": b'{"error": {"message": "context too long"}}'}, "refuses every request"),
        ({"status": 400, "body": b'{"error": {"message": "too many", "param": "max_tokens"}}'}, "refuses every request"),
    ],
)
def test_what_no_retry_can_mend_ends_the_run(serve, tmp_path, response, told):
    server = serve(lambda *_: response)
    with pytest.raises(UserError, match=told):
        ask(server, tmp_path, 20, RequestLimits(concurrency=1, backoff=0.01))
    assert len(server.bodies) <= 3


def test_a_server_that_is_slow_at_first_is_asked_as_often_as_one_that_has_answered(serve, tmp_path):
    server = serve(lambda number, body: {"content": "late", "sleep": 1.5} if number < 2 else echo(number, body))
    assert [reply.text for reply in ask(server, tmp_path, 1, timeout=0.7)] == ["answer 0"]


def test_one_refused_request_does_not_stop_the_others(serve, tmp_path):
    refusal = {"status": 400, "body": b'{"error": {"message": "filtered"}}'}
    server = serve(lambda number, body: refusal if "question 1" in asked(body) else echo(number, body))
    replies = ask(server, tmp_path, 4)
    assert [reply.finish for reply in replies] == ["stop", "refused", "stop", "stop"]
    assert "filtered" in replies[1].text
    (tmp_path / "j.jsonl").unlink()
    with pytest.raises(UserError, match="m: refused every request; see"):  # of few, too
        ask(serve(lambda *_: refusal), tmp_path, 2)


def test_settings_that_a_model_does_not_take_are_left_out(serve, tmp_path, capsys):
    def reasoner(number, body):
        if "max_tokens" in body:
            message = "Unsupported parameter: use 'max_completion_tokens' instead"
            return {"status": 400, "body": json.dumps({"error": {"message": message, "param": "max_tokens"}}).encode()}
        if "temperature" in body:
            return {"status": 400, "body": b'{"error": {"message": "only the default", "param": "temperature"}}'}
        return echo(number, body)

    server = serve(reasoner)
    assert len(ask(server, tmp_path, 6, max_tokens=77)) == 6
    assert server.bodies[-1]["max_completion_tokens"] == 77
    out = capsys.readouterr().out
    assert out.count("max_completion_tokens instead of") == 1 and out.count("does not take temperature 0") == 1


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_requests_than_the_budget_are_sent(serve, tmp_path, concurrency):
    server = serve(lambda number, body: {"status": 500, "body": b"{}"} if number == 2 else echo(number, body))
    with pytest.raises(UserError, match="--budget 5: used up"):
        ask(server, tmp_path, 10, RequestLimits(concurrency=concurrency, budget=5, backoff=0.01))
    assert len(server.bodies) == 5
    with pytest.raises(UserError, match="--budget 5: used up"):
        ask(server, tmp_path, 10, RequestLimits(concurrency=concurrency, budget=5, backoff=0.01))
    assert len(server.bodies) == 5
    assert len(ask(server, tmp_path, 10, RequestLimits(concurrency=concurrency, budget=11, backoff=0.01))) == 10
    assert len(server.bodies) == 11


def test_the_cost_holds_where_answers_cost_far_more_than_estimated(serve, tmp_path):
    """A token costs 1 and about 8 are expected an answer. The first shows that it is 100, which answers under way count, too;
    one that cannot be used is paid for as well."""
    usage = {"prompt_tokens": 50, "completion_tokens": 50}
    cut = {"body": completion({"content": "x"})[:-20]}
    server = serve(lambda number, body: cut if number == 2 else {"content": "x", "usage": usage, "sleep": 0.05})
    terms = {"concurrency": 8, "price_in": 1e6, "price_out": 1e6, "backoff": 0.01}
    for limit, sent in ((350, 3), (399, 3), (450, 4)):
        with pytest.raises(UserError, match="is spent, and the next answer may cost 100"):
            ask(server, tmp_path, 9, RequestLimits(max_cost=limit, **terms), max_tokens=4)
        assert len(server.bodies) == sent


def test_so_many_requests_are_under_way_at_once(serve, tmp_path):
    together = threading.Barrier(3, timeout=30)
    server = serve(lambda number, body: [together.wait(), echo(number, body)][1])
    assert len(ask(server, tmp_path, 6, RequestLimits(concurrency=3))) == 6


def test_half_a_character_in_an_answer_does_not_end_the_run(serve, tmp_path):
    server = serve(lambda *_: {"body": completion({"content": "x"}).replace(b'"x"', b'"x\\ud83d"', 2)})
    assert [reply.text for reply in ask(server, tmp_path, 2)] == ["x?", "x?"]


def test_what_was_spent_counts_before_prompts_are_sent(tmp_path, capsys):
    assert [tokens_in(text) for text in ("你好吗", "four", "fives", "")] == [3, 1, 2, 0]
    spent = Spent(cost=1)
    for cost in (3, 2):
        spent.pay(cost)
    assert (spent.cost, spent.dearest) == (6, 3)
    limits = RequestLimits(price_in=1e6, max_cost=10)  # a token costs 1
    with asking(ModelServer("m", "http://localhost:9/v1"), limits, tmp_path / "j.jsonl", {}) as endpoint:
        asked = httpx.Request("POST", "http://localhost:9/v1")
        limited = openai.RateLimitError("", response=httpx.Response(429, request=asked), body=None)
        for error in (openai.APITimeoutError(asked), Unusable("half"), limited):  # the first two may have been computed
            endpoint._failed("a", error, 4)
        costs = {"a failed 1": 4, "a failed 2": 4, "a failed 3": None}
        assert {key: entry.get("may_cost") for key, entry in endpoint.journal.values.items()} == costs
        assert endpoint.spent.cost == 8
        endpoint.spent.cost = 9
        endpoint.announce({"a": "好", "a failed 1": "asked before"})
        told = "1 requests to send, about 1 tokens, up to 1,024 received; cost about 1.0000 to 1.0000\n"
        assert capsys.readouterr().out == told
        with pytest.raises(
            UserError, match=r"--max_cost 10: sending the prompts alone costs about 2\.0000, and 9\.0000 is spent"
        ):
            endpoint.announce({"b": "坏"})
    assert capsys.readouterr().out.endswith("\n3 requests (3 failed), 0 tokens sent and 0 received, cost 0.0000\n")


def test_tokens_and_cost_are_totalled(serve, tmp_path, capsys):
    server = serve(lambda number, body: {"content": "x", "usage": None} if number == 0 else echo(number, body))
    ask(server, tmp_path, 3, RequestLimits(price_in=2.5, price_out=10))
    counted = "3 requests (0 failed), 200 tokens sent and 20 received (not counted by the server: those of 1 answers)"
    assert f"{counted}, cost 0.0007" in capsys.readouterr().out


def test_a_journal_of_another_run_is_not_gone_on_with(serve, tmp_path):
    server = serve(echo)
    ask(server, tmp_path)
    with pytest.raises(UserError, match="temperature"):
        ask(server, tmp_path, temperature=0.7)


def test_the_key_is_sent_and_needed_only_elsewhere(serve, tmp_path, monkeypatch):
    server = serve(echo)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    ask(server, tmp_path)
    assert set(server.keys) == {"Bearer secret-key"}
    assert "secret-key" not in (tmp_path / "j.jsonl").read_text("utf-8")
    monkeypatch.delenv("OPENAI_API_KEY")
    for local in (
        "http://localhost:1/v1",
        "http://127.0.0.1:1",
        "http://192.168.1.7/v1",
        "http://[::1]:80/v1",
        "http://gpu1:80/v1",
        "http://gpu.local/v1",
        "http://llm.localhost:8000/v1",
    ):
        ModelServer("m", local)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gpu1:80/v1")
    assert (ModelServer("m").url, ModelServer("m", "http://gpu2/v1").url) == ("http://gpu1:80/v1", "http://gpu2/v1")
    monkeypatch.delenv("OPENAI_BASE_URL")
    for remote in ("", "https://api.example.com/v1", "http://8.8.8.8/v1"):
        with pytest.raises(UserError, match="OPENAI_API_KEY"):
            ModelServer("m", remote)
    for wrong in ("localhost:8000/v1", "ftp://localhost/v1", "http://", "http://[::1", "http://localhost:99999/v1"):
        with pytest.raises(UserError, match="--api_base"):
            ModelServer("m", wrong)


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(serve, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(ask(serve(echo), tmp_path)) == 3


def test_models_are_asked_as_the_options_say():
    said = {"api_base": "http://localhost:1/v1", "temperature": 0.5, "max_tokens": 7, "timeout": 3.0}
    limits = {"concurrency": 2, "budget": 5, "price_in": 1.0, "price_out": 2.0, "max_cost": 3.0}
    options = judge.Options(output_dir="o", judge_model="m", **said, **limits)
    assert setup.service(options) == ModelServer("m", **said) and setup.service(options, "n") == ModelServer("n", **said)
    assert setup.terms(options) == RequestLimits(**limits)
    judge.check(judge.Options(output_dir="o", answers=["a=b"], metrics=True, max_cost=1.0, price_out=1.0))  # one price will do
    defaults = {field.name: field.default for field in dataclasses.fields(judge.Options)}
    assert (defaults["temperature"], defaults["max_tokens"], defaults["repeats"], defaults["seed"]) == (0.0, 1024, 1, 42)
