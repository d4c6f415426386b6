"""Bases whose files hold quantized weights: trained on, answered with, dequantized in merging, or refused in one line."""

import json
import shutil

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from utils.adapters import switching
from utils.console import UserError
from utils.inference.answerers import resolve
from utils.models import loading, quantized
from utils.models.loading import load_base
from utils.models.meta_layout import open_model
from utils.models.placement import DeviceConfig, place
from utils.models.tokenizer import load_tokenizer

IDS = torch.tensor([[1, 5, 6, 7, 30, 300, 5]])
WAYS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "nf4 with quantized scales": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float16
    ),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
    "nf4 in bfloat16": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.bfloat16,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "fp8": None,
}


def in_fp8(base, folder):
    """A copy of a model with its layers in float8, in blocks of 32 x 32, as DeepSeek publishes it in larger ones."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 32, 32, columns // 32, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folders of a model, full and quantized in each way, and of an adapter for it."""
    top = tmp_path_factory.mktemp("quantized")
    found = {"full": tiny.llama(top / "full")}
    for way, settings in WAYS.items():
        folder = top / way
        if settings is None:
            in_fp8(found["full"], folder)
        else:
            shutil.copytree(found["full"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
            options = {"device_map": {"": "cpu"}, "quantization_config": settings}
            AutoModelForCausalLM.from_pretrained(found["full"], **options).save_pretrained(folder)
        found[way] = folder
    return found | {"adapter": tiny.adapter(found["full"], top / "adapter")}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def as_the_library_dequantizes(folder):
    """The model in float32 as transformers itself makes it of quantized weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
    return model.dequantize(dtype=torch.float32).float() if getattr(model, "is_quantized", False) else model


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_dequantized_as_the_library_does_it(bases, way):
    expected = as_the_library_dequantizes(bases[way]).state_dict()
    config, stored = open_model(bases[way])
    found = quantized.full(bases[way], config, stored)
    assert set(found.names) == set(expected) and len(found.derived) == 14
    for name in found.names:
        assert found.shape(name) == tuple(expected[name].shape) and found.dtype(name) == torch.float32
        torch.testing.assert_close(found.tensor(name), expected[name].float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found.rows(name, slice(3, 5)), found.tensor(name)[3:5], rtol=0, atol=0)
    far = expected["model.layers.0.mlp.up_proj.weight"] - open_model(bases["full"])[1].tensor(
        "model.layers.0.mlp.up_proj.weight"
    )
    assert 0 < far.abs().max() < 0.5  # quantized indeed, and scaled


def test_how_far_quantized_weights_are_is_measured_on_tensors_from_all_over(bases, monkeypatch):
    _, stored = open_model(bases["full"])
    linear = [name for name in stored.names if name.endswith("_proj.weight")]
    monkeypatch.setattr(quantized.Requantized, "MEASURED", 4)
    for way in ("4-bit", "8-bit"):
        found = quantized.Requantized(stored, linear, way, {"dtype": "float32"})
        some = sorted(linear)[::4]
        apart = sum((found.tensor(name) - stored.tensor(name)).square().sum() for name in some)
        whole = sum(stored.tensor(name).square().sum() for name in some)
        assert found.difference() == (pytest.approx((apart / whole).sqrt().item()), len(some))
        assert torch.equal(found.tensor("model.norm.weight"), stored.tensor("model.norm.weight"))


@pytest.mark.parametrize("way", ["nf4 with quantized scales", "int8", "fp8"])
def test_an_adapter_on_a_quantized_base_is_merged_into_its_full_weights(bases, tmp_path, script, way):
    merged = script(
        "merge_weights.py", "--base_model", bases[way], "--lora_model", bases["adapter"], "--output_dir", tmp_path / "m"
    )
    merged.ok()
    assert "14 tensors are quantized" in merged.out and "dequantized to float32" in merged.out
    expected = logits(PeftModel.from_pretrained(as_the_library_dequantizes(bases[way]), bases["adapter"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not getattr(model, "is_quantized", False) and model.dtype == torch.float32
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_answers_on_a_quantized_base_are_those_of_peft(bases, way):
    model = load_base(str(bases[way]), load_tokenizer(bases[way]), place(None, False))
    adapters = switching.attach(model, {"own": bases["adapter"]}, str(bases[way]))
    full = logits(PeftModel.from_pretrained(as_the_library_dequantizes(bases[way]), bases["adapter"]))
    near = {"rtol": 0.1, "atol": 0.5} if way == "int8" else {"rtol": 1e-2, "atol": 2e-2}  # int8 rounds activations, too
    torch.testing.assert_close(logits(model), full, **near)
    with switching.merged(adapters, "own"):
        torch.testing.assert_close(logits(model), full, **near)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "float16"), ({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "float8_e4m3fn"}, "float16"), ({"dtype": "int32"}, "float16"), ({"dtype": 5}, "float16"),
        ({"dtype": "nn"}, "float16"),
    ],
)  # fmt: skip
def test_the_dtype_that_weights_are_dequantized_to(config, dtype):
    assert quantized.full_dtype(config) == getattr(torch, dtype)


def test_what_the_library_found_in_a_base_s_files_is_told(capsys):
    found = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"c", "b"}}
    loading.check_report(found, "some-base")
    assert capsys.readouterr().out == "some-base: 2 tensors in its files are not part of the model (b, …)\n"
    with pytest.raises(UserError) as error:
        loading.check_report(found | {"mismatched_keys": {("a", (3, 4), (3, 5))}}, "some-base")
    assert str(error.value) == (
        "some-base: 1 tensors are not of the shapes that its config.json describes (a is (3, 4), not (3, 5), …); "
        "copy weights and configuration of one model"
    )
    with pytest.raises(UserError, match=r"^some-base: 2 tensors are missing \(d, …\); check its files$"):
        loading.check_report(found | {"missing_keys": {"e", "d"}}, "some-base")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_a_base_is_quantized(monkeypatch, dtype):
    eight, four = (loading.quantization(place(*way, dtype=dtype)).to_dict() for way in ((True, False), (False, True)))
    assert eight["load_in_8bit"] and not eight["load_in_4bit"] and four["load_in_4bit"] and not four["load_in_8bit"]
    assert four["bnb_4bit_quant_type"] == "nf4" and four["bnb_4bit_use_double_quant"]
    assert four["bnb_4bit_compute_dtype"] == dtype and four["bnb_4bit_quant_storage"] == "uint8"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # which shards tensors of one type
    placement = DeviceConfig(torch.device("cpu"), getattr(torch, dtype), "4bit")
    assert loading.quantization(placement).to_dict()["bnb_4bit_quant_storage"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bit_layers_compute_in_the_dtype_asked_for_whatever_the_files_name(bases, dtype):
    way = "nf4 with quantized scales"  # whose files name float16
    model = load_base(str(bases[way]), load_tokenizer(bases[way]), place(None, False, dtype=dtype))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {getattr(torch, dtype)}
    wanted = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert all({name: getattr(part, name) for name in wanted} == wanted for part in (model.config, model.generation_config))


def test_training_on_a_quantized_base(bases, tmp_path, script):
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "ab", "output": "cd"}] * 4))
    argv = ["--data_path", tmp_path / "data.json", "--val_set_size", 0, "--num_epochs", 1, "--batch_size", 4]
    for way in ("nf4 with quantized scales", "int8", "fp8"):
        output = tmp_path / way
        trained = script("finetune.py", "--base_model", bases[way], "--output_dir", output, *argv)
        trained.ok()
        assert "are already quantized" in trained.out
        moved = load_file(output / "adapter_model.safetensors")
        assert all(tensor.any() for name, tensor in moved.items() if "lora_B" in name)


def without_entry(folder, copy, **entry):
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config.pop("quantization_config", None)
    (copy / "config.json").write_text(json.dumps(config | entry))
    return copy


@pytest.mark.parametrize("way", ["nf4", "int8", "fp8"])
def test_scales_that_no_configuration_names(bases, tmp_path, script, way):
    """The library would leave them unused, and compute with unscaled weights."""
    folder = without_entry(bases[way], tmp_path / "base")
    words = "does not say how; copy config.json again"
    with pytest.raises(UserError, match=words):
        load_base(str(folder), load_tokenizer(folder), place(None, False))
    with pytest.raises(UserError, match=words):
        resolve(str(folder), [str(bases["adapter"])], "")
    refused = script(
        "merge_weights.py", "--base_model", folder, "--lora_model", bases["adapter"], "--output_dir", tmp_path / "m"
    )
    assert refused.status == 2 and words in refused.error


@pytest.mark.parametrize(
    ("way", "told", "words"),
    [
        ("nf4", {"load_in_8bit": True}, "is quantized, and nothing says how it is scaled"),
        ("int8", {"load_in_4bit": True}, "is quantized, and nothing says how it is scaled"),
        ("full", {"load_in_4bit": True}, "says that its weights are quantized (bitsandbytes), but none of them is"),
        ("full", {"quant_method": "fp8", "weight_block_size": [32, 32]}, "is quantized, and nothing says how it is scaled"),
    ],
)
def test_weights_that_are_not_what_the_configuration_says(bases, tmp_path, way, told, words):
    """All say the same of them; the library would end with a traceback, or leave float8 unscaled."""
    folder = without_entry(bases[way], tmp_path / "base", quantization_config=told)
    if "quant_method" in told:
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: one.to(torch.float8_e4m3fn) for name, one in tensors.items() if name.endswith("_proj.weight")}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for use in (
        lambda: load_base(str(folder), load_tokenizer(folder), place(None, False)),
        lambda: resolve(str(folder), [str(bases["adapter"])], ""),
        lambda: quantized.full(folder, *open_model(folder)),
    ):
        with pytest.raises(UserError) as caught:
            use()
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "told",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "unheard-of"},
    ],
)
def test_methods_that_do_not_work_here(bases, tmp_path, script, told):
    """Before a record is encoded."""
    folder = without_entry(bases["full"], tmp_path / "base", quantization_config=told)
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "ab", "output": "cd"}] * 4))
    argv = ["--base_model", folder, "--data_path", tmp_path / "data.json", "--val_set_size", 0, "--output_dir", tmp_path / "o"]
    refused = script("finetune.py", *argv)
    assert refused.status == 2 and f"are quantized ({told['quant_method']})" in refused.error
    assert "records to train" not in refused.out and "encoding" not in refused.err
    with pytest.raises(UserError, match=f"are quantized .{told['quant_method']}"):
        resolve(str(folder), [str(bases["adapter"])], "")
    with pytest.raises(UserError, match=f"are quantized .{told['quant_method']}"):
        quantized.full(folder, *open_model(folder))
