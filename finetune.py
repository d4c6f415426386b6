"""Train a LoRA adapter: a warm start on a base model, or incremental training on an earlier adapter.

    python finetune.py --base_model models/chinese-alpaca-7b --data_path data.json --output_dir output/run-1

    python finetune.py --base_model models/chinese-alpaca-7b --data_path more.json --output_dir output/rerun-1 \\
        --resume_from_checkpoint output/run-1

The same command again goes on after a kill. Several GPUs: torchrun --nproc_per_node 4 finetune.py …
"""

import dataclasses
import importlib.util
import math
import os
import time
from typing import TYPE_CHECKING, Any

from utils.cli import option, run
from utils.console import UserError, is_main_process, say
from utils.files import check_folder
from utils.prompter import Prompter
from utils.records import read_records
from utils.sources import check_base, check_validation, data_files

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from utils.dataset import Encoded
    from utils.modeling import Placement
    from utils.start import Start
    from utils.training import StepTrainer


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this script; names and defaults are those of alpaca-lora where it has them."""

    base_model: str = option(help="base model: a folder, or a name on the Hugging Face hub", heading="Model and data")
    data_path: str = option(help="records: FILE, a hub name, or several with weights (a.json,b.jsonl:0.5)")
    output_dir: str = option("./lora-alpaca", "folder for the adapter, its checkpoints and its log")
    prompt_template_name: str = option("alpaca", "template: a name in templates/, or the path of a .json file")
    tokenizer: str = option("", "folder of an extended tokenizer (the base's is used where none is given)")

    batch_size: int = option(128, "records in one optimizer step, over all processes", least=1, heading="Training")
    micro_batch_size: int = option(4, "memory is sized for this many records of full length at once", least=1)
    num_epochs: int = option(3, "passes over the data", least=1)
    max_steps: int = option(-1, "stop after this many optimizer steps (-1: after the epochs)", least=-1)
    learning_rate: float = option(3e-4, "highest learning rate", least=0)
    lr_scheduler_type: str = option(
        "linear", "course of the learning rate", choices=("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup_steps: int | None = option(None, "steps of warm-up (100, but at most a tenth of all steps)", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm (0: never)", least=0)
    neftune_noise_alpha: float | None = option(None, "noise on the embeddings (NEFTune)", least=0)
    cutoff_len: int = option(256, "tokens of a record that are kept", least=2)
    val_set_size: int | float = option(2000, "records, or a fraction of them, kept for validation", least=0)
    train_on_inputs: bool = option(True, "False: learn the answers only, not the questions")
    add_eos_token: bool = option(False, "accepted for old scripts: the end of sequence is always learned")
    group_by_length: bool = option(False, "steps of records of similar length (less padding, an odd loss curve)")
    seed: int = option(42, "rules the split, the order, dropout and the adapter's first values", least=0, most=2**32 - 1)

    lora_r: int | None = option(None, "rank (8, or that of the adapter trained on)", least=1, heading="Adapter")
    lora_alpha: int | None = option(None, "scale (16, or that of the adapter trained on)", least=1)
    lora_dropout: float = option(0.05, "dropout before the adapter", least=0, most=0.99)
    lora_target_modules: list[str] = option([], "layers ([q_proj,v_proj], or the family's attention projection)")
    modules_to_save: list[str] = option([], "layers trained whole, such as [embed_tokens,lm_head]")
    use_rslora: bool | None = option(None, "scale by the root of the rank")
    use_dora: bool | None = option(None, "train magnitudes and directions (DoRA)")

    resume_from_checkpoint: str | None = option(
        None, "adapter to train on, checkpoint of this run, or auto for its newest one", heading="Start, saving, logs"
    )
    dry_run: bool = option(False, "show the data, the steps and the memory needed, load no weights, write nothing")
    overwrite_output_dir: bool = option(False, "start anew where the output folder holds a run")
    eval_steps: int = option(200, "steps between evaluations (also at each epoch's end)", least=1)
    save_steps: int = option(200, "steps between checkpoints (also at each epoch's end)", least=1)
    save_total_limit: int = option(3, "checkpoints kept, beside the best one", least=1)
    load_best_model_at_end: bool = option(True, "False: keep the last adapter, not the one with the best validation loss")
    report_to: list[str] = option([], "also log to [tensorboard] or [wandb]; JSON lines and a plot are always there")
    wandb_project: str = option("", "project in Weights & Biases")
    wandb_run_name: str = option("", "name of the run there")
    wandb_watch: str = option("", "what it watches", choices=("", "false", "gradients", "all"))
    wandb_log_model: str = option("", "whether it stores the model", choices=("", "false", "true", "checkpoint", "end"))

    load_8bit: bool | None = option(None, "base in 8 bit (on CUDA this is the default)", heading="Machine")
    load_4bit: bool = option(False, "base in 4 bit (NF4)")
    bf16: bool | None = option(None, "compute in bfloat16 (default where the GPU has it)")
    fp16: bool | None = option(None, "compute in float16 (default on other GPUs)")
    gradient_checkpointing: bool | None = option(None, "compute activations twice to save memory (where it is short)")
    attn_implementation: str = option(
        "", "attention kernel of transformers", choices=("", "eager", "sdpa", "flash_attention_2")
    )
    torch_compile: bool = option(False, "compile the model")
    num_workers: int = option(0, "processes that load data", least=0)


def main(options: Options) -> None:
    """The story of one step of a chain."""
    check_together(options)
    from utils import lineage, start  # here, because torch takes seconds to import
    from utils.files import digest, locked
    from utils.modeling import place, precision

    began = time.time()
    placement = place(options.load_8bit, options.load_4bit)
    half = precision(placement.device, options.bf16, options.fp16)
    if options.dry_run:
        return show(options, placement, half)
    with locked(options.output_dir):
        origin = start.decide(options.output_dir, options.resume_from_checkpoint, options.overwrite_output_dir)
        base, parent = start.base_and_parent(origin, options.base_model)
        start.check_parent(origin, lora_options(options))
        check_layers(options)
        tokenizer, train_data, val_data, data = prepare_data(options, origin)
        run_facts = {"options": what_rules(options), "base": digest(base), "parent": parent, "data": data["files"]}
        start.check_unchanged(origin, run_facts)
        if options.overwrite_output_dir and is_main_process():
            start.clear(options.output_dir)
        from utils import training  # here, because its imports take seconds more

        model = prepare_model(options, placement, origin, tokenizer)
        trainer = prepare_trainer(options, placement, half, model, train_data, val_data, run_facts)
        training.train(trainer, origin.checkpoint)
        results = training.finish(trainer, tokenizer, options.load_best_model_at_end and val_data is not None)
        facts = {"base": base, "parent": parent, "data": data, "results": results}
        if is_main_process():
            lineage.write(options.output_dir, lineage.describe("train", options, began, **facts))
    say(f"done: {options.output_dir} holds the adapter; its chain: python -m utils.lineage {options.output_dir}")


def check_together(options: Options) -> None:
    """Options that depend on each other, or name what is not there. Raises UserError naming them."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = options.micro_batch_size * processes
    if options.batch_size % at_once:
        raise UserError(
            f"--batch_size {options.batch_size}: is no multiple of --micro_batch_size {options.micro_batch_size} x {processes} "
            f"processes = {at_once}; give {max(1, options.batch_size // at_once) * at_once}, or another micro-batch size"
        )
    check_folder(options.output_dir)
    if options.bf16 and options.fp16:
        raise UserError("--bf16 and --fp16: both given; choose one")
    if wants_wandb(options) and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "--wandb_project (or WANDB_PROJECT): the wandb package is not installed; pip install wandb, or leave it out"
        )
    for name in options.report_to:
        if name not in ("tensorboard", "wandb", "none"):
            raise UserError(f"--report_to {name}: unknown; give tensorboard, wandb or none")
    check_base(options.base_model)
    Prompter(options.prompt_template_name)
    files = data_files(options.data_path)
    for file in files:
        next(read_records(file))  # so that one without any is refused before torch is imported
    check_validation(options.val_set_size, files)
    if options.add_eos_token:
        say("--add_eos_token: the end of sequence is learned with or without it")


def wants_wandb(options: Options) -> bool:
    """True where an option or, as of old, the environment names a project of Weights & Biases."""
    return bool("wandb" in options.report_to or options.wandb_project or os.environ.get("WANDB_PROJECT"))


def what_rules(options: Options) -> dict[str, Any]:
    """The options that a run's result depends on; base, parent and data count by what they are, not by their paths."""
    free = {
        "base_model", "data_path", "output_dir", "tokenizer", "resume_from_checkpoint", "overwrite_output_dir",
        "save_total_limit", "report_to", "wandb_project", "wandb_run_name", "wandb_watch", "wandb_log_model", "num_workers",
    }  # fmt: skip
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in free}


def check_layers(options: Options) -> None:
    """Raises UserError where a layer that an option names is not in the model; its weights need not be loaded for that."""
    named = {name: getattr(options, name) for name in ("lora_target_modules", "modules_to_save")}
    if any(named.values()):
        from utils import adapters, memory

        adapters.check_layers(memory.skeleton(options.base_model), **named)


def prepare_data(options: Options, origin: "Start") -> tuple[Any, "Encoded", "Encoded | None", dict[str, Any]]:
    """The tokenizer, the encoded records to train on and to validate with, and what the lineage says of them."""
    from utils import dataset
    from utils.files import sha256
    from utils.modeling import read_architecture
    from utils.tokenizer import load_tokenizer
    from utils.tokenizer_files import tokenizer_hash
    from utils.weights import base_folder

    read_architecture(base_folder(options.base_model))  # before the tokenizer, whose library reads the same config.json
    prompter = Prompter(options.prompt_template_name)
    folder = tokenizer_folder(options, origin)
    tokenizer = load_tokenizer(folder)
    hashes = {str(file): sha256(file) for file in data_files(options.data_path)}
    encoder = dataset.Encoder(prompter, tokenizer, tokenizer_hash(folder), options.cutoff_len, options.train_on_inputs)
    table, asked = dataset.encode_all(encoder, options.data_path, hashes, options.seed, keep=not options.dry_run)
    numbers = dataset.usable(table, asked, options.cutoff_len)
    train_numbers, val_numbers = dataset.split(numbers, options.val_set_size, options.seed)
    train = dataset.Encoded(table, train_numbers, options.cutoff_len)
    validation = dataset.Encoded(table, val_numbers, options.cutoff_len) if len(val_numbers) else None
    facts = {
        "path": options.data_path,
        "files": hashes,
        "template": {"name": prompter.name, "texts": prompter.texts},
        "records": len(asked),
        "dropped": len(asked) - len(numbers),
        "train": len(train_numbers),
        "validation": len(val_numbers),
        "tokens": sum(train.lengths),
        "supervised": sum(train.supervised),
    }
    say(
        f"{facts['train']} records to train on, {facts['validation']} to validate with; an epoch has {facts['tokens']} tokens, "
        f"{facts['supervised']} of them supervised"
    )
    return tokenizer, train, validation, facts


def tokenizer_folder(options: Options, origin: "Start") -> str:
    """The folder of the tokenizer: the one given, else that beside the adapter to train on, else the base's."""
    from utils.tokenizer_files import has_tokenizer

    beside = origin.checkpoint or origin.parent
    return options.tokenizer or (str(beside) if beside and has_tokenizer(beside) else options.base_model)


def prepare_model(options: Options, placement: "Placement", origin: "Start", tokenizer: Any) -> "PeftModel":
    """The base with the adapter that is trained on it."""
    import transformers

    from utils import adapters, memory, start
    from utils.modeling import fit_embeddings, load_base

    if placement.device.type == "cpu":
        memory.keep_freed()
    say(f"base model {options.base_model} on {placement}")
    transformers.set_seed(options.seed)
    base = load_base(options.base_model, tokenizer, placement, options.attn_implementation)
    config = start.lora_config(base, lora_options(options), origin.checkpoint or origin.parent)
    fit_embeddings(base, tokenizer, options.base_model, config.modules_to_save or [])
    if origin.parent and not origin.checkpoint:
        return adapters.load(base, origin.parent, config)
    return adapters.add(base, config)


def lora_options(options: Options) -> dict[str, Any]:
    """The options that describe the adapter."""
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora", "modules_to_save")
    return {name: getattr(options, name) for name in names}


def show(options: Options, placement: "Placement", half: str | None) -> None:
    """What --dry_run prints instead of training."""
    from utils import adapters, memory, report, start

    origin = start.decide(options.output_dir, options.resume_from_checkpoint, options.overwrite_output_dir)
    start.check_parent(origin, lora_options(options))
    tokenizer, train, *_ = prepare_data(options, origin)
    report.print_report(
        train.full_lengths, options.cutoff_len, [train[index] for index in range(min(2, len(train)))], tokenizer
    )
    base = memory.skeleton(options.base_model)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = adapters.add(base, start.lora_config(base, lora_options(options), origin.checkpoint or origin.parent))
    trainable, total = model.get_nb_trainable_parameters()
    tokens = options.micro_batch_size * options.cutoff_len
    say(f"\n{math.ceil(len(train) / options.batch_size)} optimizer steps an epoch, {count_steps(options, len(train))} in all")
    say(f"{trainable:,} of {total:,} parameters would be trained")
    for checkpointing in (False, True):
        needed = memory.estimate(model, placement, half, tokens, checkpointing)
        say(f"memory on {placement}, --gradient_checkpointing {checkpointing}: {needed}")
    say("dry run: no weights were loaded and nothing was written")


def count_steps(options: Options, records: int) -> int:
    """Optimizer steps of the whole run."""
    return options.max_steps if options.max_steps > 0 else math.ceil(records / options.batch_size) * options.num_epochs


def prepare_trainer(
    options: Options,
    placement: "Placement",
    half: str | None,
    model: "PeftModel",
    train: "Encoded",
    validation: "Encoded | None",
    run_facts: dict[str, Any],
) -> "StepTrainer":
    """The Trainer with everything it needs."""
    from utils.batching import Plan
    from utils.training import Job, StepTrainer

    args = training_arguments(options, placement, half, model, len(train))
    plan = Plan(
        batch_size=options.batch_size,
        micro_batch_tokens=options.micro_batch_size * options.cutoff_len,
        processes=args.world_size,
        process=args.process_index,
        group_by_length=options.group_by_length,
        seed=options.seed,
        pad_to=8 if args.device.type == "cuda" else 1,
    )
    job = Job(plan, options.base_model, run_facts, options.eval_steps, options.save_total_limit)
    return StepTrainer(model, args, job, train, validation)


def training_arguments(
    options: Options, placement: "Placement", half: str | None, model: "PeftModel", records: int
) -> "TrainingArguments":
    """The options in the Trainer's own terms."""
    from transformers import TrainingArguments

    from utils import memory

    checkpointing = options.gradient_checkpointing
    if checkpointing is None:
        tokens = options.micro_batch_size * options.cutoff_len
        checkpointing = memory.is_short(model, placement, half, tokens)
    steps = count_steps(options, records)
    warmup = options.warmup_steps if options.warmup_steps is not None else min(100, steps // 10)
    say(f"{steps} optimizer steps of {options.batch_size} records, {warmup} of them warm-up; computing in {half or 'float32'}")
    args = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.micro_batch_size,
        num_train_epochs=options.num_epochs,
        max_steps=options.max_steps if options.max_steps > 0 else -1,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        neftune_noise_alpha=options.neftune_noise_alpha,
        optim="adamw_torch",
        bf16=half == "bfloat16",
        fp16=half == "float16",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=options.torch_compile,
        seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        dataloader_num_workers=options.num_workers,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        use_cpu=placement.device.type == "cpu",
        disable_tqdm=True,
        report_to=["wandb"] if wants_wandb(options) else options.report_to or "none",
        run_name=options.wandb_run_name or None,
    )
    args._n_gpu = min(1, args.n_gpu)  # several GPUs are for several processes; DataParallel would split micro-batches
    for name in ("project", "watch", "log_model"):
        if value := getattr(options, f"wandb_{name}"):
            os.environ[f"WANDB_{name.upper()}"] = value
    return args


if __name__ == "__main__":
    run(main, Options)
