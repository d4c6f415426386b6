"""Multiple-choice questions for a base model and its adapters: by the likelihood of each choice, or by generated answers."""

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.console import UserError, progress, say
from utils.datasets.choices import LETTERS, Choice, read_choices
from utils.datasets.encoding import encode_last_answers, encode_text
from utils.datasets.records import Record
from utils.evaluation.answers import grouped
from utils.evaluation.chosen import read_answer
from utils.evaluation.intervals import compare_shares, share
from utils.evaluation.tables import Row, Table
from utils.files import digest
from utils.inference import batch
from utils.inference.continuations import Asked, log_likelihoods
from utils.inference.engine import Engine
from utils.inference.kv_cache import Ids, common
from utils.journal import Journal

LETTER, TEXT, ANSWER = "letter", "text", "answer"  # what is scored: a choice's letter, its text, or the generated answer
PLAIN, OWN = "plain", "own"  # how it is asked: as text to continue, or with each adapter's template
EXAMPLES = "dev.json"  # the default file of worked examples, beside the questions
LONGEST = 1 << 20  # tokens: nothing is cut
GENERATED = {PLAIN: 16, OWN: 256}  # tokens of an answer


class Way(NamedTuple):
    """How questions are asked: with how many worked examples, what is scored, and as what kind of text."""

    shots: int = 0
    by: str = LETTER
    template: str = PLAIN

    def __str__(self) -> str:
        looked_at = {LETTER: "likelihood of the letter", TEXT: "likelihood of the choice", ANSWER: "generated answer"}
        asked = "plain text" if self.template == PLAIN else "own template"
        return f"{self.shots} shots, {asked}, {looked_at[self.by]}"


class Marked(NamedTuple):
    """One question's result: the indices of the chosen choices (None: uncertain), and their basis: a number for each choice,
    or the generated text."""

    chosen: list[int] | None
    shown: list[float] | str


def read_examples(path: str, questions: Sequence[Choice], files: Sequence[str], shots: int) -> dict[str, list[Choice]]:
    """The first `shots` worked examples of each subject, from the file `path`, or from `dev.json` beside the questions.

    Prints which subjects have fewer. Raises UserError if there are none.
    """
    if not shots:
        return {}
    folders = [Path(file) if Path(file).is_dir() else Path(file).parent for file in files]
    beside = [folder / EXAMPLES for folder in folders if (folder / EXAMPLES).is_file()]
    if not path and not beside:
        raise UserError(f"--shots {shots}: no {EXAMPLES} beside the questions; name a file as --shots_path, or give --shots 0")
    found: dict[str, list[Choice]] = {}
    for one in read_choices([path] if path else [str(file) for file in dict.fromkeys(beside)], "--shots_path"):
        if len(one.right) == 1 and len(found.setdefault(one.category, [])) < shots:
            found[one.category].append(one)
    few = sorted({one.category for one in questions if len(found.get(one.category, [])) < shots})
    if few:
        counts = ", ".join(f"{name} {len(found.get(name, []))}" for name in few[:8]) + (", …" if len(few) > 8 else "")
        say(f"{len(few)} subjects have fewer than {shots} worked examples, which are all used: {counts}")
    return found


def description(one: Choice) -> str:
    """The introduction to the questions of a subject."""
    topic = f"关于{one.topic}的" if one.topic else ""
    return f"以下是{topic}单项选择题，请直接给出正确答案的选项。\n\n"


def question(one: Choice, by: str) -> str:
    """A question up to its answer; its choices are listed unless their texts are the answers."""
    listed = "" if by == TEXT else "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, one.choices, strict=False))
    return f"{one.question}{listed}\n答案："


def answer(one: Choice, place: int, by: str) -> str:
    """A choice as an answer."""
    return one.choices[place] if by == TEXT else LETTERS[place]


def as_text(one: Choice, examples: Sequence[Choice], by: str) -> str:
    """A question after its subject's description and worked examples, as text to continue."""
    solved = [f"{question(example, by)} {answer(example, example.right[0], by)}\n\n" for example in examples]
    return description(one) + "".join(solved) + question(one, by)


def as_dialogue(one: Choice, examples: Sequence[Choice], by: str) -> Record:
    """A question as a record with the worked examples as earlier turns."""
    turns = [question(example, by) for example in [*examples, one]]
    turns[0] = description(one) + turns[0]
    answers = [answer(example, example.right[0], by) for example in examples]
    asked: Record = {"instruction": turns[-1], "input": "", "output": ""}
    if examples:
        asked["history"] = [list(turn) for turn in zip(turns, answers, strict=False)]
    return asked


def encode(engine: Engine, name: str, one: Choice, examples: Sequence[Choice], way: Way) -> Asked:
    """The ids of a question for the answerer `name`, and of each of its choices after it.

    Each text is encoded as one; a token that straddles question and choice belongs to the choice.
    """
    tokenizer = engine.tokenizers[name]
    if way.template == PLAIN:
        text = as_text(one, examples, way.by)
        prompt = encode_text(text, tokenizer)
        if way.by == ANSWER:
            return Asked(prompt, [])
        wholes = [encode_text(f"{text} {answer(one, place, way.by)}", tokenizer) for place in range(len(one.choices))]
    else:
        record = as_dialogue(one, examples, way.by)
        prompt = engine.encode(name, record)
        if way.by == ANSWER:
            return Asked(prompt, [])
        answered = [record | {"output": answer(one, place, way.by)} for place in range(len(one.choices))]
        encoded = encode_last_answers(answered, engine.prompters[name], tokenizer, LONGEST)
        wholes = [one.input_ids for one in encoded]
    shared = min(common(prompt, whole) for whole in wholes)
    ends = engine.ending(name, None if way.template == PLAIN else "").ends
    rests = [up_to(whole[shared:], ends) for whole in wholes]
    if not all(rests):  # a choice has no token beyond those that all have in common
        raise UserError(f"{name}: a choice of {one.question[:40]!r} has no token of its own; give another --choices_by")
    return Asked(prompt[:shared], rests)


def up_to(ids: Ids, ends: Collection[int]) -> Ids:
    """The tokens before the first end token."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def encode_fitting(engine: Engine, name: str, one: Choice, examples: list[Choice], way: Way) -> tuple[Asked | None, int]:
    """A question with as many of its worked examples as fit in the model's window, and how many these are; None if it does
    not fit even without examples."""
    for count in range(len(examples), -1, -1):
        asked = encode(engine, name, one, examples[len(examples) - count :], way)
        longest = max(map(len, asked.continuations), default=GENERATED[way.template])
        if engine.window is None or len(asked.prompt) + longest <= engine.window:
            return asked, count
    return None, 0


def mark_all(
    engine: Engine, questions: Sequence[Choice], examples: dict[str, list[Choice]], way: Way, path: Path
) -> dict[str, list[Marked | None]]:
    """Each answerer's results, one for each question (None: it does not fit the model's window); subject by subject, each
    in the journal `path` when it is there."""
    if way.by != ANSWER and all(len(one.right) > 1 for one in questions):
        raise UserError("--choices: all questions have several right choices; give --choices_by answer, which can name several")
    subjects = grouped(range(len(questions)), lambda place: questions[place].category)
    header: dict[str, Any] = {"questions": digest(questions), "examples": digest(examples), "way": list(way)}
    header |= {"answerers": fingerprints(engine), "placement": str(engine.placement)}
    journal = Journal(path, header)
    if journal.values:
        say(f"{path}: {len(journal.values)} of {len(engine.answerers) * len(subjects)} subjects are already done; continuing")
    found: dict[str, list[Marked | None]] = {}
    try:
        for name in engine.prompters:
            marks: list[Marked | None] = [None] * len(questions)
            fewer = 0
            with progress(total=len(questions), desc=name, unit=" questions") as bar:
                for subject, places in subjects.items():
                    key = f"{name} {subject}"
                    if key not in journal.values:
                        engine.use(name)
                        journal.put(key, mark(engine, name, [questions[p] for p in places], examples.get(subject, []), way))
                    results, cut = journal.values[key]
                    fewer += cut
                    for place, result in zip(places, results, strict=True):
                        marks[place] = Marked(*result) if result else None
                    bar.update(len(places))
            if fewer:
                say(
                    f"{name}: {fewer} of {len(questions)} questions were asked with fewer examples, "
                    f"to fit {engine.window} tokens"
                )
            found[name] = marks
    finally:
        journal.close(done=False)
    return found


def fingerprints(engine: Engine) -> dict[str, Any]:
    """What the answerers are made of: the base model, and each adapter's weights."""
    from utils import lineage
    from utils.adapters.adapters import find_weights
    from utils.files import sha256

    folders = {one.name: sha256(find_weights(one.folder)) if one.folder else "" for one in engine.answerers}
    return {"base model": lineage.fingerprint(engine.base_model), "adapters": folders}


def mark(
    engine: Engine, name: str, questions: Sequence[Choice], examples: list[Choice], way: Way
) -> tuple[list[Marked | None], int]:
    """The results of one subject's questions, and how many of them were asked with fewer examples than there are."""
    encoded = [encode_fitting(engine, name, one, examples, way) for one in questions]
    fitting = [place for place, (asked, _) in enumerate(encoded) if asked is not None]
    asked = [encoded[place][0] for place in fitting]
    results: list[Marked | None] = [None] * len(questions)
    if way.by == ANSWER:
        texts = generate(engine, name, [one.prompt for one in asked if one], way)
        for place, text in zip(fitting, texts, strict=True):
            results[place] = Marked(read_answer(text, questions[place].choices), text)
    else:
        scores = log_likelihoods(engine.model, [one for one in asked if one], engine.room)
        for place, numbers in zip(fitting, scores, strict=True):
            results[place] = Marked([max(range(len(numbers)), key=numbers.__getitem__)], numbers)
    return results, sum(encoded[place][1] < len(examples) for place in fitting)


def generate(engine: Engine, name: str, prompts: list[Ids], way: Way) -> list[str]:
    """Greedy answers to `prompts`."""
    template, stops = (None, ["\n"]) if way.template == PLAIN else ("", [])
    return batch.greedy_texts(engine, name, prompts, GENERATED[way.template], template, stops)


def scored(questions: Sequence[Choice], marks: dict[str, list[Marked | None]], way: Way) -> list[int]:
    """The indices of the questions that count: those that fit every answerer's window and, if likelihoods are compared, have
    only one right choice."""
    return [
        place
        for place, one in enumerate(questions)
        if (way.by == ANSWER or len(one.right) == 1) and all(found[place] is not None for found in marks.values())
    ]


def is_right(one: Choice, mark: Marked | None) -> bool:
    """True if exactly the right choices were chosen."""
    return mark is not None and mark.chosen == list(one.right)


def tabulate(
    questions: Sequence[Choice], marks: dict[str, list[Marked | None]], way: Way, dtype: str
) -> tuple[list[Table], list[str]]:
    """The share of right answers over all questions, by group and by subject, with notes for the reader."""
    counted = scored(questions, marks, way)
    if not counted:
        raise UserError("--choices: no question can be scored; see the lines above")
    right = {name: {place: is_right(questions[place], found[place]) for place in counted} for name, found in marks.items()}
    subjects = grouped(counted, lambda place: questions[place].category)
    groups: dict[str, list[int]] = {}
    for place in counted:
        for group in questions[place].groups:
            groups.setdefault(group, []).append(place)

    def table(title: str, members: dict[str, list[int]]) -> Table:
        rows = []
        for label, places in members.items():
            shares = {name: share(sum(hit[place] for place in places), len(places)) for name, hit in right.items()}
            rows.append(Row.of(label, len(places), shares))
        return Table(f"{title} ({way}, {dtype})", list(marks), rows)

    tables = [table("right choices in %", {"all questions": counted} | groups)]
    tables += [table("right choices in %, by subject", subjects)] if len(subjects) > 1 else []
    return tables, notes(questions, marks, right, subjects, way)


def notes(
    questions: Sequence[Choice],
    marks: dict[str, list[Marked | None]],
    right: dict[str, dict[int, bool]],
    subjects: dict[str, list[int]],
    way: Way,
) -> list[str]:
    """Notes, one line each: what was left out or unreadable, chance level, and which answerers differ."""
    counted = sum(map(len, subjects.values()))
    lines = [f"{counted} of {len(questions)} questions count, in {len(subjects)} subjects; intervals are 95 % (Wilson)"]
    several = sum(len(one.right) != 1 for one in questions)
    if several and way.by != ANSWER:
        lines.append(f"{several} questions have several right choices, and are left out; --choices_by answer scores them")
    long = sum(any(found[place] is None for found in marks.values()) for place in range(len(questions)))
    if long:
        lines.append(f"{long} questions are longer than the model's window, and are left out")
    places = [place for found in subjects.values() for place in found]
    chance = statistics.fmean(1 / len(questions[place].choices) for place in places)
    lines.append(f"guessing would give {100 * chance:.1f} %")
    for name, found in marks.items():
        unclear = sum(found[place].chosen is None for place in places)  # type: ignore[union-attr]
        if unclear:
            lines.append(f"{name}: {unclear} of {counted} answers name no clear choice, and count as wrong")
        basis = [one.shown for place in places if (one := found[place]) and not isinstance(one.shown, str)]
        if tied := sum(numbers.count(max(numbers)) > 1 for numbers in basis):
            lines.append(f"{name}: in {tied} of {counted} questions several choices are the most likely; the first is taken")
        most = Counter(tuple(one.chosen) for place in places if (one := found[place]) and one.chosen).most_common(1)
        if most and most[0][1] > 0.7 * counted:
            letter = "".join(LETTERS[place] for place in most[0][0])
            lines.append(f"{name}: chooses {letter} for {100 * most[0][1] / counted:.0f} % of the questions")
        means = [statistics.fmean(right[name][place] for place in group) for group in subjects.values()]
        lines.append(f"{name}: mean over the subjects {100 * statistics.fmean(means):.1f} %")
    return lines + compare_shares({name: list(hits.values()) for name, hits in right.items()})


def as_records(questions: Sequence[Choice], marks: dict[str, list[Marked | None]]) -> list[dict[str, Any]]:
    """Every question with what each answerer chose, for a file that people read."""
    records = []
    for place, one in enumerate(questions):
        asked = {"category": one.category, "instruction": one.question, "choices": list(one.choices)}
        asked |= {"answer": "".join(LETTERS[p] for p in one.right)}
        records.append(asked | {"systems": {name: shown(found[place]) for name, found in marks.items()}})
    return records


def shown(mark: Marked | None) -> dict[str, Any]:
    """One result in readable form."""
    if mark is None:
        return {"left out": "longer than the model's window"}
    chosen = None if mark.chosen is None else "".join(LETTERS[place] for place in mark.chosen)
    if isinstance(mark.shown, str):
        return {"chosen": chosen, "answer": mark.shown}
    return {"chosen": chosen, "log_likelihoods": [round(number, 4) for number in mark.shown]}


def for_report(questions: Sequence[Choice], marks: dict[str, list[Marked | None]]) -> list[dict[str, Any]]:
    """Every question in the form for the report."""
    found = []
    for place, one in enumerate(questions):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, one.choices, strict=False))
        right = "".join(LETTERS[p] for p in one.right)
        texts = {"问题 question": f"{one.question}\n{listed}", "正确 right": right}
        answers = {name: in_words(shown(ones[place])) for name, ones in marks.items()}
        found.append({"category": one.category, "texts": texts, "answers": answers, "remarks": []})
    return found


def in_words(result: dict[str, Any]) -> str:
    """One result as text: what was chosen, and on what basis."""
    if "left out" in result:
        return f"— ({result['left out']})"
    if "answer" in result:
        return f"{result['chosen'] or '?'}\n{result['answer']}"
    numbers = ", ".join(f"{letter} {number:.2f}" for letter, number in zip(LETTERS, result["log_likelihoods"], strict=False))
    return f"{result['chosen']}\n{numbers}"
