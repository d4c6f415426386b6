"""Batch answers: the contract of test.json, kills, several adapters, refusals; through `generate.py` as a user runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
from scripting import ROOT

import generate
from utils.cli import parse
from utils.console import UserError
from utils.datasets.prompts import read_prompts
from utils.evaluation.answers import answer_files
from utils.inference import batch as batch_answers
from utils.inference.kv_cache import DecodingBatch

PROMPTS = [
    "你是谁？",
    {"instruction": "Translate.", "input": "春眠不觉晓", "category": "translate"},
    "Write a poem about the lazy dog and the quick brown fox, and let it be as long as this prompt is, or longer.",
    "你是谁？",
    {"instruction": "And then?", "history": [["Who are you?", "我是梦想家。"]]},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.llama(folder / "base")
    return folder


@pytest.fixture
def place(models, tmp_path):
    """A folder with a prompts file, and two adapters that have no answers yet."""
    for seed, name in enumerate("ab"):
        tiny.adapter(models / "base", tmp_path / name, seed)
    write(tmp_path / "prompts.json", PROMPTS)
    return tmp_path


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    return path


def run(*arguments, tokens=12):
    """Call the script's main with a command line."""
    line = [*arguments, "--is_ui", "False", "--max_new_tokens", str(tokens)]
    generate.main(parse(generate.Options, [str(part) for part in line]))


def command(*arguments, tokens=12):
    line = [*arguments, "--is_ui", "False", "--max_new_tokens", tokens]
    return [sys.executable, str(ROOT / "generate.py"), *map(str, line)]


def answers(path):
    return json.loads(path.read_text("utf-8"))


def test_answers_stand_beside_the_weights_in_the_order_of_the_input(place, capsys):
    """DESIGN: test.json; pitfall 9: UTF-8, nothing escaped; equal prompts are answered once."""
    run("--lora_weights", place / "a", "--test_input_path", place / "prompts.json")
    found = answers(place / "a" / "test.json")
    plain = [{key: value for key, value in record.items() if key != "output"} for record in found]
    assert plain == [{"instruction": prompt} if isinstance(prompt, str) else prompt for prompt in PROMPTS]
    assert list(found[1]) == ["instruction", "input", "output", "category"]
    assert found[0] == found[3]
    assert "\\u4f60" not in (place / "a" / "test.json").read_text("utf-8")
    said = capsys.readouterr().out
    assert "1 of 5 prompts equal an earlier one and share its answer\n" in said
    told = r"/a/test.json: 5 answers; 48 tokens in [\d.]+ s \([\d.]+ a second\)\n4 answers reached the token limit before"
    assert re.search(told, said)
    assert not list((place / "a").glob("*.journal"))


def test_a_folder_becomes_one_file_with_categories(place):
    write(place / "in" / "02b.json", ["你是谁？"])
    write(place / "in" / "01a.json", ["Hello", {"instruction": "Bye", "category": "own"}])
    out = place / "new" / "all.json"
    run("--lora_weights", place / "a", "--test_input_path", place / "in", "--output_path", out)
    assert [(record["instruction"], record["category"]) for record in answers(out)] == [
        ("Hello", "01a"),
        ("Bye", "own"),
        ("你是谁？", "02b"),
    ]
    two = place / "two.json"
    several = f"{place / 'in' / '02b.json'},{place / 'in' / '01a.json'}:0.5"
    run("--lora_weights", place / "a", "--test_input_path", several, "--output_path", two, "--seed", 1)
    assert [record["category"] for record in answers(two)] == ["02b", "own"]  # with the usual seed, 01a's other one


def test_several_adapters_get_byte_for_byte_what_each_gets_alone(place):
    """The base's tensors are put back after each, not subtracted from."""
    inputs = ("--test_input_path", place / "prompts.json")
    run("--lora_weights", f"{place / 'a'},{place / 'b'}", *inputs)
    assert all((place / name / "test.yaml").is_file() for name in "ab")
    together = [(place / name / "test.json").read_bytes() for name in "ab"]
    for name in "ab":
        (place / name / "test.json").unlink()
        run("--lora_weights", place / name, *inputs)
    assert [(place / name / "test.json").read_bytes() for name in "ab"] == together
    assert together[0] != together[1]


def test_the_base_answers_alone_where_it_is_told_where_to(models, place, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(models / "base"))
    with pytest.raises(UserError, match="--output_path"):
        run("--test_input_path", place / "prompts.json")
    run("--test_input_path", place / "prompts.json", "--output_path", place / "base.json")
    assert len(answers(place / "base.json")) == 5


def test_answers_to_other_prompts_are_not_overwritten_unasked(place):
    """Pitfall 16."""
    weights = ("--lora_weights", place / "a")
    result = place / "a" / "test.json"
    run(*weights, "--test_input_path", place / "prompts.json")
    before = result.read_bytes()
    other = write(place / "other.json", ["Another question"])
    with pytest.raises(UserError, match=r"other prompts.*--overwrite"):
        run(*weights, "--test_input_path", other)
    assert result.read_bytes() == before
    run(*weights, "--test_input_path", other, "--overwrite")
    assert [record["instruction"] for record in answers(result)] == ["Another question"]
    write(result, {"mine": 1})
    with pytest.raises(UserError, match="other prompts"):
        run(*weights, "--test_input_path", other)


def test_answers_are_drawn_with_several_seeds(place):
    """Each as a run with that seed alone; judge.py takes a folder of them as samples of one system."""
    sampled = ["--lora_weights", place / "a", "--test_input_path", place / "prompts.json", "--do_sample"]
    sampled += ["--temperature", "5.0", "--num_beams", "1"]
    run(*sampled, "--seeds", "3,11")
    assert not (place / "a/test.json").exists() and (place / "a/test-3.yaml").is_file()
    drawn = {seed: (place / f"a/test-{seed}.json").read_bytes() for seed in (3, 11)}
    run(*sampled, "--seed", "11", "--output_path", place / "alone.json")
    assert drawn[11] == (place / "alone.json").read_bytes() != drawn[3]
    again = [f"f={place / 'a'}"] * 2
    found = {"f": place / "a/test-3.json", "f#2": place / "a/test-11.json"}
    assert answer_files(again) == found | {"f#3": found["f"], "f#4": found["f#2"]}


def test_the_same_run_again_has_nothing_to_do(place, capsys):
    weights = ("--lora_weights", place / "a", "--test_input_path", place / "prompts.json")
    run(*weights)
    capsys.readouterr()
    made, journal = json.loads((place / "a/.test.json.made").read_text("utf-8")), place / "a/.test.json.journal"
    header = {key: made[key] for key in made if key not in ("template", "dtype", "sha256")}
    batch_answers.Journal(journal, header).close(done=False)  # as a kill leaves it
    run(*weights)
    assert "--overwrite answers them again" in capsys.readouterr().out and not journal.exists()
    run(*weights, "--stop", "END")
    assert "5 answers" in capsys.readouterr().out
    run(*weights, "--num_beams", 1)
    assert "5 answers" in capsys.readouterr().out


@pytest.mark.parametrize(("sampling", "kills"), [((), (2, 13)), (("--do_sample", "--temperature", 1), (9,))])
def test_a_killed_run_goes_on_and_ends_as_if_undisturbed(place, script, sampling, kills):
    """Pitfall 16: killed at any moment, no answer that was there is computed in vain, and the file is the same."""
    many = write(place / "many.json", [f"Question {number}: {'why ' * (number % 7)}?" for number in range(24)])
    line = ("--lora_weights", place / "a", "--test_input_path", many, "--batch_size", 4, *sampling)
    line = ("generate.py", *line, "--is_ui", "False", "--max_new_tokens", 60)
    result, journal = place / "a" / "test.json", place / "a" / ".test.json.journal"
    assert script(*line).ok()
    undisturbed = result.read_bytes()
    result.unlink()
    for wanted in kills:
        running = script.start(*line)
        running.wait_until(lambda wanted=wanted: journal.exists() and journal.read_bytes().count(b'"output"') >= wanted)
        if wanted == kills[0]:
            running.kill()
            assert running.wait().status == -signal.SIGKILL
            continue
        for _ in range(2):  # Ctrl-C, twice
            running.kill(signal.SIGINT)
        ended = running.wait()
        assert ended.status == 130 and ended.err.endswith("generate.py: interrupted\n") and "Traceback" not in ended.err
        assert f"{journal}: keeps" in ended.out and "run the same command again" in ended.out
    assert "answers are there already; continuing" in script(*line).ok()
    assert result.read_bytes() == undisturbed


def test_an_unfinished_run_of_other_settings_is_named(place):
    many = write(place / "many.json", [f"Question {number}" for number in range(9)])
    line = ("--lora_weights", place / "a", "--test_input_path", many)
    journal = place / "a" / ".test.json.journal"
    batch_answers.Journal(journal, {"settings": "of another run"}).close(done=False)
    with pytest.raises(UserError, match="other settings"):
        run(*line)
    run(*line, "--overwrite")
    assert len(answers(place / "a" / "test.json")) == 9


def test_answers_edited_or_of_an_adapter_trained_anew_since_are_not_kept(place):
    weights, inputs = place / "a" / "adapter_model.safetensors", ("--test_input_path", place / "prompts.json")
    result, journal = place / "a" / "test.json", place / "a" / ".test.json.journal"
    run("--lora_weights", f"{place / 'a'},{place / 'b'}", *inputs)
    first = answers(result)
    write(result, [first[0] | {"output": "edited"}, *first[1:]])
    run("--lora_weights", place / "a", *inputs)
    assert answers(result) == first
    made = json.loads((place / "a" / ".test.json.made").read_text("utf-8"))
    shutil.copyfile(place / "b" / weights.name, weights)
    batch_answers.Journal(journal, {key: made[key] for key in made if key not in ("template", "dtype", "sha256")}).close(
        done=False
    )
    with pytest.raises(UserError, match=r"other settings \(adapter\)"):
        run("--lora_weights", place / "a", *inputs)
    journal.unlink()
    run("--lora_weights", place / "a", *inputs)
    assert answers(result) == answers(place / "b" / "test.json") != first


@pytest.mark.slow
def test_running_out_of_memory_halves_the_batches_and_changes_no_answer(place):
    """Pitfall 11: with the memory that one prompt needs, sixteen at once are halved until they fit."""
    long = "long " * 150
    many = write(place / "many.json", [f"{number} {long}" for number in range(16)])
    line = ("--lora_weights", place / "a", "--test_input_path", many, "--num_beams", 64, "--batch_size", 16)
    limit = (
        "import resource, sys, runpy; import utils.inference.engine, utils.inference.batch as b; old = b.Task.answer_all\n"
        "def limited(*a):\n"
        "    a[0].engine.loaded\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)\n"
        "    old(*a)\n"
        "b.Task.answer_all = limited; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    limited = [sys.executable, "-c", limit, *command(*line)[1:]]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "out of memory with 16 prompts at once; continuing with 8" in done.stdout
    found = (place / "a" / "test.json").read_bytes()
    run(*line[:-1], 1, "--overwrite")
    assert answers(place / "a" / "test.json") == json.loads(found)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_longer_than_planned_for_are_cut_into_batches_that_fit(place, monkeypatch, capsys, beams):
    """Pitfall 11: a plan has room for usual answers; where they are longer, no more is held than there is room for."""
    line = ("--lora_weights", place / "a", "--test_input_path", place / "prompts.json", "--num_beams", beams)
    run(*line, "--output_path", place / "plain.json", tokens=24)
    assert "longer than planned" not in capsys.readouterr().out
    longest, held = 120, []
    monkeypatch.setattr(batch_answers, "EXPECTED", 2)
    monkeypatch.setattr(batch_answers.Engine, "batch_room", lambda *_: 2 * beams * (longest + 24))
    step = DecodingBatch.step

    def counted(self, tokens):
        assert len(held) < 500, "planned anew without end"
        held.append(self.mask.numel())
        step(self, tokens)

    monkeypatch.setattr(DecodingBatch, "step", counted)
    run(*line, "--output_path", place / "cut.json", tokens=24)
    assert "longer than planned for; they are computed in" in capsys.readouterr().out
    assert max(held) <= 2 * beams * (longest + 24)
    assert answers(place / "cut.json") == answers(place / "plain.json")


def test_what_the_window_leaves_is_told_and_answers_that_it_cuts_are_counted(tmp_path, capsys):
    base, prompts = tiny.llama(tmp_path / "base", max_position_embeddings=100), write(tmp_path / "in.json", ["问", "问" * 20])
    run("--base_model", base, "--test_input_path", prompts, "--output_path", tmp_path / "out.json", tokens=60)
    said = capsys.readouterr().out
    assert "1 of 2 answers have room for 29 to 60 tokens instead of 60" in said and "2 answers reached the token limit" in said


def test_prompts_are_measured_before_the_weights_are_loaded(place, tmp_path, monkeypatch):
    """What is wrong with a prompt is told without the minutes that loading a large model takes."""

    def load(*_):
        pytest.fail("the weights were loaded")

    monkeypatch.setattr("utils.inference.engine.load_base", load)
    long = write(tmp_path / "long.json", ["far too long " * 2000])
    line = ("--lora_weights", place / "a", "--output_path", tmp_path / "out.json", "--test_input_path")
    with pytest.raises(UserError, match="the model's window is"):
        run(*line, long)
    assert not list(tmp_path.glob("*out.json*"))
    monkeypatch.undo()
    monkeypatch.setattr("utils.inference.engine.decode", lambda *_: pytest.fail("nothing is answered"))
    with pytest.raises(pytest.fail.Exception):
        run(*line, place / "prompts.json")
    assert not list(tmp_path.glob("*out.json*")), "without an answer there is nothing to keep"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (("--lora_weights", "{}/none", "--test_input_path", "{}/prompts.json"), "no such"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/none.json"), "none.json"),
        (("--lora_weights", "{}/a"), "--test_input_path"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/empty.json"), "empty.json"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/prompts.json", "--prompt_template", "none"), "none"),
        (
            ("--lora_weights", "{}/a,{}/b", "--test_input_path", "{}/prompts.json", "--output_path", "{}/x.json"),
            "--output_path",
        ),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/prompts.json", "--load_8bit", "--load_4bit"), "--load_4bit"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/prompts.json", "--seeds", "1,2"), "--do_sample"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/prompts.json", "--do_sample", "--seeds", "1,1"), "different"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/prompts.json", "--do_sample", "--seeds", "1,01"), "different"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/prompts.json", "--do_sample", "--seeds", "a"), "whole numbers"),
        (("--lora_weights", "{}/a", "--test_input_path", "{}/huge.json"), "window"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(place, line, named):
    write(place / "empty.json", [])
    write(place / "huge.json", ["far too long " * 2000])
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=named):
        run(*(part.replace("{}", str(place)) for part in line))
    assert sorted(place.rglob("*")) == before


def test_two_runs_do_not_write_one_file(place):
    with (
        batch_answers.locked(place / "a" / "test.json"),
        pytest.raises(UserError, match="in use"),
    ):
        run("--lora_weights", place / "a", "--test_input_path", place / "prompts.json")


def test_batches_hold_prompts_of_like_length():
    """Pitfall 11: two long prompts among many short ones do not make all of them long."""
    prompts = [[0] * length for length in [699, 42, 335, *range(50, 104)]]
    plenty = 10**6
    batches = batch_answers.plan(prompts, 4, 48, plenty, 0)
    assert sorted(place for batch in batches for place in batch) == list(range(len(prompts)))
    for batch in batches:
        lengths = [len(prompts[place]) for place in batch]
        assert len(batch) * max(lengths) <= 1.5 * sum(lengths)
        assert len(batch) * 4 <= batch_answers.ROWS
    assert len(batches) <= 6
    assert [len(batch) for batch in batch_answers.plan(prompts, 4, 48, plenty, 20)] == [20, 20, 17]
    for batch in batch_answers.plan(prompts, 4, 48, 4 * 800, 0):
        assert len(batch) == 1 or 4 * len(batch) * (len(prompts[batch[0]]) + 48) <= 4 * 800


def test_prompts_may_come_from_several_sources_with_weights(tmp_path, capsys):
    (tmp_path / "a.json").write_text('["一", "二", "三", "四"]', "utf-8")
    (tmp_path / "b.jsonl").write_text('{"instruction": "五", "category": "own"}\n', "utf-8")
    records = read_prompts([f"{tmp_path}/a.json:0.5", f"{tmp_path}/b.jsonl:2"])
    assert [record["category"] for record in records] == ["a", "a", "own", "own"]
    assert "weight 0.5 makes 2 of 4 records" in capsys.readouterr().out
    assert [record["instruction"] for record in records] == ["三", "四", "五", "五"]
    drawn = read_prompts([f"{tmp_path}/a.json:0.5"], seed=3)
    assert [record["instruction"] for record in drawn] == ["二", "四"] and "category" not in drawn[0]
    with pytest.raises(UserError, match="the weights leave no prompt"):
        read_prompts([f"{tmp_path}/a.json:0.01"])
    with pytest.raises(UserError, match="no such file"):
        read_prompts([f"{tmp_path}/c.json:0.5"])
    (tmp_path / "one").mkdir()
    (tmp_path / "a.json").rename(tmp_path / "one/a.json")
    (tmp_path / "one/.b.json").write_text('["藏"]', "utf-8")
    assert {record["category"] for record in read_prompts([str(tmp_path / "one")])} == {"a"}


def test_an_adapter_on_the_hub_answers_and_is_trained_on_as_one_in_a_folder(models, place, script, monkeypatch):
    """It lies in the hub's cache, as after a download: there is no network here."""
    cache = place / "hub/hub/models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree(place / "a", cache / "snapshots" / ("1" * 40))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub/hub"))
    line = ["--base_model", models / "base", "--test_input_path", place / "prompts.json"]
    on_the_hub = [*command(*line, "--lora_weights", "owner/name")[1:], "--output_path"]
    assert "give --output_path" in script(*on_the_hub[:-1], cwd=place).error
    script(*on_the_hub, place / "hub.json", cwd=place).ok()
    run(*line, "--lora_weights", str(place / "a"))
    assert answers(place / "hub.json") == answers(place / "a/test.json")
    records = write(place / "records.json", [{"instruction": "一", "input": "", "output": "二"}] * 8)
    train = ["--base_model", models / "base", "--data_path", records, "--dry_run", "--batch_size", 4]
    train += ["--output_dir", place / "out", "--val_set_size", 0, "--resume_from_checkpoint", "owner/name"]
    dry = script("finetune.py", *train, cwd=place).ok()
    assert "incremental training: weights from" in dry and "taken from" in dry
