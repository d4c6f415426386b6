"""scripts/offline_bundle.sh and setup.sh --offline: what is refused, and (slow) an installation without any network."""

import os
import shutil
import subprocess

import pytest
from scripting import ROOT


def bash(*words, cwd=ROOT, before=(), **env):
    """Run a script to its end."""
    command = [*before, "bash", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no output file given"),
        (["{tmp}/x.tar", "--platform", "win32"], "--platform win32: not linux-x86_64 or linux-aarch64"),
        (["{tmp}/x.tar", "--torch"], "--torch: has no value"),
        (["{tmp}/x.tar", "--torch", "rocm"], "--torch rocm: not cpu or cuda"),
        (["{tmp}/there.tar"], "exists already"),
        (["{tmp}/nowhere/x.tar"], "is not a folder to write to"),
        (["{tmp}/x.tar"], "get-smollm2-135m.sh makes it, or give --no-model"),
    ],
)
def test_bundle_is_refused_before_anything_is_fetched(tmp_path, words, told):
    (tmp_path / "there.tar").touch()
    words = [word.format(tmp=tmp_path) for word in words]
    done = bash("scripts/offline_bundle.sh", *words, MODEL_DIR=str(tmp_path))
    assert done.returncode == 2
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.tar"]


def test_damaged_bundle_is_refused(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_text("other")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  wheels/a.whl\n")
    subprocess.run(["tar", "-cf", "bad.tar", "SHA256SUMS", "wheels"], cwd=tmp_path, check=True)
    shutil.copytree(ROOT / "scripts", tmp_path / "copy" / "scripts")
    for name, told in (("bad.tar", "is cut off or damaged"), ("SHA256SUMS", "is cut off or damaged"), ("no", "no such file")):
        done = bash("copy/scripts/setup.sh", "--offline", name, cwd=tmp_path)
        assert done.returncode == 2
        assert told in done.stderr
    assert not (tmp_path / "copy" / ".venv").exists()


@pytest.mark.slow
@pytest.mark.long
def test_installation_from_a_bundle_without_network(tmp_path):
    """Wheels are fetched first; then, in a namespace without network, a fresh environment is made and answers."""
    if subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("no namespaces without network here (unshare -rn)")
    made = bash("scripts/offline_bundle.sh", tmp_path / "bundle.tar")
    assert made.returncode == 0, made.stderr
    subprocess.run(["tar", "-xf", "bundle.tar", "dreamergpt"], cwd=tmp_path, check=True)
    alone = {"before": ["unshare", "-rn"], "cwd": tmp_path, "MODEL_DIR": str(tmp_path / "dreamergpt" / "models")}
    done = bash("dreamergpt/scripts/setup.sh", "--offline", "bundle.tar", **alone)
    assert done.returncode == 0, done.stderr
    ask = (
        ".venv/bin/python generate.py --base_model models/smollm2-135m --is_ui False --test_input_path data/demo/f0.json"
        " --output_path answers.json --max_new_tokens 2 --num_beams 1"
    )
    asked = bash("-c", f"cd dreamergpt && {ask}", **alone)
    assert asked.returncode == 0, asked.stderr
    assert (tmp_path / "dreamergpt" / "answers.json").is_file()
