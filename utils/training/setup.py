"""What a training run needs before its first step: device, model, Trainer; and what --dry_run shows instead."""

import datetime
import math
import os
import shlex
import time
from typing import TYPE_CHECKING, Any

from utils.console import UserError, is_main_process, say
from utils.datasets.stages import INSTRUCTION, LABELLED, NAMES, PREFERENCE, TEXT
from utils.files import check_room
from utils.models.memory import peak_memory
from utils.training.checks import check_layers, lora_options, named_dtype

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from utils.datasets.dataset import EncodedDataset
    from utils.models.placement import DeviceConfig
    from utils.training.evaluations import Evaluator
    from utils.training.grpo import Policy, Sampler
    from utils.training.preferences import Preference
    from utils.training.start import RunStart
    from utils.training.trainer import StepTrainer

BYTES_TO_SAVE = 16  # of a parameter in float32: in the adapter, and in one checkpoint beside AdamW's two averages
LONGEST_WAIT = datetime.timedelta(days=1)  # for the first rank to encode the data
Options = Any  # finetune.Options; modules import no scripts


def join_ranks(placement: "DeviceConfig") -> None:
    """Connect the processes of a run on several GPUs or machines, so that one can wait for another."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=placement.device.type == "cpu", timeout=LONGEST_WAIT)


def choose_dtype_and_kernel(placement: "DeviceConfig", named: str, base_model: str, origin: "RunStart") -> "DeviceConfig":
    """`placement` with the type to train in, and the attention kernel: the type that an option `named`, that of the
    checkpoint to resume, or the one that is fast here, on all ranks what the first one measures."""
    from accelerate.utils import broadcast_object_list

    from utils.models.placement import measured, with_dtype, with_training_kernel
    from utils.training import start

    if origin.checkpoint and not named:
        names = [start.dtype_of(origin.checkpoint)]
    else:
        names = [named or measured(placement, base_model).dtype_name if is_main_process() else ""]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            broadcast_object_list(names)
    return with_training_kernel(with_dtype(placement, names[0]), base_model)


def prepare_model(options: Options, placement: "DeviceConfig", origin: "RunStart", tokenizer: Any, stage: str) -> "PeftModel":
    """The base with the adapter to be trained."""
    import transformers

    from utils.adapters import adapters
    from utils.adapters.lora_config import lora_config
    from utils.models import spread
    from utils.models.loading import fit_embeddings, load_base
    from utils.models.sharding import wants_fsdp

    if wants_fsdp() and stage not in (TEXT, INSTRUCTION):
        raise UserError(
            f"FSDP: supports only {NAMES[TEXT]} and {NAMES[INSTRUCTION]}; "
            "start with torchrun, or with --device_map auto in one process"
        )
    if wants_fsdp() and (options.eval_answers or options.eval_choices):
        raise UserError("--eval_answers, --eval_choices: are not supported with FSDP; evaluate the saved adapter with judge.py")
    say(f"base model {options.base_model} on {placement}")
    transformers.set_seed(options.seed)
    base = load_base(options.base_model, tokenizer, placement, placement.kernel)
    config = lora_config(base, lora_options(options), origin.checkpoint or origin.parent, stage == TEXT)
    fit_embeddings(base, tokenizer, options.base_model)
    spread.check_adapter(base, config.modules_to_save or [], config.use_dora)
    parent = None if origin.checkpoint else origin.parent
    model = adapters.load(base, parent, config) if parent else adapters.add(base, config)
    trained, _ = model.get_nb_trainable_parameters()
    check_room(options.output_dir, trained * BYTES_TO_SAVE)
    return model


def show(options: Options, placement: "DeviceConfig", stage: str) -> None:
    """What --dry_run prints instead of training."""
    from utils import lineage
    from utils.adapters import adapters
    from utils.adapters.lora_config import lora_config
    from utils.models.architecture import meta_model
    from utils.training import dry_run, memory, start
    from utils.training.data import prepare_data

    origin = start.decide(options.output_dir, options.resume_from_checkpoint, options.overwrite_output_dir)
    placement = choose_dtype_and_kernel(placement, named_dtype(options), options.base_model, origin)
    start.check_parent(origin, lora_options(options), options.base_model)
    check_layers(options, origin)
    parent = {"lineage": lineage.read(origin.parent)} if origin.parent else None
    tokenizer, train, _, data = prepare_data(options, origin, parent, stage)
    dry_run.print_report(
        train.full_lengths, options.cutoff_len, [train[index] for index in range(min(2, len(train)))], tokenizer
    )
    base = meta_model(options.base_model)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    every_layer = data["stage"] == TEXT
    model = adapters.add(base, lora_config(base, lora_options(options), origin.checkpoint or origin.parent, every_layer))
    trainable, total = model.get_nb_trainable_parameters()
    say(f"\n{math.ceil(len(train) / options.batch_size)} optimizer steps per epoch, {count_steps(options, len(train))} in all")
    say(f"{trainable:,} of {total:,} parameters would be trained")
    memory.show(model, placement, options.micro_batch_size, options.cutoff_len)
    say("dry run: no weights were loaded and nothing was written")


def count_steps(options: Options, records: int) -> int:
    """Optimizer steps of the whole run."""
    return options.max_steps if options.max_steps > 0 else math.ceil(records / options.batch_size) * options.num_epochs


def prepare_trainer(
    options: Options,
    placement: "DeviceConfig",
    model: "PeftModel",
    train: "EncodedDataset",
    validation: "EncodedDataset | None",
    run_facts: dict[str, Any],
    stage: str,
    best: str = "",
    sampler: "Sampler | None" = None,
    evaluator: "Evaluator | None" = None,
) -> "StepTrainer":
    """The Trainer with everything it needs.

    The best adapter is chosen by the metric `best`; `sampler` draws the answers to be rewarded, and `evaluator` has the
    model answer at each evaluation.
    """
    from utils.training.batching import BatchConfig
    from utils.training.trainer import RunConfig, StepTrainer

    args = training_arguments(options, placement, model, len(train), best)
    if options.torch_compile:
        compile_layers(model)
    plan = BatchConfig(
        batch_size=options.batch_size,
        micro_batch_tokens=options.micro_batch_size * options.cutoff_len,
        world_size=args.world_size,
        rank=args.process_index,
        group_by_length=options.group_by_length,
        seed=options.seed,
        pad_to=8 if args.device.type == "cuda" else 1,
    )
    job = RunConfig(plan, options.base_model, run_facts, options.eval_steps, options.save_total_limit, evaluator)
    if stage in (PREFERENCE, LABELLED):
        from utils.training.preferences import KTOTrainer, PreferenceTrainer

        kind = KTOTrainer if stage == LABELLED else PreferenceTrainer
        return kind(model, args, job, train, validation, preference(options, stage))
    if sampler:
        from utils.training.grpo import GRPOTrainer

        return GRPOTrainer(model, args, job, train, validation, policy(options), sampler)
    return StepTrainer(model, args, job, train, validation)


def preference(options: Options, stage: str) -> "Preference":
    """The options of training on preferences, with KTO's loss for single answers with a label."""
    from utils.training.preferences import Preference

    loss = "kto" if stage == LABELLED else options.preference_loss or "dpo"
    weights = (options.desirable_weight, options.undesirable_weight)
    return Preference(loss, options.preference_beta, options.preference_sft, options.preference_margin, *weights)


def policy(options: Options) -> "Policy":
    """The options of training by rewards, and the functions that `--rewards` names."""
    from utils.training.grpo import Policy
    from utils.training.rewards import load_rewards

    names = ("group_size", "temperature", "clip_epsilon", "kl_beta", "num_iterations")
    return Policy(load_rewards(options.rewards, options.reward_format), *(getattr(options, name) for name in names))


def compile_layers(model: "PeftModel") -> None:
    """Have each decoder layer compiled when it is first called, in place, once for all lengths of records.

    Layers, being alike, compile faster than the whole model, and the loss that training puts around them is left alone.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True)
    say(f"--torch_compile: {len(layers)} layers are compiled in the first step, which takes longer")


def training_arguments(
    options: Options, placement: "DeviceConfig", model: "PeftModel", records: int, best: str = ""
) -> "TrainingArguments":
    """The options as the Trainer's arguments; `best` is the metric that chooses the best adapter, "" for none."""
    from transformers import TrainingArguments

    from utils.training import memory, trackers
    from utils.training.evaluations import LOSS

    if placement.quantize == "8bit" and options.load_8bit is None:
        memory.tell_faster(model, placement, options.micro_batch_size, options.cutoff_len)
    checkpointing = wants_checkpointing(options, placement, model)
    args = TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.micro_batch_size,
        num_train_epochs=options.num_epochs,
        max_steps=options.max_steps if options.max_steps > 0 else -1,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=warmup_steps(options, placement, records),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        neftune_noise_alpha=options.neftune_noise_alpha,
        optim="adamw_torch_fused" if placement.device.type == "cuda" else "adamw_torch",
        bf16=placement.autocast_dtype == "bfloat16",
        fp16=placement.autocast_dtype == "float16",
        gradient_checkpointing=checkpointing,
        # bitsandbytes keeps the input of each 8-bit product, which only recomputing the whole layer frees
        gradient_checkpointing_kwargs={"use_reentrant": placement.quantize == "8bit"},
        full_determinism=options.deterministic,
        seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        metric_for_best_model=best or None,
        greater_is_better=bool(best) and best != LOSS,
        dataloader_num_workers=options.num_workers,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        use_cpu=placement.device.type == "cpu",
        disable_tqdm=True,
        report_to=trackers.wanted(options) or "none",
        run_name=options.wandb_run_name or None,
    )
    args._n_gpu = min(1, args.n_gpu)  # several GPUs need several processes; DataParallel would split micro-batches
    return args


def warmup_steps(options: Options, placement: "DeviceConfig", records: int) -> int:
    """Steps over which the learning rate grows: as asked for, else a tenth, at most 100; printed with all that are taken."""
    steps = count_steps(options, records)
    warmup = options.warmup_steps if options.warmup_steps is not None else min(100, steps // 10)
    computing = f"computing in {placement.autocast_dtype or 'float32'}"
    say(f"{steps} optimizer steps of {options.batch_size} records, {warmup} of them warm-up; {computing}")
    return warmup


def wants_checkpointing(options: Options, placement: "DeviceConfig", model: "PeftModel") -> bool:
    """Whether activations are computed again in the backward pass: as asked for, else if it is necessary, which is printed."""
    from utils.models import spread
    from utils.training import memory

    if options.gradient_checkpointing is not None:
        return options.gradient_checkpointing
    if spread.offloaded(model):
        say(
            "layers are read for each pass: --gradient_checkpointing is on; otherwise all would be held until the backward pass"
        )
        return True
    return memory.is_short(model, placement, options.micro_batch_size, options.cutoff_len)


def tell_end(options: Options, results: dict[str, Any], began: float) -> None:
    """Print the results of the run, and the command that answers with its adapter."""
    import torch

    losses = f"training loss {results['train_loss']:.4f}"
    if results["eval_loss"] is not None:
        losses += f", validation loss {results['eval_loss']:.4f}"
    card = torch.npu if hasattr(torch, "npu") and torch.npu.is_available() else torch.cuda
    peak = card.max_memory_allocated() if card.is_available() else peak_memory()
    minutes = (time.time() - began) / 60
    say(f"{results['steps']} steps in {minutes:.1f} minutes; {losses}; at most {peak / 1e9:.1f} GB of memory")
    say(f"done: {options.output_dir} holds the adapter; its chain: python -m utils.lineage {shlex.quote(options.output_dir)}")
    say(f"next: python generate.py --lora_weights {shlex.quote(options.output_dir)}")
