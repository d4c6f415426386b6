"""Files and requests that mean harm: nothing of them runs, nothing is read, written or deleted outside.

Elsewhere: pickled adapters (tests/merging/test_merging_refusals.py, tests/training/test_start.py); files asked from the
page, uploads and scripts in questions (tests/chat); control characters in raw files (tests/datasets/test_preparing.py).
"""

import json
import os
import pickle
import shutil
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from browsing import send
from cases import FULL, GOOD, ROOT, has
from playwright.sync_api import expect

from utils.datasets.templates import TEMPLATES, Prompter
from utils.files import read_json, write_json
from utils.training import checkpoints

pytest_plugins = ["browsing"]  # fixtures

# ---- pickles that run code on loading


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


class Evaluated(Trap):
    """The same by evaluating a text."""

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.marker)!r}).touch()",)


class Touched(Trap):
    """The same by a method of a harmless class."""

    def __reduce__(self):
        return Path.touch, (self.marker,)


def write(form: str, trap: Trap, file: Path) -> None:
    """A file with the trap among tensors, in one of the forms that torch.load knows."""
    value = {"model.norm.weight": torch.ones(4), "trap": trap}
    if form == "plain":
        file.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, file, _use_new_zipfile_serialization=form == "zip")


@pytest.fixture
def marker(tmp_path):
    """The file that no hostile file may make."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code was run"


PLACES = {  # where the pickle lies -> its name, and the options that have it read
    "a base that is merged": ("base", "pytorch_model.bin", "merge_weights.py", "--base_model {hostile}"),
    "a base that is trained on": ("base", "pytorch_model.bin", "finetune.py", "--base_model {hostile}"),
    "a base that answers": ("base", "pytorch_model.bin", "generate.py", "--base_model {hostile}"),
    "a base of Meta's that is merged": ("meta", "consolidated.00.pth", "merge_weights.py", "--base_model {hostile}"),
    "an adapter that is merged": ("adapter", "adapter_model.bin", "merge_weights.py", "--lora_model {hostile}"),
    "an adapter that is trained on": ("adapter", "adapter_model.bin", "finetune.py", "--resume_from_checkpoint {hostile}"),
    "an adapter that answers": ("adapter", "adapter_model.bin", "generate.py", "--lora_weights {hostile}"),
    "a checkpoint of alpaca-lora": ("adapter", "pytorch_model.bin", "finetune.py", "--resume_from_checkpoint {hostile}"),
}


@pytest.mark.parametrize("trap", [Trap, Evaluated, Touched] if FULL else [Touched])
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_runs_nothing(refused, world, tmp_path, marker, place, form, trap):
    kind, name, script, options = PLACES[place]
    hostile = shutil.copytree(world["adapter" if kind == "adapter" else "base"], tmp_path / "hostile")
    for weights in hostile.glob("*.safetensors"):
        weights.unlink()
    if kind == "meta":
        (hostile / "config.json").unlink()
        (hostile / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}')
    write(form, trap(marker), hostile / name)
    has(refused(script, options.replace("{hostile}", str(hostile))), ("hostile", "refused", "code"))


def test_a_pickle_in_a_shard_runs_nothing(refused, world, tmp_path, marker):
    hostile = shutil.copytree(world["base"], tmp_path / "hostile")
    (hostile / "model.safetensors").unlink()
    write("zip", Touched(marker), hostile / "pytorch_model-00001-of-00001.bin")
    homes = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (hostile / "pytorch_model.bin.index.json").write_text(json.dumps(homes))
    for program, options in (("merge_weights.py", "--base_model"), ("generate.py", "--base_model")):
        has(refused(program, f"{options} {hostile}"), ("hostile", "refused", "safetensors"))


@pytest.fixture(scope="module")
def unfinished(world, tmp_path_factory):
    """A run that was stopped after its first checkpoint."""
    from scripting import Script

    top = tmp_path_factory.mktemp("unfinished")
    argv = [*GOOD["finetune.py"].format(tmp=top, **world).split(), "--max_steps", "2", "--save_steps", "1"]
    assert Script(top)("finetune.py", *argv).ok()
    (top / "out" / "lineage.json").unlink()
    shutil.rmtree(top / "out" / "checkpoint-2")
    return top / "out"


MORE_PICKLES = ("scheduler.pt", "rng_state.pth", "adapter_model.bin")


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "training_args.bin", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_PICKLES)]
)
def test_a_checkpoint_with_a_pickle_runs_nothing(cold_or_forked, world, unfinished, tmp_path, marker, name):
    """Its manifest vouches for the file, as whoever gives a checkpoint away can have it do."""
    out = shutil.copytree(unfinished, tmp_path / "out")
    checkpoint = out / "checkpoint-1"
    write("zip", Touched(marker), checkpoint / name)
    checkpoints.seal(checkpoint, read_json(checkpoint / checkpoints.MANIFEST)["run"])
    argv = [*GOOD["finetune.py"].format(tmp=tmp_path, **world).split(), "--max_steps", "2", "--save_steps", "1"]
    ended = cold_or_forked("finetune.py", *argv, cwd=tmp_path)
    assert ended.status == 0 or ("checkpoint-1: refused" in ended.error and "delete it" in ended.error)


# ---- models that ask for code of their own

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n\nclass Evil:\n    pass\n"
AUTO = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
ASKING = {
    "config of an unknown family": ("config.json", {"auto_map": AUTO, "model_type": "evil"}),
    "config of a known family": ("config.json", {"auto_map": AUTO}),
    "config with code of the hub": ("config.json", {"auto_map": {"AutoModelForCausalLM": "owner/evil--evil.Evil"}}),
    "config with a kernel of the hub": ("config.json", {"attn_implementation": "owner/evil"}),
    "config that names a class": ("config.json", {"architectures": ["evil.Evil"], "transformers_version": "9"}),
    "tokenizer": ("tokenizer_config.json", {"auto_map": AUTO, "tokenizer_class": "Evil"}),
    "tokenizer that names a module": ("tokenizer_config.json", {"tokenizer_class": "evil.Evil"}),
    "generation": ("generation_config.json", {"auto_map": AUTO, "custom_generate": "evil"}),
}  # fmt: skip


@pytest.mark.parametrize("program", ["merge_weights.py", "generate.py", *(["finetune.py"] if FULL else [])])
@pytest.mark.parametrize("what", ASKING)
def test_a_model_that_asks_for_code_of_its_own(cold_or_forked, world, tmp_path, marker, what, program):
    """It is refused, or read with the code that transformers has for its family."""
    file, asked = ASKING[what]
    hostile = shutil.copytree(world["base"], tmp_path / "hostile")
    value = json.loads((hostile / file).read_text()) if (hostile / file).is_file() else {}
    (hostile / file).write_text(json.dumps(value | asked))
    for name in ("evil.py", "custom_generate/generate.py"):
        (hostile / name).parent.mkdir(exist_ok=True)
        (hostile / name).write_text(CODE.format(marker=str(marker)))
    argv = GOOD[program].format(tmp=tmp_path, **world | {"base": hostile}).split()
    ended = cold_or_forked(program, *argv, *(["--max_steps", "1"] if program == "finetune.py" else []), cwd=hostile)
    assert ended.status == 0 or "hostile" in ended.error
    if what == "config of an unknown family" and program != "merge_weights.py":
        assert "is refused" in ended.error


@pytest.mark.parametrize("program", ["merge_weights.py", "generate.py", "finetune.py"])
def test_an_adapter_that_names_modules(cold_or_forked, world, tmp_path, marker, program):
    hostile = shutil.copytree(world["adapter"], tmp_path / "hostile")
    asked = {
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
        "base_model_name_or_path": str(world["base"]),
    }
    settings = json.loads((hostile / "adapter_config.json").read_text())
    (hostile / "adapter_config.json").write_text(json.dumps(settings | asked))
    (hostile / "evil.py").write_text(CODE.format(marker=str(marker)))
    more = ["--resume_from_checkpoint", str(hostile), "--max_steps", "1"] if program == "finetune.py" else []
    argv = GOOD[program].format(tmp=tmp_path, **world | {"adapter": hostile}).split()
    ended = cold_or_forked(program, *argv, *more, cwd=hostile, PYTHONPATH=str(hostile))
    assert ended.status == 0 or "hostile" in ended.error


# ---- paths

OUTSIDE = "../../../outside"


def test_names_in_answers_are_no_paths(cold_or_forked, world, tmp_path):
    """Systems and categories are named in tables; the files that are written are the same whatever they are called."""
    records = json.loads(world["one"].read_text("utf-8"))
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([record | {"category": OUTSIDE} for record in records]))
    inner = tmp_path / "1" / "2" / "3"
    inner.mkdir(parents=True)
    argv = ["--answers", f"{OUTSIDE}={tmp_path}/a.json", "--answers", f"/etc/x={tmp_path}/b.json", "--metrics"]
    assert cold_or_forked("judge.py", *argv, "--output_dir", inner / "out", cwd=inner).ok()
    assert {path.name for path in (inner / "out").iterdir()} == {"metrics.md", "metrics.csv", "metrics.json"}
    assert not list(tmp_path.rglob("outside*")) and not Path("/etc/x").exists()


@pytest.mark.parametrize(
    "name", ["../test_data", "..", "/etc/passwd", "templates/../../../etc/passwd.json", "alpaca/../alpaca", "."]
)
def test_a_template_is_a_name_or_a_json_file(refused, name):
    has(refused("generate.py", f"--prompt_template {name}"), ("no such template", "choose one of"))


def test_clearing_an_output_folder_follows_no_link(cold_or_forked, world, tmp_path):
    """A link that is called like a checkpoint is not a reason to delete what it leads to."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-3").symlink_to(precious)
    argv = [*GOOD["finetune.py"].format(tmp=tmp_path, **world).split(), "--overwrite_output_dir", "--max_steps", "1"]
    ended = cold_or_forked("finetune.py", *argv, cwd=tmp_path)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert ended.status == 0 or "checkpoint-3" in ended.error


def test_a_manifest_that_names_files_outside_reads_none_into_the_run(cold_or_forked, world, unfinished, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "out")
    manifest = out / "checkpoint-1" / checkpoints.MANIFEST
    value = read_json(manifest)
    write_json(manifest, value | {"files": value["files"] | {"../../../../../../etc/passwd": "0" * 64}})
    argv = [*GOOD["finetune.py"].format(tmp=tmp_path, **world).split(), "--max_steps", "2", "--save_steps", "1"]
    assert "incomplete" in cold_or_forked("finetune.py", *argv, cwd=tmp_path).ok()


# ---- records that look like templates

NASTY = [
    "{instruction.__class__}", "{output}", "{input!r}", "{0}", "{}", "{{", "}}", "{", "}", "%s %(instruction)s", "{{ 7 * 7 }}",
    "{% for x in ().__class__.__mro__ %}{% endfor %}", "$instruction ${input}", "`id`", "{instruction.__init__.__globals__}",
]  # fmt: skip


@pytest.mark.parametrize("template", sorted(file.stem for file in TEMPLATES.glob("*.json")))
def test_records_are_no_templates(template):
    """What stands in a field stands in the prompt, in each field, and in nothing else."""
    prompter = Prompter(template)
    for text in NASTY:
        record = {"instruction": text, "input": "plain", "history": [[text, text]], "output": text, "system": text}
        plain = {key: "x" if value == text else value for key, value in record.items()} | {"history": [["x", "x"]]}
        expected = [turn.prompt.count("x") for turn in prompter.turns(plain)]
        turns = prompter.turns(record)
        assert [turn.answer for turn in turns] == [text, text]
        assert all(text in turn.prompt for turn in turns) and len(expected) == len(turns)
        assert turns[0].prompt.startswith(f"{text}\n\n")
        assert "<class" not in turns[-1].prompt and "49" not in turns[-1].prompt


# ---- the page


def post(url, path, value, **headers):
    """Send JSON; returns status and text."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    request = urllib.request.Request(f"{url}gradio_api/{path}", body, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


def called(url, data, name="answer"):
    """Call the API as gradio's clients do; returns all that comes back."""
    status, text = post(url, f"call/{name}", {"data": data})
    if status != 200:
        return text
    with urllib.request.urlopen(f"{url}gradio_api/call/{name}/{json.loads(text)['event_id']}", timeout=60) as response:
        return response.read().decode("utf-8", "replace")


GOOD_CALL = ["你好", "", [], "", "", 1, 3, False, 0.1, 0.75, 40, 42, 1.0, 0]
SECRET = "root:x:0:0"
FILE = {"path": "/etc/passwd", "orig_name": "passwd", "meta": {"_type": "gradio.FileData"}}
VALUES = [
    None,
    5,
    True,
    [],
    {},
    ["/etc/passwd"],
    FILE,
    {"__type__": "update"},
    "x" * 1_000_000,
    [[["a"]]],
    10**400,
    float("nan"),
    "\ud83d",
]


@pytest.mark.parametrize("place", range(len(GOOD_CALL)))
def test_wrong_types_to_the_api(url, place):
    """Each argument as everything that it is not: an error, or an answer; never a file, a traceback, a path of ours."""
    assert "event: complete" in called(url, GOOD_CALL)
    for value in VALUES:
        told = called(url, [*GOOD_CALL[:place], value, *GOOD_CALL[place + 1 :]])
        assert SECRET not in told and "Traceback" not in told and str(ROOT) not in told and "site-packages" not in told
    assert "event: complete" in called(url, GOOD_CALL), "the page still answers"


def test_wrong_requests_to_the_api(url):
    bodies = [b"", b"{", b"[]", b"null", {"data": None}, {"data": []}, {"data": GOOD_CALL * 9}, {"data": {"instruction": FILE}}]
    bodies += [{"data": GOOD_CALL, "fn_index": 0, "session_hash": "../../x"}, {"data": GOOD_CALL, "trigger_id": FILE}]
    bodies.append(b"[" * 99_999)
    for body in bodies:
        for path in ("call/answer", "queue/join", "run/predict", "call/none", "reset", "cancel"):
            _, told = post(url, path, body)
            assert SECRET not in told and "Traceback" not in told and "site-packages" not in told
    assert "event: complete" in called(url, GOOD_CALL)


def test_what_is_not_part_of_the_api_cannot_be_called(url):
    """The page's own functions work on a session's state, and take no conversation from outside."""
    config = json.loads(urllib.request.urlopen(f"{url}config").read())
    for dependency in config["dependencies"]:
        name = dependency["api_name"]
        if name not in ("answer", "answerers", False, None):
            assert SECRET not in called(url, [FILE] * len(dependency["inputs"]), name)
        body = {"data": [FILE] * len(dependency["inputs"]), "fn_index": dependency["id"], "session_hash": "stranger"}
        assert SECRET not in post(url, "run/predict", body)[1]


@pytest.mark.slow
def test_nobody_reads_anothers_session(visit, url):
    """What one visitor said is in no answer to another who knows, or guesses, names of sessions."""
    page, hashes = visit(url), set()
    page.on("request", lambda request: hashes.update(json.loads(request.post_data or "{}").get("session_hash", "").split()))
    page.locator("#max_new_tokens input[type=number]").fill("5")
    send(page, "我的密码是四二四二")
    page.locator("#chat .bot.message").wait_for()
    page.wait_for_timeout(1500)
    assert hashes, "the page names its session in its requests"
    config = json.loads(urllib.request.urlopen(f"{url}config").read())
    for session in hashes:
        for dependency in config["dependencies"]:
            data = [None] * len(dependency["inputs"])
            for path in ("run/predict", "queue/join"):
                body = {"data": data, "fn_index": dependency["id"], "session_hash": session}
                assert "四二四二" not in json.dumps(post(url, path, body)[1]).encode().decode("unicode_escape", "replace")
    other = visit(url)
    assert "四二四二" not in other.locator("body").inner_text()


class Listener:
    """A server elsewhere, which notes what it is asked for."""

    def __init__(self):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_html_script_and_images_in_answers_are_shown_as_text(visit, url, tmp_path):
    """In a conversation that is loaded, as in one that a model writes: no script runs, no address elsewhere is asked."""
    listener = Listener()
    answers = [
        "<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "<svg onload=alert(3)>", "<iframe src='javascript:a(4)'>",
        f"<img src='{listener.url}/html'>", f"![secret]({listener.url}/markdown)", "[click](javascript:alert(5))",
        "<details open ontoggle=alert(6)>", f"<link rel=stylesheet href={listener.url}/style>", "<b onmouseover=alert(7)>x</b>",
        f"<form action={listener.url}/form><input name=a></form>", "$$\\href{javascript:a(8)}{x}$$", "<style>*{}</style>",
        "\\`<b onmouseover=alert(9)>`", "``<iframe src=x>`", "a ```<form>", "- a\n  ```\n<form>", "```\na\n```~\n<form>",
        "#include <stdio.h>", "```\n<b>in a block</b>\n```", "`<b>in a line</b>`",
    ]  # fmt: skip
    record = {"instruction": "last", "output": "end", "history": [[text, text] for text in answers]}
    (tmp_path / "hostile.json").write_text(json.dumps([record]))
    page = visit(url)
    with page.expect_file_chooser() as chooser:
        page.locator("#load").click()
    chooser.value.set_files(tmp_path / "hostile.json")
    expect(page.locator("#chat .bot.message")).to_have_count(len(answers) + 1)
    page.wait_for_timeout(1000)
    assert listener.asked == []
    inside = page.locator("#chat .message")
    harm = "script iframe svg[onload] img[onerror] link form style b details [onmouseover] [ontoggle] a[href^=javascript]"
    assert {tag for tag in harm.split() if inside.locator(tag).count()} == set()
    seen = inside.all_inner_texts()
    for text in [*answers[:5], "#include <stdio.h>", "<b>in a block</b>", "<b>in a line</b>"]:
        assert sum(text in one for one in seen) >= 2, text  # as question, and as answer
