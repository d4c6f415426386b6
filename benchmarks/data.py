"""Firefly's 1.65 million records: time and memory to split them into parts, to just read them, and of the baseline.

    python benchmarks/data.py

The file is synthetic, in the real format: 24 kinds in their real numbers, shuffled, about 1.1 GB. Three programs alternate:
one that only reads the lines with orjson, `data/firefly/prepare.py`, and the baseline, which holds everything in memory; the
last two must write identical bytes.
"""

import collections
import dataclasses
import filecmp
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, Figures, child, interleave, report
from utils.cli import option, run

KINDS = (
    dict.fromkeys(
        ("NLI", "Summary", "Couplet", "MusicComment", "NER", "KeywordRecognition", "TextCorrection", "SentimentAnalyze"), 50_000
    )
    | dict.fromkeys(("TextMatching", "ClassicalChinese", "Composition", "Translation"), 50_000)
    | {
        "ProductDesc": 70_000,
        "MRC": 70_000,
        "Cot": 74_771,
        "OpenQA": 69_843,
        "AncientPoem": 69_950,
        "JinYongGeneration": 49_990,
        "LyricGeneration": 49_985,
        "Dictionary": 30_895,
        "StoryGeneration": 19_048,
        "Program": 974,
        "ProseGeneration": 658,
        "BELLE": 543_285,
    }
)
READ = "import orjson, sys\nfor line in open(sys.argv[1], 'rb'): orjson.loads(line)"
PARTS = 5


@dataclasses.dataclass
class Options:
    """The options of this benchmark."""

    share: float = option(1.0, "share of the real number of records", least=0.0001, most=1)
    repeats: int = option(3, "runs of each program", least=1)
    plain: bool = option(True, "also run the baseline, which takes 2 GB of memory")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        raw, ours, plain = (Path(name, part) for part in ("firefly-train-1.1M.jsonl", "ours", "plain"))
        write_raw(raw, options.share)
        facts = {"bytes": raw.stat().st_size}
        recipes = {
            "read the lines with orjson": lambda: child("-c", READ, raw),
            "data/firefly/prepare.py": lambda: child(ROOT / "data/firefly/prepare.py", "--raw", raw, "--output_dir", ours),
        }
        if options.plain:
            recipes["plain recipe"] = lambda: child(__file__, "plain_recipe", raw, plain)
        medians = interleave(recipes, options.repeats)
        equal = options.plain and all(
            filecmp.cmp(plain / f"firefly-train-{part}.json", ours / f"firefly-train-{part}.json", shallow=False)
            for part in range(PARTS)
        )
    if options.plain and not equal:
        sys.exit("the baseline and ours wrote different files")
    report(medians, ratios(medians), ("orjson", "tqdm"), **facts, **({"equal": equal} if options.plain else {}))


def write_raw(path: Path, share: float) -> None:
    """Write the synthetic file. Lengths are log-normal, like those of real answers."""
    random.seed(42)
    text = "".join(chr(random.randrange(0x4E00, 0x9FA5)) if random.random() > 0.12 else "，" for _ in range(1_000_000))
    kinds = [kind for kind, count in KINDS.items() for _ in range(max(1, round(count * share)))]
    random.shuffle(kinds)
    with open(path, "w", encoding="utf-8") as file:
        for kind in kinds:
            begin, asked, answered = random.randrange(900_000), random.lognormvariate(4.0, 0.7), random.lognormvariate(4.6, 0.8)
            middle = begin + 1 + int(min(asked, 5_000))
            end = middle + 1 + int(min(answered, 20_000))
            item = {"kind": kind, "input": text[begin:middle], "target": text[middle:end] + "。\n完"}
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def plain_recipe(raw: str, folder: str) -> None:
    """Read all records into memory, count, split, write with json: what such scripts usually do."""
    with open(raw, encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    totals = collections.Counter(item["kind"] for item in items)
    seen: collections.Counter[str] = collections.Counter()
    parts: list[list[dict]] = [[] for _ in range(PARTS)]
    for item in items:
        kind = item["kind"]
        parts[seen[kind] // -(-totals[kind] // PARTS)].append(
            {"instruction": item["input"], "input": "", "output": item["target"]}
        )
        seen[kind] += 1
    Path(folder).mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        with open(Path(folder, f"firefly-train-{number}.json"), "w", encoding="utf-8") as file:
            json.dump(part, file, ensure_ascii=False, indent=1)
            file.write("\n")


def ratios(medians: dict[str, Figures]) -> Figures:
    read, ours = medians["read the lines with orjson"], medians["data/firefly/prepare.py"]
    found = {
        "ours / reading, time": ours["seconds"] / read["seconds"],
        "ours / reading, processor time": ours["cpu_seconds"] / read["cpu_seconds"],
    }
    if "plain recipe" in medians:
        plain = medians["plain recipe"]
        found["plain / ours, time"] = plain["seconds"] / ours["seconds"]
        found["plain / ours, memory"] = plain["peak_mb"] / ours["peak_mb"]
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain_recipe"]:
        plain_recipe(*sys.argv[2:])
    else:
        run(main, Options)
