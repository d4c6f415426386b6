"""Trackers are really written to, without the net, and read back by their own libraries; each is asked for before the work."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scripting import ROOT, warm
from trainings import history, options

import finetune
from utils.console import UserError
from utils.files import write_json
from utils.training import trackers

warm("transformers.trainer", "utils.evaluation.during_training")
torch.set_num_threads(1)

LOG = """
def records(path):  # of LevelDB's log format, behind a header of seven bytes
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield record
            record = b""
"""
READ = {
    "wandb": LOG
    + """
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
for data in records(next(Path("wandb").glob("offline-run-*/*.wandb"))):
    record = Record()
    record.ParseFromString(data)
    for item in record.history.item:
        if item.key == "train/loss" or list(item.nested_key) == ["train/loss"]:
            losses.append(json.loads(item.value_json))
for table in sorted(Path("wandb").rglob("*.table.json"), key=lambda file: file.stat().st_mtime):
    answers.append([answer for _, answer in json.loads(table.read_text("utf-8"))["data"]])
""",
    "swanlab": LOG
    + """
from pathlib import Path
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
for data in records(next(Path("swanlog").glob("run-*/*.swanlab"))):
    record = Record()
    record.ParseFromString(data)
    if record.HasField("scalar") and record.scalar.key == "train/loss":
        losses.append(record.scalar.value.number)
answers.append([file.read_text("utf-8") for file in Path("swanlog").glob("run-*/media/text/*")])
""",
    "mlflow": """
import mlflow
client = mlflow.MlflowClient()
(run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
assert run.info.status == "FINISHED"
losses = [one.value for one in client.get_metric_history(run.info.run_id, "loss")]
for file in sorted(client.list_artifacts(run.info.run_id, "answers"), key=lambda one: int(one.path.split("-")[-1][:-3])):
    text = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{file.path}")
    answers.append([line.split(" | ")[1].removesuffix(" |") for line in text.splitlines()[2:]])
""",
}


def run(base, data, folder, name, python=sys.executable):
    """A short run in `folder` with one tracker."""
    write_json(folder / "asked.json", [{"instruction": f"{n}+{n}"} for n in range(3)])
    argv = options(base, data, folder / "out", eval_answers=folder / "asked.json", max_new_tokens=4, report_to=f"[{name}]")
    env = os.environ | {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_TRACKING_URI": str(folder / "mlruns")}
    env |= {"MLFLOW_ALLOW_FILE_STORE": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    done = subprocess.run(
        [python, ROOT / "finetune.py", *argv], cwd=folder, capture_output=True, text=True, env=env, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return env


def logged(folder):
    """The losses and the answers of the run's own log."""
    entries = history(folder / "out")
    answers = [[one["answer"] for one in entry["answers"]] for entry in entries if "answers" in entry]
    return [entry["loss"] for entry in entries if "loss" in entry], answers


def test_tensorboard_holds_the_losses_and_the_answers(script, bases, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_json(tmp_path / "asked.json", [{"instruction": f"{n}+{n}"} for n in range(3)])
    changes = {"eval_answers": tmp_path / "asked.json", "max_new_tokens": 4, "report_to": "[tensorboard]"}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **changes)).ok()
    losses, answers = logged(tmp_path)
    events = EventAccumulator(str(next((tmp_path / "out/runs").iterdir())))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("eval/answers/text_summary")]
    assert len(texts) == len(answers) == 2
    assert trackers.markdown([["a|b", "c\nd"]]).splitlines()[-1] == "| a\\|b | c<br>d |"
    for text, given in zip(texts, answers, strict=True):
        assert all(answer.replace("|", "\\|").replace("\n", "<br>") in text for answer in given)


def test_each_tracker_is_told_the_step_and_both_texts_of_each_answer(monkeypatch):
    """With stand-ins for the packages, which are not installed here; the test below has the real ones where they are."""
    told = []

    def noting(name):
        return lambda *args, **options: told.append((name, *args, options)) or len(told)

    used = {"wandb": ("Table", "log", "init"), "swanlab": ("Text", "log", "init"), "mlflow": ("log_text", "search_experiments")}
    for name, functions in used.items():
        module = SimpleNamespace(**{function: noting(f"{name}.{function}") for function in functions})
        monkeypatch.setitem(sys.modules, name, module)
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=7), args=SimpleNamespace(report_to=["mlflow", "swanlab", "wandb"])
    )
    trackers.show_answers(trainer, [{"question": "问", "answer": "答"}])
    assert told == [
        ("wandb.Table", {"columns": ["question", "answer"], "data": [["问", "答"]]}),
        ("wandb.log", {"eval/answers": 1, "train/global_step": 7}, {}),
        ("swanlab.Text", "答", {"caption": "问"}),
        ("swanlab.log", {"eval/answers": [3]}, {"step": 7}),
        ("mlflow.log_text", trackers.markdown([["问", "答"]]), "answers/step-7.md", {}),
    ]
    told.clear()
    for name in ("WANDB_PROJECT", "SWANLAB_PROJECT"):
        monkeypatch.setenv(name, f"of {name}")
    given = finetune.Options(base_model="", data_path="", report_to=[*used, "tensorboard"], wandb_run_name="mine")
    trackers.start(given)
    begun = [
        ("wandb.init", {"project": "of WANDB_PROJECT", "name": "mine"}),
        ("swanlab.init", {"project": "of SWANLAB_PROJECT", "experiment_name": "mine"}),
        ("mlflow.search_experiments", {"max_results": 1}),
    ]
    assert told == begun
    for name in ("WANDB_PROJECT", "SWANLAB_PROJECT"):
        monkeypatch.delenv(name)
    trackers.start(dataclasses.replace(given, report_to=["wandb", "swanlab"], wandb_run_name=""))
    assert told[3:] == [
        ("wandb.init", {"project": "huggingface", "name": None}), ("swanlab.init", {"project": None, "experiment_name": None})
    ]  # fmt: skip
    del told[3:]
    monkeypatch.setenv("RANK", "1")
    trackers.start(given)
    assert told == begun, "the first rank alone begins runs"
    monkeypatch.setenv("RANK", "0")
    fixes = {"wandb": "log in, or set WANDB_MODE=offline", "swanlab": "log in, or set SWANLAB_MODE=offline"}
    for name, fix in (fixes | {"mlflow": "check MLFLOW_TRACKING_URI, such as a folder"}).items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError) as error:
            trackers.start(dataclasses.replace(given, report_to=[name]))
        reason = f"import of {name} halted; None in sys.modules"
        assert str(error.value) == f"--report_to {name}: could not start a run ({reason}); {fix}, or leave it out"


@pytest.mark.parametrize(
    ("changes", "project", "wanted"),
    [
        ({"report_to": ["none"]}, "", []),
        ({"report_to": ["mlflow", "wandb"], "wandb_project": "mine"}, "", ["mlflow", "wandb"]),
        ({"wandb_project": "mine"}, "", ["wandb"]),
        ({}, "theirs", ["wandb"]),
    ],
)
def test_the_trackers_asked_for_and_what_wandb_reads_of_its_options(monkeypatch, changes, project, wanted):
    for name in ("WANDB_PROJECT", "WANDB_WATCH", "WANDB_LOG_MODEL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_PROJECT", project)
    given = finetune.Options(base_model="", data_path="", wandb_watch="all", wandb_log_model="end", **changes)
    assert trackers.wanted(given) == wanted
    trackers.pass_on(given)
    found = [os.environ[f"WANDB_{name}"] for name in ("PROJECT", "WATCH", "LOG_MODEL")]
    assert found == [changes.get("wandb_project", project), "all", "end"]


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_each_tracker_is_written_to_offline(bases, data, tmp_path, name):
    """Set TRACKERS_PYTHON to the Python of an environment that has the trackers beside what this project needs."""
    python = os.environ.get("TRACKERS_PYTHON", sys.executable if importlib.util.find_spec(name) else "")
    if not python:
        pytest.skip(f"{name} is not installed; name the Python of an environment that has it as TRACKERS_PYTHON")
    env = run(bases["llama"], data, tmp_path, name, python)
    program = f"import json\nlosses, answers = [], []\n{READ[name]}\nprint('found ' + json.dumps([losses, answers]))"
    read = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300)
    assert read.returncode == 0, read.stderr
    losses, answers = json.loads(read.stdout.rpartition("found ")[2])
    wanted = logged(tmp_path)
    assert losses == pytest.approx(wanted[0], rel=1e-4)
    found, given = ({one.strip() for answers in steps for one in answers} for steps in (answers, wanted[1]))
    assert found == given


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_work(script, bases, data, tmp_path, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    error = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", report_to=f"[tensorboard,{name}]")).error
    assert f"--report_to {name}: the {name} package is not installed; pip install {name}, or leave it out" in error
    assert not (tmp_path / "out").exists()
