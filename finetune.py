"""Train a LoRA adapter: a warm start on a base model, or incremental training on an earlier adapter.

    python finetune.py --base_model models/chinese-alpaca-7b --data_path data.json --output_dir output/run-1

    python finetune.py --base_model models/chinese-alpaca-7b --data_path more.json --output_dir output/rerun-1 \\
        --resume_from_checkpoint output/run-1

After a kill, the same command resumes. Several GPUs: torchrun --nproc_per_node 4 finetune.py …
"""

import dataclasses
import time
from typing import Any

from utils.cli import option, run
from utils.console import is_main_process
from utils.datasets.stages import REWARD
from utils.evaluation import training_questions
from utils.models.hubs import HUBS, named_on
from utils.training import checks, setup, trackers
from utils.training.rewards import reward_files


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this script; names and defaults are those of alpaca-lora where it has them."""

    base_model: str = option(help="base model: a folder, or a name on a hub", heading="Model and data")
    data_path: str = option(help="records: FILE, a hub name, or several with weights (a.json,b.jsonl:0.5)")
    stage: str = option(
        "",
        "training stage, if the records' form leaves a choice",
        choices=("", "text", "instruction", "preference", "reward"),
    )
    output_dir: str = option("./lora-alpaca", "folder for the adapter, its checkpoints and its log")
    prompt_template_name: str = option("alpaca", "template: a name in templates/, a .json file, or chat (the tokenizer's own)")
    enable_thinking: bool | None = option(None, "passed to chat templates that support it, and kept in the saved one")
    tokenizer: str = option("", "folder of an extended tokenizer (by default the base's is used)")

    batch_size: int = option(128, "records in one optimizer step, over all processes", least=1, heading="Training")
    micro_batch_size: int = option(4, "records of --cutoff_len tokens that fit in memory at once", least=1)
    num_epochs: int = option(3, "passes over the data", least=1)
    max_steps: int = option(-1, "stop after this many optimizer steps (-1: after the epochs)", least=-1)
    learning_rate: float = option(3e-4, "highest learning rate", least=0)
    lr_scheduler_type: str = option(
        "linear", "learning-rate schedule", choices=("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup_steps: int | None = option(None, "steps of warm-up (100, but at most a tenth of all steps)", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = option(1.0, "largest gradient norm (0: no clipping)", least=0)
    neftune_noise_alpha: float | None = option(None, "noise on the embeddings (NEFTune)", least=0)
    cutoff_len: int = option(256, "longest sequence in tokens; longer records are cut", least=2, most=10_000_000)
    val_set_size: int | float = option(2000, "records, or a fraction of them, kept for validation", least=0)
    train_on_inputs: bool = option(True, "learn the questions too (False: the answers only)")
    add_eos_token: bool = option(False, "accepted for old scripts; the end token is always learned")
    group_by_length: bool = option(False, "batch records of similar length (less padding, a jagged loss curve)")
    seed: int = option(42, "random seed: data split, order, dropout, LoRA initialization", least=0, most=2**32 - 1)

    lora_r: int | None = option(None, "rank (8, or the parent adapter's)", least=1, most=65_536, heading="Adapter")
    lora_alpha: int | None = option(None, "scale (16, or the parent adapter's)", least=1)
    lora_dropout: float = option(0.05, "dropout before the adapter", least=0, most=0.99)
    lora_target_modules: list[str] = option([], "layers ([q_proj,v_proj], or the family's attention projection)")
    modules_to_save: list[str] = option([], "layers trained in full, such as [embed_tokens,lm_head]")
    use_rslora: bool | None = option(None, "scale by the root of the rank")
    use_dora: bool | None = option(None, "train magnitudes and directions (DoRA)")

    preference_loss: str = option(
        "",
        "loss for pairs (default dpo), or kto, which labelled answers always use",
        choices=("", "dpo", "ipo", "orpo", "simpo", "kto"),
        heading="Preferences",
    )
    preference_beta: float = option(0.1, "strength of the preference (SimPO: about 2)", least=1e-6)
    preference_sft: float = option(0.0, "weight of the chosen answers' own loss, which is added", least=0)
    preference_margin: float = option(0.5, "margin between the two answers' rewards (SimPO)", least=0)
    desirable_weight: float = option(1.0, "weight of answers labelled true (KTO)", least=1e-6)
    undesirable_weight: float = option(1.0, "weight of answers labelled false (KTO)", least=1e-6)

    rewards: list[str] = option(
        [], "learn by rewards: exact, number, format, length or FILE.py:name, each with its :weight", heading="Rewards"
    )
    reward_format: str = option("", "regular expression of format (<think>…</think> and an answer)")
    group_size: int = option(8, "answers sampled for each question", least=2)
    max_new_tokens: int = option(128, "longest answer while training (--rewards, --eval_answers), in tokens", least=1)
    temperature: float = option(1.0, "sampling temperature", least=0.01)
    clip_epsilon: float = option(0.2, "how far one update may change a token's probability (GRPO)", least=1e-6)
    kl_beta: float = option(0.0, "weight of the KL divergence from the starting model (GRPO)", least=0)
    num_iterations: int = option(1, "updates on each set of sampled answers (GRPO)", least=1)

    resume_from_checkpoint: str | None = option(
        None, "adapter to train on, checkpoint of this run, or auto for its newest one", heading="Start, saving, logs"
    )
    dry_run: bool = option(False, "show the data, the steps and the memory needed, load no weights, write nothing")
    replay: float = option(0.0, "records of earlier steps learned again, as a share of the new ones (0.1)", least=0)
    overwrite_output_dir: bool = option(False, "start over where the output folder holds a run")
    eval_steps: int = option(200, "steps between evaluations (also at each epoch's end)", least=1)
    save_steps: int = option(200, "steps between checkpoints (also at each epoch's end)", least=1)
    save_total_limit: int = option(3, "checkpoints to keep, in addition to the best one", least=1)
    eval_answers: str = option("", "a few prompts to answer at each evaluation; the answers are logged")
    eval_choices: str = option("", "choice records to score the model on at each evaluation")
    load_best_model_at_end: bool = option(True, "keep the adapter with the best validation loss (False: the last one)")
    metric_for_best_model: str = option(
        "", "metric of the best adapter: choices (--eval_choices), chrf or exact (--eval_answers) [loss]"
    )
    report_to: list[str] = option([], "also log to [tensorboard,wandb,swanlab,mlflow]; JSON lines and a plot are always there")
    wandb_project: str = option("", "project in Weights & Biases")
    wandb_run_name: str = option("", "name of the run there")
    wandb_watch: str = option("", "what wandb watches", choices=("", "false", "gradients", "all"))
    wandb_log_model: str = option("", "whether wandb stores the model", choices=("", "false", "true", "checkpoint", "end"))

    load_8bit: bool | None = option(None, "base in 8 bit (the default on CUDA)", heading="Machine")
    load_4bit: bool = option(False, "base in 4 bit (NF4)")
    dtype: str = option(
        "", "compute dtype (by default what is fast on this machine)", choices=("", "float32", "bfloat16", "float16")
    )
    hub: str = option("huggingface", "where a base model's name is looked up", choices=HUBS)
    device_map: str = option("", "auto: spread the base over all GPUs, main memory and the disk", choices=("", "auto"))
    bf16: bool | None = option(None, "old name of --dtype bfloat16 (False: of --dtype float32)")
    fp16: bool | None = option(None, "old name of --dtype float16 (False: of --dtype float32)")
    gradient_checkpointing: bool | None = option(
        None, "recompute activations in the backward pass to save memory (on if memory is short)"
    )
    attn_implementation: str = option(
        "",
        "attention kernel of transformers (on a GPU FlashAttention 2 if installed, else sdpa)",
        choices=("", "eager", "sdpa", "flash_attention_2"),
    )
    torch_compile: bool = option(False, "compile the model")
    deterministic: bool = option(False, "bit-for-bit reproducible on the same GPU (slower; on a CPU it always is)")
    num_workers: int = option(0, "data-loader processes", least=0)


def main(options: Options) -> None:
    """Run one step of a chain."""
    options = dataclasses.replace(options, base_model=named_on(options.hub, options.base_model))
    stage = checks.check_together(options)
    asked = training_questions.read(options)
    from utils import lineage  # here, because torch takes seconds to import
    from utils.files import locked
    from utils.models.placement import place
    from utils.training import start
    from utils.training.data import prepare_data, write_template

    began = time.time()
    dtype, kernel = checks.named_dtype(options), options.attn_implementation
    placement = place(options.load_8bit, options.load_4bit, dtype=dtype, device_map=options.device_map, kernel=kernel)
    checks.check_compiles(options, placement.quantize)
    setup.join_ranks(placement)
    if options.dry_run:
        return setup.show(options, placement, stage)
    with locked(options.output_dir):
        origin = start.decide(options.output_dir, options.resume_from_checkpoint, options.overwrite_output_dir)
        placement = setup.choose_dtype_and_kernel(placement, dtype, options.base_model, origin)
        base, parent = start.base_and_parent(origin, options.base_model)
        start.check_parent(origin, checks.lora_options(options), options.base_model)
        checks.check_layers(options, origin)
        tokenizer, train_data, val_data, data = prepare_data(options, origin, parent, stage)
        rules = what_rules(options) | {"dtype": placement.dtype_name, "attn_implementation": placement.kernel}
        rules |= reward_files(options.rewards) | asked.hashes()
        files = data["files"] | data.get("replay", {}).get("files", {})
        run_facts = {"options": rules, "base": lineage.identity(base), "parent": parent, "data": files}
        start.check_unchanged(origin, run_facts)
        start.tell_other_dtype(parent, placement.dtype_name)
        if options.overwrite_output_dir and is_main_process():
            start.clear(options.output_dir)
        trackers.start(options)
        from utils.training.run import finish, train  # here, because its imports take seconds more

        model = setup.prepare_model(options, placement, origin, tokenizer, stage)
        sampler, evaluator = samplers(options, stage, asked, tokenizer, model, placement.dtype_name)
        best = training_questions.best_metric(options.metric_for_best_model, asked, val_data is not None)
        trainer = setup.prepare_trainer(
            options, placement, model, train_data, val_data, run_facts, stage, best, sampler, evaluator
        )
        train(trainer, origin.checkpoint)
        results = finish(trainer, tokenizer, options.load_best_model_at_end and bool(best))
        facts = {"base": base, "parent": parent, "data": data, "dtype": placement.dtype_name, "results": results}
        if is_main_process():
            write_template(options, data, tokenizer)
            lineage.write(options.output_dir, lineage.describe("train", options, began, **facts))
    setup.tell_end(options, results, began)


def samplers(options: Options, stage: str, asked: Any, tokenizer: Any, model: Any, dtype_name: str) -> tuple[Any, Any]:
    """What answers while training, for rewards and for --eval_answers and --eval_choices; None where nothing asks for it."""
    sampler = evaluator = None
    if stage == REWARD:
        from utils.inference.rollouts import make_sampler

        sampler = make_sampler(options, tokenizer)
    if asked:
        from utils.evaluation.during_training import make_evaluator

        evaluator = make_evaluator(options, asked, tokenizer, model, dtype_name)
    return sampler, evaluator


def what_rules(options: Options) -> dict[str, Any]:
    """The options that a run's result depends on; base, parent and data count by content, not by path."""
    free = {
        "base_model", "hub", "data_path", "output_dir", "tokenizer", "resume_from_checkpoint", "overwrite_output_dir",
        "save_total_limit", "report_to", "wandb_project", "wandb_run_name", "wandb_watch", "wandb_log_model", "num_workers",
        "eval_answers", "eval_choices",  # counted by the files' contents
        "device_map", "dtype", "bf16", "fp16",  # the resulting dtype is added
    }  # fmt: skip
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in free}


if __name__ == "__main__":
    run(main, Options)
