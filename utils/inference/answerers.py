"""The models that answer: adapters, or the base alone; on which base and with which template, from their own records."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import lineage
from utils.adapters import fit
from utils.console import UserError, say
from utils.datasets.sources import is_hub_name
from utils.datasets.templates import CHAT, PROMPTS, Prompter
from utils.files import read_json
from utils.models import quantized
from utils.models.tokenizer_files import CONFIG, TEMPLATE, has_tokenizer
from utils.models.weights import base_folder, refuse_adapter, weight_files

BASE = "base"  # the name of the model without an adapter


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model that answers: an adapter, or the base alone (`folder` None); with the template it was trained on."""

    name: str
    folder: Path | None
    template: str
    lineage: dict[str, Any] | None


def resolve(base_model: str, lora_weights: Sequence[str], prompt_template: str) -> tuple[str, list[ChatModel]]:
    """The base model and the models that answer on it, from the options and from the adapters' own records.

    Without adapters the base answers. If `base_model` or `prompt_template` is "", the adapters' lineage decides.
    Raises UserError if an adapter is missing or broken, if neither options nor adapters name a base, if the adapters
    contradict the options or each other, or if the base cannot be loaded.
    """
    from utils.models.architecture import read_architecture

    names = labels(lora_weights)
    lora_weights = [str(base_folder(name)) if is_hub_name(name) else name for name in lora_weights]
    found = {folder: (fit.Adapter(folder), lineage.read(folder)) for folder in lora_weights}
    if not base_model:
        recorded = [(known or {}).get("base") for _, known in found.values()]
        base_model = common_base({folder: named_base(one.settings, known) for folder, (one, known) in found.items()}, recorded)
        say(f"base model: {base_model}, which the adapter was trained on")
    base = base_folder(base_model)
    refuse_adapter(base)
    config = read_architecture(base)  # before the tokenizer, whose library also reads config.json
    weight_files(base)
    quantized.check(base, config)
    if any(known and known.get("base") for _, known in found.values()):
        fingerprint = lineage.fingerprint(base_model)
        for folder, (_, known) in found.items():
            lineage.check_same_base(known, fingerprint, folder, base_model)
    for adapter, _ in found.values():
        fit.check(adapter, base, grows=False)
    if not found:
        return base_model, [ChatModel(BASE, None, prompt_template or own_template(base), None)]
    return base_model, [
        ChatModel(name, Path(folder), choose_template(prompt_template, known, folder), known)
        for name, (folder, (_, known)) in zip(names, found.items(), strict=True)
    ]


def own_template(base: Path) -> str:
    """The template for a base without adapters: its own chat template if it has one, which is printed, else alpaca."""
    config = read_json(base / CONFIG) if (base / CONFIG).is_file() else {}
    if (base / TEMPLATE).is_file() or (isinstance(config, dict) and config.get("chat_template")):
        say(f"{base}: has a chat template, which is used (--prompt_template names another)")
        return CHAT
    return "alpaca"


def with_base(answerers: list[ChatModel]) -> list[ChatModel]:
    """The base, with the template of the first adapter, and the adapters."""
    return answerers if answerers[0].folder is None else [ChatModel(BASE, None, answerers[0].template, None), *answerers]


def named_base(written: dict[str, Any], known: dict[str, Any] | None) -> str:
    """The base that an adapter's lineage names, else its `adapter_config.json`; "" if neither does."""
    recorded = (known or {}).get("base") or {}
    return recorded.get("name") or written.get("base_model_name_or_path") or ""


def common_base(bases: dict[str, str], recorded: Sequence[dict[str, Any] | None] = ()) -> str:
    """The one base that all adapters name; among copies, listed by the fingerprints `recorded`, the first that exists."""
    if not bases:
        raise UserError("--base_model: missing; give the folder of a model, or --lora_weights with a lineage.json")
    for folder, base in bases.items():
        if not base:
            raise UserError(f"{folder}: does not say which base it was trained on; give it as --base_model")
    if len(set(bases.values())) > 1:
        prints = [base["fingerprint"] for base in recorded if base]
        if len(prints) == len(bases) and not any(lineage.differences(prints[0], other) for other in prints[1:]):
            return next((base for base in bases.values() if Path(base).is_dir()), next(iter(bases.values())))
        listed = ", ".join(f"{folder}: {base}" for folder, base in bases.items())
        raise UserError(f"--lora_weights: trained on several bases ({listed}); give --base_model, or adapters of one base")
    return next(iter(bases.values()))


def choose_template(given: str, known: dict[str, Any] | None, folder: str) -> str:
    """The template for an adapter.

    Raises UserError if the one given is not the one it was trained with, or that one has changed since.
    """
    trained = known["options"].get("prompt_template_name") if known else None
    if not known or not trained:
        if not given:
            say(f"{folder}: records no template; alpaca is used, as in alpaca-lora")
        return given or "alpaca"
    recorded = lineage.template_of(known)
    if CHAT in (given or trained, trained):
        changed = given not in ("", trained)
        if not changed and recorded and (Path(folder) / TEMPLATE).is_file():
            changed = (Path(folder) / TEMPLATE).read_text("utf-8") != recorded["texts"].get("chat_template")
    else:
        texts = Prompter(given or trained).texts
        wanted = recorded["texts"] if recorded else Prompter(trained).texts
        changed = any(texts.get(key) != wanted.get(key) for key in (*PROMPTS, "response_split"))
    if changed:
        if given:
            fix = f"leave --prompt_template out, or give {trained}"
            raise UserError(f"--prompt_template {given}: {folder} was trained with {trained}; {fix}")
        raise UserError(f"{folder}: its template {trained} has changed since training; restore the old one")
    return given or trained


def tokenizer_home(answerer: ChatModel, base_model: str) -> str | Path:
    """The folder of an answerer's tokenizer: the adapter's if it has one, else the base's."""
    return answerer.folder if answerer.folder and has_tokenizer(answerer.folder) else base_model


def labels(folders: Sequence[str]) -> list[str]:
    """A short, distinct name for each adapter: its folder's name, with as many parent folders as necessary."""
    if len(set(folders)) < len(folders):
        raise UserError("--lora_weights: names the same folder twice; name each adapter once")
    parts = [Path(folder).absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names) and BASE not in names:
            return names
    return list(folders)
