"""Checkpoints: which are spared, which count, and that they are on the disk before they do."""

import contextlib
import errno
import os
import pickle
import signal
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from scripting import ROOT
from trainings import entries, options

from utils.console import UserError
from utils.training import checkpoints, run, start

torch.set_num_threads(1)


def test_the_best_checkpoint_is_spared(script, bases, data, tmp_path):
    """The second step goes too far, so the first is the best, and one checkpoint is kept beside it."""
    changes = {"val_set_size": 8, "learning_rate": 0.5, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", lr_scheduler_type="constant", **changes)).ok()
    validation = entries(tmp_path / "out", "eval_loss")
    best = min(validation, key=validation.get)
    assert best == 1
    assert [checkpoints.step_of(folder) for folder in checkpoints.in_order(tmp_path / "out")] == [1, 2]


def test_a_half_deleted_checkpoint_is_not_taken_for_whole(tmp_path, monkeypatch):
    folder, link = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    folder.mkdir()
    link.symlink_to(folder)
    (folder / "a").write_text("x")
    checkpoints.seal(folder, {})
    checkpoints.remove(link)
    assert checkpoints.is_whole(folder) and not link.exists()
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda _: None)
        checkpoints.remove(folder)
    assert (folder / "a").exists() and not checkpoints.is_whole(folder)
    checkpoints.remove(folder)
    assert not folder.exists()


def test_checkpoints_are_in_the_order_of_their_steps_and_what_is_none_is_left(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", "checkpoint--1", "mine-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert [checkpoints.step_of(folder) for folder in checkpoints.in_order(tmp_path)] == [9, 20, 100]
    checkpoints.rotate(tmp_path, 1, 9)
    assert [checkpoints.step_of(folder) for folder in checkpoints.in_order(tmp_path)] == [9, 100]
    assert len(list(tmp_path.iterdir())) == 6


def test_killed_while_an_old_run_is_cleared_its_folder_holds_no_finished_one(tmp_path, monkeypatch):
    for name in ("lineage.json", "data.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(checkpoints, "remove", killed)
        start.clear(str(tmp_path))
    assert not (tmp_path / "lineage.json").exists()
    start.clear(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"options": {"seed": 2, "new": None}}, "seed was 1, is 2"),
        ({"options": {"seed": 1, "new": "x"}}, "new was None, is 'x'"),
        ({"options": {}}, "seed was 1, is None"),
        ({"parent": {"sha256": "q", "name": "elsewhere"}}, "parent adapter was 'p', is 'q'"),
        ({"parent": None, "base": "c"}, "base model was 'b', is 'c'; parent adapter was 'p', is None"),
        ({"parent": {"sha256": "p", "name": "moved"}}, ""),
        ({"data": {"a.json": "2", "c.json": "3"}},
         "data file a.json was '1', is '2'; data file b.json was '1', is None; data file c.json was None, is '3'"),
    ],
)  # fmt: skip
def test_a_run_is_resumed_with_what_it_began_with(tmp_path, changes, told):
    run = {"options": {"seed": 1}, "base": "b", "parent": {"sha256": "p", "name": "f1"}, "data": {"a.json": "1", "b.json": "1"}}
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    checkpoints.seal(folder, run)
    start.check_unchanged(start.RunStart(None, None), run | {"base": "any"})
    with pytest.raises(UserError) if told else contextlib.nullcontext() as error:
        start.check_unchanged(start.RunStart(None, folder), run | changes)
    assert not told or str(error.value) == (
        f"{folder}: belongs to an unfinished run with other options or data ({told}); "
        "give the old ones to resume it, or --overwrite_output_dir to start over"
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (pickle.UnpicklingError("x"), "{}: refused, because loading a file in it would run code; delete it"),
        (torch._dynamo.exc.TorchDynamoException(" \n why\nmore"),
         "--torch_compile: torch cannot compile the model here: why; train without it"),
        (ZeroDivisionError("ours"), ""),
    ],
)  # fmt: skip
def test_what_ends_a_training_is_told_and_clears_up(tmp_path, error, told):
    closed, before = [], [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    out = tmp_path / "out"
    out.mkdir()

    def fails(resume_from_checkpoint):
        assert resume_from_checkpoint == str(tmp_path / "checkpoint-3")
        raise error

    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=1, output_dir=str(out), process_index=2), stopped_by=None, train=fails,
        budget=SimpleNamespace(load=lambda *given: closed.append(given)), returning_loss=lambda: contextlib.nullcontext(False),
        run_log=SimpleNamespace(close=lambda: closed.append(1)),
    )  # fmt: skip
    with pytest.raises(UserError if told else ZeroDivisionError) as raised:
        run.train(trainer, tmp_path / "checkpoint-3")
    assert not told or str(raised.value) == told.format(tmp_path / "checkpoint-3")
    assert closed == [(tmp_path / "checkpoint-3", 2), 1] and not out.exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


STOPPED = """
import contextlib, signal, sys
from types import SimpleNamespace
sys.path.insert(0, {root!r})
from utils.training import run

def train(resume_from_checkpoint):
    for name in sys.argv[3:]:
        signal.raise_signal(getattr(signal, name))
    print("the step ends")

def close():
    if "SIGHUP" in sys.argv:  # the shell's, after the kernel's
        signal.raise_signal(signal.SIGHUP)
    print("log closed")

trainer = SimpleNamespace(
    args=SimpleNamespace(world_size=int(sys.argv[1]), output_dir=sys.argv[2]), stopped_by=None, train=train,
    state=SimpleNamespace(global_step=3), returning_loss=lambda: contextlib.nullcontext(True),
    run_log=SimpleNamespace(close=close),
)
run.train(trainer, None)
"""


@pytest.mark.parametrize(
    ("ranks", "signals", "status"),
    [(1, ["TERM"], 143), (1, ["INT"], 130), (1, ["HUP", "HUP"], 129), (1, ["TERM", "INT"], -2), (2, ["TERM", "TERM"], 143),
     (2, ["INT", "TERM"], 143), (1, [], 0)],
)  # fmt: skip
def test_a_signal_lets_the_step_end_and_a_second_one_does_not_where_nobody_else_waits(script, tmp_path, ranks, signals, status):
    (tmp_path / "stopped.py").write_text(STOPPED.format(root=str(ROOT)))
    (tmp_path / "out").mkdir()
    ended = script(tmp_path / "stopped.py", ranks, tmp_path / "out", *(f"SIG{name}" for name in signals))
    stopping = f"stopping after this step, with a checkpoint{'; once more stops at once' if ranks == 1 else ''}"
    end = ["stopped at step 3; run the same command again to resume"] if signals else []
    heard = [stopping] * (len(signals) if "HUP" not in signals else 1)  # which comes twice, from the kernel and the shell
    told = [stopping] if status < 0 else [*heard, "the step ends", "log closed", *end]
    assert (ended.status, ended.out.splitlines()) == (status, told)
    assert (tmp_path / "out").exists() == (status < 0), "a run that left nothing leaves no folder"


@pytest.mark.parametrize(
    ("file", "content"),
    [("a", "y"), ("a", None), ("checkpoint.json", None), ("checkpoint.json", "[]"), ("checkpoint.json", '{"files": {}}'),
     ("checkpoint.json", '{"run": {}, "files": []}')],
)  # fmt: skip
def test_a_checkpoint_of_which_anything_has_changed_is_not_whole(tmp_path, file, content):
    (tmp_path / "a").write_text("x")
    checkpoints.seal(tmp_path, {})
    assert checkpoints.is_whole(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    assert not checkpoints.is_whole(tmp_path)


def test_a_checkpoint_is_on_the_disk_before_it_is_sealed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoints, "sync", synced.append)
    (tmp_path / "deep").mkdir()
    files = [tmp_path / "a", tmp_path / "deep" / "b"]
    for file in files:
        file.write_text("x")
    checkpoints.seal(tmp_path, {})
    assert synced == files and checkpoints.is_whole(tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_removed_and_the_newest_named(script, bases, data, tmp_path, monkeypatch):
    seal = checkpoints.seal

    def sealed(folder, run):
        if checkpoints.step_of(folder) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(folder, run)

    monkeypatch.setattr(checkpoints, "seal", sealed)
    out = tmp_path / "out"
    error = script("finetune.py", *options(bases["llama"], data, out, save_steps=1, max_steps=3)).error
    assert error == (
        f"finetune.py: error: {out}/checkpoint-3: could not be written ([Errno 28] No space left on device); "
        f"free some space and run the same command again: it resumes from {out}/checkpoint-2"
    )
    assert [folder.name for folder in checkpoints.in_order(out)] == ["checkpoint-1", "checkpoint-2"]
