"""Files that are complete or not there: what is on the disk before a name says so."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from utils import files
from utils.console import UserError
from utils.journal import Journal

NOBODY = 2**22 + 1  # no process of Linux has such a number


@pytest.fixture
def events(monkeypatch):
    """What is synced and renamed, in order: ("fsync" | "replace" | "rename", the name of the file or folder)."""
    found = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name_of(number):
        return os.path.basename(os.readlink(f"/proc/self/fd/{number}"))

    monkeypatch.setattr(os, "fsync", lambda number: (found.append(("fsync", name_of(number))), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (found.append(("replace", new.name)), replace(old, new)))
    monkeypatch.setattr(os, "rename", lambda old, new: (found.append(("rename", new.name)), rename(old, new)))
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, events):
    left = [tmp_path / f".a.json.{socket.gethostname()}.{process}.part" for process in (os.getppid(), NOBODY)]
    for file in left:
        file.touch()
    with files.replacing(tmp_path / "a.json") as aside:
        aside.write_text("1", "utf-8")
    assert events == [("fsync", aside.name), ("replace", "a.json")]
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", left[0].name}  # not what a running process writes


@pytest.mark.parametrize("way", [files.replacing, files.replacing_folder])
def test_a_second_ctrl_c_does_not_stop_the_clearing_up(tmp_path, monkeypatch, way):
    with pytest.raises(KeyboardInterrupt, match="the first"), way(tmp_path / "made") as aside:
        aside.touch()
        for module, name in ((Path, "unlink"), (shutil, "rmtree")):
            old = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, old=old, **k: (os.kill(os.getpid(), signal.SIGINT), old(*a, **k)))
        raise KeyboardInterrupt("the first")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, events):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with files.replacing_folder(tmp_path / "model") as aside:
        (aside / "deeper").mkdir()
        for name in ("a", "deeper/b"):
            (aside / name).write_text("1", "utf-8")
    assert sorted(events[:2]) == [("fsync", "a"), ("fsync", "b")]
    assert events[-1] == ("rename", "model")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "b", "deeper", "model"]


def test_the_lock_of_a_process_that_is_gone_is_taken_and_another_machine_s_is_not(tmp_path, capsys):
    lock = tmp_path / ".out.lock"
    lock.write_text(f"process {NOBODY} on {socket.gethostname()}")
    with files.locked(tmp_path / "out"):
        assert f"removed a stale lock left by process {NOBODY}" in capsys.readouterr().out
    lock.write_text("process 1 on another")
    with (
        pytest.raises(UserError, match="in use by process 1 on another; wait for it, or delete"),
        files.locked(tmp_path / "out"),
    ):
        pass
    assert lock.read_text() == "process 1 on another"


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old", "utf-8")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a") as aside:
        aside.write_text("new", "utf-8")
        raise ZeroDivisionError
    assert [(file.name, file.read_text("utf-8")) for file in tmp_path.iterdir()] == [("a", "old")]


def test_json_is_written_to_be_read_by_people(tmp_path):
    files.write_json(tmp_path / "a.json", {"名": ["值"]})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n "名": [\n  "值"\n ]\n}\n'


def test_a_journal_has_on_the_disk_what_it_was_given(tmp_path, events):
    journal = Journal(tmp_path / "journal", {"run": 1})
    journal.put("a", 1)
    assert events == [("fsync", "journal")] * 2
    assert (tmp_path / "journal").read_bytes() == b'{"run": 1}\n{"key": "a", "value": 1}\n'


def test_a_half_line_of_a_journal_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    Journal(path, {"run": 1}).put("a", 1)
    with open(path, "ab") as file:
        file.write(b'{"key": "b", "val')
    journal = Journal(path, {"run": 1})
    assert journal.values == {"a": 1}
    journal.put("c", 3)
    assert Journal(path, {"run": 1}).values == {"a": 1, "c": 3}


def test_a_journal_of_another_run_is_told_by_what_either_has_and_the_other_has_not(tmp_path):
    Journal(tmp_path / "journal", {"same": [1], "other": 1, "old": 0}).put("a", 1)
    with pytest.raises(UserError, match=r"journal: belongs to an unfinished run with other settings \(new, old, other\)"):
        Journal(tmp_path / "journal", {"same": (1,), "other": 2, "new": 0})


def test_a_finished_journal_goes_and_another_one_stays(tmp_path):
    for done in (False, True):
        Journal(tmp_path / str(done), {}).close(done)
    assert [file.name for file in tmp_path.iterdir()] == ["False"]
