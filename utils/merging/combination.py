"""Combining adapters of one base model: a weighted sum, or by TIES, DARE or magnitude pruning.

The rules are peft's (`add_weighted_adapter`), computed from the adapters' files without loading the base model.
Task arithmetic: Ilharco et al. 2023, https://arxiv.org/abs/2212.04089. TIES: Yadav et al. 2023,
https://arxiv.org/abs/2306.01708. DARE: Yu et al. 2024, https://arxiv.org/abs/2311.03099.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils import lineage
from utils.adapters.adapters import find_weights, save
from utils.adapters.consistency import PREFIX
from utils.console import UserError, progress, say
from utils.files import sha256
from utils.merging.adapter_deltas import Adapter
from utils.merging.plan import dequantized
from utils.merging.rules import HALVES, Rule
from utils.models import meta_layout
from utils.models.names import Finder, ask_library
from utils.models.tokenizer_files import has_tokenizer
from utils.models.weights import Weights, base_folder

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import LoraConfig

NOT_ADDED = {  # settings that rule out a weighted sum
    "use_dora": "its magnitudes do not add up",
    "trainable_token_indices": "it replaces rows of the embeddings",
    "lora_bias": "it has biases",
    "target_parameters": "it changes parameters outside of linear layers",
}

Factors = tuple[torch.Tensor, torch.Tensor, float]  # lora_A (rank, inputs), lora_B (outputs, rank), and alpha / rank


@dataclasses.dataclass(frozen=True)
class Combination:
    """Adapters to combine: their base model (`base_model` as the user named it), and each adapter's weight.

    `modules` are the layers that any of them changes, in the model's order, and say whether the layer is an embedding.
    """

    base_model: str
    fingerprint: dict[str, Any]
    adapters: list[Adapter]
    weights: list[float]
    rule: Rule
    modules: dict[str, bool]
    short_names: list[str]

    def __str__(self) -> str:
        names = " + ".join(f"{weight:g} x {folder}" for weight, folder in zip(self.weights, self.folders, strict=True))
        return f"{names} ({self.rule.method})"

    @property
    def folders(self) -> list[Path]:
        """The adapters' folders."""
        return [adapter.folder for adapter in self.adapters]

    @property
    def size(self) -> int:
        """The most bytes that the combined adapter's tensors take."""
        return 4 * sum(math.prod(a.weights.shape(name)) for a in self.adapters for name in a.names.values())

    def write(self, folder: Path, options: Any, began: float) -> int:
        """Write the combined adapter with tokenizer, template and lineage; returns its rank."""
        from utils.datasets.jinja_export import write_chat_template
        from utils.models.tokenizer import read_tokenizer, save_tokenizer

        tensors, rank = combine(self)
        save(tensors, config_of(self, rank), folder, self.base_model)
        template = tell_templates(self.adapters)
        homes = [*self.folders, base_folder(self.base_model)]
        home = next((home for home in homes if has_tokenizer(home)), None)
        if home:
            tokenizer = read_tokenizer(home)
            save_tokenizer(tokenizer, home, folder)
            if template:
                write_chat_template(template["name"], template["texts"], tokenizer, folder)
        results = {"rank": rank, "tensors": len(tensors)}
        lineage.write(folder, lineage.describe("combine", options, began, **self.facts(), template=template, results=results))
        return rank

    @contextlib.contextmanager
    def written_aside(self, options: Any, began: float) -> Iterator[str]:
        """While the block runs, the combined adapter in a temporary folder, to be merged into the base."""
        with tempfile.TemporaryDirectory(prefix="dreamergpt-") as folder:
            self.write(Path(folder), options, began)
            yield folder

    def facts(self) -> dict[str, Any]:
        """What a lineage records about the combined adapters, and the rule."""
        return {
            "base": {"name": self.base_model, "fingerprint": self.fingerprint},
            "parents": [
                {
                    "name": str(adapter.folder),
                    "weight": weight,
                    "sha256": sha256(find_weights(adapter.folder)),
                    "lineage": lineage.read(adapter.folder),
                }
                for adapter, weight in zip(self.adapters, self.weights, strict=True)
            ],
            "combination": dataclasses.asdict(self.rule),
        }


def plan_combination(base_model: str, weights: dict[str, float | None], rule: Rule) -> Combination:
    """Check that adapters fit each other and the base; without a weight one counts 1. Nothing is computed or written.

    Raises UserError if one belongs to another base model, holds what has no weighted sum, or has an unsuitable rank.
    """
    base = base_folder(base_model)
    config, stored = meta_layout.open_model(base)
    config, stored = dequantized(base, config, stored)
    find, kinds = Finder(stored.names, config), {name: stored.kind(name) for name in stored.names}
    fingerprint = lineage.fingerprint(base_model)
    adapters = [Adapter(base_folder(name)) for name in weights]
    for adapter in adapters:
        lineage.check_same_base(lineage.read(adapter.folder), fingerprint, str(adapter.folder), base_model)
        drop_copies(adapter, find, stored)
        refuse_what_has_no_sum(adapter)
        adapter.changes(find.with_tied_head(kinds), find)
    tell_other_bases(adapters)
    names = {module: find(f"{module}.weight") for adapter in adapters for module in adapter.modules}
    if len(set(names.values())) != len(names):
        raise UserError("--lora_model: the adapters name the same layers differently; save them again with one version of peft")
    check_ranks(adapters, rule, {module: kinds[names[module]][0] for module in names if names[module] in kinds})
    if rule.method.endswith("svd") and not rule.rank:
        highest = max(rank_of(adapter, module) for adapter in adapters for module in adapter.modules)
        rule = dataclasses.replace(rule, rank=highest)
    if "dare" in rule.method:  # drops values at random, so the order of layers matters
        order = {name: number for number, name in enumerate(ask_library(config, stored.names).in_order)}
        names = dict(sorted(names.items(), key=lambda item: order.get(f"{item[0]}.weight", len(order))))
    parts = [part for adapter in adapters for part in adapter.modules.items()]
    modules = {name: any("lora_embedding" in p["A"] for module, p in parts if module == name) for name in names}
    return Combination(
        base_model, fingerprint, adapters, [1.0 if w is None else w for w in weights.values()], rule, modules,
        short_names(list(modules), stored.names),
    )  # fmt: skip


def drop_copies(adapter: Adapter, find: Finder, stored: Weights) -> None:
    """Leave out the base's own weights that peft saved, as it does beside an embedding's LoRA, if they are unchanged."""
    for name, in_file in list(adapter.replaced.items()):
        target = find(name)
        if target in stored.names:
            own, theirs = adapter.weights.tensor(in_file), stored.tensor(target)
            if own.shape == theirs.shape and torch.equal(own.to(theirs.dtype), theirs):
                del adapter.replaced[name]
                adapter.names = {plain: file for plain, file in adapter.names.items() if file != in_file}


def refuse_what_has_no_sum(adapter: Adapter) -> None:
    """Raises UserError if an adapter holds more than products, which can be weighted and added."""
    why = next((f"{reason} ({setting})" for setting, reason in NOT_ADDED.items() if adapter.settings.get(setting)), "")
    if adapter.settings.get("bias", "none") != "none":
        why = f"it holds the base's biases (bias: {adapter.settings['bias']})"
    if adapter.replaced:
        layers = sorted({name.rpartition(".")[0] for name in adapter.replaced})
        why = f"it holds whole layers ({', '.join(layers[:3])}{', …' if len(layers) > 3 else ''})"
    if any("magnitude_vector" in parts for parts in adapter.modules.values()):
        why = why or NOT_ADDED["use_dora"]
    if why:
        raise UserError(f"{adapter.folder}: cannot be combined with weights, since {why}; merge it alone into the base model")


def tell_other_bases(adapters: list[Adapter]) -> None:
    """Print if adapters name different base models, and no lineages could be compared."""
    named = {str(adapter.settings.get("base_model_name_or_path") or ""): adapter for adapter in adapters}
    unknown = [adapter for adapter in adapters if lineage.read(adapter.folder) is None]
    if unknown and len({Path(name).name for name in named if name}) > 1:
        say(f"the adapters name different base models ({', '.join(named)}), which are assumed to be the same model")


def check_ranks(adapters: list[Adapter], rule: Rule, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError if the rule needs equal ranks and they differ, or the requested rank is too high."""
    for module in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        ranks = {str(a.folder): rank_of(a, module) for a in adapters if module in a.modules}
        if rule.method in HALVES and len(set(ranks.values())) > 1:
            ranks_shown = ", ".join(f"{folder} has rank {rank}" for folder, rank in ranks.items())
            raise UserError(
                f"--combine {rule.method}: adds matrices of one rank, and in {module} {ranks_shown}; use cat or svd"
            )
        most = min([sum(ranks.values()), *shapes.get(module, ())] if rule.method == "svd" else shapes.get(module, (rule.rank,)))
        if rule.rank > most:
            raise UserError(f"--rank {rule.rank}: {module} has rank {most} at most when combined; give {most} or less")


def rank_of(adapter: Adapter, module: str) -> int:
    """The rank of an adapter in one of its layers."""
    return adapter.weights.shape(adapter.modules[module]["A"])[0]


def short_names(modules: list[str], stored: list[str]) -> list[str]:
    """Names for `target_modules` that mean exactly these layers: their last parts if that is unambiguous, else whole names."""
    ends = sorted({name.rpartition(".")[2] for name in modules})
    meant = sum(name.removesuffix(".weight").rpartition(".")[2] in ends for name in stored if name.endswith(".weight"))
    return ends if meant == len(modules) else sorted(modules)


def combine(plan: Combination) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of the combined adapter, by peft's names, and its rank, with a scale of 1.

    Layers of a lower rank are padded with zeros, as in peft. Raises UserError if a value is not finite.
    """
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    kept = [0.0, 0.0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.rule.seed)
        for module in progress(plan.modules, desc="combining", unit="layer"):
            parts, weights = [], []
            for adapter, weight in zip(plan.adapters, plan.weights, strict=True):
                if module in adapter.modules:
                    parts.append(factors_of(adapter, module))
                    weights.append(weight)
            turned = plan.modules[module] or bool(plan.adapters[0].settings.get("fan_in_fan_out"))
            factors[module] = combine_layer(parts, weights, plan.rule, turned, kept)
            if not all(half.isfinite().all() for half in factors[module]):
                raise UserError(f"{module}: the combination is not finite; one of the adapters is broken, download it again")
    if kept[1]:
        say(f"--combine {plan.rule.method}: the result keeps {kept[0] / kept[1]:.2%} of the combined change (squared norm)")
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors: dict[str, torch.Tensor] = {}
    for module, (a, b) in factors.items():
        names = ("lora_embedding_A", "lora_embedding_B") if plan.modules[module] else ("lora_A.weight", "lora_B.weight")
        missing = rank - a.shape[0]
        filled = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        tensors |= {f"{PREFIX}{module}.{name}": half for name, half in zip(names, filled, strict=True)}
    return tensors, rank


def factors_of(adapter: Adapter, module: str) -> Factors:
    """What an adapter adds to a layer, in float32."""
    names = adapter.modules[module]
    a, b = (adapter.weights.tensor(names[half]).to(torch.float32, copy=True) for half in "AB")
    return a, b, adapter.scaling(module, a.shape[0])


def combine_layer(
    parts: list[Factors], weights: list[float], rule: Rule, turned: bool, kept: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (rank, inputs) and lora_B (outputs, rank) of the combination, whose product is the combined change.

    `turned`: the layer stores its weight as (inputs, outputs), in which order random numbers are drawn. If an SVD cuts the
    rank, the squared norms of the kept part and of the whole are added to `kept`.
    """
    scales = [weight * scale for (_, _, scale), weight in zip(parts, weights, strict=True)]
    if rule.method in ("cat", "svd"):
        a = torch.cat([a * scale for (a, _, _), scale in zip(parts, scales, strict=True)])
        b = torch.cat([b for _, b, _ in parts], dim=1)
        return (a, b) if rule.method == "cat" else cut_product(a, b, rule.rank, kept)
    if rule.method in HALVES:
        roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
        signs = torch.tensor([math.copysign(1, scale) for scale in scales])
        return apply_rule([a for a, _, _ in parts], roots * signs, rule), apply_rule([b for _, b, _ in parts], roots, rule)
    deltas = [(b @ a) * scale for a, b, scale in parts]
    change = apply_rule([delta.T if turned else delta for delta in deltas], torch.tensor(weights), rule)
    u, s, v = torch.linalg.svd(change.T if turned else change, full_matrices=False)
    return cut(u, s, v, rule.rank, kept)


def apply_rule(tensors: list[torch.Tensor], weights: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Tensors of one shape combined into one, by peft's functions."""
    from peft.utils import merge_utils

    name = rule.method.removesuffix("_svd")
    if name == "linear":
        return merge_utils.task_arithmetic(tensors, weights)
    return getattr(merge_utils, name)(tensors, weights, rule.density)


def cut_product(a: torch.Tensor, b: torch.Tensor, rank: int, kept: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of b @ a by a product of `rank`, through two small QR decompositions. peft's SVD of the whole
    product gives the same, but on 4096 x 4096 values instead of the squared sum of ranks.
    """
    (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return cut(qb @ u, s, v @ qa.T, rank, kept)


def cut(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int, kept: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `rank` singular values as lora_A and lora_B."""
    kept[0] += s[:rank].square().sum().item()
    kept[1] += s.square().sum().item()
    return v[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()


def config_of(plan: Combination, rank: int) -> "LoraConfig":
    """The settings of the combined adapter: alpha equal to the rank, for a scale of 1, without rsLoRA."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=plan.short_names, task_type="CAUSAL_LM",
        fan_in_fan_out=bool(plan.adapters[0].settings.get("fan_in_fan_out")),
        lora_dropout=max(adapter.settings.get("lora_dropout", 0.0) for adapter in plan.adapters),
    )  # fmt: skip


def tell_templates(adapters: list[Adapter]) -> dict[str, Any] | None:
    """The template for the combined adapter: the first that is recorded; prints which adapters have another."""
    known = {str(a.folder): lineage.template_of(lineage.read(a.folder)) for a in adapters}
    found = {folder: template for folder, template in known.items() if template}
    first = next(iter(found), "")
    others = [folder for folder, template in found.items() if template["texts"] != found[first]["texts"]]
    if others:
        say(f"{', '.join(others)}: trained with another template than {first}, whose {found[first]['name']} is kept")
    return found[first] if first else None
