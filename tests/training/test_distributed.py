"""The commands of docs/distributed.md run: two machines, played by two launchers here, give what one process gives."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripting import ROOT, free_port
from trainings import losses, options

from utils.training.checkpoints import MANIFEST

TEXT = (ROOT / "docs" / "distributed_EN.md").read_text("utf-8")
COMMANDS = re.findall(r"^(torchrun --nnodes 2|accelerate launch --multi_gpu) (.*?) finetune\.py", TEXT, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_give_what_one_process_gives(script, bases, data, tmp_path, launcher):
    changes = {"max_steps": 2, "lora_dropout": 0}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "one", **changes)).ok()
    pair = [rest for begins, rest in COMMANDS if begins.startswith(launcher)]
    assert len(pair) == 2
    port, running = str(free_port()), []
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


SRUN = """#!{python}
import os, subprocess, sys

step = {{name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_NNODES")}} | {{"SLURM_STEP_ID": "0"}}
nodes = range(int(step["SLURM_NNODES"]))
envs = [os.environ | step | {{"SLURM_NODEID": str(n), "SLURM_PROCID": str(n), "SLURM_LOCALID": "0"}} for n in nodes]
tasks = [subprocess.Popen(sys.argv[1:], env=env) for env in envs]
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def signal_step(job, number):
    """Send a signal as `--signal` without `B:` does: to all processes of the job's step, those that a task has started too."""
    signed = {f"SLURM_JOB_ID={job}".encode(), b"SLURM_STEP_ID=0"}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if signed <= set((process / "environ").read_bytes().split(b"\0")):
                os.kill(int(process.name), number)


@pytest.fixture
def sbatch(tmp_path):
    """Starts the batch script of the documentation as Slurm would on two nodes: `srun` starts its task on each."""
    for name, text in {"srun": SRUN.format(python=sys.executable), "scontrol": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    block = re.search(r"## Slurm.*?```text\n(.*?)```", TEXT, re.DOTALL)[1]

    def start(run):
        batch = re.sub(r"finetune\.py .*?'", lambda _: f"finetune.py {shlex.join(run)}'", block)
        batch = batch.replace("--nproc_per_node 2", "--nproc_per_node 1").replace("29500", str(free_port()))
        assert batch.count("127.0.0.1") == 0 and "--nodes 2 --ntasks-per-node 1" in batch and "--signal TERM@" in batch
        env = os.environ | {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        env |= {"SLURM_JOB_ID": tmp_path.name, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        return subprocess.Popen(["bash", "-c", batch], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env)

    return start


@pytest.mark.slow
def test_a_slurm_job_whose_time_runs_out_leaves_a_checkpoint_and_the_next_goes_on(script, bases, data, tmp_path, sbatch):
    changes = {"num_epochs": 30, "lora_dropout": 0, "learning_rate": 1e-3}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "one", **changes)).ok()
    run, log = options(bases["llama"], data, tmp_path / "two", **changes), tmp_path / "two" / "train_log.jsonl"
    job = sbatch(run)
    while job.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.01)
    signal_step(tmp_path.name, signal.SIGTERM)
    _, errors = job.communicate(timeout=600)
    assert 'Traceback (most recent call last):\n  File "finetune' not in errors
    stopped = len(losses(tmp_path / "two"))
    assert 3 <= stopped < 150 and (tmp_path / "two" / f"checkpoint-{stopped}" / MANIFEST).exists(), errors[-3000:]
    job = sbatch(run)
    _, errors = job.communicate(timeout=600)
    assert job.returncode == 0, errors[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_the_check_of_a_gpu_says_where_there_is_none(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu_check.sh", tmp_path / "r.md"], capture_output=True, text=True, env=env
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "finds no NVIDIA GPU" in ended.stderr
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
    for part in ("tests on the GPU", "demo, 8bit", "demo, bfloat16", "demo, 4bit", "two GPUs"):
        assert f"| {part} | {'FAIL' if status else 'pass'} |" in text
    assert not (tmp_path / "r.md.figures").exists()
