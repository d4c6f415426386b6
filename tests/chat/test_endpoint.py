"""OpenAI's protocol, asked with the official client and with curl: answers, streams, errors, adapters that come and go."""

import collections
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import openai
import psutil
import pytest
import tiny
import uvicorn
from scripting import ROOT, free_port
from starlette.applications import Starlette

from utils.chat.endpoint import Endpoint
from utils.chat.protocol import Refused
from utils.console import UserError
from utils.datasets.record_writer import write_records
from utils.inference import scheduler as scheduling
from utils.inference.sampling_params import SamplingParams

pytest_plugins = ["browsing"]  # fixtures
QUESTION = [{"role": "user", "content": "你是谁？"}]


@contextlib.contextmanager
def serving(service, adapters_dir=""):
    """The address of an endpoint with the key "secret"."""
    routes = Endpoint(service, SamplingParams(), "secret", adapters_dir).routes(alone=True)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(name="address", scope="module")
def fixture_address(service, folder):
    """The endpoint over the tiny models, and a folder of adapters to load."""
    (folder / "more").mkdir()
    tiny.adapter(folder / "base", folder / "more" / "f3", 5)
    with serving(service, str(folder / "more")) as address:
        yield address


@pytest.fixture(name="client")
def fixture_client(address):
    with openai.OpenAI(api_key="secret", base_url=address, max_retries=0) as client:
        yield client


def curl(address, path, body=None, key="secret", *more):
    """The status and the body of a response."""
    data = ["--data-binary", "@-"] if body is not None else []
    line = ["curl", "-s", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {key}", *data, *more, address + path]
    text = body if isinstance(body, str) else json.dumps(body)
    out = subprocess.run(line, input=text, capture_output=True, text=True, check=True).stdout
    content, _, status = out.rpartition("\n")
    return int(status), content


@pytest.mark.parametrize(("longest", "limit"), [(100, 100), (2000, 512)])
def test_who_names_no_limit_gets_512_tokens_at_most(service, monkeypatch, longest, limit):
    monkeypatch.setattr(service, "longest_answer", longest)
    assert Endpoint(service, SamplingParams()).settings({}).max_new_tokens == limit


def test_who_gives_a_temperature_samples_from_all_tokens(service):
    endpoint = Endpoint(service, SamplingParams(top_p=0.5, top_k=7))
    found = endpoint.settings({"temperature": 0.7, "max_tokens": 9})
    assert (found.do_sample, found.temperature, found.top_p, found.top_k) == (True, 0.7, 1.0, 0)
    assert (found.num_beams, found.max_new_tokens) == (1, 9)
    assert endpoint.settings({"temperature": 0.7, "top_p": 0.9}).top_p == 0.9
    assert endpoint.settings({}).top_k == 7 and not endpoint.settings({"temperature": 0}).do_sample


def test_half_the_window_is_the_questions_where_the_answer_might_fill_it(service):
    asked = {"instruction": "你是谁？", "input": "", "history": [["一", "二"]]}
    most, long = SamplingParams(max_new_tokens=service.engine.window), ["长" * 800] * 2
    for history, dropped in (([["一", "二"]], 0), ([long] * 4 + [["一", "二"]], 4), ([long] * 2, 2)):
        left = service.engine.encode("base", asked | {"history": history[dropped:]})
        assert service.fit("base", asked | {"history": history}, most) == (left, dropped)
    for count in (200, 201):
        with pytest.raises(UserError, match="is too long: .* tokens" if count == 200 else "200 earlier turns"):
            service.fit("base", asked | {"instruction": "长" * 9000, "history": [["一", "二"]] * count}, most)
    assert len(service.ids_of("base", "长" * 20_001)) > 20_001
    with pytest.raises(UserError, match="at most 200,000 characters"):
        service.ids_of("base", "长" * 200_001)


def test_an_answer_that_is_continued_may_be_as_much_longer_as_asked_for(service):
    *_, reply = service.reply(
        "f1", {"instruction": "你是谁？"}, SamplingParams(num_beams=1, max_new_tokens=5), begun="我是" * 9
    )
    assert (reply.tokens, reply.finish) == (5, "length") and reply.text.startswith("我是" * 9)


NOTHING = {  # what asks for nothing beyond what is done anyway
    "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": False,
    "top_logprobs": 0, "echo": False, "suffix": "", "tools": [], "tool_choice": "none", "parallel_tool_calls": True,
    "modalities": ["text"], "response_format": {"type": "text"}, "service_tier": "auto", "store": False, "metadata": {},
    "made_up": None,
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_taken(address):
    for more in ({}, {"tool_choice": "auto", "service_tier": "default", "store": True}):
        body = {"model": "f1", "messages": QUESTION, "max_tokens": 1} | NOTHING | more
        assert curl(address, "/chat/completions", body)[0] == 200
    errors = {status: Refused(status, "why", "code").body()["error"]["type"] for status in (400, 429, 499, 500, 504)}
    assert errors == dict.fromkeys((400, 429, 499), "invalid_request_error") | dict.fromkeys((500, 504), "server_error")


def test_models_are_the_base_and_every_adapter(client):
    assert [(one.id, one.parent) for one in client.models.list()] == [("base", None), ("f1", "base"), ("f2", "base")]
    assert client.models.retrieve("f2") == client.models.list().data[2]
    with pytest.raises(openai.NotFoundError, match="f3: not loaded"):
        client.models.retrieve("f3")


def test_a_chat_is_answered_whole_and_streamed_as_the_engine_answers(client, service):
    *_, expected = service.reply("f1", {"instruction": "你是谁？"}, SamplingParams(num_beams=1, max_new_tokens=20))
    whole = client.chat.completions.create(model="f1", messages=QUESTION, max_tokens=20)
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish)
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, expected.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.chat.completions.create(model="f1", messages=QUESTION, max_completion_tokens=20, **options))
    assert parts[-1].usage == usage and not parts[-1].choices
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == expected.text
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 2) + [expected.finish]


def test_a_dialogue_reaches_the_model_as_the_template_has_it(client, service):
    messages = [{"role": "system", "content": "说短一点。"}, *QUESTION, {"role": "assistant", "content": "我是梦想家。"}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "真的？"}]})
    record = {"instruction": "真的？", "history": [["你是谁？", "我是梦想家。"]], "system": "说短一点。"}
    ids = service.engine.encode("f2", record)
    answer = client.chat.completions.create(model="f2", messages=messages, max_tokens=8)
    raw = client.completions.create(model="f2", prompt=ids, max_tokens=8)
    assert answer.usage.prompt_tokens == raw.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == raw.choices[0].text


def test_a_text_is_completed_with_the_ids_of_the_rendered_prompt(client, service):
    text = service.engine.prompter("f1").generate_prompt("你是谁？")
    by_text = client.completions.create(model="f1", prompt=text, max_tokens=12)
    by_ids = client.completions.create(
        model="f1", prompt=service.engine.encode("f1", {"instruction": "你是谁？"}), max_tokens=12
    )
    assert by_text.choices == by_ids.choices and by_text.usage == by_ids.usage
    stream = client.completions.create(model="f1", prompt=text, max_tokens=12, stream=True)
    assert "".join(part.choices[0].text for part in stream) == by_text.choices[0].text


def test_a_file_is_answered_through_the_endpoint_as_on_this_machine(address, folder, script, tmp_path):
    """With each of the adapters at once; the ids sent are those of a local run, and so are the answers."""
    records = [{"instruction": "你是谁？"}, {"instruction": "Add.", "input": "1 + 1"}]
    records.append({"instruction": "真的？", "history": [["你是谁？", "我是梦想家。"]], "system": "说短一点。"})
    write_records(tmp_path / "prompts.json", records)
    line = ["--is_ui", "False", "--test_input_path", tmp_path / "prompts.json", "--num_beams", 1, "--max_new_tokens", 12]
    line += ["--lora_weights", f"{folder / 'f1'},{folder / 'f2'}"]
    script("generate.py", *line).ok()
    local = [(folder / name / "test.json").read_text("utf-8") for name in ("f1", "f2")]
    assert "401" in script("generate.py", *line, "--api_base", address, "--overwrite", OPENAI_API_KEY="wrong").error
    script("generate.py", *line, "--api_base", address, "--overwrite", OPENAI_API_KEY="secret").ok()
    assert [(folder / name / "test.json").read_text("utf-8") for name in ("f1", "f2")] == local != local[::-1]


def test_a_seed_repeats_and_a_stop_ends(client, service, monkeypatch):
    asked, submit = [], service.scheduler.submit
    monkeypatch.setattr(service.scheduler, "submit", lambda request, *more: (asked.append(request), submit(request, *more))[1])
    drawn = {"model": "f1", "messages": QUESTION, "temperature": 1.5, "max_tokens": 20}
    one, two, other = (client.chat.completions.create(**drawn, seed=seed).choices[0] for seed in (1, 1, 2))
    assert one.message.content == two.message.content != other.message.content
    text = client.chat.completions.create(model="f1", messages=QUESTION, max_tokens=30).choices[0].message.content
    middle = text[len(text) // 2 : len(text) // 2 + 2]
    cut = client.chat.completions.create(model="f1", messages=QUESTION, max_tokens=30, stop=[middle]).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == text[: text.index(middle)].strip()
    client.completions.create(model="base", prompt=[5, 6], max_tokens=1, seed=0, user="me", stop=["x" * 100] * 16)
    known = [(one.name, one.template, one.exact, one.asker, one.stops) for one in asked]
    plainly = ("f1", "", False, "127.0.0.1", ())
    assert known[:3] == [("f1", "", True, "127.0.0.1", ())] * 3 and known[3:5] == [plainly, (*plainly[:4], (middle,))]
    assert known[5:] == [("base", None, True, "me", ("x" * 100,) * 16)]


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        ({"model": "../f1"}, 404, "../f1"),
        ({"model": None}, 400, "model"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, 400, "alien"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "x"}]}, 400, "user's"),
        ({"messages": [{"role": "user", "content": "长" * 9000}]}, 400, "too long"),
        ({"stop": ["x"] * 17}, 400, "more than 16"),
        ({"stop": "x" * 101}, 400, "up to 100 characters"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "does not support tools"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"made_up": 1}, 400, "made_up"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream": True, "stream_options": {"made_up": 1}}, 400, "stream_options"),
        ({"n": True}, 400, "n: not supported"),
        ({"seed": "1"}, 400, 'seed "1": not allowed; give a whole number from 0 to 2147483647'),
        ({"template": "/etc/passwd.json"}, 400, "template"),
        ({"user": "x" * 2**20}, 413, "bytes"),
    ],
)
def test_a_bad_request_is_refused_by_name(address, change, status, named):
    given, body = curl(address, "/chat/completions", {"model": "f1", "messages": QUESTION, "max_tokens": 2} | change)
    assert (given, list(json.loads(body))) == (status, ["error"]), body
    assert named in json.loads(body)["error"]["message"]


def test_no_json_no_key_and_no_route_are_errors_of_the_protocol(address, service):
    rows = service.engine.model.get_input_embeddings().weight.shape[0]
    for path, body, key, status, code in (
        ("/chat/completions", "{", "secret", 400, "invalid_json"),
        ("/chat/completions", "[" * 50_000, "secret", 400, "invalid_json"),
        ("/completions", {"model": "f1", "prompt": [-1]}, "secret", 400, "invalid_request"),
        ("/completions", {"model": "f1", "prompt": [rows]}, "secret", 400, "invalid_request"),
        ("/models", None, "wrong", 401, "invalid_api_key"),
        ("/models", None, "", 401, "invalid_api_key"),
        ("/files/etc/passwd", None, "secret", 404, "not_found"),
    ):
        given, content = curl(address, path, body, key)
        assert (given, json.loads(content)["error"]["code"]) == (status, code)
    status, stream = curl(address, "/completions", {"model": "f1", "prompt": [5], "max_tokens": 1, "stream": True})
    assert status == 200 and stream.endswith("\n\ndata: [DONE]\n\n")


def test_a_full_queue_refuses_and_who_hangs_up_frees_a_place(address, client, service, engine, monkeypatch):
    monkeypatch.setattr(scheduling, "AT_ONCE", 1)
    monkeypatch.setattr(scheduling, "WAITING", 1)
    engine.pause = 0.02
    long = {"model": "f1", "messages": QUESTION, "max_tokens": 2048, "stream": True}
    first = client.chat.completions.create(**long)
    next(iter(first))
    second = client.chat.completions.create(**long)
    until = time.monotonic() + 20
    while not service.scheduler.waiting and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError, match="queue is full"):
        client.chat.completions.create(**long)
    second.close()  # one who still waits
    while service.scheduler.waiting and time.monotonic() < until:
        time.sleep(0.01)
    body = json.dumps(long | {"stream": False})  # and one that asked for the whole answer
    third = subprocess.Popen(["curl", "-s", "-H", "Authorization: Bearer secret", "-d", body, f"{address}/chat/completions"])
    while not service.scheduler.waiting and time.monotonic() < until:
        time.sleep(0.01)
    first.close()
    while service.scheduler.waiting and time.monotonic() < until:
        time.sleep(0.01)
    third.kill()
    third.wait()
    while service.scheduler.running and time.monotonic() < until:
        time.sleep(0.01)
    engine.pause = 0
    assert not service.scheduler.running and not service.scheduler.waiting


def test_adapters_come_and_go_while_others_are_answered(address, client, folder, service):
    expected = client.chat.completions.create(model="f1", messages=QUESTION, max_tokens=20).choices
    stream = client.chat.completions.create(model="f1", messages=QUESTION, max_tokens=20, stream=True)
    for name in ("", " ", "../f1", "a/b", "a\nb", "x" * 101):
        assert curl(address, "/load_lora_adapter", {"lora_name": name, "lora_path": "f3"})[0] == 400
    for path in (str(folder / "f1"), "../f1", "/etc"):
        for name in ("x", "f3"):
            assert curl(address, "/load_lora_adapter", {"lora_name": name, "lora_path": path})[0] == 404
    for path in ("f3", str(folder / "more" / "f3")):
        assert curl(address, "/load_lora_adapter", {"lora_name": "third", "lora_path": path})[0] == 200
        assert curl(address, "/load_lora_adapter", {"lora_name": "third", "lora_path": path})[0] == 400
        third = client.chat.completions.create(model="third", messages=QUESTION, max_tokens=20).choices
        assert third != expected
        assert curl(address, "/unload_lora_adapter", {"lora_name": "third"})[0] == 200
        assert curl(address, "/unload_lora_adapter", {"lora_name": "third"})[0] == 404
        assert "third" not in (name for name, _ in service.scheduler.kept), "another of that name has its own"
    assert curl(address, "/unload_lora_adapter", {"lora_name": "base"})[0] == 400
    assert "".join(part.choices[0].delta.content or "" for part in stream) == expected[0].message.content
    assert client.chat.completions.create(model="f1", messages=QUESTION, max_tokens=20).choices == expected


@pytest.mark.slow
def test_fifty_clients_lose_nothing_and_memory_stays_flat(address, service):
    """For SOAK_SECONDS (20; ten minutes when asked): streams, whole answers, and some who hang up; all are the answers that
    one client alone is given, none is lost, and afterwards no place is taken and memory has not grown."""
    seconds, clients = float(os.environ.get("SOAK_SECONDS", 20)), 50
    prompts = [[{"role": "user", "content": f"问题{number}"}] for number in range(10)]
    lost: list[str] = []
    told = collections.Counter()
    with openai.OpenAI(api_key="secret", base_url=address, max_retries=0) as client:
        asked = {"model": "f1", "max_tokens": 8}
        expected = [client.chat.completions.create(messages=p, **asked).choices[0].message.content for p in prompts]
    until, every, memory = time.monotonic() + seconds, min(60.0, seconds / 4), []

    def ask(number):
        chance = random.Random(number)
        with openai.OpenAI(api_key="secret", base_url=address, max_retries=20, timeout=300) as client:
            while time.monotonic() < until:
                place = chance.randrange(len(prompts))
                kind = chance.choice(("whole", "stream", "hung up"))
                request = asked | {"messages": prompts[place]}
                try:
                    if kind == "whole":
                        text = client.chat.completions.create(**request).choices[0].message.content
                    else:
                        with client.chat.completions.create(**request, stream=True) as parts:
                            read = parts if kind == "stream" else itertools.islice(parts, 1)
                            text = "".join(part.choices[0].delta.content or "" for part in read)
                    if kind != "hung up" and text != expected[place]:
                        lost.append(f"{kind}: {text!r} instead of {expected[place]!r}")
                except openai.APIError as error:
                    lost.append(f"{kind}: {error}")
                told[kind] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        time.sleep(every)
        memory.append(psutil.Process().memory_info().rss)
    for thread in threads:
        thread.join()
    given_up = time.monotonic() + 60
    while (service.scheduler.running or service.scheduler.waiting) and time.monotonic() < given_up:
        time.sleep(0.05)
    assert not lost and not service.scheduler.running and not service.scheduler.waiting, lost[:3]
    assert min(told[kind] for kind in ("whole", "stream", "hung up")) > 0, told
    sizes = ", ".join(f"{size / 1e6:.0f}" for size in memory)
    print(f"{sum(told.values())} requests of {clients} clients in {seconds:.0f} s, {told}; MB every {every:.0f} s: {sizes}")
    assert memory[-1] < memory[len(memory) // 2 - 1] * 1.05 + 20e6, sizes


@pytest.mark.slow
def test_the_script_serves_programs_alone_and_refuses_to_do_so_openly(folder, script):
    options = ["--lora_weights", folder / "f1", "--is_ui", "api"]
    assert "--api_key" in script("generate.py", *options, "--server_name", "0.0.0.0").error
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = script("generate.py", *options, "--server_port", port)
        assert "--server_port" in ended.error and "cannot be mixed" not in ended.out
    line = [sys.executable, ROOT / "generate.py", *options, "--server_port", str(port)]
    with subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert any(f"http://127.0.0.1:{port}/v1" in printed for printed in running.stdout)
        client = openai.OpenAI(api_key="any", base_url=f"http://127.0.0.1:{port}/v1")
        assert client.chat.completions.create(model="f1", messages=QUESTION, max_tokens=5).choices[0].message.content
        running.send_signal(signal.SIGHUP)
        assert "Traceback" not in running.communicate()[1]
