"""Compare the answers of several systems: with a judge, with measures that need none, or step by step along a chain.

    python judge.py --answers f1=output/f1 --answers f2=output/f2 --judge_model gpt-4o --output_dir output/judged

    python judge.py --chain output/f2 --output_dir output/chain

    python judge.py --answer_with gpt-4o --output_dir output/gpt-4o

The judge is any model behind an OpenAI-compatible API (--api_base; the key is read from OPENAI_API_KEY); --answer_with
has such a model answer the prompts itself. Each request is kept in the output folder: the same command goes on where it
was stopped, and pays nothing twice.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import option, run
from utils.console import UserError, say
from utils.files import check_folder

if TYPE_CHECKING:
    from utils.api import Service
    from utils.endpoint import Terms
    from utils.prompts import Record
    from utils.tables import Table

TEST_DATA = Path(__file__).parent / "test_data"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of judge.py."""

    output_dir: str = option(help="folder for tables, picture and journal")

    answers: list[str] = option([], "NAME=PATH of a system's test.json; once for each system", many=True, heading="Systems")
    chain: str = option("", "an adapter's folder: all steps of its chain are systems, and what each gained and lost is shown")

    judge_model: str = option("", "the model that scores the answers", heading="Judge")
    repeats: int = option(1, "times that each prompt is judged", least=1)
    seed: int = option(42, "rules the order in which the judge sees the systems")

    answer_with: str = option("", "a model that answers the prompts, into test.json in the output folder", heading="Answering")
    test_input_path: list[str] = option([], "the prompts: a file, several, or a folder; also for references [test_data]")

    api_base: str = option("", "address of the API, such as http://localhost:8000/v1 [OpenAI's]", heading="Requests")
    concurrency: int = option(4, "requests under way at once", least=1, most=1000)
    budget: int | None = option(None, "most requests to send, failed ones and those of earlier starts included", least=1)
    timeout: float = option(
        600.0, "seconds that one request may take (one given up may have to be paid all the same)", least=0.1
    )
    temperature: float | None = option(0.0, "None: the server's own", least=0)
    max_tokens: int | None = option(1024, "most tokens of one reply; None: the server's own", least=1)
    price_in: float = option(0.0, "price of a million tokens sent, to total the cost", least=0)
    price_out: float = option(0.0, "price of a million tokens received", least=0)

    metrics: bool = option(False, "compute what needs no judge (with --chain and no judge: always)", heading="Without a judge")
    likelihood: bool = option(True, "with them, the log-likelihood of the references under each system that is an adapter")
    base_model: str = option("", "the adapters' base model [as their lineage.json says]")
    load_8bit: bool = option(False, "load the base model in 8 bit")


def main(options: Options) -> None:
    """Have prompts answered, or answers judged and measured, and write the tables."""
    from utils.answers import complete, side_by_side
    from utils.files import locked

    check(options)
    if options.answer_with:
        answer_prompts(options)
        return
    files, steps = find_answers(options)
    prompts, answers = side_by_side(files)
    prompts = complete(prompts, read_prompts(options))
    with locked(options.output_dir):
        tables = have_judged(options, prompts, answers) if options.judge_model else []
        if options.metrics or not options.judge_model:
            tables += have_measured(options, prompts, answers, files)
        show_gains(options, tables, steps)


def check(options: Options) -> None:
    """Raises UserError where options that need or exclude each other do not agree."""
    check_folder(options.output_dir)
    if options.answer_with and (options.judge_model or options.answers or options.chain or options.metrics):
        raise UserError("--answer_with: makes answers, which the other options compare; run one after the other")
    if not (options.answer_with or options.answers or options.chain):
        raise UserError("--answers or --chain: missing; say what to compare, or give --answer_with to make answers")
    if not (options.answer_with or options.judge_model or options.metrics or options.chain):
        raise UserError("--judge_model or --metrics: missing; say how to compare")
    if options.answer_with or options.judge_model:
        service(options)


def service(options: Options) -> "Service":
    """The model behind the API. Raises UserError where the address is none, or a key is missing."""
    from utils.api import Service

    model = options.answer_with or options.judge_model
    return Service(model, options.api_base, options.temperature, options.max_tokens, options.timeout)


def terms(options: Options) -> "Terms":
    """The options about the number of requests and their price."""
    from utils.endpoint import Terms

    return Terms(options.concurrency, options.budget, options.price_in, options.price_out)


def read_prompts(options: Options) -> list["Record"]:
    """The prompts to answer, or to take categories and references from."""
    from utils.prompts import read_prompts

    return read_prompts(options.test_input_path or [str(TEST_DATA)])


def find_answers(options: Options) -> tuple[dict[str, Path], list[str]]:
    """The answer files of all systems by name, and which of the systems are the steps of the chain, in order."""
    from utils.answers import answer_files
    from utils.prompts import RESULT

    files = answer_files(options.answers)
    steps: dict[str, Path] = {}
    if options.chain:
        from utils.steps import chain_folders

        steps = {name: folder / RESULT for name, folder in chain_folders(options.chain).items()}
        missing = ",".join(str(file.parent) for file in steps.values() if not file.is_file())
        if missing:
            command = f"python generate.py --is_ui False --test_input_path test_data --lora_weights {missing}"
            raise UserError(f"{missing}: without a {RESULT}; make it with {command}")
        for name in files.keys() & steps.keys():
            raise UserError(f"--answers {name}=…: also the name of a step of the chain; choose another")
    files |= steps
    if options.judge_model and not 2 <= len(files) <= 8:
        raise UserError(f"--judge_model: a judge is shown 2 to 8 systems, not {len(files)}; give as many --answers")
    return files, list(steps)


def have_judged(options: Options, prompts: list["Record"], answers: dict[str, list[str]]) -> list["Table"]:
    """Have the answers scored; write and print the scores, the picture, and how even the judge was."""
    from utils import tables, verdicts
    from utils.answers import key_of
    from utils.endpoint import asking
    from utils.files import write_json
    from utils.judging import judge_all
    from utils.lineage import digest
    from utils.picture import draw

    folder = Path(options.output_dir)
    header = {"seed": options.seed, "prompts and answers": digest([[key_of(prompt) for prompt in prompts], answers])}
    with asking(service(options), terms(options), folder / "judge.jsonl", header) as endpoint:
        judgements = judge_all(endpoint, prompts, answers, options.repeats, options.seed)
    table = verdicts.tabulate(f"scores by {options.judge_model}", prompts, list(answers), judgements)
    notes = verdicts.notes(prompts, table, judgements)
    write_json(folder / "judgements.json", [verdicts.as_record(one, prompts[one.prompt]) for one in judgements])
    tables.write(folder / "scores", [table], notes, verdicts.facts(judgements))
    draw(table, folder / "scores.png")
    say("\n".join([tables.markdown(table), *notes]))
    return [table]


def have_measured(
    options: Options, prompts: list["Record"], answers: dict[str, list[str]], files: dict[str, Path]
) -> list["Table"]:
    """Compute what needs no judge; write and print it."""
    from utils import tables
    from utils.answers import by_category
    from utils.metrics import measure

    members = by_category(prompts)
    found = measure(prompts, members, answers)
    referenced = sum("reference" in prompt for prompt in prompts)
    note = f"{referenced} of {len(prompts)} prompts have a reference"
    adapters = {name: file.parent for name, file in files.items() if (file.parent / "adapter_config.json").is_file()}
    if options.likelihood and adapters and referenced:
        from utils.likelihood import table_where_possible

        found += table_where_possible(options.base_model, adapters, prompts, members, options.load_8bit)
    tables.write(Path(options.output_dir) / "metrics", found, [note])
    say("\n".join(f"{table.title}\n{tables.markdown(table)}" for table in found) + note)
    return found


def show_gains(options: Options, tables: list["Table"], steps: list[str]) -> None:
    """Write and print how the values change from step to step of a chain."""
    if steps:
        from utils.answerers import BASE
        from utils.tables import write_gains

        say(write_gains(Path(options.output_dir) / "chain.md", tables, [BASE, *steps]))


def answer_prompts(options: Options) -> None:
    """Have the model behind the API answer the prompts, into a test.json of its own."""
    from utils.endpoint import asking
    from utils.files import locked
    from utils.judging import answer_all
    from utils.lineage import digest
    from utils.prompts import RESULT
    from utils.records import write_records

    prompts, folder = read_prompts(options), Path(options.output_dir)
    with locked(folder):
        if (folder / RESULT).exists() and not (folder / "answers.jsonl").exists():
            raise UserError(f"{folder / RESULT}: was not made by --answer_with; choose another --output_dir")
        header = {"prompts": digest(prompts)}
        with asking(service(options), terms(options), folder / "answers.jsonl", header) as endpoint:
            records = answer_all(endpoint, prompts)
        write_records(folder / RESULT, records)
    say(f"{folder / RESULT}: {len(records)} answers of {options.answer_with}")


if __name__ == "__main__":
    run(main, Options)
