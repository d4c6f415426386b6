"""Write HumanEval or MBPP as prompts with their tests, which judge.py --run_code runs.

    python data/code/prepare.py --raw downloads/HumanEval.jsonl

Answer them with generate.py (again with other seeds for pass@10); judge.py --run_code takes the file as --test_input_path.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import run
from utils.console import UserError, say
from utils.datasets.evaluation_sets import EvaluationOptions, write
from utils.datasets.file_formats import read_items
from utils.datasets.sources import check_exists

LICENCES = {
    "humaneval": "HumanEval is under the MIT licence (openai/human-eval); cite Chen et al. 2021, arXiv:2107.03374",
    "mbpp": "MBPP is under CC BY 4.0 (google-research/mbpp); cite Austin et al. 2021, arXiv:2108.07732",
}


def main(options: EvaluationOptions) -> None:
    """Read a file of either set; which it is follows from its fields."""
    check_exists(Path(options.raw))
    found = list(problems(Path(options.raw)))
    kind = found[0]["category"]
    write(options, "code", LICENCES[kind], {kind: found})


def problems(path: Path) -> Iterator[dict[str, Any]]:
    """The problems of a file; other items are counted."""
    kept = dropped = 0
    for _, item in read_items(path):
        record = from_humaneval(item) or from_mbpp(item) if isinstance(item, dict) else None
        kept, dropped = kept + bool(record), dropped + (not record)
        if record:
            yield record
    if dropped:
        say(f"{path}: {dropped} of {kept + dropped} items dropped: neither HumanEval's fields nor MBPP's")
    if not kept:
        raise UserError(f"{path}: holds no problem of HumanEval or MBPP; name HumanEval.jsonl or mbpp.jsonl")


def from_humaneval(item: dict[str, Any]) -> dict[str, Any] | None:
    """A problem of HumanEval: the head of a function to be completed, and a function `check` that tests it."""
    if not all(isinstance(item.get(name), str) and item[name].strip() for name in ("prompt", "test", "entry_point")):
        return None
    asked = f"请补全下面的 Python 函数，只写出完整的函数。\n```python\n{item['prompt'].rstrip()}\n```"
    tests = f"{item['test']}\n\ncheck({item['entry_point']})"
    found = {"instruction": asked, "input": "", "output": "", "category": "humaneval"}
    return found | {"prefix": item["prompt"], "entry_point": item["entry_point"], "tests": tests}


def from_mbpp(item: dict[str, Any]) -> dict[str, Any] | None:
    """A problem of MBPP: a sentence, and assertions, which the model is shown."""
    text, tests = item.get("text") or item.get("prompt"), item.get("test_list")
    if not (
        isinstance(text, str)
        and isinstance(tests, list)
        and tests
        and all(isinstance(test, str) and test.strip() for test in tests)
    ):
        return None
    shown = "\n".join(tests)
    asked = f"{text}\n请写一个 Python 函数，只写代码，要能通过下面的测试：\n```python\n{shown}\n```"
    found = {"instruction": asked, "input": "", "output": "", "category": "mbpp", "prefix": "", "entry_point": ""}
    needed = item.get("test_imports") or []  # of the sanitized set; the whole one has test_setup_code
    before = [*(needed if isinstance(needed, list) else []), item.get("test_setup_code") or ""]
    return found | {"tests": "\n".join(map(str, [*before, shown]))}


if __name__ == "__main__":
    run(main, EvaluationOptions)
