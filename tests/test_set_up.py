"""Set-up: its words, and the tested versions beside the ranges."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def test_set_up_refuses_an_unknown_word_before_anything_is_installed():
    ended = subprocess.run(["bash", ROOT / "scripts" / "setup.sh", "dev", "newset"], capture_output=True, text=True)
    assert (
        ended.returncode == 2
        and ended.stderr == "setup: error: newset: unknown; bash scripts/setup.sh [dev] [newest] [--offline FILE]\n"
    )


def test_set_up_asks_pip_for_what_is_not_installed_yet(tmp_path):
    """With a stand-in for pip in a copy that has nothing else."""
    for name in ("scripts/setup.sh", "scripts/env.sh", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools, asked = tmp_path / ".venv" / "bin", tmp_path / "asked"
    tools.mkdir(parents=True)
    for name, line in (("python", "exit 0"), ("pip", f'echo "$*" >> {asked}')):
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)

    def pip_of(*words):
        asked.write_text("")
        subprocess.run(["bash", tmp_path / "scripts" / "setup.sh", *words], check=True, capture_output=True)
        return [line.replace(f"{tmp_path}/", "") for line in asked.read_text().splitlines()]

    quiet = "install --quiet --disable-pip-version-check"
    base, dev = (f"{quiet} -c constraints.txt -r {file}" for file in ("requirements.txt", "requirements-dev.txt"))
    newest = f"{quiet} --upgrade --upgrade-strategy eager -r requirements.txt"
    assert [pip_of(), pip_of(), pip_of("dev"), pip_of("dev")] == [[base], [], [dev], []]
    (tmp_path / "constraints.txt").write_text("")
    assert [pip_of("dev"), pip_of("newest"), pip_of("newest"), pip_of()] == [[base, dev], [newest], [], [base]]
    if shutil.which("nvidia-smi"):
        return
    (tools / "python").write_text("#!/bin/sh\nexit 1\n")  # which has no torch: the one for CPUs comes first
    for status, index in ((0, " --extra-index-url https://download.pytorch.org/whl/cpu"), (1, "")):
        (tools / "python3").write_text(f"#!/bin/sh\nexit {status}\n")  # which looks whether the index is there
        (tools / "python3").chmod(0o755)
        (line,) = pip_of()
        assert line.startswith(f"{quiet} -c constraints.txt{index} torch>=")


def test_the_check_on_a_card_runs_its_parts_and_reports_what_failed(tmp_path):
    """With stand-ins for the card's tool, of which there are two, and for a Python, which fails where it loads in 4 bit."""
    venv, demo, report = tmp_path / "venv", tmp_path / "demo", tmp_path / "report.md"
    (venv / "bin").mkdir(parents=True)
    demo.mkdir()
    failing = 'case "$*" in *load_4bit*) echo broken; exit 3 ;; esac; echo "figure: $*"'
    for path, lines in ((venv / "bin/python", failing), (tmp_path / "nvidia-smi", "echo card 1; echo card 2")):
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
    env = os.environ | {"GPU_VENV": str(venv), "DEMO": str(demo), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", ROOT / "scripts/gpu_check.sh", report], env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout.endswith(f"gpu_check: wrote {report}; please paste it into an issue\n")
    text = re.sub(r"\| \d+ \|", "| 0 |", report.read_text()).replace(str(tmp_path), "T")
    text = re.sub(r"--output_dir \S+/", "--output_dir W/", text)
    common = "--prompt_template_name alpaca_short --batch_size 10 --micro_batch_size 10 --val_set_size 0 --lora_r 8 "
    common += "--lora_alpha 16 --lora_dropout 0.05"
    trained = "finetune.py --base_model T/demo --data_path data/demo/f1.json --output_dir W/{} --num_epochs 4"
    rate = f" --learning_rate 2e-3 {common}"
    two = f"-m torch.distributed.run --standalone --nproc_per_node 2 {trained.format('two')} {common} --micro_batch_size 5"
    parts = ["tests on the GPU", "demo, 8bit", "demo, bfloat16", "demo, 4bit", "two GPUs"]
    rows = [f"| {part} | {'FAIL' if part == 'demo, 4bit' else 'pass'} | 0 |" for part in parts]
    assert (
        "| part | result | seconds |\n|---|---|---|\n" + "\n".join(rows) in text and "- GPU, driver, memory: card 1\n" in text
    )
    figures = [
        "tests on the GPU: figure: -m pytest -q -s -m slow or not slow tests/training/test_cuda.py",
        f"demo, 8bit: figure: {trained.format('8bit')}{rate} --load_8bit",
        f"demo, bfloat16: figure: {trained.format('bfloat16')}{rate} --load_8bit False",
        "--- demo, 4bit",
        "broken",
        f"two GPUs: figure: {two}",
    ]
    assert text.endswith("\n```text\n" + "\n".join(figures) + "\n```\n")
    assert {*tmp_path.iterdir()} == {venv, demo, report, tmp_path / "nvidia-smi"}


def test_the_tested_versions_are_in_range():
    """Each requirement has one version in constraints.txt, and its range holds it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                needed = Requirement(line.partition("#")[0])
                assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), line
