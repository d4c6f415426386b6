"""Loads a base model according to its placement, and fits its embeddings to a tokenizer."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, modeling_utils

from utils.console import UserError, is_out_of_memory, reason, say, say_once
from utils.models import quantized, sharding, spread
from utils.models.architecture import meta_model, read_architecture
from utils.models.layers import embedding_names
from utils.models.placement import DeviceConfig
from utils.models.sharding import wants_fsdp
from utils.models.tokenizer import end_tokens, load_tokenizer
from utils.models.tokenizer_files import too_many_tokens
from utils.models.vocabulary import check_extends, grow_embeddings
from utils.models.weights import base_folder, has_weights, tell_adapter, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # the first takes seconds to import

NO_ADAPTER = {"subfolder": "not-looked-for"}  # the library would load an adapter found here onto the base


def load_base(
    base_model: str, tokenizer: "PreTrainedTokenizerBase", placement: DeviceConfig, attn_implementation: str = ""
) -> "PreTrainedModel":
    """Load a base model; its special ids are taken from the tokenizer, since published configs often have wrong ones.

    Raises UserError if the folder, a shard or a tensor is missing, or the tokenizer has ids that the model has no
    row for.
    """
    folder = base_folder(base_model)
    config = read_architecture(folder)
    weight_files(folder)  # the library's own errors for missing or unreadable files mislead
    quantized.check(folder, config, str(placement.device))
    options: dict[str, Any] = {"dtype": placement.dtype, "device_map": {"": placement.device}}
    if wants_fsdp() and not placement.quantize:
        options["device_map"] = {"": "cpu"}  # from there its parts go to the GPUs
    if placement.spread:
        options |= {"device_map": "auto", "max_memory": spread.room()}
    tell_adapter(folder)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    method = quantized.method_of(config.to_dict())
    if method:
        say(f"{base_model}: its weights are already quantized ({method}), and remain so")
    elif placement.quantize:
        options["quantization_config"] = quantization(placement)
    copied = bool(placement.quantize or method) or config.dtype != placement.dtype
    with reading_weights() if copied else contextlib.nullcontext():
        if placement.quantize or sharding.loads():
            model = load_checked(base_model, folder, **options)
        else:
            model = sharding.without_weights(folder, placement.dtype)
    if placement.spread:
        spread.tell(model, base_model)
    if getattr(model, "is_loaded_in_4bit", False):
        prepare_4bit(model, placement)
    take_special_ids(model, tokenizer, base_model)
    return model


def take_special_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str) -> None:
    """Put the tokenizer's special ids into a model's configuration; of tokens that end answers, all that there are."""
    ids = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = end_tokens(base_model, tokenizer)
    ids |= {"eos_token_id": ends} if len(ends) > 1 else {}
    for config in filter(None, (model.config, model.generation_config)):
        for kind, token in ids.items():
            setattr(config, kind, token)


def load_checked(base_model: str, folder: Path, **options: Any) -> "PreTrainedModel":
    """A base model as the library loads it with these `options`. Raises UserError if it cannot, or tensors are missing."""
    options |= {"adapter_kwargs": NO_ADAPTER, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # so that they are reported below, by name
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
    except pickle.UnpicklingError:
        raise UserError(
            f"{base_model}: refused, because loading its weights would run code; get them as .safetensors"
        ) from None
    except Exception as error:  # the library checks little, and fails wherever a file is not what it expects
        if is_out_of_memory(error):
            raise
        if "dispatched on the CPU or the disk" in str(error):
            raise UserError(
                f"{base_model}: does not fit on the GPUs, and quantized layers cannot be "
                "elsewhere; give --load_4bit, or --load_8bit False, which leaves layers in main memory"
            ) from None
        raise UserError(f"{base_model}: cannot be loaded ({reason(error)}); check the model folder") from None
    check_report(report, base_model)
    return model


def without_values(base_model: str) -> "PreTrainedModel":
    """The model without values, after the library has looked for all of its tensors in the files, which are not read.

    Raises UserError like `load_base`. If there are no files, or their weights are quantized, only config.json counts.
    """
    folder = base_folder(base_model)
    if quantized.method_of(read_architecture(folder).to_dict()) or not has_weights(folder):
        return meta_model(base_model)
    weight_files(folder)
    return load_checked(base_model, folder, device_map={"": "meta"})


def prepare_4bit(model: "PreTrainedModel", placement: DeviceConfig) -> None:
    """Have 4-bit layers compute in the dtype of `placement`, whatever their files name, and with a backward pass on a CPU."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = placement.dtype, True
        if isinstance(module, Linear4bit) and placement.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False  # otherwise an evaluation packs the weights for a kernel without one


@contextlib.contextmanager
def reading_weights() -> Iterator[None]:
    """While the block runs, transformers reads the tensors of a file instead of mapping them.

    Mapped pages count as this process's memory until the last tensor is loaded: for a 7B base, 13 GB beside its copy.
    """
    mapping = modeling_utils.safe_open
    modeling_utils.safe_open = lambda file, **options: mapping(file, **(options | {"backend": "pread"}))
    try:
        yield
    finally:
        modeling_utils.safe_open = mapping


def check_report(report: dict[str, Any], base_model: str) -> None:
    """Print which tensors in the files do not belong to the model that its configuration describes.

    Raises UserError if the model has tensors that the files lack, or have in another shape.
    """
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise UserError(f"{base_model}: {len(report['missing_keys'])} tensors are missing ({name}, …); check its files")
    if report["mismatched_keys"]:
        name, stored, wanted = min(report["mismatched_keys"])
        raise UserError(
            f"{base_model}: {len(report['mismatched_keys'])} tensors are not of the shapes that its config.json describes "
            f"({name} is {tuple(stored)}, not {tuple(wanted)}, …); copy weights and configuration of one model"
        )
    if report["unexpected_keys"]:
        name = min(report["unexpected_keys"])
        say_once(f"{base_model}: {len(report['unexpected_keys'])} tensors in its files are not part of the model ({name}, …)")


def quantization(placement: DeviceConfig) -> BitsAndBytesConfig:
    """bitsandbytes' LLM.int8 (Dettmers et al. 2022) or NF4 with double quantization (QLoRA, Dettmers et al. 2023)."""
    if placement.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=placement.dtype,
        bnb_4bit_quant_storage=placement.dtype if wants_fsdp() else None,  # FSDP shards tensors of one type
    )


def check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str) -> None:
    """Raises UserError if the tokenizer has more ids than the model has embedding rows.

    Fewer ids are fine: BLOOM pads 250,680 of them to 250,880 rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise too_many_tokens(base_model, rows, len(tokenizer))
    if rows > len(tokenizer):
        say(f"{base_model}: {rows} embedding rows, of which {len(tokenizer)} have tokens")


def check_new_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str, trained_whole: list[str]
) -> None:
    """Raises UserError if a tokenizer has more tokens than `model`, which may be without values, has embedding rows, and these
    would never be trained, since no layer in `trained_whole` holds them, or it is not an extension of the base's tokenizer.
    """
    rows, layers = model.get_input_embeddings().weight.shape[0], embedding_names(model)
    if len(tokenizer) <= rows:
        return
    if not {name.split(".")[-1] for name in trained_whole} & set(layers):
        raise UserError(
            f"{base_model}: has {rows} embedding rows for a tokenizer of {len(tokenizer)} tokens; to train the new ones "
            f"give --modules_to_save '[{','.join(layers)}]', or use a base and a tokenizer of one stage"
        )
    check_extends(load_tokenizer(base_model), tokenizer)


def fit_embeddings(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", base_model: str) -> None:
    """Give a model embedding rows for a tokenizer with more tokens than the base's, for which `check_new_tokens` holds."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        grow_embeddings(model, load_tokenizer(base_model), tokenizer)
        say(f"{base_model}: {len(tokenizer) - rows} embedding rows added for new tokens, each the mean of the rows it replaces")
    check_vocabulary(model, tokenizer, base_model)
