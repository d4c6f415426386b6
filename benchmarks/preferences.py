"""Learning from preferences and from raw text beside trl: the same losses and gradients, speed and memory.

    python benchmarks/preferences.py --base_model models/smollm2-135m

trl must be installed beside the rest (pip install trl, or PYTHONPATH naming a folder that it was installed into). First
trl's own trainers compute each loss and its gradients on one batch of theirs, and ours on the very same ids: DPO, IPO,
SimPO, KTO, the odds ratio of ORPO (trl adds the loss of the prompt, we that of the answer alone), and GRPO with clipping
and KL. Then DPO and pre-training on raw text (trl: packed) run in turn, without dropout, on the same records.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.common import Figures, child, interleave, report, text_maker
from utils.cli import option, run
from utils.console import UserError

RECIPES = ("trl dpo", "our dpo", "trl text", "our text")
LOSSES = ("dpo", "ipo", "kto", "simpo", "orpo", "grpo")
BETA = 0.3
IGNORED = -100
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {  # trl's, of each loss, and their settings
    "dpo": ("DPO", {"loss_type": "sigmoid"}),
    "ipo": ("DPO", {"loss_type": "ipo"}),
    "kto": ("KTO", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    "simpo": ("CPO", {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
    "orpo": ("ORPO", {}),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    base_model: str = option(help="the model to train")
    steps: int = option(2, "optimizer steps of each run", least=1)
    batch_size: int = option(16, "pairs, or documents, in a step", least=1)
    micro_batch_size: int = option(4, "sequences of full length at once", least=1)
    cutoff_len: int = option(256, "tokens of a sequence", least=2)
    repeats: int = option(3, "runs of each recipe", least=1)
    only: str = option("", "measure the speed of this alone", choices=("", "dpo", "text"))
    recipe: str = option("", "used by the benchmark itself: run this one", choices=("", "equal", *RECIPES))
    data: str = option("", "used by the benchmark itself: the records")


def main(options: Options) -> None:
    """Compare the losses, measure all recipes in turn, or be one of them."""
    if options.recipe:
        print(json.dumps(equal(options) if options.recipe == "equal" else measure(options)))
        return
    if importlib.util.find_spec("trl") is None:
        raise UserError("trl: is not installed; pip install trl, or have PYTHONPATH name a folder that holds it")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.json"
        data.write_text(json.dumps(records(options), ensure_ascii=False), "utf-8")
        names = ("base_model", "steps", "batch_size", "micro_batch_size", "cutoff_len")
        common = [*(f"--{name}={getattr(options, name)}" for name in names), "--data", str(data)]
        facts: dict[str, Any] = {}
        if not options.only:
            compared = child(__file__, *common, "--recipe", "equal")
            facts["differences"] = {name: value for name, value in compared.items() if " " in name}
        recipes: dict[str, Callable[[], Figures]] = {
            name: functools.partial(child, __file__, *common, "--recipe", name)
            for name in RECIPES
            if name.endswith(options.only)
        }
        medians = interleave(recipes, options.repeats)
    ratios: Figures = {}
    for what, peer in (("dpo", "trl"), ("text", "trl packed")):
        if f"our {what}" in medians:
            theirs, ours = medians[f"trl {what}"], medians[f"our {what}"]
            ratios |= {
                f"real tokens a second of our {what} / {peer}": ours["tokens_per_second"] / theirs["tokens_per_second"],
                f"processor time, {peer} / our {what}": theirs["train_cpu_seconds"] / ours["train_cpu_seconds"],
                f"memory of our {what} / {peer}": ours["peak_mb"] / theirs["peak_mb"],
            }
    report(medians, ratios, ("torch", "transformers", "peft", "trl"), **facts)


def records(options: Options) -> dict[str, list[dict[str, str]]]:
    """Pairs whose lengths are spread as real ones are, and documents likewise."""
    text, count = text_maker(), options.steps * options.batch_size
    pairs = [{"prompt": text(15), "chosen": text(40), "rejected": text(40)} for _ in range(count)]
    return {"pairs": pairs, "texts": [{"text": text(80)} for _ in range(count)]}


def lora_model(options: Options, trained: bool = False) -> Any:
    """The base with a fresh adapter, or with one that changes its answers."""
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
    """The tokenizer, with something to pad with, as trl asks for it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def trl_trainer(name: str, options: Options, model: Any, rows: list[dict], folder: str, **settings: Any) -> Any:
    """One of trl's trainers on these rows, all of its steps in the order of the rows."""
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
    """The gradients of a loss, and none left behind."""
    import torch

    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, weights))


def equal(options: Options) -> Figures:
    """The largest relative difference of our loss, and of its gradients, from trl's, for each loss."""
    found: Figures = {}
    small = dataclasses.replace(options, batch_size=4, micro_batch_size=4)
    pairs = json.loads(Path(options.data).read_text("utf-8"))["pairs"][:4]
    for name in LOSSES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            model = lora_model(options, trained=True)
            theirs, start, inputs = trl_loss(name, small, model, pairs, folder)
            ours = our_loss(name, model, start, inputs)
            one, other = gradients_of(model, theirs), gradients_of(model, ours)
        largest = max(gradient.abs().max().item() for gradient in one)
        found[f"{name} loss"] = abs(theirs.item() - ours.item()) / abs(theirs.item())
        found[f"{name} gradient"] = max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) / largest
    bad = {name: value for name, value in found.items() if not value < 1e-4}
    if bad:
        sys.exit(f"not equal to trl's within 1e-4: {bad}")
    return found


def our_log_probs(model: Any, ids: Any, labels: Any) -> tuple[Any, Any]:
    """Our log-probabilities of the labelled tokens, and the row of each."""
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
    """The model with other values of some parameters, while the block runs."""
    mine = {name: parameter for name, parameter in model.named_parameters() if name in start}
    now = {name: parameter.data for name, parameter in mine.items()}
    for name, parameter in mine.items():
        parameter.data = start[name]
    yield
    for name, parameter in mine.items():
        parameter.data = now[name]


def move(model: Any) -> dict[str, Any]:
    """Move the adapter from where it starts, as training does; returns where it started, which is the reference."""
    import torch

    start = {name: parameter.detach().clone() for name, parameter in start_weights(model).items()}
    generator = torch.Generator().manual_seed(1)
    for parameter in start_weights(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator) * parameter.data.abs().mean()
    return start


def trl_loss(name: str, options: Options, model: Any, pairs: list[dict], folder: str) -> tuple[Any, dict, dict[str, Any]]:
    """trl's loss of its first batch after the adapter has moved, where it started, and what ours is computed from:
    ids and labels, of KTO also the mismatched ones, of GRPO also the advantages and how far tokens have moved."""
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
        if name == "orpo":  # without the loss that it adds
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
    """Our loss of what `trl_loss` gives; the reference is the adapter as it started."""
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
        found = functools.partial(judged_loss, lambda *_: our_log_probs(model, ids, labels)[0], settings, torch.zeros(5))
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
    """trl's loss of a fixed batch of sampled answers whose policy has moved since."""
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


def measure(options: Options) -> Figures:
    """Train one recipe: seconds, by the clock and of the processors, from the first step's beginning, the reference's
    computation included, and real tokens a second."""
    both = json.loads(Path(options.data).read_text("utf-8"))
    who, what = options.recipe.split()
    rows = both["pairs" if what == "dpo" else "texts"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        model = lora_model(options)
        recipe = train_trl if who == "trl" else train_ours
        seconds, cpu_seconds, tokens = recipe(options, model, what, rows, folder)
    return {"train_seconds": seconds, "train_cpu_seconds": cpu_seconds, "tokens_per_second": tokens / seconds}


def real_tokens(options: Options, what: str, rows: list[dict[str, str]]) -> int:
    """Tokens of the sequences that are learned, ends included, before any padding."""
    tokenizer = tokenizer_of(options)
    texts = (
        [row["text"] for row in rows]
        if what == "text"
        else [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    )
    return sum(min(options.cutoff_len, len(ids) + 1) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def train_trl(options: Options, model: Any, what: str, rows: list[dict], folder: str) -> tuple[float, float, int]:
    """trl's DPOTrainer, or its SFTTrainer with packing."""
    if what == "dpo":
        trainer = trl_trainer("DPO", options, model, rows, folder, beta=BETA)
    else:
        trainer = trl_trainer("SFT", options, model, rows, folder, packing=True)
    return *seconds_of(trainer.train), real_tokens(options, what, rows)


def seconds_of(function: Callable[[], Any]) -> tuple[float, float]:
    """The time of one call by the clock, and of the processors."""
    began, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - cpu


def train_ours(options: Options, model: Any, what: str, rows: list[dict], folder: str) -> tuple[float, float, int]:
    """Our trainer on the same records."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from transformers import TrainingArguments

    from utils.datasets.dataset import EncodedDataset
    from utils.training.batching import BatchConfig
    from utils.training.preferences import Preference, PreferenceTrainer
    from utils.training.run import train
    from utils.training.trainer import RunConfig, StepTrainer

    args = TrainingArguments(
        output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-4, num_train_epochs=1,
        save_strategy="no", remove_unused_columns=False, logging_steps=1,
    )  # fmt: skip
    plan = BatchConfig(options.batch_size, options.micro_batch_size * options.cutoff_len)
    table = Dataset(pa.table(encoded(options, what, rows)))
    data = EncodedDataset(table, np.arange(len(table)), options.cutoff_len)
    job = RunConfig(plan, options.base_model, {}, 10**6, 1)

    def learn() -> None:
        if what == "dpo":
            trainer: StepTrainer = PreferenceTrainer(model, args, job, data, None, Preference("dpo", BETA, 0.0, 0.0))
        else:
            trainer = StepTrainer(model, args, job, data, None)
        trainer._save_checkpoint = lambda *_: None  # type: ignore[method-assign]  # trl's run saves nothing either
        train(trainer, None)

    return *seconds_of(learn), real_tokens(options, what, rows)


def encoded(options: Options, what: str, rows: list[dict[str, str]]) -> dict[str, list]:
    """The columns of our data set: the ids that trl makes of the same records."""
    tokenizer = tokenizer_of(options)

    def ids_of(text: str) -> list[int]:
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][: options.cutoff_len]

    if what == "text":
        ids = [ids_of(row["text"]) for row in rows]
        sizes = [len(one) for one in ids]
        return {"input_ids": ids, "labels": ids, "full_length": np_ints(sizes), "supervised": np_ints([n - 1 for n in sizes])}
    columns: dict[str, list] = {}
    for side, names in (("chosen", ("input_ids", "labels")), ("rejected", ("rejected_ids", "rejected_labels"))):
        ids = [ids_of(row["prompt"] + row[side]) for row in rows]
        known = [len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row in rows]
        columns[names[0]] = ids
        columns[names[1]] = [[IGNORED] * n + one[n:] for n, one in zip(known, ids, strict=True)]
    longest = [max(map(len, pair)) for pair in zip(columns["input_ids"], columns["rejected_ids"], strict=True)]
    return columns | {"full_length": np_ints(longest), "supervised": np_ints([1] * len(rows))}


def np_ints(numbers: list[int]) -> Any:
    """Numbers as a column of int32."""
    import pyarrow as pa

    return pa.array(numbers, pa.int32())


if __name__ == "__main__":
    run(main, Options)
