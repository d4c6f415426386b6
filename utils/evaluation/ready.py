"""What the later stages of judge.py need, read and checked before the first of them: a judge is paid for."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import lineage
from utils.console import UserError

if TYPE_CHECKING:
    from utils.datasets.prompts import Record
    from utils.evaluation.code import Task
    from utils.evaluation.forgetting import Chain
    from utils.evaluation.pairwise import Comparison
    from utils.evaluation.report import Findings
    from utils.inference.engine import Engine

Options = Any  # judge.Options; modules import no scripts


@dataclasses.dataclass
class Ready:
    """People's `votes`, the `tasks` of --run_code, the engine for log-likelihoods, and the `chain` whose forgetting is
    measured."""

    votes: list["Comparison"] = dataclasses.field(default_factory=list)
    tasks: dict[str, "Task"] = dataclasses.field(default_factory=dict)
    likelihood: "Engine | None" = None
    chain: "Chain | None" = None


def prepare(
    options: Options, findings: "Findings", prompts: list["Record"], answers: dict[str, list[str]], files: dict[str, Path]
) -> Ready:
    """Read what the later stages need. Raises UserError if one of them could not end, so that nothing is paid before that."""
    ready, steps = Ready(), {name: findings.folders[name] for name in findings.steps[1:]}
    if options.report:
        for folder in findings.folders.values():
            lineage.read(folder)
    if options.votes:
        from utils.evaluation.pairwise import read_votes

        ready.votes = read_votes(options.votes, prompts, answers)
    if options.run_code:
        from utils.datasets.prompts import prompt_files
        from utils.evaluation import code

        ready.tasks = code.read_tasks([str(file) for file in prompt_files(options.test_input_path)])
        code.outcome("")  # raises, if nothing can be run safely here
    if options.chain:
        from utils.evaluation import forgetting

        ready.chain = forgetting.prepare(options.base_model, steps, options.held_out, options.load_8bit)
        if not (ready.chain.data or files):
            raise UserError(f"{options.chain}: no step of the chain has answers or held-out records; give --held_out STEP=FILE")
    adapters = list(adapters_of(files).values())
    if options.likelihood and measures(options, files) and adapters and any("reference" in prompt for prompt in prompts):
        from utils.evaluation.likelihood import engine_where_possible

        if ready.chain and adapters == list(steps.values()):
            ready.likelihood = ready.chain.engine
        else:
            ready.likelihood = engine_where_possible(options.base_model, adapters, options.load_8bit)
    return ready


def measures(options: Options, files: dict[str, Path]) -> bool:
    """True if metrics that need no judge are computed."""
    return bool(files) and (
        options.metrics or not (options.judge_model or options.votes or options.run_code or options.refusals)
    )


def adapters_of(files: dict[str, Path]) -> dict[str, Path]:
    """The folders of the systems whose answers stand beside an adapter."""
    from utils.evaluation.answers import samples

    folders = {name: files[name].parent for name in samples(list(files))}
    return {name: folder for name, folder in folders.items() if (folder / "adapter_config.json").is_file()}
