"""A file of prompts answered by another server: the ids of a local run, resumed where it stopped, wrong names refused."""

import json
import re
from dataclasses import replace

import pytest
import tiny
from api_server import asked

from utils.console import UserError
from utils.datasets.record_writer import write_records
from utils.inference.remote import Asking, model_names, request_fields
from utils.inference.requests import RequestLimits
from utils.inference.sampling_params import SamplingParams

RECORDS = [
    {"instruction": "你是谁？"},
    {"instruction": "Add.", "input": "1 + 1"},
    {"instruction": "真的？", "history": [["你是谁？", "我是梦想家。"]], "system": "说短一点。"},
]


@pytest.fixture(name="prompts")
def fixture_prompts(tmp_path):
    write_records(tmp_path / "prompts.json", RECORDS)
    return tmp_path / "prompts.json"


@pytest.fixture(name="f1", scope="module")
def fixture_f1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.adapter(tiny.llama(folder / "base"), folder / "f1", 1)
    return folder / "f1"


def options(server, prompts, *more):
    return ["--is_ui", "False", "--test_input_path", prompts, "--api_base", server.url, *more]


def completion(text):
    choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
    return {
        "body": json.dumps({"id": "x", "object": "text_completion", "created": 1, "model": "f1", "choices": [choice]}).encode()
    }


def test_messages_go_where_no_tokenizer_is_known(serve, script, prompts, tmp_path):
    def behave(number, body):
        cut = {"content": "answer to " + asked(body), "finish": "length"}
        refused = {"status": 400, "body": b'{"error": {"message": "filtered"}}'}
        return {"你是谁？": "answer to 你是谁？", "真的？": refused}.get(asked(body), cut)

    server = serve(behave)
    server.models = ["only"]
    line = options(server, prompts, "--output_path", tmp_path / "out.json", "--repetition_penalty", 1.2)
    out = script("generate.py", *line, "--stop", "END").ok()
    assert "sending messages" in out and "1 prompts have an input" in out and "uses its only model, only" in out
    assert "1 of 3 answers were refused by the server, and left empty" in out
    assert "1 of 3 answers were cut off (--max_new_tokens)" in out
    answers = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [record["output"] for record in answers] == ["answer to 你是谁？", "answer to Add.\n1 + 1", ""]
    third = next(body for body in server.bodies if len(body["messages"]) == 4)
    assert [message["role"] for message in third["messages"]] == ["system", "user", "assistant", "user"]
    assert (third["temperature"], third["stop"], third["model"]) == (0.0, ["END"], "only")
    assert third["repetition_penalty"] == 1.2
    assert "holds the answers" in script("generate.py", *line, "--stop", "END").ok() and len(server.bodies) == 3
    script("generate.py", *line, "--stop", "OTHER").ok()
    assert len(server.bodies) == 6, "with other settings the answers are others"


def test_what_the_protocol_has_of_the_settings_is_sent():
    drawn = {"top_p": 0.75, "seed": 42}
    assert request_fields(SamplingParams()) == {} and request_fields(SamplingParams(repetition_penalty=0.9)) == {
        "repetition_penalty": 0.9
    }
    assert request_fields(SamplingParams(do_sample=True)) == drawn | {"top_k": 40}
    assert request_fields(SamplingParams(do_sample=True, top_k=0)) == drawn, "0 means all here, and nothing there"


SGLANG = [{"id": "models/base", "owned_by": "sglang"}, {"id": "f1", "owned_by": "sglang", "parent": "models/base"}]
VLLM = [{"id": "models/base", "owned_by": "vllm"}, {"id": "f1", "owned_by": "vllm", "parent": "models/base"}]


@pytest.mark.parametrize(
    ("models", "asked_for", "name"),
    [
        (SGLANG, "f1", "models/base:f1"),  # at f1 alone the base answers
        (SGLANG, "models/base:f1", "models/base:f1"),
        (SGLANG, "models/base", "models/base"),
        (SGLANG, "models/base:f2", None),
        (SGLANG[:1], "models/base:f1", "models/base:f1"),  # one that lists no adapters
        (VLLM, "f1", "f1"),
        (["f1:latest", "f2:latest"], "f1", "f1:latest"),  # Ollama
        (["qwen:0.5b", "f1:latest"], "qwen:0.5b", "qwen:0.5b"),
        (["qwen:0.5b", "f1:latest"], "qwen", None),
        (["/models/f1.gguf"], "", "/models/f1.gguf"),  # llama.cpp
    ],
)
def test_each_server_is_asked_by_the_name_that_it_knows(serve, models, asked_for, name):
    server = serve(lambda *_: "")
    server.models = models
    asking = Asking(server.url, asked_for, "chat", SamplingParams(), (), RequestLimits())
    if name:
        assert model_names(asking, []) == [name]
    else:
        with pytest.raises(UserError, match=f"--api_model {asked_for}: not served there; .* serves "):
            model_names(asking, [])
    if models == SGLANG and asked_for == "f1":
        assert model_names(replace(asking, model=""), ["output/f1"]) == [name]


def test_a_stopped_run_goes_on_and_a_refused_setting_is_left_out(serve, script, prompts, f1, tmp_path):
    def behave(number, body):
        if "top_k" in body:
            return {"status": 400, "body": b'{"error": {"message": "Unrecognized request argument supplied: top_k"}}'}
        return {"status": 401, "body": b"{}"} if len(done) == 2 else done.append(0) or completion(str(body["prompt"]))

    done = []
    server = serve(behave)
    server.models = ["f1", "f2"]
    drawn = ("--do_sample", "--lora_weights", f1, "--output_path", tmp_path / "out.json", "--concurrency", 1)
    assert "401" in script("generate.py", *options(server, prompts, *drawn)).error
    assert not (tmp_path / "out.json").exists()
    done.clear()
    out = script("generate.py", *options(server, prompts, *drawn)).ok()
    assert "2 answers are there already" in out and "does not take top_k 40" in out
    assert len({str(body["prompt"]) for body in server.bodies}) == 3 and len(done) == 1
    assert (server.bodies[-1]["seed"], server.bodies[-1]["top_p"], server.bodies[-1]["temperature"]) == (42, 0.75, 0.1)
    assert not list(tmp_path.glob(".*.journal"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--api_model", "f9"], "f9: not served there; .* serves f1, f2"),
        ([], "--api_model: missing; .* serves f1, f2"),
        (["--api_model", "f1", "--api_route", "completions"], "needs a tokenizer"),
        (["--api_model", "f1", "--api_route", "chat", "--prompt_template", "alpaca"], "the server's own is used"),
        (["--api_model", "f1", "--no_repeat_ngram_size", 2], "not part of the protocol"),
        (["--api_model", "f1", "--load_8bit"], "the server has the weights"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_the_first_request(serve, script, prompts, tmp_path, more, told):
    server = serve(lambda *_: "x")
    server.models = ["f1", "f2"]
    error = script("generate.py", *options(server, prompts, "--output_path", tmp_path / "out.json", *more)).error
    assert re.search(told, error) and not server.bodies and not (tmp_path / "out.json").exists()


def test_a_server_that_is_not_there_is_named(script, prompts, tmp_path):
    line = ["--is_ui", "False", "--test_input_path", prompts, "--output_path", tmp_path / "o.json"]
    assert "does not list its models" in script("generate.py", *line, "--api_base", "http://127.0.0.1:9/v1").error
    assert "--is_ui False" in script("generate.py", "--api_base", "http://127.0.0.1:9/v1").error
