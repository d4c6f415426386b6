"""Clean records before training: near-duplicates, overlap with test questions, other languages, personal numbers.

    python data/clean.py --data_path datasets/belle/belle-0.5m.json --output_path datasets/belle/clean.json

    python data/clean.py --data_path a.json,b.jsonl --output_path clean.json --against test_data,cmmlu.json --languages zh

What was dropped or masked is printed with its count and examples, and stands beside the output as clean.report.json.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import end_with_parent, option, run
from utils.console import UserError, progress, say
from utils.datasets.text_faults import FIXES
from utils.files import check_folder, locked, write_json

if TYPE_CHECKING:
    from utils.datasets.records import Record

EXAMPLES, CHUNK = 3, 500
TEST_DATA = Path(__file__).resolve().parents[1] / "test_data"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is dropped, and what is masked."""

    data_path: str = option(help="records: FILE, a hub name, or several (a.json,b.jsonl)")
    output_path: str = option(help="file for the records that are kept")
    against: list[str] = option([str(TEST_DATA)], "test questions that no record may share text with ([]: none)")
    ngram: int = option(13, "characters in a row, without spaces and punctuation, that count as shared", least=4)
    near_duplicates: float = option(
        0.8, "share of common text from which the later of two records is dropped (0: keep all)", least=0, most=1
    )
    languages: list[str] = option([], "keep only answers in these languages: zh, en, other")
    least_characters: int = option(1, "shortest answer to keep", least=1)
    most_characters: int = option(100_000, "longest record to keep", least=1)
    fix_texts: list[str] = option([], "fix what earlier processing broke in texts", choices=FIXES)
    mask_personal: bool = option(True, "replace e-mail addresses, ID and phone numbers")
    overwrite: bool = option(False, "replace the output")


def main(options: Options) -> None:
    """Two passes: look at each record alone, then at all of them together."""
    check_together(options)
    from utils.datasets.cleaning import Contamination

    files = input_files(options)
    target = Path(options.output_path)
    report = Report(options)
    with locked(target), room_beside(target) as folder:
        index = Contamination(questions(options.against), options.ngram)
        say(f"{len(index.questions):,} test questions to compare with")
        kept, signatures = folder / "kept.jsonl", folder / "signatures"
        offsets = look_at_each(options, files, index, kept, signatures, report)
        dropped = find_near_duplicates(options, kept, signatures, offsets, report)
        write(target, kept, offsets, dropped, report)
    report.print(target)
    write_json(target.with_name(f"{target.stem}.report.json"), report.as_json())


def check_together(options: Options) -> None:
    """Raises UserError if an option names something that does not exist, or the output already exists."""
    wrong = sorted(set(options.languages) - {"zh", "en", "other"})
    if wrong:
        raise UserError(f"--languages {wrong[0]}: not a known language; give zh, en or other")
    check_folder(Path(options.output_path).parent, "--output_path")
    if Path(options.output_path).is_dir() or options.output_path.endswith("/"):
        raise UserError(f"--output_path {options.output_path}: is a folder; name a file in it, such as clean.json")
    if Path(options.output_path).exists() and not options.overwrite:
        raise UserError(f"{options.output_path}: already exists; give --overwrite, or choose another --output_path")
    if options.least_characters > options.most_characters:
        raise UserError(
            f"--least_characters {options.least_characters}: more than --most_characters {options.most_characters}; swap them"
        )


@contextlib.contextmanager
def room_beside(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, deleted at the end; leftovers of a killed run are removed first."""
    folder = target.with_name(f".{target.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def input_files(options: Options) -> list[Path]:
    """The files to clean. Raises UserError if the output is one of them."""
    from utils.datasets.sources import data_files

    files = data_files(options.data_path)
    if any(file.resolve() == Path(options.output_path).resolve() for file in files):
        raise UserError(f"{options.output_path}: is also an input; choose another --output_path")
    return files


def questions(paths: list[str]) -> Iterator[str]:
    """The test questions of files and folders; a choice record's choices belong to its question."""
    from utils.datasets.prompts import read_prompts

    for record in read_prompts(paths) if paths else []:
        yield "\n".join(filter(None, [record["instruction"], record.get("input")]))


class Report:
    """Counts and examples of what was dropped and masked."""

    def __init__(self, options: Options):
        self.options = dataclasses.asdict(options)
        self.read = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self.examples: dict[str, list[Any]] = {}

    def drop(self, cause: str, example: Any, keep_all: bool = False) -> None:
        """Count a dropped record; the first few of each cause are shown, and all contaminated ones are listed."""
        self.dropped[cause] += 1
        if keep_all or len(self.examples.setdefault(cause, [])) < EXAMPLES:
            self.examples.setdefault(cause, []).append(example)

    def print(self, target: Path) -> None:
        """Print counts and examples."""
        for cause, count in self.dropped.most_common():
            say(f"dropped: {cause}: {count:,}")
            for example in self.examples[cause][:EXAMPLES]:
                say("  " + json.dumps(example, ensure_ascii=False)[:160])
        for mask, count in self.masked.most_common():
            say(f"masked: {mask}: {count:,}")
        say(f"{target}: {self.kept:,} of {self.read:,} records")

    def as_json(self) -> dict[str, Any]:
        """All counts and examples, for the file beside the output."""
        return {
            "options": self.options, "read": self.read, "kept": self.kept, "dropped": dict(self.dropped),
            "masked": dict(self.masked), "examples": self.examples,
        }  # fmt: skip


def look_at_each(options: Options, files: list[Path], index: Any, kept: Path, signatures: Path, report: Report) -> array:
    """Write the kept records as lines to `kept`, and their signatures; returns where each line begins."""
    offsets = array("q", [0])
    with kept.open("wb") as lines, signatures.open("wb") as sketches, progress(desc="cleaning", unit="record") as bar:
        for examined in in_parallel(options, index, chunks(files, options.fix_texts)):
            for line, sketch, cause, example, masked in examined:
                report.read += 1
                report.masked.update(masked)
                if cause:
                    report.drop(cause, example, keep_all=cause == CONTAMINATED)
                    continue
                lines.write(line)
                sketches.write(sketch)
                offsets.append(offsets[-1] + len(line))
            bar.update(len(examined))
    return offsets


def chunks(files: list[Path], fixes: list[str]) -> Iterator[list["Record"]]:
    """All records, CHUNK at a time."""
    from utils.datasets.records import read_records

    chunk: list[Record] = []
    for file in files:
        for record in read_records(file, fixes=fixes):
            chunk.append(record)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    yield chunk


def in_parallel(options: Options, index: Any, parts: Iterator[list["Record"]]) -> Iterator[list[tuple]]:
    """The result of `examine` for each chunk, in order, using all cores; only a few chunks are in memory."""
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, initializer=prepare, initargs=(options, index)) as pool:
        waiting: deque = deque()
        for part in parts:
            waiting.append(pool.submit(examine, part))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


CONTAMINATED = "shares text with a test question"
worker: dict[str, Any] = {}  # passed to each process once


def prepare(options: Options, index: Any) -> None:
    """Keep what all chunks need in this process."""
    end_with_parent()
    worker.update(options=options, index=index)


def examine(records: list["Record"]) -> list[tuple]:
    """For each record its line, its signature, why it is dropped ("" if kept), an example, and what was masked."""
    from utils.datasets.cleaning import mask_personal, signature, texts_of

    options: Options = worker["options"]
    found: list[tuple] = []
    for record in records:
        masked: Counter[str] = Counter()
        if options.mask_personal:
            record, masked = mask_personal(record)
        text = "\n".join(texts_of(record))
        cause, example = why_drop(record, text, options)
        if cause:
            found.append((b"", b"", cause, example, Counter()))
            continue
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        found.append((line, signature(text).tobytes() if options.near_duplicates else b"", "", None, masked))
    return found


def why_drop(record: "Record", text: str, options: Options) -> tuple[str, Any]:
    """Why one record is dropped on its own account, and what to show of it; ("", None) if it is kept."""
    from utils.datasets.cleaning import language_of

    shown = record["instruction"][:60]
    if len(record["output"]) < options.least_characters:
        return "answer shorter than --least_characters", shown
    if len(text) > options.most_characters:
        return "longer than --most_characters", shown
    if options.languages and (language := language_of(record["output"])) not in options.languages:
        return f"answer in another language ({language})", record["output"][:60]
    if (question := worker["index"].hit(record)) is not None:
        return CONTAMINATED, {"record": shown, "test question": question[:60]}
    return "", None


def find_near_duplicates(options: Options, kept: Path, signatures: Path, offsets: array, report: Report) -> set[int]:
    """The numbers of records that share --near_duplicates of their text with an earlier kept one."""
    from utils.datasets.cleaning import candidates, similarity, texts_of

    dropped: set[int] = set()
    if not options.near_duplicates or len(offsets) < 3:
        return dropped
    with kept.open("rb") as lines:

        def record(number: int) -> "Record":
            lines.seek(offsets[number])
            return json.loads(lines.read(offsets[number + 1] - offsets[number]))

        for earlier, later in progress(candidates(signatures), desc="near-duplicates", unit="pair"):
            if earlier in dropped or later in dropped:
                continue
            one, other = record(earlier), record(later)
            if similarity("\n".join(texts_of(one)), "\n".join(texts_of(other))) >= options.near_duplicates:
                dropped.add(later)
                report.drop("near-duplicate of an earlier record", [one["instruction"][:60], other["instruction"][:60]])
    return dropped


def write(target: Path, kept: Path, offsets: array, dropped: set[int], report: Report) -> None:
    """Write the kept records as one JSON array, completely or not at all."""
    from utils.datasets.record_writer import write_records

    with kept.open("rb") as lines:
        stay = (json.loads(line) for number, line in enumerate(lines) if number not in dropped)
        report.kept = write_records(target, stay)


if __name__ == "__main__":
    run(main, Options)
