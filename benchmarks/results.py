"""Turn what benchmarks printed into one Markdown page: python benchmarks/results.py FOLDER NAME…

FOLDER holds one file for each benchmark NAME; the last line of each is its JSON object (see `common.report`).
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """# 实测结果 · Measured results

`bash benchmarks/run.sh` 写出本页；每项都在同一次运行里交替执行，取中位数。
Written by `bash benchmarks/run.sh`; the recipes of each take turns within one run, and these are the medians.
"""


def main(folder: str, *names: str) -> None:
    """Print the page."""
    results = {name: json.loads(Path(folder, name).read_text("utf-8").strip().splitlines()[-1]) for name in names}
    print(HEAD)
    for name, result in results.items():
        print("\n".join(section(name, result)))


def section(name: str, result: dict[str, Any]) -> list[str]:
    """One benchmark: where it ran, its medians, its ratios, and what else it reports."""
    lines = [f"## {name}", "", first_line(name), "", facts("machine", result["machine"]), facts("versions", result["versions"])]
    keys = list(dict.fromkeys(key for figures in result["medians"].values() for key in figures))
    lines += ["", f"| | {' | '.join(key.replace('_', ' ') for key in keys)} |", "|---" * (len(keys) + 1) + "|"]
    for recipe, figures in result["medians"].items():
        lines.append(f"| {recipe} | {' | '.join(number(figures.get(key)) for key in keys)} |")
    lines += ["", *(f"- {ratio}: **{number(value)}**" for ratio, value in result["ratios"].items())]
    rest = {key: value for key, value in result.items() if key not in ("machine", "versions", "medians", "ratios")}
    return [*lines, *([facts("also", rest)] if rest else []), ""]


def first_line(name: str) -> str:
    """What a benchmark's docstring says it is."""
    return Path(__file__).with_name(f"{name}.py").read_text("utf-8").removeprefix('"""').splitlines()[0]


def facts(title: str, values: dict[str, Any]) -> str:
    """Names and values as one item of a list."""
    return f"- {title}: " + ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def number(value: float | None) -> str:
    """Three digits that count, or none where it was not measured."""
    return "—" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
