"""Scores of questions with choices on a real model, beside those of lm-evaluation-harness: stored ones, and made anew."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripting import ROOT

from benchmarks.choices import sums
from utils.datasets.choices import read_choices
from utils.evaluation import choices
from utils.evaluation.likelihood import load_engine

MODEL = Path(os.environ.get("MODEL_DIR", ROOT / "models")) / "smollm2-135m"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="the demo model is not there; bash scripts/get-smollm2-135m.sh makes it"),
]

# lm_eval 0.4.13 with transformers 5.24, float32, its CMMLU task on every thirtieth sum, two examples
STORED = [
    [-1.46894, -2.03749, -1.20227, -1.93022],
    [-1.45217, -2.19573, -1.27808, -2.05786],
    [-1.52136, -1.65040, -2.30508, -0.91325],
    [-1.45190, -1.67250, -2.31953, -0.97876],
    [-1.42534, -2.52334, -0.93816, -1.83969],
    [-1.55835, -2.56706, -0.88923, -1.55137],
]


def test_likelihoods_are_those_that_the_harness_gave(tmp_path):
    path = sums(tmp_path)
    questions = read_choices([path])[::30]
    engine = load_engine(str(MODEL), [], False)
    examples = choices.read_examples("", questions, [path], 2)
    found = choices.mark_all(engine, questions, examples, choices.Way(2), tmp_path / "journal")["base"]
    for one, stored in zip(found, STORED, strict=True):
        assert one.shown == pytest.approx(stored, abs=1e-3)


def test_the_harness_gives_the_same_today():
    """Set LM_EVAL_PYTHON to the Python of an environment that has lm_eval."""
    python = os.environ.get("LM_EVAL_PYTHON", sys.executable if importlib.util.find_spec("lm_eval") else "")
    if not python:
        pytest.skip("lm_eval is missing; name the Python of an environment that has it as LM_EVAL_PYTHON")
    command = [
        sys.executable,
        "-m",
        "benchmarks.choices",
        "--base_model",
        MODEL,
        "--lm_eval_python",
        python,
        "--questions",
        "12",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ratios = json.loads(ended.stdout.splitlines()[-1])["ratios"]
    assert ratios["same choice"] >= 0.995 and ratios["largest difference"] <= 1e-3
