"""The two layouts that base models come in: Hugging Face's, and Meta's own for LLaMA.

Meta's is a folder with `params.json` and `consolidated.00.pth`, `.01.pth`, … Each of these files holds, under the same
names, one part of every tensor: some of its rows or columns, or (norms) all of it. The rows of the query and key
projections are in a different order, for a different way to compute rotary embeddings.
"""

import math
from pathlib import Path
from typing import Any

import torch

from utils.console import UserError
from utils.files import read_json
from utils.models.weights import Weights, dtype_name, refuse_adapter

META_FILES = "consolidated.*.pth"
WHOLE, ROWS, COLUMNS = "whole", "rows", "columns"
TOP = {  # Meta's name -> Hugging Face's name, and how Meta divides the tensor among its files
    "tok_embeddings.weight": ("model.embed_tokens.weight", COLUMNS),
    "norm.weight": ("model.norm.weight", WHOLE),
    "output.weight": ("lm_head.weight", ROWS),
}
LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", ROWS),
    "attention_norm.weight": ("input_layernorm.weight", WHOLE),
    "ffn_norm.weight": ("post_attention_layernorm.weight", WHOLE),
}
MOST = 200_000  # of anything that params.json counts


def is_meta(folder: Path) -> bool:
    """True for a folder in Meta's layout."""
    return not (folder / "config.json").is_file() and any(folder.glob(META_FILES))


def open_model(folder: Path) -> tuple[dict[str, Any], Weights]:
    """A model's configuration and tensors in Hugging Face's layout, whichever layout its files have.

    Raises UserError if files are missing or belong to no model.
    """
    if is_meta(folder):
        meta = MetaWeights(folder)
        return meta.config, meta
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: is not a configuration of a model; download it again")
    weights = Weights(folder)
    if not weights.names:
        raise UserError(f"{weights.files[0]}: holds no tensors; is it the right file?")
    return config, weights


def names_in_meta(layers: int) -> dict[str, tuple[str, str]]:
    """For each Hugging Face name, Meta's name and how the tensor is divided."""
    names = {ours: (theirs, division) for theirs, (ours, division) in TOP.items()}
    for layer in range(layers):
        for theirs, (ours, division) in LAYER.items():
            names[f"model.layers.{layer}.{ours}"] = f"layers.{layer}.{theirs}", division
    return names


class MetaWeights(Weights):
    """The tensors of a folder in Meta's layout, under Hugging Face's names and in its order of rows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.params = read_params(folder / "params.json")
        self.files = sorted(folder.glob(META_FILES))
        self.parts = [Weights(folder, [file]) for file in self.files]
        if self.params.get("use_scaled_rope"):
            raise UserError(f"{folder / 'params.json'}: Llama 3 is not read from Meta's layout; get it from the hub")
        self._homes_in_meta = names_in_meta(self.params["n_layers"])
        missing = sorted(theirs for theirs, _ in self._homes_in_meta.values() if theirs not in self.parts[0].names)
        if missing:
            raise UserError(f"{self.files[0]}: {len(missing)} tensors are missing ({missing[0]}, …); download it again")
        rows = self.shape("model.layers.0.self_attn.q_proj.weight")[0]
        if rows != self.params["dim"] or len({tuple(part.names) for part in self.parts}) > 1:
            raise UserError(
                f"{folder}: {len(self.files)} files hold {rows} of {self.params['dim']} rows of the first layer; "
                "copy all of its consolidated.*.pth"
            )
        self.names = sorted(self._homes_in_meta)
        self.config = config_of(self.params, self)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one whole tensor."""
        theirs, division = self._homes_in_meta[name]
        shape = list(self.parts[0].shape(theirs))
        if division != WHOLE:
            axis = 0 if division == ROWS else 1
            shape[axis] = sum(part.shape(theirs)[axis] for part in self.parts)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        """The type that one tensor is stored in."""
        return self.parts[0].dtype(self._homes_in_meta[name][0])

    def file_of(self, name: str) -> Path:
        """The first of the files that hold parts of one tensor."""
        return self.files[0]

    def rows(self, name: str, index: slice | torch.Tensor) -> torch.Tensor:
        """The rows `index` of one tensor, in Hugging Face's order, gathered from all files."""
        theirs, division = self._homes_in_meta[name]
        if division == WHOLE:
            return self.parts[0].rows(theirs, index)
        if division == COLUMNS:
            return torch.cat([part.rows(theirs, index) for part in self.parts], dim=1)
        wanted = self._order(name)[index]
        ends = torch.tensor([part.shape(theirs)[0] for part in self.parts]).cumsum(0)
        gathered = torch.empty(len(wanted), self.shape(name)[1], dtype=self.dtype(name))
        for part, end in zip(self.parts, ends.tolist(), strict=True):
            begin = end - part.shape(theirs)[0]
            here = (wanted >= begin) & (wanted < end)
            if here.any():
                gathered[here] = part.rows(theirs, wanted[here] - begin)
        return gathered

    def _order(self, name: str) -> torch.Tensor:
        """Meta's index of each of Hugging Face's rows."""
        rows = torch.arange(self.shape(name)[0])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = len(rows) * self.params["n_heads"] // self.params["dim"]
            return rows.view(heads, -1, 2).transpose(1, 2).reshape(-1)
        return rows


def read_params(path: Path) -> dict[str, Any]:
    """Meta's `params.json`. Raises UserError if a number in it is missing, or implausible for a LLaMA."""
    params = read_json(path)
    if not isinstance(params, dict):
        raise UserError(f"{path}: is not an object of settings; download the file again")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
        value = params.get(name)
        may_lack = value is None and name in ("n_kv_heads", "max_seq_len")
        if not may_lack and not (type(value) is int and 1 <= value <= MOST):
            raise UserError(f"{path}: {name} is {value!r:.80}, which is not plausible; download the file again")
    for name in ("norm_eps", "rope_theta"):
        value = params.get(name, 10000.0 if name == "rope_theta" else None)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} is {value!r:.80}, which is not plausible; download the file again")
    if params["dim"] % params["n_heads"]:
        raise UserError(
            f"{path}: dim {params['dim']} is not a multiple of n_heads {params['n_heads']}; download the file again"
        )
    return params


def config_of(params: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """Hugging Face's configuration for Meta's `params.json`.

    Meta's files do not say for how many positions a model was trained: 2048 in LLaMA, whose weights are float16, and
    4096 in Llama 2, whose weights are bfloat16.
    """
    dtype = weights.dtype("model.embed_tokens.weight")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": weights.shape("model.embed_tokens.weight")[0],
        "hidden_size": params["dim"],
        "intermediate_size": weights.shape("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "max_position_embeddings": params.get("max_seq_len") or (4096 if dtype == torch.bfloat16 else 2048),
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype_name(dtype),
    }
