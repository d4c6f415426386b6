"""Multiple-choice questions by log-likelihood: lm-evaluation-harness and this toolkit, same model, prompts and examples.

    python -m benchmarks.choices --base_model models/smollm2-135m --lm_eval_python /tmp/lm-eval/bin/python

The harness must be installed in an environment of its own (pip install lm_eval). Its task is the one for CMMLU, with local
files. Without --choices, the questions are generated arithmetic problems. Log-likelihoods must agree within 1e-3, and choices
on at least 99.5 % of the questions. Loading the model and the libraries is not measured.
"""

import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Figures, interleave, report
from utils.cli import option, run
from utils.console import UserError

TOLERANCE, SAME = 1e-3, 0.995
HARNESS = """
import json, sys, time
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.api.task import ConfigurableTask

job = json.load(open(sys.argv[1]))
model = HFLM(pretrained=job["model"], dtype="float32", device="cpu", batch_size=job["batch_size"])
tasks = []
for name, subject in job["subjects"].items():
    tasks.append(ConfigurableTask(config={
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": subject["files"]},
        "test_split": "test", "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice", "description": subject["description"], "num_fewshot": job["shots"],
        "doc_to_text": "{{Question.strip()}}\\nA. {{A}}\\nB. {{B}}\\nC. {{C}}\\nD. {{D}}\\n答案：",
        "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "{{['A', 'B', 'C', 'D'].index(Answer)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }))
for round in range(job["repeats"]):
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    found = simple_evaluate(
        model=model, tasks=tasks, num_fewshot=job["shots"], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_defaults=False),
    )
    seconds = time.perf_counter() - start
    samples = {name: [[float(one[0]) for one in sample["filtered_resps"]] for sample in sorted(each, key=lambda s: s["doc_id"])]
               for name, each in found["samples"].items()}
    print("done " + json.dumps({"seconds": seconds, "samples": samples}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    base_model: str = option(help="base model")
    lm_eval_python: str = option(sys.executable, "Python interpreter of an environment with lm_eval")
    choices: str = option("", "choice records, with dev.json beside them (default: generated arithmetic)")
    questions: int = option(120, "number of questions, evenly spaced", least=1)
    shots: int = option(5, "worked examples", least=0, most=5)
    batch_size: int = option(8, "batch size of the harness", least=1)
    repeats: int = option(1, "runs of each recipe", least=1)


def main(options: Options) -> None:
    """Run both alternately, compare their results, and print the figures."""
    if subprocess.run([options.lm_eval_python, "-c", "import lm_eval"], capture_output=True).returncode:
        raise UserError(f"--lm_eval_python {options.lm_eval_python}: lm_eval is not installed there; pip install lm_eval")
    from utils.datasets.choices import read_choices
    from utils.evaluation import choices
    from utils.evaluation.likelihood import load_engine

    with tempfile.TemporaryDirectory() as folder:
        path = options.choices or sums(Path(folder))
        questions = read_choices([path])
        questions = questions[:: max(1, len(questions) // options.questions)][: options.questions]
        examples = choices.read_examples("", questions, [path], options.shots)
        engine = load_engine(options.base_model, [], False)
        engine.loaded  # noqa: B018, load the model before the clock starts
        harness = Harness(options, questions, examples, Path(folder))
        results: dict[str, list[list[float]]] = {}

        def ours() -> Figures:
            start = time.perf_counter()
            journal = Path(folder) / f"{start}.jsonl"
            marks = choices.mark_all(engine, questions, examples, choices.Way(options.shots), journal)
            results["ours"] = [list(one.shown) for one in marks["base"] if one]  # type: ignore[arg-type]
            return {"seconds": time.perf_counter() - start}

        def theirs() -> Figures:
            seconds, results["lm_eval"] = harness.run()
            return {"seconds": seconds}

        medians = interleave({"lm_eval": theirs, "ours": ours}, options.repeats)
    same, largest = compare(results["lm_eval"], results["ours"])
    ratios = {
        "speed": medians["lm_eval"]["seconds"] / medians["ours"]["seconds"],
        "same choice": same,
        "largest difference": largest,
    }
    report(
        medians, ratios, ("torch", "transformers"), questions=len(questions), shots=options.shots, batch_size=options.batch_size
    )
    if same < SAME or largest > TOLERANCE:
        sys.exit("the results differ by more than rounding")


def sums(folder: Path) -> str:
    """Write arithmetic problems of three kinds as choice records, with five examples each; returns the questions' file."""
    chance = random.Random(0)
    split: dict[str, list[dict[str, Any]]] = {"dev": [], "test": []}
    for topic, sign, count in (("加法", "加", 60), ("减法", "减", 60), ("乘法", "乘以", 60)):
        for number in range(count + 5):
            one, other = chance.randint(20, 99), chance.randint(2, 19)
            right = {"加": one + other, "减": one - other, "乘以": one * other}[sign]
            given = [right, right + 1, right + 10, right - 2]
            chance.shuffle(given)
            text = f"小明有一道题不会做：{one}{sign}{other}，结果等于多少？请从下面四个数里选出正确的一个。"
            record = {"instruction": text, "choices": list(map(str, given)), "answer": "ABCD"[given.index(right)]}
            split["dev" if number < 5 else "test"].append(record | {"category": topic, "topic": topic})
    for name, records in split.items():
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return str(folder / "test.json")


class Harness:
    """lm-evaluation-harness in a process that keeps its model loaded."""

    def __init__(self, options: Options, questions: list[Any], examples: dict[str, list[Any]], folder: Path):
        from utils.evaluation.choices import description

        self.order: dict[str, list[int]] = {}
        for place, one in enumerate(questions):
            self.order.setdefault(one.category, []).append(place)
        self.subjects = {}
        for number, (subject, places) in enumerate(self.order.items()):
            files = {}
            for split, ones in (
                ("test", [questions[p] for p in places]),
                ("dev", examples.get(subject, [questions[places[0]]])),
            ):
                files[split] = str(folder / f"{number}-{split}.jsonl")
                Path(files[split]).write_text("".join(as_row(one) for one in ones), "utf-8")
            self.subjects[f"subject{number}"] = {"files": files, "description": description(questions[places[0]])}
        job = {"model": options.base_model, "batch_size": options.batch_size, "subjects": self.subjects}
        (folder / "job.json").write_text(json.dumps(job | {"shots": options.shots, "repeats": options.repeats}), "utf-8")
        command = [options.lm_eval_python, "-c", HARNESS, str(folder / "job.json")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_for(self, word: str) -> str:
        """The rest of the next line that begins with a word. Ends the benchmark if the harness has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        sys.exit("lm_eval ended; see its output")

    def run(self) -> tuple[float, list[list[float]]]:
        """The seconds of one evaluation, and each question's log-likelihoods of its choices, in order."""
        self.wait_for("ready")
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = json.loads(self.wait_for("done "))
        by_place: dict[int, list[float]] = {}
        for (_, places), name in zip(self.order.items(), self.subjects, strict=True):
            by_place |= dict(zip(places, found["samples"][name], strict=True))
        return found["seconds"], [by_place[place] for place in sorted(by_place)]


def as_row(one: Any) -> str:
    """A question as a line with CMMLU's columns."""
    row = dict(zip("ABCD", one.choices, strict=True)) | {"Question": one.question, "Answer": "ABCD"[one.right[0]]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def compare(one: list[list[float]], other: list[list[float]]) -> tuple[float, float]:
    """The share of questions on which both choose the same, and the largest difference in log-likelihood."""
    pairs = list(zip(one, other, strict=True))
    same = sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs) / len(pairs)
    return same, max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    run(main, Options)
