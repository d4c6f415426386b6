"""Meta's own layout: what its settings become, and which are not plausible."""

import json
from types import SimpleNamespace

import pytest
import torch

from utils.console import UserError
from utils.models.meta_layout import config_of, read_params

GOOD = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 32}


@pytest.mark.parametrize(
    ("params", "dtype", "config"),
    [
        ({}, "float16", {}),
        ({}, "bfloat16", {"max_position_embeddings": 4096}),
        ({"max_seq_len": 512, "n_kv_heads": 2}, "bfloat16", {"max_position_embeddings": 512, "num_key_value_heads": 2}),
        ({"rope_theta": 1e6, "n_kv_heads": None}, "float32", {"rope_theta": 1e6}),
    ],
)
def test_the_configuration_of_meta_s_settings(tmp_path, params, dtype, config):
    (tmp_path / "params.json").write_text(json.dumps(GOOD | params))
    shapes = {"model.embed_tokens.weight": (500, 64), "model.layers.0.mlp.gate_proj.weight": (176, 64)}
    weights = SimpleNamespace(dtype=lambda _: getattr(torch, dtype), shape=shapes.__getitem__)
    assert config_of(read_params(tmp_path / "params.json"), weights) == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 500, "hidden_size": 64,
        "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": dtype,
    } | config  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0, -1, 200_001, 2.5, "4", True, None)) for name in ("dim", "n_layers", "n_heads")),
        *((name, (0, -1, 200_001, 2.5, "4", True)) for name in ("n_kv_heads", "max_seq_len")),
        ("norm_eps", (0, -1e-5, float("inf"), "small", None)),
        ("rope_theta", (0, -1, float("inf"), "large", None)),
    ],
)
def test_settings_that_are_not_plausible_are_named(tmp_path, name, values):
    path = tmp_path / "params.json"
    for value in values:
        path.write_text(json.dumps(GOOD | {name: value}))
        with pytest.raises(UserError) as error:
            read_params(path)
        assert str(error.value) == f"{path}: {name} is {value!r}, which is not plausible; download the file again"
    path.write_text(json.dumps(GOOD | {"n_heads": 5}))
    with pytest.raises(UserError, match=f"^{path}: dim 64 is not a multiple of n_heads 5; download the file again$"):
        read_params(path)
    path.write_text("[]")
    with pytest.raises(UserError, match=f"^{path}: is not an object of settings; download the file again$"):
        read_params(path)
