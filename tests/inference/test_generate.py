"""generate.py: which option reaches what, and what it refuses before anything is loaded."""

import socket
from pathlib import Path

import pytest

import generate
from utils.chat.address import Address
from utils.cli import parse
from utils.console import UserError
from utils.inference.answerers import BASE, ChatModel
from utils.inference.remote import Asking
from utils.inference.requests import RequestLimits
from utils.inference.sampling_params import SamplingParams


def kept(calls, result=None):
    """A function that keeps what it is given."""
    return lambda *given: calls.append(given) or result


def test_models_are_loaded_as_the_options_say(monkeypatch):
    """On a machine with such cards; what is loaded is told by the tests of the engine."""
    asked, f1 = [], ChatModel("f1", Path("f1"), "alpaca", None)
    monkeypatch.setattr("utils.inference.answerers.resolve", kept(asked, ("models/b", [f1])))
    monkeypatch.setattr("utils.models.placement.place", lambda *given: given)
    monkeypatch.setattr("utils.models.placement.measured", lambda placement, base: ("measured", base, *placement))
    monkeypatch.setattr("utils.inference.engine.Engine", lambda *given: given)
    base = ChatModel(BASE, None, "alpaca", None)
    given = {"base_model": "b", "lora_weights": ["f1"], "prompt_template": "t", "load_8bit": True, "gpu_id": 3}
    given |= {"device_map": "auto", "stop": ["END"], "enable_thinking": False}
    loaded = generate.load_engine(generate.Options(**given))
    assert loaded == ("models/b", [base, f1], ("measured", "models/b", True, False, 3, "", "auto"), ["END"], False)
    given |= {"load_8bit": False, "load_4bit": True, "dtype": "float32", "is_ui": False}
    loaded = generate.load_engine(generate.Options(**given))
    assert loaded == ("models/b", [f1], (False, True, 3, "float32", "auto"), ["END"], False)
    assert asked == [("b", ["f1"], "t")] * 2


def test_another_server_is_asked_as_the_options_say(monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr("utils.inference.remote.run", kept(asked))
    given = {"api_base": "http://gpu/v1", "api_model": "m", "api_route": "chat", "concurrency": 7, "stop": ["END"]}
    given |= {"enable_thinking": True, "base_model": "b", "lora_weights": ["f1"], "prompt_template": "t", "overwrite": True}
    settings = SamplingParams(seed=9)
    generate.have_answered(generate.Options(**given), settings, [Path("out")], [{"instruction": "问"}])
    asking = Asking("http://gpu/v1", "m", "chat", settings, ["END"], RequestLimits(7), True)
    assert asked == [(asking, "b", ["f1"], "t", [Path("out")], [{"instruction": "问"}], True)]


@pytest.mark.parametrize("feedback", [True, False])
def test_people_and_programs_are_served_as_the_options_say(monkeypatch, tmp_path, feedback):
    served: list[tuple] = []
    monkeypatch.setattr(generate, "load_engine", lambda options: "engine")
    for name in ("server.serve", "server.serve_api", "terminal.talk"):
        monkeypatch.setattr(f"utils.chat.{name}", kept(served))
    folder = str(tmp_path / "feedback") if feedback else ""
    given = {"server_name": "localhost", "auth": "me:secret", "api_key": "key", "share_gradio": True, "lang": "en"}
    given |= {"adapters_dir": str(tmp_path), "feedback_dir": folder, "num_beams": 2, "seed": 5}
    for way in (True, "api", "terminal"):
        generate.main(generate.Options(is_ui=way, **given))
    address = Address("localhost", None, ("me", "secret"), True, "key")
    settings = SamplingParams(num_beams=2, seed=5)
    assert served[0] == ("engine", settings, "en", address, str(tmp_path), folder)
    assert served[1:] == [("engine", settings, address, str(tmp_path)), ("engine", settings)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--load_4bit --is_ui False --api_base http://gpu/v1", "the server has the weights"),
        ("--api_model m", "--api_model and --api_route: are for another server"),
        ("--api_route chat", "--api_model and --api_route: are for another server"),
        ("--api_base http://gpu/v1", "is for the batch mode; add --is_ui False"),
        ("--test_input_path a.json", "are for the batch mode; add --is_ui False"),
        ("--output_path a.json", "are for the batch mode; add --is_ui False"),
        ("--seeds 1,2 --do_sample", "are for the batch mode; add --is_ui False"),
        ("--is_ui False --seeds 1,2 --do_sample --temperature 0", "without sampling all answers would be the same"),
        ("--base_model ./nowhere", "no such folder; check the path of the model"),
        ("--adapters_dir ./nowhere", "no such folder; name one that holds folders of adapters"),
        ("--prompt_template nowhere", "nowhere: no such template"),
        ("--auth me", "not of the form user:password"),
        ("--is_ui api --server_name 0.0.0.0", "others can reach it; give --api_key KEY"),
        ("--server_port {taken}", "--server_port {taken}: Address already in use"),
        ("--feedback_dir {file}", "{file}: is not a folder"),
        ("--concurrency 1001", "--concurrency 1001"),
        ("--gpu_id -1", "--gpu_id -1"),
        ("--server_port 65536", "--server_port 65536"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(monkeypatch, tmp_path, line, told):
    monkeypatch.setattr(generate, "load_engine", lambda options: pytest.fail("the models were loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = {"taken": server.getsockname()[1], "file": tmp_path / "file"}
        with pytest.raises(UserError) as error:
            generate.main(parse(generate.Options, line.format(**known).split()))
    assert told.format(**known) in str(error.value)
