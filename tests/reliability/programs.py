"""The programs that the campaign kills, starves of disk space and starts twice: each a command, and what it may leave behind.

Every command writes into `<place>/out`, and nothing else of it lies in `place`: so all that is there belongs to the run.
"""

import dataclasses
import gzip
import json
import random
import shutil
from pathlib import Path

import datasets
import orjson
import tiny
import torch
from api_server import Server, asked, fair
from raw_sets import firefly_items, lines, write_coig
from scripting import warm

from utils.training import checkpoints

torch.set_num_threads(1)
warm("gradio", "matplotlib.backends.backend_agg", "matplotlib.figure", "openai")
warm("utils.inference.batch", "utils.merging.merge", "utils.training.trainer")
CACHE = Path(datasets.config.HF_DATASETS_CACHE) / "dreamergpt"
TIMES = {"lineage.json": ("time",)}  # the fields that may differ between two runs of one command
JOURNALS = {"judge.jsonl", "answers.jsonl"}  # of requests, in the order in which the answers came
GROWING = {"train_log.jsonl", "loss.png"} | JOURNALS  # of these, what was there at a kill is the beginning of the whole


@dataclasses.dataclass(frozen=True)
class Program:
    """A script of the repository with its options; `{place}` in them stands for the folder that it may write to.

    `locks` is the file, below that folder, that says who is at work there.
    """

    name: str
    words: list[str]
    lock: str = ".out.lock"

    def argv(self, place: Path) -> list[str]:
        """The command that writes into `place`."""
        return [word.replace("{place}", str(place)) for word in self.words]


def training(folder: Path) -> Program:
    """Incremental training on an adapter: seven steps with dropout, the last amid an epoch, validation, checkpoints that go."""
    base = tiny.llama(folder / "base")
    parent = tiny.adapter(base, folder / "parent", scale=0.02)
    numbers = random.Random(0)
    records = [
        {"instruction": f"第{i}题：" + "问" * numbers.randint(1, 30), "input": "", "output": "答" * numbers.randint(1, 20)}
        for i in range(40)
    ]
    data = write(folder / "records.json", records)
    words = f"finetune.py --base_model {base} --resume_from_checkpoint {parent} --data_path {data} --val_set_size 8"
    words += " --batch_size 8 --micro_batch_size 2 --num_epochs 2 --max_steps 7 --cutoff_len 128 --learning_rate 1e-2"
    words += " --save_steps 3 --eval_steps 3 --save_total_limit 2 --output_dir {place}/out"
    return Program("training", words.split())


def merging(folder: Path) -> Program:
    """A base and two adapters, merged into several files."""
    base = tiny.llama(folder / "base", num_hidden_layers=6, hidden_size=128, intermediate_size=512)
    layers = ["q_proj", "v_proj", "down_proj"]
    adapters = [tiny.adapter(base, folder / f"adapter{seed}", seed, target_modules=layers) for seed in (1, 2)]
    words = f"merge_weights.py --base_model {base} --lora_model {adapters[0]},{adapters[1]} --max_shard_size 1MB"
    return Program("merging", [*words.split(), "--output_dir", "{place}/out"])


def merging_pth(folder: Path) -> Program:
    """A base converted into Meta's own layout."""
    base = tiny.llama(folder / "base", num_hidden_layers=4, hidden_size=128, intermediate_size=512)
    return Program("merging_pth", f"merge_weights.py --base_model {base} --output_type pth --output_dir {{place}}/out".split())


def answering(folder: Path) -> Program:
    """Thirty prompts, six of them equal to others, in batches of four."""
    base = tiny.llama(folder / "base")
    adapter = tiny.adapter(base, folder / "adapter")
    prompts = write(folder / "prompts.json", [f"Question {n % 24}: {'why ' * (n % 7)}?" for n in range(30)])
    words = f"generate.py --lora_weights {adapter} --is_ui False --test_input_path {prompts} --batch_size 4 --num_beams 1"
    words += " --max_new_tokens 30 --output_path {place}/out/test.json"
    return Program("answering", words.split(), "out/.test.json.lock")


def judging(folder: Path) -> Program:
    """Three systems, six prompts, three repeats, by a judge behind a real server; and the measures that need none."""
    worth = {"one": [8, 7, 6, 9, 5, 10], "two": [7, 8.5, 6, 3, 5, 9], "three": [0, 8.5, 7, 9, 5, 1]}
    words = ["judge.py", "--judge_model", "m", "--metrics", "--repeats", "3", "--output_dir", "{place}/out"]
    for name, scores in worth.items():
        records = [
            {"instruction": f"问题{n}", "output": f"{name} 的回答，worth {score}", "category": "01qa" if n < 4 else "mine"}
            for n, score in enumerate(scores)
        ]
        words += ["--answers", f"{name}={write(folder / f'{name}.json', records)}"]
    server = Server(lambda number, body: {"content": fair(number, body), "sleep": 0.02})  # ends with the process
    return Program("judging", [*words, "--api_base", server.url])


def asking(folder: Path) -> Program:
    """A model behind a real server answers thirty prompts."""
    prompts = write(folder / "prompts.json", [f"问题{n}" for n in range(30)])
    server = Server(lambda number, body: {"content": f"答：{asked(body)}", "sleep": 0.02})
    words = f"judge.py --answer_with m --test_input_path {prompts} --api_base {server.url}"
    return Program("asking", [*words.split(), "--output_dir", "{place}/out"])


def preparing_firefly(folder: Path) -> Program:
    """Firefly, cut into five parts by way of nameless files."""
    folder.mkdir()
    with gzip.open(folder / "firefly-train-1.1M.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines(firefly_items(20_000)))
    return Program("preparing_firefly", ["data/firefly/prepare.py", "--raw", str(folder), "--output_dir", "{place}/out"])


def preparing_coig(folder: Path) -> Program:
    """COIG's six files of six shapes, one after the other."""
    write_coig(folder)
    for file in folder.glob("*.jsonl"):
        file.write_text(file.read_text("utf-8") * 2_000, "utf-8")
    return Program("preparing_coig", ["data/COIG/prepare.py", "--raw", str(folder), "--output_dir", "{place}/out"])


EACH = (training, merging, merging_pth, answering, judging, asking, preparing_firefly, preparing_coig)
BUILDERS = {build.__name__: build for build in EACH}


def write(path: Path, value: object) -> Path:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    return path


def clear(place: Path) -> None:
    """Have `place` empty, and nothing kept of what was encoded before."""
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(CACHE, ignore_errors=True)


def contents(place: Path) -> dict[str, object]:
    """Every file below `place` and in the cache of encoded records, as bytes, but for the named time fields.

    The lines of journals of requests are sorted.
    """
    found: dict[str, object] = {}
    for folder in (place, CACHE):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                found[str(path.relative_to(folder.parent))] = content(path)
    return found


def content(path: Path) -> object:
    """What a file holds, as it can be compared."""
    if path.name in TIMES:
        return {key: value for key, value in orjson.loads(path.read_bytes()).items() if key not in TIMES[path.name]}
    if path.name in JOURNALS:
        return sorted(path.read_bytes().splitlines())
    return path.read_bytes()


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names of the files that are not the same, or only in one of two `contents`."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def check_nothing_half_written(place: Path, whole: dict[str, object]) -> None:
    """After a kill, what bears the name of a result is as it is in the undisturbed run's, and so are sealed checkpoints."""
    for path in sorted((place / "out").rglob("*")):
        name = str(path.relative_to(place.parent))
        checkpoint = next((folder for folder in path.parents if checkpoints.step_of(folder) >= 0), None)
        is_result = checkpoint is None or checkpoints.is_whole(checkpoint)
        if path.is_file() and is_result and not path.name.startswith(".") and path.name not in GROWING and name in whole:
            assert content(path) == whole[name], f"{path}: has the name of a whole file, and is none"
