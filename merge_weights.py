"""Join a base model with LoRA weights into one model folder, or convert a base between layouts (no --lora_model).

    python merge_weights.py --base_model models/llama-13b --lora_model models/chinese-alpaca-lora-13b \\
        --output_dir models/chinese-alpaca-13b

    python merge_weights.py --base_model models/llama-7b --output_dir models/chinese-alpaca-plus-7b \\
        --lora_model models/chinese-llama-plus-lora-7b,models/chinese-alpaca-plus-lora-7b

The base may be in Hugging Face's layout or in Meta's own (consolidated.00.pth, params.json, tokenizer.model).
"""

import dataclasses
import gc
import time

from utils.cli import option, run
from utils.console import UserError, say
from utils.files import check_folder, locked, replacing_folder


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this script."""

    base_model: str = option(help="base model: a folder, or a name on the Hugging Face hub")
    output_dir: str = option(help="folder for the merged model")
    lora_model: list[str] = option([], "folder with LoRA weights; several, in their order: a,b (none: convert only)")
    output_type: str = option("huggingface", "layout to write", choices=("huggingface", "pth"))
    dtype: str | None = option(None, "type to round to (the base's)", choices=("float16", "bfloat16", "float32"))
    max_shard_size: str = option("5GB", "largest file to write, such as 500MB")
    verify: bool = option(False, "compare with base and adapters on a few prompts (loads both models, one by one)")
    overwrite: bool = option(False, "replace the model in the output folder")
    offload_dir: str | None = option(None, "accepted for old scripts: nothing needs to be offloaded any more")


def main(options: Options) -> None:
    """Check that everything goes together, then compute, write, read back, describe, and only then name the folder."""
    began = time.time()
    check_folder(options.output_dir)
    twice = [name for number, name in enumerate(options.lora_model) if name in options.lora_model[:number]]
    if twice:
        raise UserError(f"--lora_model {twice[0]}: named twice, and would be added twice; name each once")
    gc.set_threshold(100_000)  # looking for garbage among all that is imported took a tenth of a merge's time
    from utils import merge_plan, merging

    if options.offload_dir:
        say("--offload_dir: not needed any more, tensors are merged one by one; nothing is written there")
    with locked(options.output_dir):
        plan = merge_plan.plan_merge(
            options.base_model, options.lora_model, options.dtype, options.output_type, options.max_shard_size
        )
        merge_plan.check_output(plan, options.output_dir, options.overwrite)
        with replacing_folder(options.output_dir) as folder:
            merging.write_model(plan, folder)
            if options.verify:
                from utils.verifying import compare_logits

                compare_logits(plan, folder)
            merging.write_lineage(plan, folder, options, began)
    say(merging.summary(plan, options.output_dir, time.time() - began))


if __name__ == "__main__":
    run(main, Options)
