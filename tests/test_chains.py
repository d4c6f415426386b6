"""scripts/chain.sh: every chain runs from merge to test.json at toy scale."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from scripting import ROOT, Script, warm
from test_scripts import CHAINS, SCRIPTS, bash

from utils import lineage

warm("utils.inference.batch", "utils.merging.merge", "utils.training.memory", "utils.training.trainer")

torch.set_num_threads(1)

CLIENT = """#!{python} -SE
import json, os, socket, sys
if not sys.argv[1].endswith(("finetune.py", "generate.py", "merge_weights.py", "extend_vocab.py")):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{address}")
    server.sendall(json.dumps([sys.argv[1:], os.getcwd()]).encode())
    server.shutdown(socket.SHUT_WR)
    status, out, err = json.load(server.makefile())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""


class World:
    """Tiny models and data in one folder, and a way to run shell scripts whose Python is forked from this process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.models, self.data, self.output = (folder / name for name in ("models", "datasets", "output"))
        self.script = Script(folder)
        self.commands: list[str] = []

    def __call__(self, script: str, *argv: str, **env: str) -> subprocess.CompletedProcess:
        """Run a shell script in the folder, with relative paths to it; what it runs is noted in `commands`."""
        self.commands = []
        out, err = self.folder / "bash.out", self.folder / "bash.err"
        settings = {
            "MODEL_DIR": "models",
            "DATA_DIR": "datasets",
            "OUTPUT_DIR": "output",
            "TRAIN_OPTIONS": "--num_epochs 1 --batch_size 4 --micro_batch_size 4 --cutoff_len 200 --val_set_size 2",
            "ANSWER_OPTIONS": "--load_8bit False --num_beams 1 --max_new_tokens 3",
        }
        with tempfile.TemporaryDirectory(prefix="s") as short, contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            client, address = Path(short, "python"), Path(short, "socket")
            client.write_text(CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
            listener.bind(str(address))
            listener.listen()
            listener.settimeout(0.02)
            with open(out, "w") as stdout, open(err, "w") as stderr:
                env = os.environ | settings | env | {"PYTHON": str(client)}
                process = subprocess.Popen(
                    ["bash", SCRIPTS / script, *argv], cwd=self.folder, env=env, stdout=stdout, stderr=stderr
                )
                while process.poll() is None:
                    with contextlib.suppress(TimeoutError):
                        self.serve(listener.accept()[0])
        return subprocess.CompletedProcess(process.args, process.returncode, out.read_text("utf-8"), err.read_text("utf-8"))

    def serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(None)
            argv, cwd = json.load(connection.makefile())
            self.commands.append(Path(argv[0]).name)
            ended = self.script(*argv, cwd=Path(cwd))
            connection.sendall(json.dumps([ended.status, ended.out, ended.err]).encode())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The bases and LoRAs that the chains start from, in small, and raw data put through the sets' own prepare.py."""
    world = World(tmp_path_factory.mktemp("world"))
    for size in ("7b", "13b"):
        tiny.llama(world.models / f"llama-{size}", seed=len(size))
        for kind in ("llama", "alpaca"):
            tiny.adapter(world.models / f"llama-{size}", world.models / f"chinese-{kind}-lora-{size}", seed=len(kind))
    tiny.bloom(world.models / "bloom-7b1")
    tiny.llama(world.models / "smollm2-135m", seed=7)
    for name, raw in write_raw(world.folder / "raw").items():
        world.script(f"data/{name}/prepare.py", "--raw", raw, DATA_DIR=str(world.data)).ok()
    return world


def write_raw(folder: Path) -> dict[str, Path]:
    """A dozen records of each set that the chains use, in the formats that these are published in."""
    texts = [
        (f"第{number}问：什么是{word}？", f"{word}是很好的东西。") for number, word in enumerate("春夏秋冬天地山水风花雪月", 1)
    ]
    english = {"instruction": "English", "input": "", "output": "English"}
    belle = [{"instruction": question, "input": "", "output": f"\n{answer}"} for question, answer in texts]
    files = {
        "COIG/human_value_alignment_instructions_part1.json": [
            {"instruction": question, "input": "", "output": answer} for question, answer in texts
        ],
        "COIG/translated_instructions.jsonl": [
            {**english, "trans_instruction": question, "trans_input": "", "trans_output": answer} for question, answer in texts
        ],
        "firefly/firefly-train-1.1M.jsonl": [
            {"kind": f"Kind{number % 2}", "input": question, "target": answer}
            for number in range(5)
            for question, answer in texts
        ],
        "psyQA/PsyQA_full.json": [
            {
                "question": question,
                "description": "最近睡不好",
                "keywords": "睡眠,压力",
                "answers": [{"answer_text": answer, "has_label": False, "labels_sequence": None}] * 2,
                "questionID": number,
            }
            for number, (question, answer) in enumerate(texts)
        ],
        "belle/Belle_open_source_0.5M.json": belle,
    }
    for name, items in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        as_array = name.endswith(("part1.json", "full.json"))
        text = json.dumps(items, ensure_ascii=False) if as_array else "\n".join(map(json.dumps, items))
        (folder / name).write_text(text, "utf-8")
    return {name.partition("/")[0]: (folder / name).parent for name in files}


def check_chain(world: World, chain: str, ended: subprocess.CompletedProcess) -> None:
    """The last step has its answers, its lineage goes back to the first, and the chain's table shows it."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    last = world.output / CHAINS[chain]
    answers = json.loads((last / "test.json").read_text("utf-8"))
    prompts = [*(ROOT / ("data/demo/heldout" if chain == "demo" else "test_data")).glob("*.json")]
    assert len(answers) == sum(len(json.loads(file.read_text("utf-8"))) for file in prompts)
    steps = [Path(step["options"]["output_dir"]).name for step in lineage.chain(last)]
    assert steps == [step for step in re.findall(r"^== (\S+):", ended.stdout, re.MULTILINE) if step in steps]
    table = ended.stdout.strip().splitlines()[-len(steps) :]
    assert [row.split()[1] for row in table] == steps
    for step in lineage.chain(last):
        assert step["options"]["learning_rate"] == (2e-3 if chain == "demo" else 1e-4) and step["data"]["train"] > 0


@pytest.mark.parametrize(
    "chain",
    [pytest.param("D13b-1-3-1", marks=pytest.mark.slow), "D7b-4-1", "B7b-5-1", pytest.param("demo", marks=pytest.mark.slow)],
)
def test_a_chain_runs_from_merge_to_answers(world, chain):
    check_chain(world, chain, world("chain.sh", chain))
    config = json.loads((world.output / CHAINS[chain] / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == (["query_key_value"] if chain == "B7b-5-1" else ["q_proj", "v_proj"])
    assert not {".journal", ".part"} & {file.suffix for file in world.output.rglob(".*")}


@pytest.mark.slow
def test_a_chain_goes_on_where_another_one_ended(world):
    """What D13b-2-2-2 made is not made again for D13b-2-3; a second start makes nothing."""
    check_chain(world, "D13b-2-2-2", world("chain.sh", "D13b-2-2-2"))
    before = {file: file.stat().st_mtime_ns for file in world.output.rglob("*") if "-2-alpaca" in str(file) and file.is_file()}
    ended = world("chain.sh", "D13b-2-3")
    check_chain(world, "D13b-2-3", ended)
    assert world.commands == ["finetune.py", "generate.py"] and ended.stdout.count("done already: ") == 7
    assert before.items() <= {file: file.stat().st_mtime_ns for file in world.output.rglob("*")}.items()
    check_chain(world, "D13b-2-3", world("chain.sh", "D13b-2-3"))
    assert world.commands == []
    assert "finetune.py" not in world("chain.sh", "D13b-2-3", "--plan").stdout


def test_merging_each_lora(world):
    for name in ("7b-llama", "7b-alpaca", "13b-llama", "13b-alpaca"):
        size, kind = name.split("-")
        merged = world.models / f"chinese-{kind}-{size}"
        if not merged.exists():
            assert world(f"merge-{name}.sh").returncode == 0
        assert (merged / "config.json").is_file()


def test_a_chain_stops_at_the_first_error(world, tmp_path):
    ended = world("chain.sh", "D7b-4-1", OUTPUT_DIR=str(tmp_path / "out"), TRAIN_OPTIONS="--batch_size 7 --micro_batch_size 4")
    assert ended.returncode == 2 and "--batch_size 7" in ended.stderr and not (tmp_path / "out").exists()
    assert world.commands[-1] == "finetune.py"


def test_a_published_adapter_counts_as_done_and_an_unfinished_run_does_not(world, tmp_path):
    folder = tmp_path / "run-4-alpaca-7b-1"
    folder.mkdir()
    (folder / "adapter_config.json").touch()
    needs = f"missing: {folder}/lineage.json; bash scripts/run-4-alpaca-7b-1.sh makes it"
    assert needs not in bash("save-generate-4-alpaca-7b-1.sh", PLAN="1", OUTPUT_DIR=str(tmp_path)).stdout
    (folder / "checkpoint-3").mkdir()
    assert needs in bash("save-generate-4-alpaca-7b-1.sh", PLAN="1", OUTPUT_DIR=str(tmp_path)).stdout
