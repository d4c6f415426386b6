"""Answer: a chat page in the browser, or a file of prompts in one go.

    python generate.py --lora_weights output/run-1

    python generate.py --lora_weights output/run-1,output/rerun-1 --is_ui False --test_input_path test_data

The base model and the template are those that the adapter was trained with (its lineage.json), or give --base_model
(or $BASE_MODEL) and --prompt_template. The batch mode writes test.json beside the weights.
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import option, run
from utils.console import UserError
from utils.prompter import Prompter
from utils.sources import check_base, is_hub_name

if TYPE_CHECKING:
    from utils.decoding import Settings
    from utils.generation import Engine


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this script; names and defaults are those of alpaca-lora where it has them."""

    base_model: str = option("", "base model: a folder, or a name on the Hugging Face hub", heading="Model")
    lora_weights: list[str] = option([], "adapter: a folder, or a name on the hub; several (a,b); none: the base model alone")
    prompt_template: str = option("", "template: a name in templates/, or a .json file (the adapter's own, or alpaca)")
    load_8bit: bool = option(False, "base in 8 bit")
    load_4bit: bool = option(False, "base in 4 bit (NF4)")
    gpu_id: int = option(0, "which GPU", least=0)

    is_ui: bool = option(True, "False: answer --test_input_path and end", heading="Batch")
    test_input_path: list[str] = option([], "prompts: a file of texts or records, several (a,b:0.5), a folder, a hub name")
    output_path: str = option("", "file for the answers (test.json beside the LoRA weights)")
    overwrite: bool = option(False, "replace answers to other prompts, or those of an unfinished run")
    batch_size: int | str = option("auto", "prompts answered at once (auto: by length and memory)", least=1, choices=("auto",))

    num_beams: int | None = option(
        None, "beams of the search (4; the page starts with 1)", least=1, most=64, heading="Decoding"
    )
    max_new_tokens: int = option(2048, "longest answer, in tokens", least=1)
    do_sample: bool = option(False, "draw tokens by chance, with the three that follow")
    temperature: float = option(0.1, "flattens (above 1) or sharpens the scores", least=0)
    top_p: float = option(0.75, "draw from the likeliest tokens that make up this share", least=0, most=1)
    top_k: int = option(40, "draw from so many tokens at most (0: all)", least=0)
    seed: int = option(42, "rules what is drawn", least=0)
    repetition_penalty: float = option(1.0, "above 1: tokens of the text so far are less likely", least=0.01)
    no_repeat_ngram_size: int = option(0, "no run of so many tokens occurs twice (0: any may)", least=0)

    server_name: str = option("127.0.0.1", "address that the page listens on", heading="Page")
    server_port: int | None = option(None, "port of the page (the first free one from 7860)", least=1, most=65535)
    share_gradio: bool = option(False, "a public link to the page, through Gradio's servers")
    auth: str = option("", "user:password that the page asks for")
    lang: str = option("zh", "language of the page", choices=("zh", "en"))


def main(options: Options) -> None:
    """Load what answers, then answer."""
    check_together(options)
    if options.is_ui:
        from utils import chat

        address = chat.Address(options.server_name, options.server_port, login(options.auth), options.share_gradio)
        chat.serve(load_engine(options), decoding(options), options.lang, address)
        return
    from utils.prompts import check_output, output_paths, read_prompts

    outputs = output_paths(options.lora_weights, options.output_path)
    records = read_prompts(options.test_input_path, options.seed)
    for path in outputs:
        check_output(path, records, options.overwrite)
    engine = load_engine(options)
    from utils import batch_answers

    batch_size = options.batch_size if isinstance(options.batch_size, int) else 0
    batch_answers.run(engine, outputs, records, decoding(options), batch_size, options.overwrite)


def check_together(options: Options) -> None:
    """Raises UserError where options exclude each other, or name what is not there."""
    if options.load_8bit and options.load_4bit:
        raise UserError("--load_8bit and --load_4bit: both given; choose one")
    if options.is_ui and (options.test_input_path or options.output_path):
        raise UserError("--test_input_path and --output_path are for the batch mode; add --is_ui False, or leave them out")
    for folder in options.lora_weights:
        if not Path(folder).is_dir() and not is_hub_name(folder):
            raise UserError(f"--lora_weights {folder}: no such folder; name the folder of an adapter")
    check_base(options.base_model)
    login(options.auth)
    if options.prompt_template:
        Prompter(options.prompt_template)


def login(auth: str) -> tuple[str, str] | None:
    """The user and the password that the page asks for, if any. Raises UserError where one of them is missing."""
    user, _, password = auth.partition(":")
    if auth and not (user and password):
        raise UserError("--auth: not of the form user:password; write both, parted by a colon")
    return (user, password) if auth else None


def load_engine(options: Options) -> "Engine":
    """The base model with the adapters on it."""
    from utils.answerers import resolve, with_base

    base_model = options.base_model or os.environ.get("BASE_MODEL", "")
    base_model, answerers = resolve(base_model, options.lora_weights, options.prompt_template)
    answerers = with_base(answerers) if options.is_ui else answerers
    from utils.generation import Engine  # here, because these take seconds to import
    from utils.modeling import place

    return Engine(base_model, answerers, place(options.load_8bit, options.load_4bit, options.gpu_id))


def decoding(options: Options) -> "Settings":
    """The options of the same names."""
    from utils.decoding import Settings

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if value is not None})


if __name__ == "__main__":
    run(main, Options)
