"""Cleaning up to a million records: time and memory of data/clean.py, and of the baseline on fewer.

    python benchmarks/clean.py

The baseline is datasketch's: MinHash with an index in memory, which finds near-duplicates and nothing else. The records are
synthetic: every tenth copies the one before except for its punctuation, some contain a telephone number or a test question,
and all of these must be found.
"""

import dataclasses
import functools
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, Figures, child, interleave, report
from benchmarks.data import READ
from utils.cli import option, run
from utils.datasets.records import read_records

SHINGLE, SHARED = 5, 0.8


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    records: int = option(1_000_000, "records of the largest file; the others have a fifth and a hundredth", least=10_000)
    repeats: int = option(1, "runs of each program", least=1)
    plain: str = option("", "internal: run the baseline on this file")


def main(options: Options) -> None:
    """Measure all recipes alternately, or be the baseline."""
    if options.plain:
        print(json.dumps({"near_duplicates": plain_recipe(Path(options.plain))}))
        return
    few, most = options.records // 100, options.records
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (few, most // 5, most):
            write_records(folder / f"{count}.jsonl", count)
        recipes: dict[str, Callable[[], Figures]] = {
            f"plain, {few:,} records": functools.partial(child, __file__, "--plain", folder / f"{few}.jsonl"),
            f"read {most:,} lines with orjson": functools.partial(child, "-c", READ, folder / f"{most}.jsonl"),
        }
        for count in (few, most // 5, most):
            recipes[f"ours, {count:,} records"] = functools.partial(ours, folder, count)
        medians = interleave(recipes, options.repeats)
        facts = {"bytes": (folder / f"{most}.jsonl").stat().st_size}
    plain, read, small, _, large = medians.values()
    if plain.pop("near_duplicates") != few // 10:
        sys.exit("the baseline found other near-duplicates")
    ratios = {
        "processor time per record, plain / ours": plain["cpu_seconds"] / small["cpu_seconds"],
        "processor time, ours / reading": large["cpu_seconds"] / read["cpu_seconds"],
        "memory per additional record, in bytes": (large["peak_mb"] - small["peak_mb"]) * 2**20 / (most - few),
    }
    report(medians, ratios, ("datasketch", "numpy", "orjson"), **facts)


def write_records(path: Path, count: int) -> None:
    """Write question-answer records with log-normal lengths, like those of real ones."""
    numbers = random.Random(42)
    text = "".join(chr(numbers.randrange(0x4E00, 0x9FA5)) for _ in range(1_000_000))
    question = next(read_records(ROOT / "test_data/09math.json", need_output=False))["instruction"]

    def some(median: float) -> str:
        pieces = int(numbers.lognormvariate(0, 0.9) * median / 20) + 1
        starts = [numbers.randrange(len(text) - 20) for _ in range(pieces)]
        return "，".join(text[start : start + 20] for start in starts)

    record: dict[str, str] = {}
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if number % 10 == 9:
                record = record | {"output": record["output"] + "！"}
            else:
                record = {"instruction": some(40), "input": "", "output": some(120)}
                record["output"] += "，电话13812345678" if number % 100 == 50 else question if number % 1000 == 500 else ""
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def ours(folder: Path, count: int) -> Figures:
    """Run data/clean.py on one of the files; ends the benchmark if it misses anything or finds too much."""
    clean = folder / "clean.json"
    figures = child(ROOT / "data/clean.py", "--data_path", folder / f"{count}.jsonl", "--output_path", clean, "--overwrite")
    found = json.loads(clean.with_name("clean.report.json").read_text("utf-8"))
    wanted = {"near-duplicate of an earlier record": count // 10, "shares text with a test question": count // 1000}
    if found["dropped"] != wanted or found["masked"] != {"[电话]": count // 100}:
        sys.exit(f"ours found {found['dropped']} and {found['masked']}")
    return figures


def plain_recipe(path: Path) -> int:
    """The number of records that share SHARED of their text with an earlier one, by datasketch's own index."""
    from datasketch import MinHash, MinHashLSH

    from utils.datasets.cleaning import normalized, texts_of

    index, dropped = MinHashLSH(threshold=SHARED, num_perm=128), 0
    for number, record in enumerate(read_records(path)):
        text, sketch = normalized("".join(texts_of(record))), MinHash(num_perm=128)
        for start in range(max(1, len(text) - SHINGLE + 1)):
            sketch.update(text[start : start + SHINGLE].encode())
        if index.query(sketch):
            dropped += 1
        else:
            index.insert(number, sketch)
    return dropped


if __name__ == "__main__":
    run(main, Options)
