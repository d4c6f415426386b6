"""Files that are complete or not there: what is on the disk before a name says so."""

import contextlib
import os
import shutil
import signal
import socket
import stat
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


@pytest.mark.parametrize("name", ["a.json", "[a]*?.json"])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, events, name):
    left = [tmp_path / f".{name}.{socket.gethostname()}.{process}.part" for process in (os.getppid(), NOBODY)]
    for file in left:
        file.touch()
    with files.replacing(tmp_path / name) as aside:
        aside.write_text("1", "utf-8")
    assert events == [("fsync", aside.name), ("replace", name)]
    assert {file.name for file in tmp_path.iterdir()} == {name, left[0].name}  # not what a running process writes


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


def test_the_lock_of_a_process_that_is_gone_is_taken(tmp_path, capsys):
    lock = tmp_path / ".out.lock"
    lock.write_text(f"process {NOBODY} on {socket.gethostname()}")
    with files.locked(tmp_path / "out"):
        assert f"removed a stale lock left by process {NOBODY}" in capsys.readouterr().out


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_lock_names_who_has_it_while_it_is_held_and_leaves_no_folder(tmp_path, monkeypatch, has_locks):
    """Also on a disk without locks, where another machine's file counts, too."""
    if not has_locks:
        monkeypatch.setattr(files, "fcntl", None)
    lock = tmp_path / "a" / "b" / ".out.lock"
    with files.locked(tmp_path / "a" / "b" / "out"):
        assert lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(tmp_path.iterdir()) == []
    lock.parent.mkdir(parents=True)
    lock.write_text("process 1 on another")
    with pytest.raises(UserError) as error, files.locked(tmp_path / "a" / "b" / "out"):
        pass
    fix = f"wait for it, or delete {lock} if that run has ended"
    assert str(error.value) == f"{tmp_path}/a/b/out: in use by process 1 on another; {fix}"
    assert lock.read_text() == "process 1 on another"


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old", "utf-8")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a") as aside:
        aside.write_text("new", "utf-8")
        raise ZeroDivisionError
    assert [(file.name, file.read_text("utf-8")) for file in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_json_is_written_to_be_read_by_people_whom_the_umask_lets(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        files.write_json(tmp_path / "a.json", {"名": ["值"]})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n "名": [\n  "值"\n ]\n}\n'
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1,\n "b" 2}', "not JSON at line 2, column 6 (Expecting ':' delimiter); fix the file"),
        ("名值".encode("gb18030"), "byte 0 is not UTF-8; convert the file to UTF-8"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8; convert the file to UTF-8"),
        (b"[" * 200_000, "nested too deeply, or a number in it too long, to be read; fix the file"),
        (b"1" * 5000, "nested too deeply, or a number in it too long, to be read; fix the file"),
        (None, "cannot be read (No such file or directory); check the path"),
    ],
)
def test_why_json_cannot_be_read_is_told(tmp_path, content, problem):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        files.read_json(file)
    assert str(error.value) == f"{file}: {problem}"
    file.write_text('\ufeff{"a": 1}', "utf-8")
    assert files.read_json(file) == {"a": 1}
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path, "cannot be read (Is a directory); check the path"),
                      (tmp_path / "pipe", "is not a regular file; save its output to a file first")):  # fmt: skip
        for read in (files.read_json, files.sha256):
            with pytest.raises(UserError) as error:
                read(path)
            assert str(error.value) == f"{path}: {why}"


@pytest.mark.parametrize("option", ["--output_dir", "--output_path"])
def test_why_a_folder_cannot_take_results_is_told_with_its_option(tmp_path, monkeypatch, option):
    (tmp_path / "file").touch()
    top = "--output_dir /: is the disk's top folder; name one in it"
    short = f"{option} {tmp_path}: 1 MB are needed and 0 MB are free; make room, or choose another disk"
    shut = f"{tmp_path}: cannot be written to (Permission denied); give another {option}"
    usage = {"full": (10**9, 10**9, 0), "roomy": (10**9, 0, 10**9), "unknown": (0, 0, 0)}

    def said(folder, disk="roomy", writable=True):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(*usage[disk]))
        monkeypatch.setattr(os, "access", lambda path, mode: writable)
        try:
            files.check_folder(folder, option)
        except UserError as error:
            return str(error)

    assert said("") == f"{option}: is empty; name a folder"
    assert said("/") == (top if option == "--output_dir" else None)
    assert said(tmp_path / "file" / "out") == f"{tmp_path}/file: is not a folder; give another {option}"
    assert said(tmp_path / "a" / "out", "full") == short
    assert said(tmp_path / "a" / "out", writable=False) == shut
    assert said(tmp_path / "a" / "out", "unknown") is None and said(tmp_path / "a" / "out") is None


def test_what_a_result_would_be_named_is_no_folder(tmp_path):
    ends = (".json", ".jsonl", ".csv", ".yaml", ".safetensors", ".jinja", ".png", ".md", ".html", ".made", ".journal")
    for end in (*ends, "", ".old"):
        path = tmp_path / f"a{end}"
        path.mkdir()
        with pytest.raises(UserError) if end in ends else contextlib.nullcontext() as error:
            files.check_free([tmp_path / "b.json", path], "--output_path")
        if error:
            assert str(error.value) == f"{path}: is a folder with the name of a file; move it, or give another --output_path"


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


def test_a_damaged_line_of_a_journal_is_named_by_its_number(tmp_path):
    path, good = tmp_path / "journal", b'{"key": "a", "value": 1}\n'
    for number, lines in enumerate((b"{]\n", b"{}\n{]\n" + good, b"{}\n" + good + b'{"key": "b"}\n' + good), 1):
        path.write_bytes(lines)
        with pytest.raises(UserError, match=f"^{path}: line {number} is damaged; delete this file to start over$"):
            Journal(path, {})


def test_a_journal_of_another_run_is_told_by_what_either_has_and_the_other_has_not(tmp_path):
    Journal(tmp_path / "journal", {"same": [1], "other": 1, "old": 0}).put("a", 1)
    with pytest.raises(UserError, match=r"journal: belongs to an unfinished run with other settings \(new, old, other\)"):
        Journal(tmp_path / "journal", {"same": (1,), "other": 2, "new": 0})


def test_a_finished_journal_goes_and_another_one_stays(tmp_path):
    for done in (False, True):
        Journal(tmp_path / str(done), {}).close(done)
    assert [file.name for file in tmp_path.iterdir()] == ["False"]
