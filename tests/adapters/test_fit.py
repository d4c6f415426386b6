"""What an adapter's files say: which is read, ranks by patterns, what the next step takes over, and other vocabularies."""

import shutil

import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from utils.adapters import adapters, consistency, fit
from utils.adapters.adapters import find_weights, open_tensors
from utils.adapters.lora_config import lora_config
from utils.adapters.settings import is_pattern
from utils.console import UserError

GIVEN = {"lora_r": None, "lora_alpha": None, "lora_dropout": 0.25, "use_rslora": None, "use_dora": None}
GIVEN |= {"modules_to_save": [], "lora_target_modules": []}


@pytest.fixture(scope="module")
def parent(tiny_llama, tmp_path_factory):
    settings = {"target_modules": ["v_proj", "q_proj"], "use_rslora": True, "modules_to_save": ["lm_head"]}
    return tiny.adapter(tiny_llama, tmp_path_factory.mktemp("fit") / "parent", **settings)


COMMON = {
    "lora_dropout": 0.25,
    "use_dora": False,
    "target_modules": {"q_proj", "v_proj"},
    "bias": "none",
    "inference_mode": False,
}


def check_settings(config, wanted):
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_what_is_not_given_is_the_parent_s_and_is_told(tiny_llama, parent, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    wanted = {"r": 4, "lora_alpha": 8, "use_rslora": True, "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    taken = "--lora_r 4, --lora_alpha 8, --lora_target_modules [q_proj,v_proj], --use_rslora True, --modules_to_save [lm_head]"
    given = {"lora_r": 4, "use_rslora": True}
    for more, told in (({}, taken), (given, taken.replace("--lora_r 4, ", "").replace("--use_rslora True, ", ""))):
        check_settings(lora_config(model, GIVEN | more, parent), COMMON | wanted)
        assert capsys.readouterr().out == f"taken from {parent}: {told}\n"


def test_a_checkpoint_without_settings_shows_them_by_its_weights(tiny_llama, tmp_path, capsys):
    """As alpaca-lora's runs of 2023 left them; alpha is what is given, or the default."""
    made = tiny.adapter(tiny_llama, tmp_path / "made", target_modules=["v_proj", "q_proj"])
    (made / "adapter_config.json").unlink()
    wanted = {"r": 4, "use_rslora": False, "modules_to_save": None, "task_type": "CAUSAL_LM"}
    for given, alpha in ((None, 16), (24, 24)):
        found = lora_config(AutoModelForCausalLM.from_pretrained(tiny_llama), GIVEN | {"lora_alpha": given}, made)
        check_settings(found, COMMON | wanted | {"lora_alpha": alpha})
        told = f"rank 4 on q_proj, v_proj; alpha {alpha} is assumed\n"
        assert capsys.readouterr().out.endswith(f"{made}: has no adapter_config.json; its weights show {told}")


def test_of_two_files_the_safe_one_is_read_and_they_must_be_the_same(parent, tmp_path):
    folder = shutil.copytree(parent, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    older = folder / "adapter_model.bin"
    torch.save(tensors, older)
    assert find_weights(folder).name == "adapter_model.safetensors" and open_tensors(folder)[1].keys() == tensors.keys()
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, older)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors and adapter_model\.bin hold different weights"):
        open_tensors(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert find_weights(folder) == older
    older.rename(folder / "pytorch_model.bin")
    assert find_weights(folder) == folder / "pytorch_model.bin"
    (folder / "pytorch_model.bin").unlink()
    missing = "holds no adapter_model.safetensors or adapter_model.bin; name the folder of an adapter"
    for path, words in ((folder, missing), (folder / "gone", "no such folder; name the folder of an adapter")):
        with pytest.raises(UserError, match=f"^{path}: {words}$"):
            find_weights(path)


@pytest.mark.parametrize(
    ("patterns", "value"),
    [
        (None, 8), ({}, 8), ({"q_proj": 2}, 2), ({"proj": 3}, 8), ({"layers.1.q_proj": 4, "q_proj": 5}, 4),
        ({"q_proj": 5, "layers.1.q_proj": 4}, 5), ({r".*\.q_pro": 6}, 8), ({r"layers\.\d\.q_proj": 7}, 7),
    ],
)  # fmt: skip
def test_a_pattern_means_the_end_of_a_name_from_a_dot_on(patterns, value):
    from peft.utils.other import get_pattern_key

    assert fit.of_pattern(patterns, "model.layers.1.q_proj", 8) == value
    key = get_pattern_key((patterns or {}).keys(), "model.layers.1.q_proj")
    assert (patterns or {}).get(key, 8) == value, "as peft takes it"


def test_a_tensor_lies_in_a_layer_whose_whole_name_is_part_of_its_own():
    saved = ["norm", "mlp.up_proj", "lm_head"]
    names = ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    others = ["model.input_norm.weight", "model.layers.0.up_proj.weight", "lm_head2.weight", "norms.weight"]
    assert [name for name in names + others if consistency.is_within(saved, name)] == names
    assert not consistency.is_within(None, "lm_head.weight")


def test_six_repetitions_in_a_row_are_allowed():
    assert is_pattern(".*a" * 6) and not is_pattern(".*a" * 7)
    assert is_pattern("|".join([".*a" * 6, ".*b" * 6])) and not is_pattern("a|" + ".*b" * 7)


def test_a_larger_vocabulary_is_merged_first_where_the_base_s_may_not_grow(tiny_llama, tmp_path):
    large = tiny.llama(tmp_path / "large")
    model = AutoModelForCausalLM.from_pretrained(large)
    count = model.config.vocab_size
    model.resize_token_embeddings(count + 3)
    model.save_pretrained(large)
    folder = tiny.adapter(large, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    fit.check(fit.Adapter(folder), tiny_llama)
    with pytest.raises(UserError) as error:
        fit.check(fit.Adapter(folder), tiny_llama, grows=False)
    assert str(error.value) == (
        f"{folder}: its vocabulary has {count + 3} tokens, that of {tiny_llama} {count}; merge it first: "
        f"python merge_weights.py --base_model {tiny_llama} --lora_model {folder} --output_dir MERGED"
    )


@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]])
def test_what_trains_is_float32_and_the_layers_compute_in_the_base_s_type(tiny_llama, whole):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    seen = []
    base.model.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    model = adapters.add(base, LoraConfig(target_modules=["q_proj"], modules_to_save=whole))
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[1, 5]]))
    assert seen == [torch.bfloat16]


def test_scales_and_the_hashes_of_files(parent):
    adapter = fit.Adapter(parent)
    assert adapter.scaling("model.layers.0.self_attn.q_proj", 4) == 8 / 2, "rsLoRA divides by the root of the rank"
    with pytest.raises(UserError, match="has rank 5, its settings say 4; the files do not belong together"):
        adapter.scaling("model.layers.0.self_attn.q_proj", 5)
    assert adapter.hashes.keys() == {"adapter_model.safetensors", "adapter_config.json"}
