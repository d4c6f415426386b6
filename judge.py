"""Compare several systems: with a judge, with metrics that need none, by multiple-choice questions, or along a chain.

    python judge.py --answers f1=output/f1 --answers f2=output/f2 --judge_model gpt-4o --output_dir output/judged

    python judge.py --chain output/f2 --output_dir output/chain

    python judge.py --choices datasets/cmmlu/test.json --shots 5 --lora_weights output/f1,output/f2 --output_dir output/cmmlu

    python judge.py --answer_with gpt-4o --output_dir output/gpt-4o

The judge is any model behind an OpenAI-compatible API (--api_base; the key is read from OPENAI_API_KEY); --answer_with
has such a model answer the prompts itself. Each request is kept in the output folder: the same command resumes where it
was stopped, and nothing is paid for twice.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import option, run
from utils.console import UserError, say
from utils.files import check_folder, check_free

if TYPE_CHECKING:
    from utils.evaluation.report import Findings


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of judge.py."""

    output_dir: str = option(help="folder for tables, picture and journal")
    report: bool = option(False, "also write all results, with every question, as one report.html")
    title: str = option("", "title of the report [the folder's name]")

    answers: list[str] = option(
        [],
        "NAME=PATH of a system's test.json, or a folder; once for each system, again for each further sample",
        many=True,
        heading="Systems",
    )
    chain: str = option("", "an adapter's folder: all steps of its chain are systems, and what each gained and lost is shown")
    held_out: list[str] = option(
        [], "STEP=FILE: records that measure what the chain forgets of a step [its validation set]", many=True
    )

    judge_model: str = option("", "the model that scores the answers", heading="Judge")
    repeats: int = option(1, "how often each prompt is judged", least=1)
    pairwise: bool = option(False, "compare two answers at a time, in both orders, instead of scoring them")
    second_judge: str = option("", "another model behind the same API that also compares, to see how far both agree")
    votes: list[str] = option([], "people's votes as another judge: preference records on the systems' answers")
    show_references: bool | None = option(None, "show the judge the prompts' references (the default with --pairwise)")
    seed: int = option(42, "random seed of the order in which the judge sees the systems")

    answer_with: str = option("", "a model that answers the prompts, into test.json in the output folder", heading="Answering")
    test_input_path: list[str] = option([], "the prompts: a file, several, or a folder; also for references [test_data]")

    api_base: str = option("", "address of the API, e.g. http://localhost:8000/v1 [OpenAI's]", heading="Requests")
    concurrency: int = option(4, "concurrent requests", least=1, most=1000)
    budget: int | None = option(None, "maximum number of requests, including failed ones and those of earlier runs", least=1)
    timeout: float = option(600.0, "timeout of one request in seconds (a request given up may still be billed)", least=0.1)
    temperature: float | None = option(0.0, "None: the server's default", least=0)
    max_tokens: int | None = option(1024, "maximum tokens of one reply; None: the server's default", least=1)
    price_in: float = option(0.0, "price of a million prompt tokens, to compute the cost", least=0)
    price_out: float = option(0.0, "price of a million completion tokens", least=0)
    max_cost: float | None = option(
        None, "send nothing that could make the run, including earlier starts, cost more than this", least=0
    )

    run_code: bool = option(
        False, "run the code in the answers against the problems' tests (Linux; no network, limits on time, memory, files)"
    )
    refusals: bool = option(False, "count refused prompts by category: by --judge_model, else by the answers' wording")
    metrics: bool = option(
        False, "compute metrics that need no judge (with --chain and no judge: always)", heading="Without a judge"
    )
    likelihood: bool = option(True, "also the log-likelihood of the references under each system that is an adapter")
    base_model: str = option("", "the adapters' base model [from their lineage.json]")
    load_8bit: bool = option(False, "load the base model in 8 bit")

    choices: list[str] = option([], "choice records to score base model and adapters on: files or folders", heading="Choices")
    lora_weights: list[str] = option([], "adapters to score beside their base model (or give --chain)")
    shots: int = option(0, "worked examples before each question", least=0, most=5)
    shots_path: str = option("", "choice records to take the examples from [dev.json beside the questions]")
    choices_by: str = option(
        "letter",
        "the likelihood of a choice's letter or of its text, or the generated answer",
        choices=("letter", "text", "answer"),
    )
    choices_template: str = option(
        "plain", "plain: as benchmarks ask base models; own: with each adapter's template", choices=("plain", "own")
    )


def main(options: Options) -> None:
    """Have prompts answered, or answers judged, compared and measured, or choices scored; write and show the results."""
    check(options)
    from utils.evaluation import ready, setup
    from utils.evaluation.answers import add_references, side_by_side
    from utils.files import locked

    if options.answer_with:
        return setup.answer_prompts(options)
    if options.choices:
        return show(options, setup.have_chosen(options))
    files, steps = setup.find_answers(options)
    prompts, answers = side_by_side(files) if files else ([], {})
    prompts = add_references(prompts, setup.read_prompts(options))
    findings = setup.start_findings(prompts, answers, files, steps)
    with locked(options.output_dir):
        later = ready.prepare(options, findings, prompts, answers, files)
        with setup.judges(options, prompts, answers) as judges:
            if "judge" in judges:
                setup.have_judged(options, findings, prompts, answers, judges["judge"])
            if options.pairwise or options.votes:
                models = [one for name, one in judges.items() if name.startswith("pairwise")]
                setup.have_compared(options, findings, prompts, answers, models, later.votes)
            if options.refusals:
                setup.have_found_refusals(options, findings, prompts, answers, judges.get("refusals"))
        if options.run_code:
            setup.have_run(options, findings, prompts, answers, later.tasks)
        if ready.measures(options, files):
            setup.have_measured(options, findings, prompts, answers, files, later)
        if later.chain and later.chain.data:
            setup.have_remembered(options, findings, later.chain)
        show(options, findings)


def check(options: Options) -> None:
    """Raises UserError if options contradict each other or lack others that they need."""
    check_folder(options.output_dir)
    check_free(Path(options.output_dir).glob("*"))
    if options.answer_with and (options.judge_model or options.answers or options.chain or options.metrics):
        raise UserError("--answer_with: makes answers, while the other options compare them; run one after the other")
    if options.choices:
        return check_choices(options)
    if not (options.answer_with or options.answers or options.chain):
        raise UserError("--answers or --chain: missing; say what to compare, or give --answer_with to make answers")
    ways = (options.judge_model, options.votes, options.metrics, options.run_code, options.refusals, options.chain)
    if not (options.answer_with or any(ways)):
        raise UserError("--judge_model, --votes or --metrics: missing; say how to compare")
    if options.held_out and not options.chain:
        raise UserError("--held_out: names records of the steps of a --chain; give both, or leave it out")
    if options.pairwise and not options.judge_model:
        raise UserError("--pairwise: needs a --judge_model to compare; for people's votes alone give --votes without it")
    if options.second_judge and not options.pairwise:
        raise UserError("--second_judge: is for --pairwise; give both, or leave it out")
    if options.second_judge and options.second_judge == options.judge_model:
        raise UserError(f"--second_judge {options.second_judge}: is the first judge; name another model")
    if options.max_cost is not None and not (options.price_in or options.price_out):
        raise UserError("--max_cost: needs prices; give --price_in and --price_out, per million tokens")
    if options.answer_with or options.judge_model:
        from utils.evaluation.setup import service

        service(options)


def check_choices(options: Options) -> None:
    """Raises UserError if --choices is given with what it excludes, or names no model."""
    others = (options.answers, options.answer_with, options.judge_model, options.metrics, options.pairwise, options.votes)
    if any(others) or options.run_code or options.refusals or options.held_out:
        raise UserError("--choices: scores models, and the other options answers; run one after the other")
    if options.chain and options.lora_weights:
        raise UserError("--chain and --lora_weights: both given; --chain scores all steps of its chain")
    if not (options.chain or options.lora_weights or options.base_model):
        raise UserError("--choices: give the model to score as --base_model, --lora_weights or --chain")


def show(options: Options, findings: "Findings") -> None:
    """Print each table once; for the steps of a chain with the change from step to step, which is also written and drawn.
    Write the report, if asked for."""
    from utils.evaluation import report
    from utils.evaluation.charts import draw_chain
    from utils.evaluation.tables import markdown, write_gains

    folder, steps = Path(options.output_dir), findings.steps
    for table in findings.tables:
        if not steps or not set(table.systems) <= set(steps):
            say(f"{table.title}\n{markdown(table)}")
    if steps:
        say(write_gains(folder / "chain.md", findings.tables, steps))
        draw_chain(findings.tables, steps, folder / "chain.png")
        findings.pictures.append(("chain", folder / "chain.png"))
    if options.report:
        report.write(folder, options.title or folder.resolve().name, shlex.join(sys.argv), findings)


if __name__ == "__main__":
    run(main, Options)
