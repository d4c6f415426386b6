"""A base that is spread over devices answers and trains as on one: with layers on the disk, and on rehearsed GPUs."""

import json
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import dispatch_model
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from trainings import losses, options, tensors
from transformers import AutoConfig, AutoModelForCausalLM

from utils.adapters import adapters
from utils.console import UserError
from utils.inference.kv_cache import GrowingLayer
from utils.inference.shared_forward import Segment
from utils.models import loading, spread
from utils.models.placement import place
from utils.models.tokenizer import load_tokenizer
from utils.training import loss, preferences

torch.set_num_threads(1)
HALF = 600_000  # bytes: the embeddings and the first of four layers


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of four layers."""
    return tiny.llama(tmp_path_factory.mktemp("spread") / "llama", num_hidden_layers=4)


@pytest.fixture
def short(monkeypatch):
    """So little main memory that the later layers and the output layer lie on the disk."""
    monkeypatch.setattr(spread, "room", lambda: {"cpu": HALF})


def load(folder, **changes):
    placement = place(False, False, device_map="auto", **changes)
    return loading.load_base(str(folder), load_tokenizer(folder), placement)


def test_a_loss_and_its_gradients_are_the_same_with_layers_on_the_disk(deep, short):
    found = {}
    for device_map in ("", "auto"):
        placement = place(False, False, device_map=device_map)
        base = loading.load_base(str(deep), load_tokenizer(deep), placement)
        assert bool(spread.offloaded(base)) == bool(device_map)
        torch.manual_seed(0)
        model = adapters.add(base, LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
        ids = torch.arange(4, 40).view(2, 18)
        with loss.returning_loss(base) as sparse:
            assert sparse
            model(input_ids=ids, labels=ids, places=torch.tensor([3, 4, 8, 20])).backward()
        found[device_map] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found[""].items():
        assert (found["auto"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_how_much_lies_where_is_told_in_bytes(capsys):
    big = {"vocab_size": 50_000, "hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **big), dtype=torch.bfloat16)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": "cpu", "lm_head": "disk", "": 1}
    spread.tell(model, "large")
    layer = (4 * 4096**2 + 3 * 4096 * 8192 + 2 * 4096) * 2 / 1e9
    places = f"0.41 GB on cuda:0, {layer:.2f} GB on cuda:1, {layer:.2f} GB in main memory, 0.41 GB on the disk"
    assert capsys.readouterr().out == f"large: {places}\n"
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(spread, "offloaded", lambda _: [model.lm_head])
        spread.tell(model, "large")
    slow = "weights that are not on a computing device are read for each pass"
    assert capsys.readouterr().out == f"large: {places}; {slow}\n"
    del model.hf_device_map
    spread.tell(model, "large")
    assert capsys.readouterr().out == "large: all of its weights are on meta\n"


@pytest.mark.slow
def test_training_with_layers_on_the_disk_gives_the_same_adapter(script, deep, data, tmp_path, short):
    """Also where it is resumed, and where all of a layer's weights are of another type than on the disk."""
    changes = {"lora_target_modules": "all-linear", "max_steps": 4, "save_steps": 2, "val_set_size": 4}
    script("finetune.py", *options(deep, data, tmp_path / "one", **changes)).ok()
    out = script("finetune.py", *options(deep, data, tmp_path / "spread", device_map="auto", **changes)).ok()
    assert re.search(r"GB in main memory, [\d.]+ GB on the disk; weights that are not on a computing device are read", out)
    assert "--gradient_checkpointing is on" in out
    (tmp_path / "spread" / "lineage.json").unlink()
    for file in (tmp_path / "spread").glob("adapter_*"):
        file.unlink()
    (tmp_path / "spread" / "checkpoint-4" / "checkpoint.json").unlink()  # as if it had been killed after checkpoint 2
    assert "resuming" in script("finetune.py", *options(deep, data, tmp_path / "spread", device_map="auto", **changes)).ok()
    assert losses(tmp_path / "spread")[-4:] == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for name, tensor in tensors(tmp_path / "one").items():
        assert (tensors(tmp_path / "spread")[name] - tensor).abs().max() < 1e-4, name
    changes |= {"dtype": "bfloat16", "max_steps": 1}
    script("finetune.py", *options(deep, data, tmp_path / "half", device_map="auto", **changes)).ok()
    assert losses(tmp_path / "half")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-2)


def test_answers_with_layers_on_the_disk_are_the_same(script, deep, tmp_path, short):
    """Of two adapters, greedy and by beams, in batches whose rows leave at different times."""
    folders = [tiny.adapter(deep, tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    (tmp_path / "prompts.json").write_text(json.dumps([{"instruction": f"第{number}题" * number} for number in range(1, 7)]))
    for beams in (1, 3):
        answers = {}
        for device_map in ("", "auto"):
            argv = ["--base_model", deep, "--is_ui", "False", "--test_input_path", tmp_path / "prompts.json", "--overwrite"]
            argv += ["--lora_weights", ",".join(map(str, folders)), "--num_beams", beams, "--max_new_tokens", 12]
            out = script("generate.py", *argv, *(["--device_map", device_map] if device_map else [])).ok()
            assert ("GB on the disk" in out) == bool(device_map)
            answers[device_map] = [(folder / "test.json").read_text("utf-8") for folder in folders]
        assert answers["auto"] == answers[""]


def test_what_cannot_be_spread_is_refused(script, deep, data, tmp_path, short, monkeypatch):
    run = options(deep, data, tmp_path / "out", device_map="auto", modules_to_save="[lm_head]")
    assert "--modules_to_save lm_head: --device_map auto left it" in script("finetune.py", *run).error
    run = options(deep, data, tmp_path / "out", device_map="auto", use_dora=True)
    assert "--use_dora: needs weights that --device_map auto left" in script("finetune.py", *run).error
    monkeypatch.setattr(spread, "room", lambda: {"cpu": HALF // 2})
    run = options(deep, data, tmp_path / "out", device_map="auto", load_8bit=True)
    assert "--load_8bit False, which leaves layers" in script("finetune.py", *run).error
    error = script("finetune.py", *options(deep, data, tmp_path / "out", device_map="auto"), WORLD_SIZE="2").error
    assert "start without torchrun" in error
    monkeypatch.setattr(spread, "room", lambda: {"cpu": 1000})
    with pytest.raises(UserError, match="no device has room for its embeddings"):
        load(deep)
    assert not (tmp_path / "out").exists()


def test_weights_may_take_four_fifths_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (1000 * (card + 1), 10_000))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=500))
    assert spread.room() == {0: 800, 1: 1600, "cpu": 400}


def test_where_the_weights_lie_is_said_of_each_card():
    device_map = {"model.embed_tokens": 0, "model.layers.1": 1, "model.layers": "cpu", "lm_head": "disk"}
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.weight", "model.layers.12.mlp.weight", "lm_head.weight")
    assert [spread.place_of(name, device_map) for name in names] == [
        "on cuda:0", "on cuda:1", "in main memory", "on the disk"
    ]  # fmt: skip


# Two cards, rehearsed: tensors without values on two devices, which refuse whatever mixes them as CUDA does


CARDS = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0}
CARDS |= {"model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 1}


@pytest.fixture
def cards(deep, monkeypatch):
    """The model over two cards that are not there."""
    plain = torch.Tensor.__getitem__

    def getitem(self, index):  # of which tensors without values allow any
        for part in index if isinstance(index, tuple) else (index,):
            assert not isinstance(part, torch.Tensor) or part.device == self.device, "indices of another device"
        return plain(self, index)

    def to(self, device, **_):
        for module in self.modules():
            for own, tensor in module.named_parameters(recurse=False):
                setattr(module, own, torch.nn.Parameter(torch.empty(tensor.shape, device=device)))
        return self

    monkeypatch.setattr(torch.Tensor, "__getitem__", getitem)
    monkeypatch.setattr(torch.nn.Module, "to", to)  # the library's swaps tensors, which these do not allow
    monkeypatch.setattr("accelerate.big_modeling.check_cuda_p2p_ib_support", lambda: True)
    monkeypatch.setattr("accelerate.hooks.set_module_tensor_to_device", lambda *_, **__: None)  # they are there already
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.__deepcopy__ = lambda _: mode  # peft copies modules; a copy of the mode frees its weak references to storages twice
    with mode:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(deep)).eval()
        for name, card in CARDS.items():
            for module in model.get_submodule(name).modules():
                for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    there = torch.empty(tensor.shape, device=f"cpu:{card}")
                    setattr(module, own, torch.nn.Parameter(there) if own in module._parameters else there)
        yield dispatch_model(model, {name: f"cpu:{card}" for name, card in CARDS.items()}, main_device="cpu:0")


@pytest.mark.parametrize("whole", [None, ["lm_head"]], ids=["lora", "whole"])
def test_training_mixes_no_tensors_of_two_cards(cards, whole, monkeypatch):
    monkeypatch.setattr(loss, "is_decoder_and_head", lambda *_: True)  # which needs values
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    model = adapters.add(cards, config)
    assert {parameter.device.index for parameter in model.parameters() if parameter.requires_grad} == {0, 1}
    ids = torch.zeros(2, 9, dtype=torch.long, device="cpu:0")
    places = torch.arange(6, device="cpu:0")
    hooked = cards.forward
    with loss.returning_loss(cards):
        lost = model(input_ids=ids, labels=ids, places=places)
        assert lost.device == torch.device("cpu:1")
        lost.backward()
    assert cards.forward is hooked
    assert all(p.grad.device == p.device for p in model.parameters() if p.requires_grad)


def test_a_cache_keeps_rows_and_masks_on_the_card_of_each_layer(cards):
    layers = [GrowingLayer(), GrowingLayer()]
    rows, segment = torch.tensor([1, 0, 1], device="cpu:0"), Segment(None, 0, 3)
    for card, layer in enumerate(layers):
        values = torch.zeros(2, 2, 5, 8, device=f"cpu:{card}")
        layer.update(values, values)
        layer.hold(rows, 1, 5, 64)
        assert layer.keys.shape == (3, 2, 68, 8) and layer.keys.device.index == card
        assert segment.mask(4, None, layer.keys.device).device.index == card


def test_pairs_are_compared_across_cards(cards):
    inputs = {"input_ids": torch.zeros(2, 9, dtype=torch.long, device="cpu:0"), "places": torch.arange(6, device="cpu:0")}
    targets = torch.zeros(6, dtype=torch.long, device="cpu:0")
    for found in (
        preferences.sparse_log_probs(cards.model, cards.lm_head, targets=targets, **inputs),
        preferences.full_log_probs(cards, targets=targets, **inputs),
    ):
        assert found.shape == (6,) and found.device.index == 0
