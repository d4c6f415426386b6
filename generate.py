"""Answer questions: on a chat page in the browser, or a file of prompts as a batch.

    python generate.py --lora_weights output/run-1

    python generate.py --lora_weights output/run-1,output/rerun-1 --is_ui False --test_input_path test_data

    python generate.py --lora_weights output/run-1 --is_ui False --test_input_path test_data --api_base http://gpu:8000/v1

The base model and the template are those that the adapter was trained with (from its lineage.json) unless --base_model
(or $BASE_MODEL) and --prompt_template name others. Batch mode writes test.json beside the weights; with --api_base
another program computes the answers: vLLM, llama.cpp, Ollama, or this script elsewhere (its key: OPENAI_API_KEY).
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from utils.chat.feedback import FOLDER, usable
from utils.cli import option, run
from utils.console import UserError, say
from utils.datasets.sources import check_base_model, is_hub_name
from utils.datasets.templates import check_template
from utils.inference.sampling_params import SamplingParams
from utils.models.hubs import HUBS, named_on
from utils.options_file import write_options

if TYPE_CHECKING:
    from utils.datasets.prompts import Record
    from utils.inference.engine import Engine


@dataclasses.dataclass(frozen=True)
class Answering:
    """Which models answer what; decoding (SamplingParams) and the page's options follow."""

    base_model: str = option("", "base model: a folder, or a name on a hub", heading="Model")
    lora_weights: list[str] = option([], "adapter: a folder, or a name on the hub; several (a,b); none: the base model alone")
    prompt_template: str = option("", "template: a name in templates/, a .json file, or chat (the adapter's own)")
    enable_thinking: bool | None = option(None, "passed to chat templates that support it (their own default)")
    stop: list[str] = option([], "texts that end an answer")
    load_8bit: bool = option(False, "base in 8 bit")
    load_4bit: bool = option(False, "base in 4 bit (NF4)")
    gpu_id: int = option(0, "which GPU", least=0)
    dtype: str = option(
        "", "compute dtype (by default what is fast on this machine)", choices=("", "float32", "bfloat16", "float16")
    )
    hub: str = option("huggingface", "where a base model's name is looked up", choices=HUBS)
    device_map: str = option("", "auto: spread the base over all GPUs, main memory and the disk", choices=("", "auto"))

    is_ui: bool | str = option(
        True,
        "False: answer --test_input_path and exit; api: only OpenAI's protocol; terminal: chat here",
        choices=("True", "False", "api", "terminal"),
        heading="Batch",
    )
    test_input_path: list[str] = option([], "prompts: a file of texts or records, several (a,b:0.5), a folder, a hub name")
    output_path: str = option("", "file for the answers (test.json beside the LoRA weights)")
    seeds: list[str] = option([], "with --do_sample: answer once with each of these seeds, into test-SEED.json (a,b,c)")
    overwrite: bool = option(False, "replace answers to other prompts, or those of an unfinished run")
    batch_size: int | str = option("auto", "prompts answered at once (auto: by length and memory)", least=1, choices=("auto",))

    api_base: str = option("", "have this server answer, e.g. http://localhost:8000/v1", heading="Another server")
    api_model: str = option("", "the model's name there (the adapter's, or the server's only one)")
    api_route: str = option(
        "",
        "completions: token ids with our template; chat: messages with the server's (depends on whether a tokenizer is known)",
        choices=("", "completions", "chat"),
    )
    concurrency: int = option(4, "concurrent requests", least=1, most=1000)


@dataclasses.dataclass(frozen=True)
class Options(SamplingParams, Answering):
    """The options of this script; names and defaults are those of alpaca-lora where it has them."""

    server_name: str = option("127.0.0.1", "address to listen on", heading="Page")
    server_port: int | None = option(None, "port to listen on (the first free one from 7860)", least=1, most=65535)
    share_gradio: bool = option(False, "a public link to the page, through Gradio's servers")
    auth: str = option("", "user:password required by the page")
    api_key: str = option("", "key that API clients must send (required unless only this machine can reach the address)")
    adapters_dir: str = option("", "folder of adapters that programs may load while the server runs")
    feedback_dir: str = option(FOLDER, "folder for votes and thumbs given on the page ('': off)")
    lang: str = option("zh", "language of the page", choices=("zh", "en"))


def main(options: Options) -> None:
    """Load the models, then answer."""
    named = named_on(options.hub, options.base_model or os.environ.get("BASE_MODEL", ""))
    options = dataclasses.replace(options, base_model=named)
    check_together(options)
    if options.is_ui:
        return talk(options)
    from utils.datasets.prompts import check_output, output_paths, read_prompts

    outputs = output_paths(options.lora_weights, options.output_path)
    records = read_prompts(options.test_input_path, options.seed)
    runs = runs_by_seed(options, outputs)
    for path in [path for _, paths in runs for path in paths]:
        check_output(path, records, options.overwrite)
    engine = None if options.api_base else load_engine(options)
    for settings, paths in runs:
        if engine is None:
            have_answered(options, settings, paths, records)
        else:
            from utils.inference import batch

            batch_size = options.batch_size if isinstance(options.batch_size, int) else 0
            batch.run(engine, paths, records, settings, batch_size, options.overwrite)
        for path in paths:
            write_options(dataclasses.asdict(options), Path(path).with_suffix(".yaml"))


def runs_by_seed(options: Options, outputs: list[Path]) -> list[tuple[SamplingParams, list[Path]]]:
    """Sampling settings and output files: once, or once for each of --seeds."""
    from utils.datasets.prompts import sample_path

    settings = decoding(options)
    if not options.seeds:
        return [(settings, outputs)]
    return [
        (dataclasses.replace(settings, seed=int(seed)), [sample_path(path, seed) for path in outputs]) for seed in options.seeds
    ]


def have_answered(options: Options, settings: SamplingParams, outputs: list[Path], records: list["Record"]) -> None:
    """Have the server at --api_base answer."""
    from utils.inference import remote
    from utils.inference.requests import RequestLimits

    limits = RequestLimits(options.concurrency)
    stops, thinking = options.stop, options.enable_thinking
    asking = remote.Asking(options.api_base, options.api_model, options.api_route, settings, stops, limits, thinking)
    remote.run(asking, options.base_model, options.lora_weights, options.prompt_template, outputs, records, options.overwrite)


def talk(options: Options) -> None:
    """Answer people or programs, until the program is stopped."""
    if options.is_ui == "terminal":
        from utils.chat import terminal

        return terminal.talk(load_engine(options), decoding(options))
    from utils.chat.address import Address

    login_of = login(options.auth)
    address = Address(options.server_name, options.server_port, login_of, options.share_gradio, options.api_key)
    address.taken()  # raises early; which port is free is found again once the weights are loaded
    if options.is_ui == "api" and address.is_open and not options.api_key:
        raise UserError(
            f"--server_name {options.server_name}: others can reach it; give --api_key KEY, which clients must then send"
        )
    feedback_dir = usable(options.feedback_dir) if options.feedback_dir and options.is_ui != "api" else ""
    engine = load_engine(options)
    from utils.chat import server

    if options.is_ui == "api":
        server.serve_api(engine, decoding(options), address, options.adapters_dir)
    else:
        server.serve(engine, decoding(options), options.lang, address, options.adapters_dir, feedback_dir)


def check_together(options: Options) -> None:
    """Raises UserError if options contradict each other or name missing things."""
    if options.load_8bit and options.load_4bit:
        raise UserError("--load_8bit and --load_4bit: both given; choose one")
    if (options.load_8bit or options.load_4bit) and options.api_base:
        raise UserError("--api_base: the server has the weights; leave --load_8bit and --load_4bit out")
    if (options.api_model or options.api_route) and not options.api_base:
        raise UserError("--api_model and --api_route: are for another server; name it with --api_base, or leave them out")
    if options.is_ui and options.api_base:
        raise UserError("--api_base: is for the batch mode; add --is_ui False")
    if options.is_ui and (options.test_input_path or options.output_path or options.seeds):
        raise UserError(
            "--test_input_path, --output_path and --seeds are for the batch mode; add --is_ui False, or leave them out"
        )
    check_seeds(options)
    for folder in options.lora_weights:
        if not Path(folder).is_dir() and not is_hub_name(folder):
            raise UserError(f"--lora_weights {folder}: no such folder; name the folder of an adapter")
    check_base_model(options.base_model)
    login(options.auth)
    if options.adapters_dir and not Path(options.adapters_dir).is_dir():
        raise UserError(f"--adapters_dir {options.adapters_dir}: no such folder; name one that holds folders of adapters")
    if options.prompt_template:
        check_template(options.prompt_template)


def check_seeds(options: Options) -> None:
    """Raises UserError if --seeds are not different numbers, or nothing is sampled."""
    wrong = [seed for seed in options.seeds if not (seed.isdecimal() and seed == str(int(seed)))]
    if wrong or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {','.join(options.seeds)}: not different whole numbers; write them like --seeds 1,2,3")
    if options.seeds and not decoding(options).samples:
        raise UserError("--seeds: without sampling all answers would be the same; add --do_sample and a --temperature above 0")


def login(auth: str) -> tuple[str, str] | None:
    """The user and password required by the page, if any. Raises UserError if one of them is missing."""
    user, _, password = auth.partition(":")
    if auth and not (user and password):
        raise UserError("--auth: not of the form user:password; write both, separated by a colon")
    return (user, password) if auth else None


def load_engine(options: Options) -> "Engine":
    """The base model with the adapters on it."""
    from utils.inference.answerers import resolve, with_base

    base_model, answerers = resolve(options.base_model, options.lora_weights, options.prompt_template)
    say(f"loading {base_model}")
    answerers = with_base(answerers) if options.is_ui else answerers
    from utils.inference.engine import Engine  # here, because these take seconds to import
    from utils.models.placement import measured, place

    placement = place(options.load_8bit, options.load_4bit, options.gpu_id, options.dtype, options.device_map)
    placement = placement if options.dtype else measured(placement, base_model)
    return Engine(base_model, answerers, placement, options.stop, options.enable_thinking)


def decoding(options: Options) -> SamplingParams:
    """The sampling settings among the options."""
    return SamplingParams(**{field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingParams)})


if __name__ == "__main__":
    run(main, Options)
