"""Half precision and quantization: every family trains with what a GPU would do, rehearsed on the CPU."""

import contextlib
import dataclasses
import importlib
import random
import shutil
import time

import pytest
import tiny
import torch
from torch.nn import functional
from trainings import history, losses, options, same, tensors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from transformers.modeling_outputs import CausalLMOutput

from benchmarks import memory as memory_cases
from utils import lineage
from utils.console import UserError
from utils.models import loading
from utils.models.placement import DeviceConfig, half_precision_gain, measured, place, with_dtype, with_training_kernel
from utils.training import setup
from utils.training.loss import returning_loss
from utils.training.start import RunStart

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def normed(tmp_path_factory):
    """Models whose last layer is a LayerNorm."""
    folder = tmp_path_factory.mktemp("normed")
    tiny.bloom(folder / "bloom")
    for name, kind in (("gpt2", GPT2Config), ("opt", OPTConfig)):
        words = tiny.tokenizer(folder / name)
        torch.manual_seed(0)
        sizes = {"ffn_dim": 128, "word_embed_proj_dim": 64} if name == "opt" else {}
        config = kind(
            vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2,
            pad_token_id=3, tie_word_embeddings=name == "opt", **sizes,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def cuda_rules(monkeypatch):
    """CUDA's autocast gives float32 out of layer_norm, whatever goes in; that of a CPU does not."""
    plain = functional.layer_norm

    def layer_norm(values, shape, weight=None, bias=None, eps=1e-5):
        if not torch.is_autocast_enabled("cpu"):
            return plain(values, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return plain(values.float(), shape, *(one if one is None else one.float() for one in (weight, bias)), eps)

    monkeypatch.setattr(functional, "layer_norm", layer_norm)


TARGETS = {"gpt2": "[c_attn]", "opt": "[q_proj,v_proj]", "bloom": "[query_key_value]"}
WHOLE = {"gpt2": "[wte,lm_head]", "opt": "[embed_tokens,lm_head]", "bloom": "[word_embeddings,lm_head]"}


ROWS = [("gpt2", False), ("bloom", True), ("gpt2", True), ("opt", False), ("opt", True), ("bloom", False)]


@pytest.mark.parametrize(("family", "whole"), [*ROWS[:2], *(pytest.param(*row, marks=pytest.mark.slow) for row in ROWS[2:])])
def test_families_with_a_last_layer_norm_train_in_bfloat16(script, normed, data, tmp_path, cuda_rules, family, whole):
    changes = {"lora_target_modules": TARGETS[family], "max_steps": 3} | ({"modules_to_save": WHOLE[family]} if whole else {})
    for dtype in ("float32", "bfloat16"):
        script("finetune.py", *options(normed / family, data, tmp_path / dtype, dtype=dtype, lora_dropout=0, **changes)).ok()
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=5e-3)
    assert lineage.read(tmp_path / "bfloat16")["dtype"] == "bfloat16"


ONES = ["[lm_head]", "[embed_tokens]"]


@pytest.mark.parametrize("bits", ["load_8bit", "load_4bit"])
@pytest.mark.parametrize("whole", ["[embed_tokens,lm_head]", *(pytest.param(one, marks=pytest.mark.slow) for one in ONES)])
def test_quantized_bases_train_with_layers_trained_whole(script, bases, data, tmp_path, bits, whole):
    changes = {bits: True, "modules_to_save": whole, "dtype": "bfloat16", "max_steps": 3}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **changes)).ok()
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


@pytest.fixture
def products_as_on_cuda(monkeypatch):
    """bitsandbytes' 8-bit products with the operations of a GPU, which quantize what goes in, too; a CPU has its own."""
    functions = importlib.import_module("bitsandbytes.autograd._functions")
    monkeypatch.setattr(functions, "MatMul8bitFp", functions.MatMul8bitLt)


@pytest.mark.parametrize(
    ("family", "whole"), [("llama", "[embed_tokens,lm_head]"), pytest.param("bloom", "[lm_head]", marks=pytest.mark.slow)]
)
def test_8_bit_as_a_gpu_computes_it_learns_and_checkpointing_changes_nothing(
    script, bases, data, tmp_path, cuda_rules, products_as_on_cuda, family, whole
):
    changes = {"load_8bit": True, "dtype": "bfloat16", "modules_to_save": whole, "max_steps": 3, "lora_dropout": 0}
    for out, on in (("kept", False), ("again", True)):
        script("finetune.py", *options(bases[family], data, tmp_path / out, gradient_checkpointing=on, **changes)).ok()
    script("finetune.py", *options(bases[family], data, tmp_path / "full", **(changes | {"load_8bit": False}))).ok()
    assert losses(tmp_path / "kept") == losses(tmp_path / "again") and same(
        *map(tensors, (tmp_path / "kept", tmp_path / "again"))
    )
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "full"), rel=3e-2)
    assert losses(tmp_path / "kept") != losses(tmp_path / "full")


def test_checkpointing_frees_what_8_bit_products_keep_on_a_gpu(tmp_path, products_as_on_cuda):
    figures = memory_cases.compare(memory_cases.random_model("llama", tmp_path), "8 bit", "all linear layers", 2, 96)
    assert 0.85 < figures["ratio"] < 1.15 and 0.85 < figures["checkpointed_ratio"] < 1.15
    assert figures["checkpointed_counted_mb"] < 0.6 * figures["counted_mb"]


def norms(folder):
    entries = history(folder)
    return [entry["grad_norm"] for entry in entries if "grad_norm" in entry]


def test_4_bit_learns_from_the_first_step_and_after_each_evaluation(script, bases, data, tmp_path):
    """An evaluation must not leave the layers with a kernel that has no backward pass, as it does on CPUs with AVX512-BF16."""
    changes = {"load_4bit": True, "val_set_size": 4, "eval_steps": 1, "save_steps": 100, "max_steps": 3}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **changes)).ok()
    assert min(norms(tmp_path / "out")) > 0


def test_a_gradient_of_zero_stops_the_run(script, bases, data, tmp_path):
    """Without a path from the loss to the adapter: values of zero reach it nowhere."""
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["llama"] / name, tmp_path / "base" / name)
    for norm in (1.0, 0):
        error = script("finetune.py", *options(tmp_path / "base", data, tmp_path / "out", max_grad_norm=norm)).error
        assert "step 1: the gradient is exactly zero" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_cap_is_noticed_while_logits_are_small(bases, cap):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = torch.tanh(output.logits / cap) * cap
        return output

    model.forward = capped
    with returning_loss(model) as sparse:
        assert not sparse


def test_a_scale_before_the_output_layer_is_noticed(bases):
    """As MiniCPM has it: what goes into the output layer is not what the decoder gives."""
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])

    def scaled(input_ids, **_):
        hidden = model.model(input_ids=input_ids, use_cache=False)[0] / 4
        return CausalLMOutput(logits=model.lm_head(hidden))

    model.forward = scaled
    with returning_loss(model) as sparse:
        assert not sparse


# Which type


def test_the_type_is_measured_named_or_taken_from_the_run(script, bases, data, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.models.placement.SMALL", 64)  # the width of this model
    for gain, name in ((1.2, "float32"), (1.4, "bfloat16")):
        monkeypatch.setattr("utils.models.placement.half_precision_gain", lambda *_, gain=gain: gain)
        out = script("finetune.py", *options(bases["llama"], data, tmp_path / name, max_steps=1)).ok()
        assert f"{gain} times as fast as float32 here: computing in {name}" in out
        assert lineage.read(tmp_path / name)["dtype"] == name
    changes = {"resume_from_checkpoint": tmp_path / "bfloat16", "max_steps": 1, "dtype": "float32"}
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "next", **changes)).ok()
    assert "the parent adapter was trained in bfloat16, this run computes in float32" in out
    (tmp_path / "float32" / lineage.FILE).unlink()  # as if it had been killed before its end
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "float32", max_steps=1)).ok()
    assert "computing in float32" in out and "times as fast" not in out
    (tmp_path / "float32" / lineage.FILE).unlink()
    error = script("finetune.py", *options(bases["llama"], data, tmp_path / "float32", max_steps=1, bf16=True)).error
    assert "dtype was 'float32', is 'bfloat16'" in error


@pytest.mark.parametrize(
    ("ranks", "rank", "named", "type_", "measures"),
    [(1, 0, "", "bfloat16", 1), (1, 0, "float16", "float16", 0), (2, 0, "", "float16", 1), (2, 1, "", "float16", 0)],
)
def test_all_ranks_compute_in_what_the_first_measures(bases, monkeypatch, ranks, rank, named, type_, measures):
    """It is passed on here as float16, whatever it was."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda names: names.__setitem__(0, "float16"))
    monkeypatch.setattr("utils.models.placement.measured", lambda one, _: asked.append(1) or with_dtype(one, "bfloat16"))
    start = RunStart(None, None)
    found = setup.choose_dtype_and_kernel(place(False, False), named, str(bases["llama"]), start)
    assert (found.dtype_name, len(asked)) == (type_, measures)


@pytest.mark.parametrize("faster", [3, 1 / 3])
def test_other_programs_have_no_part_in_what_is_measured(monkeypatch, faster):
    """On a machine so busy that a product waits for up to twenty times as long as it takes."""
    waits, spent = random.Random(0), []

    def product(some, weight):
        costs = 1e-3 if weight.dtype == torch.float32 else 1e-3 / faster
        until = time.thread_time() + costs
        while time.thread_time() < until:
            pass
        time.sleep(waits.choice([0, 0.002, 0.02]))  # the thread's own time stands still meanwhile
        spent.append(costs)
        return some

    monkeypatch.setattr(functional, "linear", product)
    threads = torch.get_num_threads()
    gain = half_precision_gain(torch.device("cpu"), torch.bfloat16, 64)
    assert gain == pytest.approx(faster, rel=0.25) and sum(spent) < 0.1
    assert len(spent) >= 2 * 8, "more than two runs of each"
    assert torch.get_num_threads() == threads


def test_types_that_exclude_each_other_or_the_device_are_refused(script, bases, data, tmp_path):
    for changes in ({"dtype": "float32", "bf16": True}, {"fp16": True, "bf16": True}):
        assert "give one" in script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **changes)).error
    assert "not supported on a CPU" in script("finetune.py", *options(bases["llama"], data, tmp_path / "out", fp16=True)).error


def test_the_base_has_the_type_that_is_computed_in(bases):
    """Else autocast keeps a cast copy of each frozen weight."""
    from utils.models.tokenizer import load_tokenizer

    for name in ("float32", "bfloat16"):
        placement = place(False, False, dtype=name)
        model = loading.load_base(str(bases["llama"]), load_tokenizer(bases["llama"]), placement)
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
    assert place(False, False).autocast_dtype is None


class Gpu:
    """What torch says of a GPU of a compute capability."""

    def __init__(self, monkeypatch, major):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: major >= 8 or including_emulation)


@pytest.mark.parametrize(("major", "name"), [(7, "float16"), (8, "bfloat16")])
def test_gpus_that_emulate_bfloat16_get_float16(monkeypatch, major, name):
    Gpu(monkeypatch, major)
    ways = [place(*asked).quantize for asked in ((None, False), (None, True), (False, True), (False, False))]
    assert place(None, False).dtype_name == name and ways == ["8bit", "4bit", "4bit", None]
    if major == 7:
        with pytest.raises(UserError, match="no instructions for it"):
            place(None, False, dtype="bfloat16")


@pytest.mark.parametrize(
    ("installed", "major", "dtype", "chosen"),
    [
        (True, 8, "", "flash_attention_2"),
        (True, 7, "", ""),
        (False, 8, "", ""),
        (True, 8, "float32", ""),
    ],
)
def test_flash_attention_is_taken_where_it_works_and_the_choice_is_said(
    bases, monkeypatch, capsys, installed, major, dtype, chosen
):
    Gpu(monkeypatch, major)
    monkeypatch.setattr("utils.models.placement.is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert with_training_kernel(place(None, False, dtype=dtype), str(bases["llama"])).kernel == chosen
    assert f"attention kernel: {chosen or 'sdpa'}" in capsys.readouterr().out
    assert with_training_kernel(place(None, False, kernel="eager"), str(bases["llama"])).kernel == "eager"
    if not (installed and major >= 8):
        with pytest.raises(UserError, match="flash_attention_2: needs the package"):
            place(None, False, kernel="flash_attention_2")


def test_a_kernel_that_is_not_there_is_refused_before_the_work(script, bases, data, tmp_path):
    run = options(bases["llama"], data, tmp_path / "out", attn_implementation="flash_attention_2")
    assert "needs the package flash-attn" in script("finetune.py", *run).error
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_with_another_kernel_than_it_began_with(script, bases, data, tmp_path, monkeypatch):
    """As where FlashAttention was there at first, and is not any more."""
    run = options(bases["llama"], data, tmp_path / "out", max_steps=1)
    with monkeypatch.context() as changed:
        changed.setattr("utils.models.placement.with_training_kernel", lambda one, _: dataclasses.replace(one, kernel="eager"))
        script("finetune.py", *run).ok()
    (tmp_path / "out" / lineage.FILE).unlink()  # as if it had been killed before its end
    assert "attn_implementation was 'eager', is ''" in script("finetune.py", *run).error
    script("finetune.py", *run, "--attn_implementation=eager").ok()


@pytest.mark.parametrize(("gain", "chosen"), [(1.29, "float32"), (1.3, "bfloat16")])
def test_half_precision_is_taken_where_it_is_worth_it_and_that_is_told(tmp_path, monkeypatch, capsys, gain, chosen):
    LlamaConfig(hidden_size=4096).save_pretrained(tmp_path)
    monkeypatch.setattr("utils.models.placement.half_precision_gain", lambda *given: gain if given[2] == 1024 else 0)
    assert measured(place(False, False), str(tmp_path)).dtype_name == chosen
    told = f"bfloat16 computes 1.3 times as fast as float32 here: computing in {chosen} (--dtype: another)\n"
    assert capsys.readouterr().out == told


def test_apple_s_gpu_computes_in_float16_throughout_and_is_not_measured(tmp_path, monkeypatch):
    LlamaConfig(hidden_size=4096).save_pretrained(tmp_path)
    monkeypatch.setattr("utils.models.placement.half_precision_gain", lambda *_: 9)
    for device, beside in (("mps", None), ("cuda", "float16")):
        placement = DeviceConfig(torch.device(device), torch.float16, None)
        assert placement.autocast_dtype == beside
        assert (measured(placement, str(tmp_path)) is placement) == (device == "mps")
    assert str(DeviceConfig(torch.device("cpu"), torch.float32, "4bit")) == "cpu, 4bit"
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert place(None, False) == DeviceConfig(torch.device("mps"), torch.float16, None)
    assert place(None, True, dtype="float32", kernel="eager") == DeviceConfig(
        torch.device("mps"), torch.float32, "4bit", kernel="eager"
    )
    with pytest.raises(UserError, match=r"^--device_map auto: Apple's GPU shares all of the machine's memory; leave it out$"):
        place(None, False, device_map="auto")


def test_ways_to_train_that_would_go_wrong_are_refused(monkeypatch):
    Gpu(monkeypatch, 8)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(UserError, match=r"LOCAL_RANK 5: .* 2 GPUs; start as many"):
        place(None, False)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match=r"^--gpu_id 5: this machine shows 2 GPUs; numbers start at 0$"):
        place(None, False, 5)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert place(None, False).quantize is None
    with pytest.raises(UserError, match="--load_8bit: FSDP"):
        place(True, False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed"):
        place(None, True)
