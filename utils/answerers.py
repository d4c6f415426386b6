"""Who answers: adapters, or the base alone; on which base, and with which template, as their own records say."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import adapters, lineage
from utils.console import UserError, say
from utils.prompter import PROMPTS, Prompter
from utils.sources import is_hub_name
from utils.weights import base_folder, refuse_adapter, weight_files

BASE = "base"  # what the model without an adapter is called


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Who answers: an adapter, or the base alone (`folder` None); with the template it was trained on."""

    name: str
    folder: Path | None
    template: str
    lineage: dict[str, Any] | None


def resolve(base_model: str, lora_weights: Sequence[str], prompt_template: str) -> tuple[str, list[Answerer]]:
    """The base model and who answers on it, from the options and from the adapters' own records.

    Without adapters the base answers. Where `base_model` or `prompt_template` is "", the adapters' lineage says it.
    Raises UserError where an adapter is missing or broken, where neither options nor adapters name a base, where
    what they say differs from what was given, or from each other, and where the base is none that can be loaded.
    """
    from utils.modeling import read_architecture

    names = labels(lora_weights)
    lora_weights = [str(base_folder(name)) if is_hub_name(name) else name for name in lora_weights]
    for folder in lora_weights:
        adapters.open_tensors(folder)  # so that a broken one is refused before the base is loaded
    found = {folder: (adapters.read_settings(folder), lineage.read(folder)) for folder in lora_weights}
    if not base_model:
        base_model = common_base({folder: named_base(*known) for folder, known in found.items()})
        say(f"base model: {base_model}, which the adapter was trained on")
    base = base_folder(base_model)
    refuse_adapter(base)
    read_architecture(base)  # before the tokenizer, whose library reads the same config.json
    weight_files(base)
    if any(known and known.get("base") for _, known in found.values()):
        fingerprint = lineage.fingerprint(base_model)
        for folder, (_, known) in found.items():
            lineage.check_base(known, fingerprint, folder, base_model)
    if not found:
        return base_model, [Answerer(BASE, None, prompt_template or "alpaca", None)]
    return base_model, [
        Answerer(name, Path(folder), choose_template(prompt_template, known, folder), known)
        for name, (folder, (_, known)) in zip(names, found.items(), strict=True)
    ]


def with_base(answerers: list[Answerer]) -> list[Answerer]:
    """The base, asked with the template of the first adapter, and the adapters."""
    return answerers if answerers[0].folder is None else [Answerer(BASE, None, answerers[0].template, None), *answerers]


def named_base(settings: dict[str, Any], known: dict[str, Any] | None) -> str:
    """The base that an adapter's lineage names, else its `adapter_config.json`; "" where neither does."""
    recorded = (known or {}).get("base") or {}
    return recorded.get("name") or settings.get("base_model_name_or_path") or ""


def common_base(bases: dict[str, str]) -> str:
    """The one base that all adapters name."""
    if not bases:
        raise UserError("--base_model: missing; give the folder of a model, or --lora_weights with a lineage.json")
    for folder, base in bases.items():
        if not base:
            raise UserError(f"{folder}: does not say which base it was trained on; give it as --base_model")
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{folder}: {base}" for folder, base in bases.items())
        raise UserError(f"--lora_weights: trained on several bases ({told}); give --base_model, or adapters of one base")
    return next(iter(bases.values()))


def choose_template(given: str, known: dict[str, Any] | None, folder: str) -> str:
    """The template to ask an adapter with.

    Raises UserError where the one given is not the one it was trained on, or that one has been changed since.
    """
    trained = known["options"].get("prompt_template_name") if known else None
    if not known or not trained:
        if not given:
            say(f"{folder}: records no template; alpaca is used, as by alpaca-lora")
        return given or "alpaca"
    texts = Prompter(given or trained).texts
    recorded = known["template"]["texts"] if known.get("template") else Prompter(trained).texts
    if any(texts.get(key) != recorded.get(key) for key in (*PROMPTS, "response_split")):
        if given:
            way_out = f"leave --prompt_template out, or give {trained}"
            raise UserError(f"--prompt_template {given}: {folder} was trained with {trained}; {way_out}")
        raise UserError(f"{folder}: its template {trained} was changed after the training; put the old one back")
    return given or trained


def labels(folders: Sequence[str]) -> list[str]:
    """A short, distinct name for each adapter: its folder's name, with as many parents as it takes."""
    if len(set(folders)) < len(folders):
        raise UserError("--lora_weights: the same folder twice; name each adapter once")
    parts = [Path(folder).absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names) and BASE not in names:
            return names
    return list(folders)
