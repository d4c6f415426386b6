"""How a base is loaded: what the library is asked for in each placement, and the ids that its configuration then has."""

import contextlib
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, modeling_utils

from utils.console import UserError
from utils.models import loading, quantized, spread
from utils.models.architecture import read_architecture
from utils.models.loading import NO_ADAPTER, load_base, quantization
from utils.models.placement import DeviceConfig
from utils.models.tokenizer import load_tokenizer

CPU, CARD = torch.device("cpu"), torch.device("cuda", 1)
FULL, HALF = torch.float32, torch.bfloat16
ASKED = [  # placement, the attention kernel, whether it is FSDP; what the library is asked for, and whether it reads the files
    (DeviceConfig(CPU, FULL, None), "", False, {"dtype": FULL, "device_map": {"": CPU}}, False),
    (DeviceConfig(CPU, HALF, None), "eager", False,
     {"dtype": HALF, "device_map": {"": CPU}, "attn_implementation": "eager"}, True),
    (DeviceConfig(CARD, HALF, "8bit"), "", False, {"dtype": HALF, "device_map": {"": CARD}}, True),
    (DeviceConfig(CARD, FULL, "4bit"), "", True, {"dtype": FULL, "device_map": {"": CARD}}, True),
    (DeviceConfig(CARD, FULL, None), "", True, {"dtype": FULL, "device_map": {"": "cpu"}}, False),
    (DeviceConfig(CARD, FULL, None, spread=True), "", False,
     {"dtype": FULL, "device_map": "auto", "max_memory": {0: 7, "cpu": 9}}, False),
]  # fmt: skip


@pytest.mark.parametrize(("placement", "kernel", "sharded", "options", "reads"), ASKED)
def test_what_the_library_is_asked_for(tiny_llama, monkeypatch, placement, kernel, sharded, options, reads):
    asked = []

    class Library:
        @staticmethod
        def from_pretrained(folder, **given):
            settings = given.pop("quantization_config", None)
            asked.append((folder, given, settings and settings.to_dict(), modeling_utils.safe_open is not mapping))
            nothing = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}
            return AutoModelForCausalLM.from_pretrained(tiny_llama), nothing

    mapping = modeling_utils.safe_open
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded).lower())
    monkeypatch.setattr(loading, "AutoModelForCausalLM", Library)
    monkeypatch.setattr(spread, "room", lambda: {0: 7, "cpu": 9})
    load_base(str(tiny_llama), load_tokenizer(tiny_llama), placement, kernel)
    options = options | {"adapter_kwargs": NO_ADAPTER, "output_loading_info": True, "ignore_mismatched_sizes": True}
    how = quantization(placement).to_dict() if placement.quantize else None
    assert asked == [(tiny_llama, options, how, reads)] and modeling_utils.safe_open is mapping


def test_special_ids_are_the_tokenizer_s_and_all_ends_that_the_files_name(tmp_path):
    base = tiny.llama(tmp_path)
    words = load_tokenizer(base)
    words.add_tokens(["<|eot|>"], special_tokens=True)
    words.save_pretrained(base)
    config = json.loads((base / "config.json").read_text()) | {"bos_token_id": 7, "pad_token_id": 8}
    for ends, wanted in ((9, 2), ([9, len(words) - 1], [2, len(words) - 1])):
        (base / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
        model = load_base(str(base), load_tokenizer(base), DeviceConfig(CPU, FULL, None))
        for part in (model.config, model.generation_config):
            assert (part.bos_token_id, part.eos_token_id, part.pad_token_id) == (1, wanted, 3)


@pytest.mark.parametrize(("training", "can_train"), [(True, False), (True, True), (False, False)])
def test_what_the_library_cannot_train_on_is_refused_in_training_alone(tiny_llama, monkeypatch, training, can_train):
    config = read_architecture(tiny_llama)
    config.quantization_config = {"quant_method": "some"}
    monkeypatch.setattr(quantized, "check_library", lambda *_: can_train)
    words = f"{tiny_llama}: its weights are quantized (some), and the library cannot train on them; {quantized.OTHER}"
    with pytest.raises(UserError) if training and not can_train else contextlib.nullcontext() as error:
        quantized.check(tiny_llama, config, training=training)
    assert error is None or str(error.value) == words


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({}, ""), ({"quantization_config": {}}, ""), ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"a": 1}}, "an unnamed method"),
        ({"quantization_config": "awq"}, "awq"),
    ],
)  # fmt: skip
def test_the_method_that_a_configuration_names(config, method):
    assert quantized.method_of(config) == method and quantized.without_method(config | {"a": 1}) == {"a": 1}


SCALES = (
    "weight.SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4", "qweight", "qzeros", "g_idx", "weight_scale", "weight_scale_inv",
    "weight_scale_2", "weight_global_scale", "weight_packed", "weight_shape", "weight_zero_point", "input_scale",
    "input_activation_scale",
)  # fmt: skip


def test_the_names_of_scales_of_all_methods_are_known():
    names = [f"model.layers.0.mlp.up_proj.{end}" for end in SCALES]
    names += [f"model.layers.0.mlp.experts.gate_up_proj_{end}" for end in ("blocks", "scales")]
    assert [name for name in names if not quantized.SCALES.search(name)] == []
    plain = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.bias", "model.layers.0.mlp.scale", "blocks.0.weight")
    assert not any(map(quantized.SCALES.search, plain))
