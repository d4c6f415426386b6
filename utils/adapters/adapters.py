"""Adapters (LoRA weights): find, check, load, save."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from utils.adapters import biases, consistency
from utils.adapters.settings import FILE, read_config
from utils.console import UserError, reason, say
from utils.files import replacing, write_json
from utils.models.spread import shown_where_computed
from utils.models.weights import Weights, check_same, dtype_name

if TYPE_CHECKING:  # peft takes seconds to import, and reading an adapter's files does not need it
    from peft import LoraConfig, PeftModel

warnings.filterwarnings("ignore", module="peft")  # warnings about what merging prints, or what is checked here
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NONE = torch.empty(0)
WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")  # what peft puts into the names of a base's own tensors
FULL_CHECKPOINT = "pytorch_model.bin"  # what alpaca-lora's runs of 2023 left in their checkpoints


def find_weights(folder: str | Path) -> Path:
    """The file with an adapter's weights. Raises UserError if the folder has none, or an empty one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of an adapter")
    for name in (*WEIGHTS, FULL_CHECKPOINT):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: holds no {' or '.join(WEIGHTS)}; name the folder of an adapter")


def open_tensors(folder: str | Path) -> tuple[Weights, dict[str, str]]:
    """An adapter's tensors, not read yet, and their names: as peft saves them, without the adapter's name -> as in the file.

    Raises UserError if the file is broken, holds no LoRA weights, or is the untouched shell of a failed save, and if the folder
    has a file of either kind, which differ.
    """
    file = find_weights(folder)
    weights = Weights(file.parent, [file])
    older = file.with_name(WEIGHTS[1])
    if file.name == WEIGHTS[0] and older.is_file():
        check_same(weights, Weights(file.parent, [older]))
    names: dict[str, str] = {}
    for name in weights.names:
        is_base = file.name == FULL_CHECKPOINT and "lora_" not in name and "modules_to_save" not in name
        if not is_base and ".original_module." not in name:
            plain = re.sub(r"\.(modules_to_save\.)?default(?=\.|$)", "", name).replace("modules_to_save.", "")
            if plain in names:
                raise UserError(f"{file}: {names[plain]} and {name} are the same tensor; delete one of them")
            if not weights.dtype(name).is_floating_point:
                kind = dtype_name(weights.dtype(name))
                raise UserError(f"{file}: {name} is {kind}, but a LoRA has floating-point numbers; download it again")
            names[plain] = name
    if not any("lora_" in name for name in names):
        raise UserError(f"{file}: holds no LoRA weights ({len(weights.names)} tensors); saving failed, or this is another file")
    return weights, names


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by the names under which peft saves them, without the adapter's name; raises as above."""
    weights, names = open_tensors(folder)
    return {plain: weights.tensor(name) for plain, name in names.items()}


def config_on(model: nn.Module, folder: str | Path) -> "LoraConfig":
    """The settings for peft of the adapter of `folder` on `model`, which may be without values.

    Whole layers that are not the base's are in `modules_to_save` also where they were saved without being named there, as
    peft saves grown embeddings. Raises UserError where they are under a LoRA: the adapter is for another base.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    own = {WRAPPED.sub("", name): one.detach() for name, one in model.named_parameters(remove_duplicate=False)}
    saved = set(config.modules_to_save or [])
    for name, tensor in consistency.unnamed(config.modules_to_save, tensors).items():
        values = own.get(WRAPPED.sub("", name), NONE)
        if not values.is_meta and torch.equal(values.cpu(), tensor.to(values.dtype)):
            continue
        if not WRAPPED.search(name):
            saved.add(name.removesuffix(".weight"))
        elif not values.is_meta:
            raise UserError(f"{folder}: is for a base with another {name.replace('.base_layer', '')}; merge it with that one")
    config.modules_to_save = sorted(saved) or None
    return biases.beside_base(config, tensors)


def add(model: nn.Module, config: "LoraConfig") -> "PeftModel":
    """A fresh adapter on `model`, with weights in float32; checks that only these train.

    Raises UserError if a target or a module to save is not in the model, or peft refuses it.
    """
    from peft import get_peft_model

    from utils.models.layers import linear_layers

    targets, layers = config.target_modules, ", ".join(linear_layers(model))
    # whose adapter starts from the base's values
    no_values = config.init_lora_weights == "mica" and model.get_input_embeddings().weight.is_meta
    try:
        with shown_where_computed(model):
            wrapped = get_peft_model(model, config, low_cpu_mem_usage=no_values)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"the adapter's settings do not fit this base model ({reason(error)}), whose linear layers are {layers}; "
            "use the base it was trained on, or other --lora_target_modules"
        ) from None
    if isinstance(targets, str) and not config.target_parameters:
        config.target_modules = targets  # peft replaces "all-linear" by hundreds of names
    if config.target_parameters:
        experts = ", ".join(sorted(config.target_parameters))
        say(f"the experts' weights also get a LoRA ({experts})")
    train_in_float32(wrapped)
    check_trainable(wrapped)
    return wrapped


def train_in_float32(model: "PeftModel") -> None:
    """Put the trained weights into float32; trained embeddings still output the base's dtype, since otherwise all layers
    would compute in float32, or refuse to."""
    embeddings = model.get_base_model().get_input_embeddings()
    dtype = next(embeddings.parameters()).dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if dtype != torch.float32 and any(parameter.requires_grad for parameter in embeddings.parameters()):
        embeddings.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))


def load(model: nn.Module, folder: str | Path, config: "LoraConfig") -> "PeftModel":
    """The adapter in `folder` on `model`, with the settings `config`, to be trained further.

    Raises UserError, naming the first differences, if its tensors are not those that `config` requires on this model.
    """
    wrapped = add(model, config)
    fill(wrapped, read_tensors(folder), Path(folder))
    return wrapped


def fill(model: "PeftModel", tensors: dict[str, torch.Tensor], source: Path, adapter: str = "default") -> None:
    """Put `tensors` into the adapter of `model` called `adapter`. Raises UserError if names or shapes differ."""
    from peft import set_peft_model_state_dict

    tensors = biases.as_its_own(model, tensors, adapter, source)
    # not the base's own, saved along; of two LoRAs on the parameters of one layer, the first is in the second's base layer
    tensors = {name: tensor for name, tensor in tensors.items() if ".base_layer." not in name or ".lora_" in name}
    wanted = {name: tuple(tensor.shape) for name, tensor in state(model, adapter=adapter).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differences = [
        f"{name} is {found.get(name, 'missing')}, the model wants {wanted.get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        raise UserError(
            f"{source}: {len(differences)} of the adapter's tensors do not fit this base model and these options "
            f"({'; '.join(differences[:3])}); use the base it was trained on"
        )
    set_peft_model_state_dict(model, tensors | dict.fromkeys(rows_of_others(model, adapter), NONE), adapter_name=adapter)


def rows_of_others(model: "PeftModel", adapter: str) -> list[str]:
    """Names of tensors of single embedding rows that only other adapters have; peft (0.21) demands them of every adapter."""
    from peft.utils.other import TrainableTokensWrapper

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)]
    others = [name for name, module in found if adapter not in module.token_adapter.trainable_tokens_delta]
    return [f"{name}.token_adapter.trainable_tokens_delta" for name in others]


def check_trainable(model: "PeftModel") -> None:
    """Raises RuntimeError if other weights than the adapter's own would be trained: a bug in this program."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    own: list[nn.Parameter] = []
    for module in model.modules():
        parts = [getattr(module, name) for name in module.adapter_layer_names] if isinstance(module, BaseTunerLayer) else []
        parts += [module.modules_to_save] if isinstance(module, ModulesToSaveWrapper) else []
        for part in [part["default"] for part in parts if "default" in part]:
            own += part.parameters() if isinstance(part, nn.Module) else [part]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    frozen = {id(parameter) for parameter in own} - trainable
    if model.peft_config["default"].init_lora_weights == "mica":
        frozen = set()  # only one of the two matrices trains
    if not trainable or frozen or trainable - {id(parameter) for parameter in own}:
        raise RuntimeError(f"{len(trainable)} tensors would be trained, the adapter has {len(own)}")


def save(tensors: dict[str, torch.Tensor], config: "LoraConfig", folder: str | Path, base_model: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, then read them back.

    The base is recorded as `base_model`. Raises UserError if the file on disk is not what was to be saved.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(folder / WEIGHTS[0]) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    settings: dict[str, Any] = config.to_dict()
    settings |= {"inference_mode": True, "base_model_name_or_path": base_model}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    write_json(folder / FILE, settings)
    read = read_tensors(folder)
    if read.keys() != tensors.keys() or any(not torch.equal(read[name], tensor) for name, tensor in tensors.items()):
        raise UserError(f"{folder / WEIGHTS[0]}: the file read back differs from what was saved; check the disk")


def state(model: "PeftModel", state_dict: dict[str, Any] | None = None, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's tensors, by their names in the saved file, without the base's frozen embeddings.

    `state_dict` is that of the whole model, and given if the model is sharded.
    """
    from peft import get_peft_model_state_dict

    others = rows_of_others(model, adapter)
    state_dict = dict(state_dict or model.state_dict()) | {f"{name}.{adapter}": NONE for name in others}
    found = get_peft_model_state_dict(model, state_dict, adapter, save_embedding_layers=False)
    return {name: tensor for name, tensor in found.items() if name not in others}


def has_moved(tensors: dict[str, torch.Tensor]) -> bool:
    """True if any `lora_B` is not all zero, as each one is before the first step."""
    return any(tensor.any().item() for name, tensor in tensors.items() if "lora_B" in name)
