"""Files and folders that the user has no right to read or to write; where the tests run as root, without root's rights."""

import os
import shutil

import pytest
from cases import GOOD, has, refusal, run_cold

ROOTLESS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
PARENT = "--resume_from_checkpoint {adapter}"
UNREADABLE = [  # script, what cannot be read, further options
    ("finetune.py", "data.json", ""),
    ("finetune.py", "template.json", "--prompt_template_name {top}/template.json"),
    ("finetune.py", "base/config.json", ""),
    ("finetune.py", "base/tokenizer.json", ""),
    ("finetune.py", "base/model.safetensors", ""),
    ("finetune.py", "base", ""),
    ("finetune.py", "adapter/adapter_config.json", PARENT),
    ("finetune.py", "adapter/adapter_model.safetensors", PARENT),
    ("finetune.py", "adapter", PARENT),
    ("generate.py", "prompts.json", ""),
    ("generate.py", "base/config.json", ""),
    ("generate.py", "base/model.safetensors", ""),
    ("generate.py", "adapter/adapter_config.json", ""),
    ("generate.py", "adapter/adapter_model.safetensors", ""),
    ("merge_weights.py", "base/model.safetensors", ""),
    ("merge_weights.py", "base/tokenizer.json", ""),
    ("merge_weights.py", "adapter/adapter_model.safetensors", ""),
    ("judge.py", "one.json", ""),
    ("extend_vocab.py", "text.txt", ""),
    ("data/psyQA/prepare.py", "raw.json", "--raw {top}/raw.json --output_dir {tmp}/out"),
    ("data/firefly/prepare.py", "raw", "--raw {top}/raw --output_dir {tmp}/out"),
]

BOTH = ("finetune.py", "generate.py")


@pytest.fixture
def own(world, tmp_path):
    """A world of the test's own, to take rights away in."""
    top = shutil.copytree(world["top"], tmp_path / "world")
    shutil.copy("templates/alpaca.json", top / "template.json")
    (top / "raw.json").write_text("[]")
    (top / "raw").mkdir()
    return {name: top / path.relative_to(world["top"]) for name, path in world.items()}


@pytest.fixture
def refused(own, tmp_path):
    """Runs a script that must refuse, without root's rights; returns its one line."""

    def run(script, options):
        return refusal(run_cold, script, f"{GOOD.get(script, '')} {options}", tmp_path, own, before=ROOTLESS)

    return run


@pytest.mark.parametrize(
    "script, thing, options",
    [  # of one script's base and adapter a file each, the others in the slow tier
        pytest.param(*row, id=f"{row[0]} {row[1]}", marks=pytest.mark.slow if number % 3 and row[0] in BOTH else ())
        for number, row in enumerate(UNREADABLE)
    ],
)
def test_what_cannot_be_read(refused, own, script, thing, options):
    place = own["top"] / thing
    place.chmod(0)
    try:
        has(refused(script, options), (thing, "Permission denied", ";"))
    finally:
        place.chmod(0o700)


def test_adapters_that_no_answers_can_be_put_beside(refused, own):
    own["adapter"].chmod(0o500)
    line = refused("generate.py", "--output_path=")
    has(line, ("adapter: cannot be written to", "give another --output_path"))
