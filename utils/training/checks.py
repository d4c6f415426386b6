"""Checks before the long work: options that contradict each other or name missing things are refused."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.console import UserError, say
from utils.datasets.sources import check_base_model, check_validation, data_files
from utils.datasets.stages import READERS, REWARD, TEXT, stage_of
from utils.datasets.templates import CHAT, check_template
from utils.datasets.tool_calls import CARRIED
from utils.files import check_folder, check_free, check_names
from utils.training import trackers
from utils.training.rewards import load_rewards, try_out

if TYPE_CHECKING:
    from utils.training.start import RunStart

Options = Any  # finetune.Options; modules import no scripts


def check_together(options: Options) -> str:
    """The stage to train. Raises UserError for options that contradict each other or name missing things."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = options.micro_batch_size * processes
    if options.batch_size % at_once:
        raise UserError(
            f"--batch_size {options.batch_size}: is not a multiple of --micro_batch_size {options.micro_batch_size} "
            f"x {processes} processes = {at_once}; give {max(1, options.batch_size // at_once) * at_once}, "
            "or another micro-batch size"
        )
    check_folder(options.output_dir)
    check_free(Path(options.output_dir).glob("*"))
    files = data_files(options.data_path)
    names = (options.base_model, options.tokenizer, options.output_dir, options.resume_from_checkpoint or "", *map(str, files))
    check_names(*names)
    named_dtype(options)
    trackers.check(options)
    check_base_model(options.base_model)
    if Path(options.base_model).resolve() == Path(options.output_dir).resolve():
        raise UserError(f"--output_dir {options.output_dir}: is the base model's own folder; choose another folder")
    check_template(options.prompt_template_name)
    stage = stage_of(options.data_path, options.stage, options.preference_loss, bool(options.rewards))
    carries = CARRIED if options.prompt_template_name == CHAT else ()
    firsts = [next(READERS[stage](file, carries)) for file in files]  # refuses a file without any before torch is imported
    if stage == REWARD:
        for first in firsts:
            try_out(load_rewards(options.rewards, options.reward_format), first)
    if stage != TEXT:
        check_validation(options.val_set_size, files)
    if options.add_eos_token:
        say("--add_eos_token: the end of sequence is learned with or without it")
    return stage


def check_compiles(options: Options, quantize: str | None) -> None:
    """Raises UserError if what --torch_compile asks for would come apart at every product."""
    if options.torch_compile and quantize == "8bit":
        raise UserError(
            "--torch_compile: 8-bit products cannot be compiled, since what they give out depends on the values; "
            "add --load_8bit False, or leave --torch_compile out"
        )


def named_dtype(options: Options) -> str:
    """The dtype that --dtype or the older --bf16 and --fp16 name; "" if they name none.

    Raises UserError if they name several.
    """
    old = {"bfloat16": options.bf16, "float16": options.fp16}
    named = {options.dtype} - {""} | {name for name, value in old.items() if value}
    if len(named) > 1:
        raise UserError("--dtype, --bf16, --fp16: these name several dtypes; give one")
    return named.pop() if named else "float32" if False in old.values() else ""


def check_layers(options: Options, origin: "RunStart") -> None:
    """Raises UserError if an option names a layer that the model lacks, or the parent's settings do not fit the model.

    The model's weights are not loaded for that.
    """
    from utils.adapters import adapters, settings, targets
    from utils.models.architecture import meta_model

    wanted, parent = lora_options(options), origin.parent
    has_settings = parent is not None and (parent / settings.FILE).is_file()
    if not (wanted["lora_target_modules"] or wanted["modules_to_save"] or has_settings):
        return
    model = meta_model(options.base_model)
    targets.check_layers(model, wanted["lora_target_modules"], wanted["modules_to_save"])
    if parent is not None and has_settings:
        config = adapters.config_on(model, parent)
        config.inference_mode = False  # as it is saved, nothing of it would train
        adapters.add(model, config)


def lora_options(options: Options) -> dict[str, Any]:
    """The options that describe the adapter."""
    from utils.adapters.targets import as_targets

    names = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save")
    return {name: getattr(options, name) for name in names} | {"lora_target_modules": as_targets(options.lora_target_modules)}


def check_tokens(options: Options, origin: "RunStart", tokenizer: Any) -> None:
    """Raises UserError if the base's files lack tensors, or embedding rows for some tokens that the run would not train."""
    from utils.adapters.lora_config import settings_of
    from utils.models.loading import check_new_tokens, without_values

    before = origin.checkpoint or origin.parent
    trained = settings_of(before, lora_options(options))["modules_to_save"] if before else options.modules_to_save
    check_new_tokens(without_values(options.base_model), tokenizer, options.base_model, trained)


def check_window(options: Options, config: Any) -> None:
    """Print if --cutoff_len exceeds the model's context window. Raises UserError if the model has no positions for more."""
    from utils.models.architecture import has_learned_positions, window_of

    window = window_of(config)
    if window is None or options.cutoff_len <= window:
        return
    if has_learned_positions(options.base_model, window):
        raise UserError(
            f"--cutoff_len {options.cutoff_len}: {options.base_model} has {window} positions; give {window} or less"
        )
    say(f"--cutoff_len {options.cutoff_len}: exceeds the {window} tokens that {options.base_model} was made for")
