"""Shared by all benchmarks: alternating recipes, medians, machine info, a table, and one JSON object as the last line."""

import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Stands between the benchmark and a program, since a process inherits the peak memory of the one that started it.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, used = os.wait4(process.pid, 0)
seconds, cpu = time.perf_counter() - start, used.ru_utime + used.ru_stime
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mb": used.ru_maxrss / 1024}))
sys.exit(status != 0)
"""
Figures = dict[str, float]  # such as {"seconds": 1.5, "peak_mb": 700}


def interleave(recipes: dict[str, Callable[[], Figures]], repeats: int) -> dict[str, Figures]:
    """Run the recipes alternately, `repeats` times each, so that a slow spell hits all of them; returns each one's medians."""
    runs: dict[str, list[Figures]] = {name: [] for name in recipes}
    for repeat in range(repeats):
        for name, recipe in recipes.items():
            figures = recipe()
            runs[name].append(figures)
            print(f"{repeat + 1}/{repeats}  {name}: {written(figures)}", file=sys.stderr, flush=True)
    return {
        name: {key: statistics.median(figures[key] for figures in measured) for key in measured[0]}
        for name, measured in runs.items()
    }


def timed(function: Callable[[], Any]) -> Figures:
    """The wall time of one call, in seconds."""
    start = time.perf_counter()
    function()
    return {"seconds": time.perf_counter() - start}


def child(*arguments: str | Path) -> Figures:
    """Run a Python program in a process of its own; returns `seconds` (wall), `cpu_seconds` and `peak_mb`.

    The peak is of the resident set, in MiB. If the program's last line of output is a JSON object, its figures are
    added. If the program fails, so does the benchmark.
    """
    command = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, arguments)]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    if ended.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}: failed\n{ended.stdout}")
    *lines, last = ended.stdout.strip().splitlines()
    reported = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {**json.loads(last), **reported}


def text_maker() -> Callable[[float], str]:
    """A function that makes Chinese texts, of a given median length, from the records in the repository.

    Lengths are log-normal, like those of real records; every run gets the same texts.
    """
    from utils.datasets.records import read_records

    files = sorted((ROOT / "test_data").glob("*.json")) + sorted((ROOT / "data/demo").glob("f*.json"))
    texts = [r["instruction"] + r["input"] + r["output"] for file in files for r in read_records(file, need_output=False)]
    numbers = random.Random(42)

    def text(median: float) -> str:
        length, made = int(numbers.lognormvariate(0, 0.9) * median) + 2, ""
        while len(made) < length:
            made += numbers.choice(texts)
        return made[:length]

    return text


def report(medians: dict[str, Figures], ratios: Figures, libraries: tuple[str, ...], **facts: Any) -> None:
    """Print a table of the medians, the ratios, and a JSON line with everything."""
    width = max(map(len, medians))
    for name, figures in medians.items():
        print(f"{name:<{width}}  {written(figures)}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3g}")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    print(
        json.dumps(
            {"machine": machine(), "versions": versions, "medians": medians, "ratios": ratios, **facts}, ensure_ascii=False
        )
    )


def written(figures: Figures) -> str:
    """Figures as a line of text."""
    return "  ".join(f"{key} {value:10.3f}" for key, value in figures.items())


def machine() -> dict[str, Any]:
    """The machine that the figures were measured on."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
