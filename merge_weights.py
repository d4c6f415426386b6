"""Join a base model with LoRA weights into one model folder, or convert a base between layouts (no --lora_model).

    python merge_weights.py --base_model models/llama-13b --lora_model models/chinese-alpaca-lora-13b \\
        --output_dir models/chinese-alpaca-13b

    python merge_weights.py --base_model models/llama-7b --output_dir models/chinese-alpaca-plus-7b \\
        --lora_model models/chinese-llama-plus-lora-7b,models/chinese-alpaca-plus-lora-7b

    python merge_weights.py --base_model models/chinese-alpaca-7b --lora_model output/run-1 \\
        --output_dir models/run-1 --export gguf --quantize q4_k_m

    python merge_weights.py --base_model models/chinese-alpaca-7b --lora_model 'output/run-1*0.7,output/run-2*0.3' \\
        --output_dir output/both --output_type adapter

The base may be in Hugging Face's layout or in Meta's own (consolidated.00.pth, params.json, tokenizer.model).
"""

import contextlib
import dataclasses
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import option, run
from utils.console import UserError, say
from utils.files import check_folder, locked, replacing_folder
from utils.merging.rules import METHODS, read_weights, rule_of
from utils.models.hubs import HUBS, named_on

if TYPE_CHECKING:
    from utils.datasets.records import Record
    from utils.merging.combination import Combination

TEST_DATA = Path(__file__).parent / "test_data"


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this script."""

    base_model: str = option(help="base model: a folder, or a name on a hub")
    output_dir: str = option(help="folder for the merged model")
    lora_model: list[str] = option(
        [], "folder with LoRA weights; several, in their order: a,b, or with weights: a*0.7,b*0.3 (none: convert only)"
    )
    combine: str = option("", "how to combine weighted adapters (cat, their exact sum)", choices=("", *METHODS))
    density: float | None = option(None, "share of values that ties, dare and magnitude_prune keep (0.5)")
    rank: int | None = option(None, "rank of the combined adapter by svd (the highest of theirs)", least=1)
    seed: int = option(42, "random seed of dare")
    output_type: str = option(
        "huggingface", "layout to write, or adapter: only the combined adapter", choices=("huggingface", "pth", "adapter")
    )
    dtype: str | None = option(
        None, "dtype of the merged weights (the base model's)", choices=("float16", "bfloat16", "float32")
    )
    hub: str = option("huggingface", "where a base model's name is looked up", choices=HUBS)
    merge_into: str = option("full", "weights that a QLoRA is added to", choices=("full", "dequantized"))
    max_shard_size: str = option("5GB", "maximum size of a weight file, e.g. 500MB")
    verify: bool = option(False, "compare with base plus adapters on a few prompts (loads both models, one after the other)")
    export: str = option("", "also write a file for llama.cpp and Ollama, and compare it with the model", choices=("", "gguf"))
    quantize: str = option("", "data type of that file (f16)", choices=("", "q8_0", "q4_k_m"))
    test_input_path: list[str] = option([], "prompts to compare that file with [test_data]")
    overwrite: bool = option(False, "replace the model in the output folder")
    offload_dir: str | None = option(None, "accepted for old scripts; nothing needs to be offloaded")


def main(options: Options) -> None:
    """Check that everything fits together, then compute, write, read back, describe, and only then name the folder."""
    began = time.time()
    options = dataclasses.replace(options, base_model=named_on(options.hub, options.base_model))
    check_folder(options.output_dir)
    questions = check_export(options)
    gc.set_threshold(100_000)  # scanning all imported objects for garbage took a tenth of a merge's time
    from utils.merging import merge
    from utils.merging.plan import check_output, plan_merge

    if options.offload_dir:
        say("--offload_dir: no longer needed, since tensors are merged one by one; nothing is written there")
    with locked(options.output_dir), contextlib.ExitStack() as aside:
        combination, adapters = prepare_combination(options)
        if combination and options.output_type == "adapter":
            return write_adapter(combination, options, began)
        if combination:
            adapters = [aside.enter_context(combination.written_aside(options, began))]
        plan = plan_merge(
            options.base_model,
            adapters,
            options.dtype,
            options.output_type,
            options.max_shard_size,
            options.merge_into,
        )
        check_output([plan.base, *(combination or plan).folders], plan.size, options.output_dir, options.overwrite)
        with replacing_folder(options.output_dir) as folder:
            merge.write_model(plan, folder)
            if options.verify:
                from utils.merging.verify import compare_logits

                compare_logits(plan, folder)
            merge.write_lineage(plan, folder, options, began, combination.facts() if combination else {})
            if options.export:
                from utils.merging import gguf_export

                gguf_export.export(folder, plan.adapters[-1].folder if plan.adapters else None, options.quantize, questions)
    say(merge.summary(plan, options.output_dir, time.time() - began))


def prepare_combination(options: Options) -> "tuple[Combination | None, list[str]]":
    """The combination that the options ask for (None: adapters are merged one after the other), and the adapters."""
    from utils.merging.combination import plan_combination

    weights = read_weights(options.lora_model)
    asked = {"--combine": options.combine, "--density": options.density, "--rank": options.rank}
    asked["--output_type adapter"] = options.output_type == "adapter"
    given = [name for name, value in asked.items() if value]
    if not weights and given:
        raise UserError(f"{given[0]}: is for adapters, but there are none; give them as --lora_model a*0.7,b*0.3")
    if not given and not any(weights.values()):
        return None, list(weights)
    rule = rule_of(options.combine, options.density, options.rank, options.seed, len(weights))
    return plan_combination(options.base_model, weights, rule), list(weights)


def write_adapter(combination: "Combination", options: Options, began: float) -> None:
    """Write only the combined adapter. Raises UserError if options for whole models are given."""
    from utils.merging.plan import check_output
    from utils.models.weights import base_folder

    of_models = {name: getattr(options, name) for name in ("dtype", "verify")}
    of_models["merge_into"] = options.merge_into != "full"
    if unfit := [name for name, value in of_models.items() if value]:
        raise UserError(f"--{unfit[0]}: is for whole models; leave it out, or leave out --output_type adapter")
    check_output(
        [base_folder(options.base_model), *combination.folders], combination.size, options.output_dir, options.overwrite
    )
    with replacing_folder(options.output_dir) as folder:
        rank = combination.write(folder, options, began)
    say(f"done: {options.output_dir} holds {combination}, rank {rank}; use it as --lora_weights, or train on it")


def check_export(options: Options) -> "list[Record]":
    """The prompts for comparing an exported file; none without --export. Raises UserError if its options contradict."""
    if not options.export:
        if options.quantize or options.test_input_path:
            raise UserError("--quantize and --test_input_path: are for --export gguf; add it, or leave them out")
        return []
    if options.output_type != "huggingface":
        raise UserError("--export gguf: is made from Hugging Face's layout; leave --output_type out")
    from utils.datasets.prompts import read_prompts
    from utils.merging.gguf_export import check_packages

    check_packages(options.quantize)
    return read_prompts(options.test_input_path or [str(TEST_DATA)])


if __name__ == "__main__":
    run(main, Options)
