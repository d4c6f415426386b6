"""Losses for benchmarks/preferences.py: trl's on a batch from its own trainers, and ours on exactly the same ids."""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

Options = Any  # preferences.Options, whose module imports this one
LOSSES = ("dpo", "ipo", "kto", "simpo", "orpo", "grpo")
BETA = 0.3
IGNORED = -100
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {  # trl's trainer for each loss, and its settings
    "dpo": ("DPO", {"loss_type": "sigmoid"}),
    "ipo": ("DPO", {"loss_type": "ipo"}),
    "kto": ("KTO", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    "simpo": ("CPO", {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
    "orpo": ("ORPO", {}),
}


def lora_model(options: Options, trained: bool = False) -> Any:
    """The base model with a fresh adapter, or with one that changes its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(42)
    base = AutoModelForCausalLM.from_pretrained(options.base_model, dtype="float32")
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        init_lora_weights=not trained,
    )  # fmt: skip
    return get_peft_model(base, lora)


def tokenizer_of(options: Options) -> Any:
    """The tokenizer, with a padding token, which trl requires."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def trl_trainer(name: str, options: Options, model: Any, rows: list[dict], folder: str, **settings: Any) -> Any:
    """One of trl's trainers on these rows, in their order."""
    from datasets import Dataset

    module = {"ORPO": "trl.experimental.orpo", "CPO": "trl.experimental.cpo"}.get(name, "trl")
    library = importlib.import_module(module)
    common = {
        "output_dir": folder, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-4,
        "per_device_train_batch_size": options.micro_batch_size, "num_train_epochs": 1, "save_strategy": "no",
        "gradient_accumulation_steps": max(1, options.batch_size // options.micro_batch_size), "bf16": False,
        "gradient_checkpointing": False, "logging_steps": 1, "max_length": options.cutoff_len,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    more: dict[str, Any] = {}
    if name == "GRPO":
        del common["max_length"]
        more["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    config = getattr(library, f"{name}Config")(**(common | settings))
    tokenizer = tokenizer_of(options)
    trainer = getattr(library, f"{name}Trainer")
    return trainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more)


def gradients_of(model: Any, loss: Any) -> list[Any]:
    """The gradients of a loss, without storing them in the parameters."""
    import torch

    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, weights))


def our_log_probs(model: Any, ids: Any, labels: Any) -> tuple[Any, Any]:
    """Our log-probabilities of the labelled tokens, and the row of each token."""
    from torch.nn import functional

    from utils.training.preferences import sparse_log_probs

    base = model.get_base_model()
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    places = (following != IGNORED).nonzero().flatten()
    return sparse_log_probs(base.base_model, base.lm_head, ids, following[places], places), places // ids.shape[1]


def start_weights(model: Any) -> dict[str, Any]:
    """The trained parameters of our adapter, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def weights_of(model: Any, start: dict[str, Any]) -> Iterator[None]:
    """Give some parameters of the model other values within the block."""
    mine = {name: parameter for name, parameter in model.named_parameters() if name in start}
    now = {name: parameter.data for name, parameter in mine.items()}
    for name, parameter in mine.items():
        parameter.data = start[name]
    yield
    for name, parameter in mine.items():
        parameter.data = now[name]


def move(model: Any) -> dict[str, Any]:
    """Change the adapter's weights, as training does; returns the original ones, which are the reference."""
    import torch

    start = {name: parameter.detach().clone() for name, parameter in start_weights(model).items()}
    generator = torch.Generator().manual_seed(1)
    for parameter in start_weights(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.data.abs().mean()
    return start


def trl_loss(name: str, options: Options, model: Any, pairs: list[dict], folder: str) -> tuple[Any, dict, dict[str, Any]]:
    """trl's loss on its first batch after the adapter has changed, the original weights, and the inputs of our loss: ids
    and labels, for KTO also the mismatched ones, for GRPO also the advantages and the shifts in log-probability."""
    if name == "grpo":
        return trl_grpo(options, model, pairs, folder)
    kind, more = TRAINERS[name]
    rows = pairs
    if name == "kto":
        rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
                for p, side in zip(pairs, ("chosen", "rejected") * 2, strict=True)]  # fmt: skip
    trainer = trl_trainer(kind, options, model, rows, folder, beta=BETA, **more)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model.train()
    start = move(model)
    if kind in ("CPO", "ORPO"):
        theirs = trainer.get_batch_loss_metrics(model, batch)[0]
        if name == "orpo":  # without the language-modelling loss that it adds
            theirs = theirs - trainer.concatenated_forward(model, batch)[4]
        both = trainer.concatenated_inputs(batch, is_encoder_decoder=False, padding_value=0, device="cpu")
        return theirs, start, {"ids": both["concatenated_input_ids"], "labels": both["concatenated_labels"]}
    theirs = trainer._compute_loss(model, batch, False)
    inputs = {"ids": batch["input_ids"], "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)}
    if name == "kto":
        other = batch["KL_input_ids"]
        inputs |= {"other_ids": other, "other_labels": other.masked_fill(batch["KL_completion_mask"] == 0, IGNORED)}
        inputs["good"] = batch["label"].bool()
    return theirs, start, inputs


def our_loss(name: str, model: Any, start: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Our loss on the inputs from `trl_loss`; the reference is the original adapter."""
    import torch

    from utils.training.grpo import policy_losses
    from utils.training.preferences import Preference, judged_loss, pair_losses, sums_by_row

    ids, labels = inputs["ids"], inputs["labels"]
    if name == "grpo":
        tokens, row = our_log_probs(model, ids, labels)
        old, reference = tokens.detach() + inputs["moved"], tokens.detach() + inputs["gap"]
        losses, _ = policy_losses(tokens, old, reference, inputs["advantage"][row], 0.2, 0.1)
        return losses.mean()
    settings = Preference(name, BETA, 0.0, 0.5, 1.5, 0.5)

    def sums(ids: Any, labels: Any, reference: bool = False) -> tuple[Any, Any]:
        with torch.no_grad() if reference else contextlib.nullcontext(), weights_of(model, start if reference else {}):
            tokens, rows = our_log_probs(model, ids, labels)
        return sums_by_row(tokens, rows, len(ids)), sums_by_row(torch.ones_like(tokens), rows, len(ids))

    if name == "kto":
        other, mismatched = inputs["other_ids"], inputs["other_labels"]
        with torch.no_grad():
            kl = (sums(other, mismatched)[0] - sums(other, mismatched, reference=True)[0]).mean().clamp(min=0)
        found = functools.partial(judged_loss, lambda **_: our_log_probs(model, ids, labels)[0], settings, torch.zeros(5))
        places = (torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten() != IGNORED).nonzero().flatten()
        reference = sums(ids, labels, reference=True)[0]
        return found(ids, labels, places, reference, inputs["good"], kl) / len(ids)
    (policy, counts), (reference, _) = sums(ids, labels), sums(ids, labels, reference=True)
    policy, counts, reference = (part.view(2, -1).T for part in (policy, counts, reference))
    losses, _ = pair_losses(settings, policy, counts, reference)
    if name == "orpo":
        losses = losses + (policy / counts)[:, 0]
    return losses.mean()


def trl_grpo(options: Options, model: Any, pairs: list[dict], folder: str) -> tuple[Any, dict, dict[str, Any]]:
    """trl's loss on a fixed batch of sampled answers whose policy has changed since."""
    import torch

    rows = [{"prompt": pair["prompt"]} for pair in pairs]
    trainer = trl_trainer(
        "GRPO", options, model, rows, folder, beta=0.1, epsilon=0.2, num_generations=4, max_completion_length=16,
        loss_type="dapo", use_bias_correction_kl=False,
    )  # fmt: skip
    start = move(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 250, (4, 20), generator=generator)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    labels = torch.cat([torch.full((4, 8), IGNORED), ids[:, 8:].masked_fill(mask == 0, IGNORED)], 1)
    tokens, _ = our_log_probs(model, ids, labels)
    moved = torch.randn(len(tokens), generator=generator) * 0.3
    gap = torch.randn(len(tokens), generator=generator) * 0.3
    advantage = torch.tensor([1.2, -0.7, 0.3, -0.8])
    full_old, full_reference = torch.zeros(4, 12), torch.zeros(4, 12)
    full_old[mask.bool()], full_reference[mask.bool()] = tokens.detach() + moved, tokens.detach() + gap
    batch = {
        "prompt_ids": ids[:, :8], "prompt_mask": torch.ones(4, 8, dtype=torch.long), "completion_ids": ids[:, 8:],
        "completion_mask": mask, "advantages": advantage, "old_per_token_logps": full_old,
        "ref_per_token_logps": full_reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    model.train()
    theirs = trainer._compute_loss(model, batch)
    return theirs, start, {"ids": ids, "labels": labels, "moved": moved, "gap": gap, "advantage": advantage}
