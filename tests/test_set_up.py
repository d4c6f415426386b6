"""Set-up: its words, and the tested versions beside the ranges."""

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


def test_the_tested_versions_are_in_range():
    """Each requirement has one version in constraints.txt, and its range holds it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                needed = Requirement(line.partition("#")[0])
                assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), line
