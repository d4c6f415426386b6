"""The commands of docs/distributed.md run: two machines, played by two launchers here, give what one process gives."""

import os
import re
import shlex
import socket
import subprocess
import sys

import pytest
from scripting import ROOT
from trainings import losses, options

TEXT = (ROOT / "docs" / "distributed_EN.md").read_text("utf-8")
COMMANDS = re.findall(r"^(torchrun --nnodes 2|accelerate launch --multi_gpu) (.*?) finetune\.py", TEXT, re.MULTILINE)


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return str(some.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_give_what_one_process_gives(script, bases, data, tmp_path, launcher):
    changes = {"max_steps": 2, "lora_dropout": 0}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "one", **changes)).ok()
    pair = [rest for begins, rest in COMMANDS if begins.startswith(launcher)]
    assert len(pair) == 2
    port, running = free_port(), []
    for rest in pair:
        words = shlex.split(rest.replace("10.0.0.1", "127.0.0.1").replace("29500", port))
        module = {
            "torchrun": ["torch.distributed.run", "--nnodes", "2"],
            "accelerate": ["accelerate.commands.launch", "--multi_gpu"],
        }
        words = shlex.split(shlex.join(words).replace("--nproc_per_node 2", "--nproc_per_node 1"))
        words = shlex.split(shlex.join(words).replace("--num_processes 4", "--num_processes 2"))
        run = options(bases["llama"], data, tmp_path / "two", **changes)
        argv = [sys.executable, "-m", *module[launcher], *words, "finetune.py", *run]
        running.append(
            subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        )
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_the_check_of_a_gpu_says_where_there_is_none(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu_check.sh", tmp_path / "r.md"], capture_output=True, text=True, env=env
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "finds no NVIDIA card" in ended.stderr
    assert not (tmp_path / "r.md").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_the_check_of_a_gpu_writes_a_report_of_all_its_parts(tmp_path, status):
    """Rehearsed with two cards that are not there, and a Python that ends at once."""
    (tmp_path / "bin").mkdir()
    programs = {
        "nvidia-smi": "case $1 in -L) echo one; echo two;; *) echo 'Some Card, 550.54, 24564 MiB';; esac",
        "bin/python": f"echo 'figure: 1234 tokens/s of' $2; case $1 in -c) exit 0;; *) exit {status};; esac",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPU_VENV": str(tmp_path), "DEMO": str(tmp_path)}
    report = tmp_path / "r.md"
    ended = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu_check.sh", report], capture_output=True, text=True, env=os.environ | env
    )
    assert ended.returncode == status, ended.stderr
    text = report.read_text("utf-8")
    assert "Some Card, 550.54, 24564 MiB" in text and text.count("figure: 1234 tokens/s") == 5 + 1 + 5 * status
    for part in ("tests on the card", "demo, 8bit", "demo, bfloat16", "demo, 4bit", "two cards"):
        assert f"| {part} | {'FAIL' if status else 'pass'} |" in text
    assert not (tmp_path / "r.md.figures").exists()
