"""The stages of judge.py: find the systems, then have them judged, compared, measured or scored."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils import lineage
from utils.console import UserError, say
from utils.evaluation.ready import Ready, adapters_of

if TYPE_CHECKING:
    from utils.datasets.prompts import Record
    from utils.evaluation.code import Task
    from utils.evaluation.forgetting import Chain
    from utils.evaluation.pairwise import Comparison
    from utils.evaluation.report import Findings
    from utils.evaluation.tables import Table
    from utils.inference.openai_client import ModelServer
    from utils.inference.requests import Endpoint, RequestLimits

TEST_DATA = Path(__file__).parents[2] / "test_data"
Options = Any  # judge.Options; modules import no scripts


def service(options: Options, model: str = "") -> "ModelServer":
    """The model behind the API: `model`, or the one named by the options. Raises UserError if the address is invalid, or a key
    is missing."""
    from utils.inference.openai_client import ModelServer

    model = model or options.answer_with or options.judge_model
    return ModelServer(model, options.api_base, options.temperature, options.max_tokens, options.timeout)


def terms(options: Options) -> "RequestLimits":
    """The limits on requests and their cost, from the options."""
    from utils.inference.requests import RequestLimits

    return RequestLimits(options.concurrency, options.budget, options.price_in, options.price_out, options.max_cost)


def read_prompts(options: Options) -> list["Record"]:
    """The prompts to answer, or the source of categories and references."""
    from utils.datasets.prompts import read_prompts

    return read_prompts(options.test_input_path or [str(TEST_DATA)])


def find_answers(options: Options) -> tuple[dict[str, Path], dict[str, Path]]:
    """The answer files of all systems by name, and the folders of the chain's steps, in order.

    If steps have no answers yet, and no option needs them, there are no files.
    """
    from utils.datasets.prompts import RESULT, result_files
    from utils.evaluation.answers import answer_files

    files = answer_files(options.answers)
    steps: dict[str, Path] = {}
    if options.chain:
        from utils.evaluation.chain import chain_folders
        from utils.evaluation.forgetting import named_files

        steps = chain_folders(options.chain)
        named_files(options.held_out, list(steps))  # so that a wrong one is refused before anything is computed
        missing = [str(folder) for folder in steps.values() if not result_files(folder)]
        command = f"python generate.py --is_ui False --test_input_path test_data --lora_weights {','.join(missing)}"
        needing = ("judge_model", "votes", "metrics", "run_code", "answers", "refusals")
        asked = any(getattr(options, name) for name in needing)
        if missing and (asked or (len(missing) < len(steps) and not options.held_out)):
            raise UserError(f"{','.join(missing)}: has no {RESULT}; make it with {command}")
        if missing:
            say(f"steps have no {RESULT}: only forgetting is measured, no answers are compared ({command} makes them)")
            return files, steps
        for name in files.keys() & steps.keys():
            raise UserError(f"--answers {name}=…: is also the name of a step of the chain; choose another")
    files |= answer_files([f"{name}={folder}" for name, folder in steps.items()])
    compares = options.votes or options.pairwise or (options.judge_model and not options.refusals)
    if compares and not 2 <= len(files) <= 8:
        raise UserError(f"--judge_model: a judge is shown 2 to 8 systems, not {len(files)}; give as many --answers")
    return files, steps


class Judge(NamedTuple):
    """A judge to be asked: the endpoint, and the questions for it."""

    endpoint: "Endpoint"
    questions: list[Any]


@contextlib.contextmanager
def judges(options: Options, prompts: list["Record"], answers: dict[str, list[str]]) -> Iterator[dict[str, Judge]]:
    """All judges of the run by the name of their journal, and their questions; what these cost is printed for all of them
    before anything is sent, and the limits hold for all together. Raises UserError if the cost exceeds the limit."""
    from utils.evaluation import judging, pairwise, refusals
    from utils.inference.requests import asking

    found: dict[str, Judge] = {}
    limits = terms(options)
    with contextlib.ExitStack() as stack:

        def add(name: str, model: str, header: dict[str, Any], questions: list[Any]) -> None:
            path = Path(options.output_dir, f"{name}.jsonl")
            endpoint = stack.enter_context(asking(service(options, model), limits, path, header))
            found[name] = Judge(endpoint, questions)

        if options.judge_model and not (options.pairwise or options.refusals):
            shown = bool(options.show_references)
            header = {"seed": options.seed} | judged_header(prompts, answers, shown)
            add("judge", "", header, judging.questions(prompts, answers, options.repeats, options.seed, shown))
        if options.pairwise:
            shown = options.show_references is not False
            header, questions = judged_header(prompts, answers, shown), pairwise.questions(prompts, answers, shown)
            for name, model in zip(("pairwise", "pairwise-2"), (options.judge_model, options.second_judge), strict=True):
                if model:
                    add(name, model, header, questions)
        if options.refusals and options.judge_model:
            add("refusals", "", judged_header(prompts, answers, False), refusals.questions(prompts, answers))
        for one in found.values():
            one.endpoint.announce({asked.key(0): asked.content for asked in one.questions})
        yield found


def completed(tables: list["Table"], findings: "Findings") -> list["Table"]:
    """Tables as shown: with the samples of a system as one column, and how the answers were made."""
    from utils.evaluation.answers import over_samples

    return [over_samples(one).telling(findings.how) for one in tables]


def publish(
    options: Options, findings: "Findings", name: str, found: list["Table"], notes: list[str], facts: Any = None
) -> None:
    """Write tables with their notes into the output folder, print the notes, and add both to the findings."""
    from utils.evaluation import tables

    tables.write(Path(options.output_dir) / name, found, notes, facts)
    if notes:
        say("\n".join(notes))
    findings.tables += found
    findings.notes += notes


def have_judged(
    options: Options, findings: "Findings", prompts: list["Record"], answers: dict[str, list[str]], judge: Judge
) -> None:
    """Score the answers; write the scores and their chart, and print notes on the judge."""
    from utils.evaluation import aggregate
    from utils.evaluation.charts import draw
    from utils.evaluation.judging import judge_all
    from utils.files import write_json

    folder, judgements = Path(options.output_dir), judge_all(*judge)
    each = aggregate.tabulate(f"scores by {options.judge_model}", prompts, list(answers), judgements)
    notes = aggregate.notes(prompts, each, judgements)
    (table,) = completed([each], findings)
    write_json(folder / "judgements.json", [aggregate.as_record(one, prompts[one.prompt]) for one in judgements])
    draw(table, folder / "scores.png")
    publish(options, findings, "scores", [table], notes, aggregate.facts(prompts, list(answers), judgements))
    findings.pictures.append((table.title, folder / "scores.png"))
    for one in judgements:
        shown = ", ".join(f"{name} {'—' if score is None else f'{score:g}'}" for name, score in one.scores.items())
        findings.questions[one.prompt]["remarks"] += [f"{options.judge_model}: {shown}", *one.answers, *one.problems]


def judged_header(prompts: list["Record"], answers: dict[str, list[str]], with_references: bool) -> dict[str, Any]:
    """The header of a judge's journal: what it belongs to."""
    from utils.evaluation.answers import key_of
    from utils.files import digest

    header: dict[str, Any] = {"prompts and answers": digest([[key_of(prompt) for prompt in prompts], answers])}
    return header | ({"references": digest([prompt.get("reference") for prompt in prompts])} if with_references else {})


def have_compared(
    options: Options,
    findings: "Findings",
    prompts: list["Record"],
    answers: dict[str, list[str]],
    models: list[Judge],
    votes: list["Comparison"],
) -> None:
    """Compare each pair of systems by each judge, including people's votes; write and print ratings, and how far judges
    agree."""
    from utils.evaluation import pairwise
    from utils.files import write_json

    judges = {pairwise.PEOPLE: votes} if votes else {}
    for endpoint, asked in models:
        judges[endpoint.service.model] = pairwise.compare_all(endpoint, asked, answers)
    found, notes = [], pairwise.agreement(judges)
    for judge, comparisons in judges.items():
        found += completed(pairwise.tabulate(judge, prompts, list(answers), comparisons), findings)
        notes += pairwise.notes(judge, prompts, answers, comparisons)
        for one in comparisons:
            findings.questions[one.prompt]["remarks"] += [pairwise.shown(one, judge), *one.answers[-1:]]
    records = [pairwise.as_record(one, prompts[one.prompt], judge) for judge, given in judges.items() for one in given]
    write_json(Path(options.output_dir) / "comparisons.json", records)
    publish(options, findings, "pairwise", found, notes)


def have_found_refusals(
    options: Options, findings: "Findings", prompts: list["Record"], answers: dict[str, list[str]], asked: Judge | None
) -> None:
    """Count refused prompts, by the judge or by the answers' wording; write the shares by category."""
    from utils.evaluation import refusals

    judge = options.judge_model or refusals.WORDINGS
    verdicts = refusals.by_judge(*asked, answers) if asked else refusals.by_wordings(answers)
    table, notes = refusals.tabulate(prompts, verdicts, judge)
    publish(options, findings, "refusals", completed([table], findings), notes)
    for system, given in verdicts.items():
        for place, refused in enumerate(given):
            findings.questions[place]["remarks"] += [f"{system}: refuses, by {judge}"] if refused else []


def have_measured(
    options: Options,
    findings: "Findings",
    prompts: list["Record"],
    answers: dict[str, list[str]],
    files: dict[str, Path],
    ready: Ready,
) -> None:
    """Compute and write the metrics that need no judge; print how many prompts have a reference."""
    from utils.evaluation.answers import by_category
    from utils.evaluation.metrics import measure

    members = by_category(prompts)
    measured, differences = measure(prompts, members, answers)
    found = completed(measured, findings)
    referenced = sum("reference" in prompt for prompt in prompts)
    notes = [f"{referenced} of {len(prompts)} prompts have a reference; intervals are 95 %", *differences]
    adapters = adapters_of(files)
    engine, ready.likelihood = ready.likelihood, None  # its weights are freed before others are loaded
    if engine:
        from utils.evaluation.likelihood import table_of

        likelihoods, lines = table_of(engine, list(adapters), prompts, members)
        found.append(likelihoods)
        notes += lines
    elif options.likelihood and adapters and not referenced:
        notes.append("no log-likelihoods, BLEU, chrF or ROUGE-L; name the files with the references as --test_input_path")
    elif options.likelihood and options.base_model and not adapters:
        notes.append(f"no log-likelihoods under {options.base_model}: none of the answers stands beside an adapter")
    publish(options, findings, "metrics", found, notes)


def have_run(
    options: Options,
    findings: "Findings",
    prompts: list["Record"],
    answers: dict[str, list[str]],
    tasks: dict[str, "Task"],
) -> None:
    """Run the code in the answers against the problems' tests; write pass@k."""
    from utils.evaluation import code

    results = code.run_all(prompts, answers, tasks)
    counted, notes = code.tabulate(prompts, results)
    publish(options, findings, "code", completed(counted, findings), notes)
    for system, ended in results.items():
        for place, result in enumerate(ended):
            if result is not None:
                findings.questions[place]["remarks"].append(f"{system}: {result or 'passes'}")


def have_remembered(options: Options, findings: "Findings", chain: "Chain") -> None:
    """Measure each step on the held-out records of every step; write and draw the matrix."""
    from utils.evaluation import forgetting
    from utils.evaluation.charts import draw_matrix

    found, picture = forgetting.matrix(chain), Path(options.output_dir) / "forgetting.png"
    publish(options, findings, "forgetting", found, [])
    draw_matrix(found, picture)
    findings.pictures.append(("what each step knows of every step's records", picture))


def start_findings(
    prompts: list["Record"], answers: dict[str, list[str]], files: dict[str, Path], steps: dict[str, Path]
) -> "Findings":
    """The initial findings: the prompts, and the systems with their answers."""
    from utils.evaluation.answers import how_answered, samples
    from utils.evaluation.judging import question
    from utils.evaluation.report import Findings
    from utils.inference.answerers import BASE

    asked: list[dict[str, Any]] = []
    for place, prompt in enumerate(prompts):
        texts = {"问题 question": question(prompt)}
        texts |= {"参考 reference": prompt["reference"]} if prompt.get("reference") else {}
        given = {system: texts[place] for system, texts in answers.items()}
        asked.append({"category": prompt["category"], "texts": texts, "answers": given, "remarks": []})
    folders = {name: files[name].parent for name in samples(list(files))} | steps
    how = how_answered(files) if files else ""
    return Findings(questions=asked, steps=[BASE, *steps] if steps else [], folders=folders, how=how)


def have_chosen(options: Options) -> "Findings":
    """Score base model and adapters on choice records; write the tables, and every question with the choices made."""
    from utils.datasets.choices import read_choices
    from utils.evaluation import choices
    from utils.evaluation.chain import chain_folders
    from utils.evaluation.likelihood import load_engine
    from utils.evaluation.report import Findings
    from utils.files import locked, write_json
    from utils.inference.answerers import BASE

    folder = Path(options.output_dir)
    way = choices.Way(options.shots, options.choices_by, options.choices_template)
    questions = read_choices(options.choices)
    examples = choices.read_examples(options.shots_path, questions, options.choices, options.shots)
    adapters = list(chain_folders(options.chain).values()) if options.chain else options.lora_weights
    for one in adapters if options.report else []:
        lineage.read(one)
    engine = load_engine(options.base_model, adapters, options.load_8bit)
    with locked(folder):
        marks = choices.mark_all(engine, questions, examples, way, folder / "choices.jsonl")
        folders = {one.name: one.folder for one in engine.answerers if one.folder}
        steps = [BASE, *folders] if options.chain else []
        findings = Findings(questions=choices.for_report(questions, marks), steps=steps, folders=folders)
        publish(options, findings, "choices", *choices.tabulate(questions, marks, way, engine.placement.numbers))
        write_json(folder / "questions.json", choices.as_records(questions, marks))
    return findings


def answer_prompts(options: Options) -> None:
    """Have the model behind the API answer the prompts, into its own test.json."""
    from utils.datasets.prompts import RESULT, answered
    from utils.evaluation.judging import question
    from utils.files import digest, locked
    from utils.inference.answer_file import AnswerFile
    from utils.inference.remote import SERVERS, ask_all, messages
    from utils.inference.requests import asking

    prompts, folder = read_prompts(options), Path(options.output_dir)
    with locked(folder):
        if (folder / RESULT).exists() and not (folder / "answers.jsonl").exists():
            raise UserError(f"{folder / RESULT}: was not made by --answer_with; choose another --output_dir")
        header = {"prompts": digest(prompts)}
        with asking(service(options), terms(options), folder / "answers.jsonl", header) as endpoint:
            endpoint.announce({f"prompt {number}": question(prompt) for number, prompt in enumerate(prompts, 1)})
            replies = ask_all(endpoint, [messages(prompt) for prompt in prompts], "--max_tokens")
        records = [answered(prompt, reply.text) for prompt, reply in zip(prompts, replies, strict=True)]
        AnswerFile(folder / RESULT, header, {"template": SERVERS, "dtype": SERVERS}).finish(records)
    say(f"{folder / RESULT}: {len(prompts)} answers from {options.answer_with}")
