"""What all tests share: no network, one thread a process (so that a warm parent can fork), caches of their own."""

import os
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="dreamergpt-cache-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same tests with a card as without; scripts/gpu_check.sh shows it
os.environ.pop("WANDB_PROJECT", None)
os.environ.pop("BASE_MODEL", None)
os.environ.pop("DATA_DIR", None)

import pytest
import tiny
import torch
from scripting import Script, warm

pytest_plugins = ["api_server", "merges", "raw_sets", "trainings"]  # fixtures; what else has some is named by its tests
pytest.register_assert_rewrite("browsing")  # so that what they check is told as a test tells it
torch.ones(1, requires_grad=True).backward()  # before FakeTensor feigns a card: autograd's threads for it survive no fork
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has all children ignore
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all its children, would ignore it


@pytest.fixture(scope="session")
def warmed():
    """What most scripts import, imported once, before any is forked."""
    warm("utils.training.trainer", "utils.datasets.dataset", "utils.inference.batch", "utils.merging.merge")
    warm("utils.datasets.preparing", "utils.evaluation.setup", "utils.training.setup", "utils.merging.combination", "fire")
    warm("matplotlib.backends.backend_agg", "matplotlib.figure")


@pytest.fixture
def script(tmp_path, warmed):
    """Runs a script of the repository as a process forked from this one: `script("finetune.py", "--x", 1)`."""
    return Script(tmp_path)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The folder of a LLaMA of two layers."""
    return tiny.llama(tmp_path_factory.mktemp("tiny") / "llama")


def pytest_collection_modifyitems(items):
    """Mark what starts a browser (page), what starts programs (cli), and the campaign of tests/reliability."""
    for item in items:
        marks = {"browser": "page", "script": "cli", "world": "cli"}
        for fixture in marks.keys() & set(item.fixturenames):
            item.add_marker(marks[fixture])
        if item.path.parent.name == "reliability":
            item.add_marker("reliability")
