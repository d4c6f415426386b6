"""Code in answers: run against each problem's tests, in an unprivileged child process, and counted as pass@k."""

import itertools
import math
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from utils.console import UserError, progress
from utils.datasets.file_formats import read_items
from utils.datasets.items import UnreadableItem
from utils.datasets.prompts import Record
from utils.evaluation.answers import ALL, grouped, key_of, samples
from utils.evaluation.intervals import FEWEST, bootstrap, compare, compare_shares, of_share
from utils.evaluation.programs import Task, program
from utils.evaluation.sandbox import REFUSED
from utils.evaluation.tables import Row, Table

SECONDS, WALL, MEGABYTES = 10, 30, 1024
SANDBOX = Path(__file__).with_name("sandbox.py")


def read_tasks(paths: Sequence[str]) -> dict[str, Task]:
    """The problems of files that data/code/prepare.py wrote, by what they ask. Raises UserError if there are none."""
    found = {}
    for path in paths:
        for _, item in read_items(Path(path)):
            if not isinstance(item, UnreadableItem) and isinstance(item, dict) and isinstance(item.get("tests"), str):
                task = Task(str(item.get("prefix") or ""), str(item.get("entry_point") or ""), item["tests"])
                found[key_of({"instruction": item.get("instruction", "")})] = task
    if not found:
        raise UserError("--run_code: --test_input_path holds no problem with tests; data/code/prepare.py makes such files")
    return found


def outcome(text: str) -> str:
    """The outcome of a program: "" if all tests pass, else why not. Raises UserError if it cannot be run safely here.

    A program that ends before its tests are done does not pass. Its output is limited like any file it writes.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = [sys.executable, "-I", str(SANDBOX), folder, str(SECONDS), str(MEGABYTES)]
        given, nothing_else = f"{word}\n{text}".encode("utf-8", "replace"), {"LC_ALL": "C.UTF-8"}
        try:
            ended = subprocess.run(
                command, input=given, stdout=out, stderr=err, timeout=WALL, env=nothing_else, start_new_session=True
            )
        except subprocess.TimeoutExpired:
            return f"took over {WALL} s"
        printed, complained = last_line(out), last_line(err)
    if ended.returncode == REFUSED:
        raise UserError(
            f"--run_code: this machine cannot sandbox a program ({complained}); use Linux with namespaces allowed, "
            "which most containers do not"
        )
    if ended.returncode == 0:
        return "" if printed == word else "ended before its tests did"
    return complained[:200] or f"ended with status {ended.returncode}"


def last_line(file: IO[bytes]) -> str:
    """The last line of a file, within its last 4 KiB."""
    file.seek(max(0, file.seek(0, 2) - 4096))
    lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""


def run_all(
    records: Sequence[Record], answers: Mapping[str, list[str]], tasks: Mapping[str, Task]
) -> dict[str, list[str | None]]:
    """For each system and record the outcome of its program (None: the record is not a problem in `tasks`)."""
    known = [tasks.get(key_of({"instruction": record["instruction"]})) for record in records]
    if not any(known):
        raise UserError("--run_code: none of the answers is to a problem of --test_input_path; answer these with generate.py")
    jobs = {
        (system, place): program(given[place], task)
        for system, given in answers.items()
        for place, task in enumerate(known)
        if task
    }
    outcome(next(iter(jobs.values())))  # first alone, so that a machine that cannot do it reports so only once
    with ThreadPoolExecutor(2) as pool, progress(total=len(jobs), desc="running code") as bar:

        def counted(text: str) -> str:
            found = outcome(text)
            bar.update()
            return found

        results = dict(zip(jobs, pool.map(counted, jobs.values()), strict=True))
    return {system: [results.get((system, place)) for place in range(len(records))] for system in answers}


def pass_at(k: int, count: int, right: int) -> float:
    """The probability that one of `k` of `count` programs passes if `right` do (the unbiased estimate of Chen et al. 2021)."""
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def tabulate(records: Sequence[Record], results: Mapping[str, list[str | None]]) -> tuple[list[Table], list[str]]:
    """A table for each k with enough samples (1, 10, 100), with notes on the commonest failures and on which systems differ."""
    groups = samples(list(results))
    fewest = min(map(len, groups.values()))
    places = [place for place, found in enumerate(next(iter(results.values()))) if found is not None]
    members = grouped(places, lambda place: records[place].get("category", ALL))
    tables, lines = [], notes(groups, results)
    for k in [k for k in (1, 10, 100) if k <= fewest]:
        shares = {
            name: {p: 100 * pass_at(k, len(systems), sum(results[s][p] == "" for s in systems)) for p in places}
            for name, systems in groups.items()
        }
        rows = []
        for category, inside in members.items():
            given = {name: [found[p] for p in inside] for name, found in shares.items()}
            means = {name: (statistics.fmean(of), of_share([(one, 100) for one in of])) for name, of in given.items()}
            rows.append(Row.of(category, len(inside), means))
        tables.append(Table(f"pass@{k} in % ({fewest} samples per problem, {SECONDS} s, {MEGABYTES} MB)", list(groups), rows))
        lines += [f"pass@{k}, all {len(places)} problems: {line}" for line in differences(shares)]
    return tables, lines


def differences(shares: Mapping[str, Mapping[int, float]]) -> list[str]:
    """A line for each pair of systems: whether they differ in pass@k (in percent) on the same problems; by McNemar's test if
    each problem is either passed or not, else by a paired bootstrap over the problems."""
    if all(share in (0, 100) for found in shares.values() for share in found.values()):
        return compare_shares({name: [share == 100 for share in found.values()] for name, found in shares.items()})
    gaps = {(a, b): [shares[a][p] - shares[b][p] for p in shares[a]] for a, b in itertools.combinations(shares, 2)}
    return [compare(one, other, bootstrap([of]) if len(of) >= FEWEST else None) for (one, other), of in gaps.items()]


def notes(groups: Mapping[str, list[str]], results: Mapping[str, list[Any]]) -> list[str]:
    """How many programs passed, and what the others ended with."""
    lines = []
    for name, systems in groups.items():
        found = [result for system in systems for result in results[system] if result is not None]
        kinds = Counter(result.partition(":")[0] for result in found if result)
        ranked = sorted(kinds.items(), key=lambda one: (-one[1], one[0]))[:5]
        others = f"; the others: {', '.join(f'{kind} {count}' for kind, count in ranked)}" if ranked else ""
        lines.append(f"{name}: {found.count('')} of {len(found)} programs pass{others}")
    return lines
