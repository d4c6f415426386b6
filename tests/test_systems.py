"""Terminals and systems: names of any bytes, other locales, hang-ups, disks without locks, and systems that lack modules."""

import errno
import json
import os
import pkgutil
import pty
import runpy
import subprocess
import sys
import threading
import time

import pytest
import tiny
import torch
from tqdm.auto import tqdm

import utils
from utils import console, files
from utils.console import UserError, say_once
from utils.files import locked
from utils.training import checkpoints

ROOT = files.Path(__file__).parent.parent
RECORDS = [{"instruction": f"问题{number}", "input": "", "output": f"回答{number}"} for number in range(12)]
PROGRAMS = ("utils.evaluation.sandbox", "utils.merging.gguf_convert")  # of Linux, and of llama.cpp's packages
WITHOUT = """
import os, runpy, signal, sys
for name in {names!r}:  # the libraries, which have their own ways on other systems
    __import__(name)
for name in [name for name in sys.modules if name.split(".")[0] == "utils"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("fork", "sysconf", "sched_getaffinity", "getuid", "geteuid"):
    delattr(os, name)
del signal.SIGHUP
sys.platform = {system!r}
"""


@pytest.fixture
def training(tmp_path):
    """The command of a short training, and its output folder."""
    base = tiny.llama(tmp_path / "base")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS), "utf-8")
    argv = ["--base_model", base, "--data_path", tmp_path / "data.json", "--output_dir", tmp_path / "out"]
    argv += ["--val_set_size", 0, "--batch_size", 2, "--micro_batch_size", 2, "--num_epochs", 8, "--save_steps", 1000]
    return [str(ROOT / "finetune.py"), *map(str, argv)], tmp_path / "out"


def wait_until(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def has_begun(folder):
    """True once a step has been logged."""
    log = folder / "train_log.jsonl"
    return lambda: log.exists() and '"loss"' in log.read_text("utf-8")


@pytest.mark.slow
def test_a_terminal_that_hangs_up_leaves_a_checkpoint(training):
    """Whatever is written after that is refused by the system (EIO)."""
    command, out = training
    pid, terminal = pty.fork()
    if pid == 0:
        status = 70
        try:
            sys.argv, sys.stdout, sys.stderr = command, open(1, "w", buffering=1), open(2, "w", buffering=1)
            console.TERMINALS[:] = [1, 2]
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(status)
    wait_until(lambda: bool(os.read(terminal, 1)) and has_begun(out)())
    os.close(terminal)
    os.waitpid(pid, 0)  # with 129; or killed, since what leads a session gets the signal again as it ends
    assert checkpoints.newest_whole(out)


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/dev/null", None])
def test_a_home_that_cannot_be_written_to_or_is_not_told(training, tmp_path, home):
    """Encoded records, matplotlib's fonts and the hub's cache find another place, whichever script wants them."""
    command, out = training
    base, data = tmp_path / "base", tmp_path / "data.json"
    places = ("MPLCONFIGDIR", "XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "HOME")
    env = {name: value for name, value in os.environ.items() if name not in places} | ({"HOME": home} if home else {})
    asked = ["--lora_weights", out, "--is_ui", "False", "--test_input_path", data, "--max_new_tokens", "2"]
    for argv in (
        [*command, "--max_steps", "2"],
        ["merge_weights.py", "--base_model", base, "--lora_model", out, "--output_dir", tmp_path / "merged"],
        ["generate.py", "--base_model", base, *asked, "--output_path", tmp_path / "answers.json"],
        ["judge.py", "--chain", out, "--held_out", f"out={data}", "--output_dir", tmp_path / "judged"],
        ["data/clean.py", "--data_path", data, "--output_path", tmp_path / "clean.json"],
    ):
        argv = [sys.executable, *map(str, argv)]
        ended = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    assert (out / "loss.png").is_file() and (out / "adapter_model.safetensors").is_file()


def test_where_there_is_a_card_a_script_is_started_anew(script, tmp_path, monkeypatch):
    """What a process knows of CUDA does not survive a fork; without a card, the tests' scripts are forks."""
    (tmp_path / "tell.py").write_text("import sys\nprint('torch' in sys.modules, *sys.argv[1:])", "utf-8")
    assert script(tmp_path / "tell.py", "a b").ok() == "True a b\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script(tmp_path / "tell.py", "a b").ok() == "False a b\n"


def test_names_are_utf8_in_any_locale(tmp_path):
    (tmp_path / "数据.json").write_text(json.dumps(RECORDS), "utf-8")
    argv = [sys.executable, ROOT / "data/clean.py", "--data_path", "数据.json", "--output_path", "干净.json"]
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ended = subprocess.run(argv, cwd=tmp_path, env={**os.environ, **locale}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "干净.json").is_file() and "\\u" in ended.stdout and ended.stdout.isascii()


@pytest.mark.parametrize("name", ["finetune.py", "generate.py", "merge_weights.py", "judge.py", "data/clean.py"])
def test_a_name_that_is_not_utf8_is_refused_by_every_script(script, tmp_path, name):
    option = {"judge.py": "--output_dir", "data/clean.py": "--data_path"}.get(name, "--base_model")
    refused = script(name, option, os.fsdecode(b"gbk\xca\xfd\xbe\xdd"), cwd=tmp_path)
    assert "the name is not UTF-8; rename the file or folder" in refused.error


def test_prompts_in_a_file_whose_name_is_not_utf8_are_refused_before_they_are_answered(tmp_path):
    from utils.datasets.prompts import read_prompts

    (tmp_path / os.fsdecode(b"\xca\xfd.json")).write_text('[{"instruction": "a"}]')
    with pytest.raises(UserError, match="the name is not UTF-8"):
        read_prompts([str(tmp_path)])


def test_on_a_disk_without_locks_the_process_that_the_file_names_counts(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    say_once.cache_clear()
    with locked(tmp_path / "out"):
        lock = tmp_path / ".out.lock"
        assert "has no file locks" in capsys.readouterr().out and f"process {os.getpid()} on" in lock.read_text()
        lock.write_text(lock.read_text().replace(str(os.getpid()), str(os.getppid())))
        with pytest.raises(UserError, match=f"in use by process {os.getppid()}"), locked(tmp_path / "out"):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_every_module_is_imported_where_linux_s_are_missing_and_merging_works(script, tmp_path, system):
    """An emulation of what is missing; nothing was tried on the systems themselves."""
    base = tiny.llama(tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter")
    names = [module.name for module in pkgutil.walk_packages(utils.__path__, "utils.") if module.name not in PROGRAMS]
    argv = ["merge_weights.py", "--base_model", base, "--lora_model", adapter, "--output_dir", tmp_path / "merged"]
    (tmp_path / "other.py").write_text(
        WITHOUT.format(system=system, names=names)
        + f"for name in {names!r}:\n    __import__(name)\n"
        + f"sys.argv = {[str(ROOT / argv[0]), *map(str, argv[1:])]!r}\n"
        + "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    told = script(tmp_path / "other.py").ok()
    assert "done: " in told and (tmp_path / "merged" / "model.safetensors").is_file()
    assert ("has no file locks" in told) and "peak memory" in told
