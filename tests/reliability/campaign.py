"""Random data, options, models and kills on every script, for as long as asked: each run ends right, or in one line.

    python tests/reliability/campaign.py --minutes 120 --seed 1

Each round draws a script, a tiny model, a file of records, options and perhaps a kill, runs the script as a user does,
and looks at what it left: exit status 0 with a result that a plain reference confirms (answers of transformers' own
generate, scores of peft), or 2 with one line and nothing written; after a kill, the same command must end as an
undisturbed run does, to the byte; no lock and no half-written file may stay. The page and the endpoint are served
throughout and asked in between, and their memory is measured. The last line is JSON.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import tiny  # noqa: E402
from outcomes import answered, cleaned, judged, merged, other_results, trained  # noqa: E402

CHARACTERS = '天地玄黄，宇宙洪荒。abc XYZ 012\n\t"\\&;<>{}[]🙂é\u200b\u3000ß'
LONGEST = 300  # seconds of one run
FAMILIES = {"llama": tiny.llama, "qwen2": tiny.qwen2, "mistral": tiny.mistral, "bloom": tiny.bloom}


class Campaign:
    """A folder of models, a random generator, and what was found so far."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw = folder, random.Random(seed)
        self.runs: Counter[str] = Counter()
        self.problems: list[dict] = []
        for name, build in FAMILIES.items():
            tiny.adapter(build(folder / name), folder / f"{name}-lora")

    def problem(self, what: str, command: list[str], told: str) -> None:
        """Keep what went wrong, with the command that shows it."""
        self.problems.append({"what": what, "command": command, "told": told[-1500:]})
        print(f"PROBLEM: {what}\n  {' '.join(command)}\n{told[-1500:]}", flush=True)

    def text(self, most: int = 60) -> str:
        """Random characters, now and then none or many."""
        return "".join(self.draw.choices(CHARACTERS, k=self.draw.choice([0, 1, 5, most, most, most, 20 * most])))

    def records(self, path: Path) -> Path:
        """A file of records in a random format, with random damage in some."""
        items = [
            {"instruction": self.text() or "问", "input": self.text(20), "output": self.text() or "答"}
            for _ in range(self.draw.randint(1, 40))
        ]
        for item in items:
            if self.draw.random() < 0.1:
                item[self.draw.choice(list(item))] = self.draw.choice([None, 1, [], {}, "", "nan", "\ud800"])
        data = json.dumps(items) if self.draw.random() < 0.5 else "\n".join(map(json.dumps, items))
        raw = data.encode()
        if self.draw.random() < 0.15:
            raw = raw[: self.draw.randint(0, len(raw))]
        if self.draw.random() < 0.1:
            at = self.draw.randrange(len(raw) + 1)
            raw = raw[:at] + bytes(self.draw.choices(range(256), k=3)) + raw[at:]
        path.write_bytes(raw)
        return path

    def commands(self, place: Path) -> tuple[str, list[str]]:
        """A script and its options; what it writes is `place / "out"`."""
        family, pick = self.draw.choice(list(FAMILIES)), self.draw.choice
        other = family if self.draw.random() < 0.9 else pick(list(FAMILIES))  # perhaps another model's adapter
        base, adapter, out = self.folder / family, self.folder / f"{other}-lora", place / "out"
        data = self.records(place / "data.json")
        train = [[], ["--lora_target_modules", "all-linear"], ["--use_dora", "True"], ["--group_by_length"]]
        train += [["--load_8bit", "True"], ["--load_4bit"], ["--resume_from_checkpoint", adapter]]
        made = {
            "finetune.py": [
                *("--base_model", base, "--data_path", data, "--output_dir", out),
                *(
                    "--val_set_size",
                    pick(["0", "1", "0.2"]),
                    "--num_epochs",
                    pick(["1", "2"]),
                    "--save_steps",
                    pick(["1", "3"]),
                ),
                *("--batch_size", pick(["2", "4", "3"]), "--micro_batch_size", pick(["1", "2"])),
                *("--cutoff_len", pick(["8", "64", "256"]), "--train_on_inputs", pick(["True", "False"]), *pick(train)),
            ],
            "generate.py": [
                *("--base_model", base, "--is_ui", "False", "--test_input_path", data, "--output_path", out / "test.json"),
                *("--max_new_tokens", pick(["1", "8", "40"]), "--num_beams", pick(["1", "2", "4"])),
                *("--batch_size", pick(["auto", "1", "3"]), *pick([[], ["--lora_weights", adapter]])),
            ],
            "merge_weights.py": [
                *("--base_model", base, "--lora_model", adapter, "--output_dir", out),
                *pick([[], ["--dtype", "float16"], ["--verify"], ["--max_shard_size", "100KB"]]),
            ],
            "judge.py": [
                *("--answers", f"a={data}", "--answers", f"b={data}", "--metrics", "--test_input_path", data),
                *("--output_dir", out),
            ],
            "data/clean.py": [
                *("--data_path", data, "--output_path", out / "clean.json", "--fix_texts", pick(["all", "[]", "[latex]"])),
            ],
        }
        script = pick(list(made))
        return script, list(map(str, made[script]))

    def round(self, number: int) -> None:
        """One run, perhaps killed and started again, and what is to be said of it."""
        place = self.folder / f"round-{number}"
        place.mkdir()
        script, options = self.commands(place)
        command = [sys.executable, str(ROOT / script), *options]
        killed = self.draw.random() < 0.25 and self.kill(command)
        ended = self.run(command, place)
        if ended is None:
            return self.problem("ran longer than any run takes", command, "")
        told = ended.stdout + ended.stderr
        lines = [line for line in ended.stderr.splitlines() if ": error: " in line]
        kind = {0: "right", 2: "refused"}.get(ended.returncode, "broken")
        if "Traceback" in told or kind == "broken" or (kind == "refused" and len(lines) != 1):
            self.problem(f"status {ended.returncode}", command, told)
        elif kind == "right":
            wrong = self.difference(script, options, place, killed)
            if wrong:
                kind = "wrong"
                self.problem(f"another result than the plain reference: {wrong}", command, told)
        elif not killed and any((place / "out").rglob("*")):
            self.problem("refused, and something was written", command, told)
        left = [str(file) for file in place.rglob(".*") if file.name.endswith((".part", ".lock", ".old"))]
        if left:
            self.problem(f"left aside: {left[0]}", command, told)
        self.runs[f"{script} {kind}{' after a kill' if killed else ''}"] += 1
        shutil.rmtree(place)

    def run(self, command: list[str], place: Path) -> subprocess.CompletedProcess | None:
        """The command to its end, None if there is none in time."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "cache")}
        try:
            return subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                cwd=place,
                env=environment,
                timeout=LONGEST,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None

    def kill(self, command: list[str]) -> bool:
        """Start the command and end it at a random moment, by a random signal."""
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(self.draw.uniform(1, 15))
        how = self.draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, how)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            self.problem(f"did not end within a minute of {how.name}", command, "")
        return True

    def difference(self, script: str, options: list[str], place: Path, killed: bool) -> str:
        """How a result differs from a plain reference and, after a kill, from that of an undisturbed run; "" if it does not.

        A check that fails itself counts as a difference.
        """
        out = place / "out"
        check = {"merge_weights.py": merged, "finetune.py": trained, "generate.py": answered, "judge.py": judged}
        try:
            wrong = check.get(script, cleaned)(dict(pairs(options)), out)
            if killed and not wrong:
                out.rename(place / "killed")
                self.run([sys.executable, str(ROOT / script), *options], place)
                wrong = other_results(place / "killed", out)
        except Exception:
            wrong = traceback.format_exc()
        return wrong


def pairs(options: list[str]) -> Iterator[tuple[str, str]]:
    """The options as pairs of name and value, "" for a flag."""
    for name, value in itertools.pairwise([*options, "--"]):
        if name.startswith("--"):
            yield name, "" if value.startswith("--") else value


class Served:
    """The page with the endpoint beside it, as a process, asked now and then."""

    def __init__(self, campaign: Campaign):
        self.campaign = campaign
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        base = campaign.folder / "llama"
        self.command = [sys.executable, str(ROOT / "generate.py"), "--base_model", str(base), "--lora_weights", f"{base}-lora",
            "--server_port", str(self.port), "--max_new_tokens", "16"]  # fmt: skip
        self.log = open(campaign.folder / "served.log", "wb")
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=self.log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        self.asked, self.memory = Counter[str](), list[int]()

    def ask(self) -> None:
        """One random request, good or bad; each must be answered in the protocol's form."""
        draw = self.campaign.draw
        question = [{"role": "user", "content": self.campaign.text() or "问"}]
        body = {
            "model": draw.choice(["base", "llama-lora", "none"]),
            "messages": draw.choice([[], question, question]),
            "max_tokens": draw.choice([1, 16, -1, "x"]),
            "temperature": draw.choice([0, 1, 9]),
        }
        raw = json.dumps(body).encode()[: None if draw.random() < 0.9 else draw.randint(0, 40)]
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/chat/completions", raw)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, told = answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            status, told = error.code, json.loads(error.read())
        except (OSError, ValueError) as error:
            return self.campaign.problem(f"the endpoint: {error}", self.command, raw.decode())
        if status >= 500 or ("choices" if status == 200 else "error") not in told:
            self.campaign.problem(f"the endpoint answered {status}", self.command, f"{raw.decode()}\n{told}")
        self.asked[str(status)] += 1
        self.memory.append(psutil.Process(self.process.pid).memory_info().rss)

    def wait(self) -> None:
        """Until it answers. Raises RuntimeError if it ends instead."""
        while True:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
            if self.process.poll() is not None:
                raise RuntimeError((self.campaign.folder / "served.log").read_text())
            time.sleep(0.5)


def main() -> int:
    """Run rounds until the time is up, and print what was found; 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore, with all they start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    until = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), given.seed)
        served = Served(campaign)
        try:
            served.wait()
            rounds = 0
            while time.monotonic() < until:
                campaign.round(rounds)
                rounds += 1
                for _ in range(5):
                    served.ask()
        finally:
            served.process.terminate()
            served.process.wait()
            served.log.close()
    sizes = [size // 10**6 for size in served.memory]
    told = {
        "minutes": given.minutes, "seed": given.seed, "rounds": rounds, "runs": dict(sorted(campaign.runs.items())),
        "requests": dict(served.asked), "server_MB": sizes[:: max(1, len(sizes) // 4)],
        "problems": campaign.problems,
    }  # fmt: skip
    print(json.dumps(told, ensure_ascii=False))
    return bool(campaign.problems)


if __name__ == "__main__":
    sys.exit(main())
