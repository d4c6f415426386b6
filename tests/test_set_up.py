"""Set-up: its words, and the tested versions beside the ranges."""

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


def test_the_tested_versions_are_in_range():
    """Each requirement has one version in constraints.txt, and its range holds it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line and not line.startswith("#"):
                needed = Requirement(line.partition("#")[0])
                assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), line
