"""Adapters combined with weights: every rule against peft's own, as an adapter and as a model, and what is refused."""

import json
import shutil

import peft
import pytest
import tiny
import torch
from merges import loaded, merge, same_logits, with_peft
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from utils import lineage
from utils.adapters.adapters import read_tensors
from utils.console import UserError
from utils.datasets.templates import Prompter
from utils.merging.rules import METHODS, Rule, rule_of
from utils.models.tokenizer import load_tokenizer

WEIGHTS = [0.7, -0.3, 1]  # the last one not named


def by_peft(base, folders, weights, method, rank=None, density=0.5):
    """The model with what peft's own `add_weighted_adapter` makes of the adapters."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    add_layers = model.base_model.inject_adapter

    def add_and_seed(*arguments):  # after the new layers' first values, which are thrown away, were drawn
        add_layers(*arguments)
        torch.manual_seed(42)

    model.base_model.inject_adapter = add_and_seed
    names = [str(number) for number in range(len(folders))]
    model.add_weighted_adapter(names, weights, "both", combination_type=method, svd_rank=rank, density=density)
    model.set_adapter("both")
    return model.eval()


def changes(model, name):
    """What an adapter adds to each layer."""
    found = {key: layer for key, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    held = {key: layer for key, layer in found.items() if name in layer.lora_A or name in layer.lora_embedding_A}
    return {key: layer.get_delta_weight(name) for key, layer in held.items()}


def combine(base, folders, weights, out, *options):
    named = ",".join(str(f) if weight == 1 else f"{f}*{weight}" for f, weight in zip(folders, weights, strict=True))
    return merge(base, [named], out, "--output_type", "adapter", *options)


def same_as_peft(base, folders, out, method, rank=None):
    weights = WEIGHTS[: len(folders)]
    pruned = method not in ("cat", "svd", "linear")
    options = ["--combine", method, *(["--rank", rank] if rank else []), *(["--density", 0.4] if pruned else [])]
    combine(base, folders, weights, out, *options)
    theirs = changes(by_peft(base, folders, weights, method, rank, 0.4), "both")
    ours = changes(with_peft(base, out), "default")
    assert ours.keys() == theirs.keys()
    for key, change in theirs.items():
        assert (ours[key] - change).abs().max() <= 2e-5 * change.abs().max(), (key, method)


@pytest.fixture(name="pair", scope="module")
def fixture_pair(base, tmp_path_factory):
    """Two adapters of one rank and other scales, on layers of which they share some."""
    folder = tmp_path_factory.mktemp("pair")
    return [
        tiny.adapter(base, folder / "a", target_modules=["q_proj", "v_proj", "embed_tokens"], lora_dropout=0.2),
        tiny.adapter(
            base, folder / "b", seed=1, lora_alpha=2, target_modules=["v_proj", "up_proj", "embed_tokens"], lora_dropout=0.1
        ),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_each_rule_gives_what_peft_gives(base, pair, tmp_path, method):
    same_as_peft(base, pair, tmp_path / "out", method, 3 if method.endswith("svd") else None)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
def test_three_adapters_of_other_ranks_and_rank_patterns(base, pair, tmp_path, method):
    third = tiny.adapter(base, tmp_path / "c", seed=2, r=6, rank_pattern={"k_proj": 2}, target_modules=["q_proj", "k_proj"])
    same_as_peft(base, [*pair, third], tmp_path / "out", method)


@pytest.mark.parametrize("method", ["cat", "dare_ties", "dare_linear_svd"])
def test_layers_that_are_stored_turned(tmp_path, method):
    base = tmp_path / "base"
    size = len(tiny.tokenizer(base))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)).save_pretrained(base)
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folders = [tiny.adapter(base, tmp_path / str(seed), seed=seed, **settings) for seed in (0, 1)]
    same_as_peft(base, folders, tmp_path / "out", method)


def test_the_exact_sum_of_rslora_where_peft_scales_it_twice(base, tmp_path):
    folders = [tiny.adapter(base, tmp_path / str(seed), seed=seed, use_rslora=True) for seed in (0, 1)]
    combine(base, folders, WEIGHTS[:2], tmp_path / "out")
    ours = changes(with_peft(base, tmp_path / "out"), "default")
    for key in ours:
        wanted = sum(w * changes(with_peft(base, f), "default")[key] for w, f in zip(WEIGHTS, folders, strict=False))
        assert torch.allclose(ours[key], wanted, atol=1e-5)


def test_a_full_model_is_the_base_with_the_combined_adapter(base, pair, tmp_path, capsys):
    named = f"{pair[0]}*0.7,{pair[1]}*0.3"
    out = merge(base, [named], tmp_path / "full", "--combine", "ties", "--density", 0.4)
    capsys.readouterr()
    combine(base, pair, [0.7, 0.3], tmp_path / "adapter", "--combine", "ties", "--density", 0.4)
    told = f"holds 0.7 x {pair[0]} + 0.3 x {pair[1]} (ties), rank 4; use it as --lora_weights, or train on it"
    assert capsys.readouterr().out == f"done: {tmp_path / 'adapter'} {told}\n"
    assert same_logits(loaded(out), with_peft(base, tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["lora_dropout"] == 0.2 and settings["base_model_name_or_path"] == str(base)
    assert settings["target_modules"] == ["embed_tokens", "q_proj", "up_proj", "v_proj"]
    for folder in (out, tmp_path / "adapter"):
        step = lineage.read(folder)
        assert [(parent["name"], parent["weight"]) for parent in step["parents"]] == [(str(pair[0]), 0.7), (str(pair[1]), 0.3)]
        assert step["combination"] == {"method": "ties", "density": 0.4, "rank": 0, "seed": 42}


@pytest.mark.parametrize("kind", [[], ["--output_type", "adapter"]])
def test_what_is_combined_is_not_written_over(base, pair, tmp_path, kind):
    folders = [shutil.copytree(folder, tmp_path / "f" / name) for folder, name in zip(pair, "ab", strict=True)]
    for output, over in ((folders[1], folders[1]), (tmp_path / "f", folders[0]), (base, base)):
        with pytest.raises(UserError) as error:
            merge(base, [f"{folders[0]}*0.7,{folders[1]}*0.3"], output, "--overwrite", *kind)
        assert str(error.value) == f"--output_dir {output}: is or contains {over}, which is merged; choose another folder"


def test_weights_alone_ask_for_the_exact_sum(base, pair, tmp_path):
    out = merge(base, [f"{pair[0]}*0.7,{pair[1]}*0.3"], tmp_path / "full")
    assert lineage.read(out)["combination"] == {"method": "cat", "density": 0.5, "rank": 0, "seed": 42}
    assert rule_of("ties", 1.0, None, 7, 2) == Rule("ties", 1.0, 0, 7) and rule_of("svd", None, 3, 42, 1) == Rule("svd", rank=3)


def test_the_svd_of_one_adapter_lowers_its_rank_and_says_what_it_keeps(base, adapter, tmp_path, capsys):
    combine(base, [adapter], [1], tmp_path / "out", "--combine", "svd", "--rank", 2)
    printed = capsys.readouterr().out
    kept = float(printed.partition("keeps ")[2].partition("%")[0]) / 100
    whole, ours = (changes(with_peft(base, folder), "default") for folder in (adapter, tmp_path / "out"))
    squares = [sum(change.square().sum() for change in found.values()) for found in (whole, ours)]
    assert squares[1] / squares[0] == pytest.approx(kept, abs=1e-3) and kept < 0.99
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_the_same_seed_drops_the_same_and_another_other_values(base, pair, tmp_path):
    found = []
    for number, seed in enumerate((1, 1, 2)):
        combine(base, pair, [1, 1], tmp_path / str(number), "--combine", "dare_linear", "--seed", seed)
        found.append(read_tensors(tmp_path / str(number)))
    same = [all(torch.equal(found[0][name], other[name]) for name in other) for other in found]
    assert same == [True, True, False]


def test_other_bases_and_the_tokenizer_of_the_first_that_has_one(base, pair, tmp_path, capsys):
    """Bases that adapters name count where no lineage says which it was."""
    one, two = (shutil.copytree(folder, tmp_path / name) for folder, name in zip(pair, ("one", "two"), strict=True))
    words = tiny.tokenizer(two)
    words.add_tokens(["梦想家"])
    words.save_pretrained(two)
    settings = json.loads((two / "adapter_config.json").read_text())
    for name, is_told in ((f"elsewhere/{base.name}", False), ("owner/other", True)):
        (two / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))
        combine(base, [one, two], [0.5, 0.5], tmp_path / "out", *(["--overwrite"] if is_told else []))
        told = f"the adapters name different base models ({base}, owner/other), which are assumed to be the same model"
        assert (told in capsys.readouterr().out.splitlines()) is is_told
    assert len(load_tokenizer(tmp_path / "out")) == len(words)
    for folder in (one, two):
        (folder / lineage.FILE).write_text(json.dumps({"kind": "train", "options": {}}))
    combine(base, [one, two], [0.5, 0.5], tmp_path / "out", "--overwrite")
    assert "name different base models" not in capsys.readouterr().out


def test_the_first_template_that_is_known_is_kept_and_others_are_told(base, pair, tmp_path, capsys):
    folders = [shutil.copytree(folder, tmp_path / name) for folder, name in zip([*pair, *pair], "abcd", strict=True)]
    texts = [Prompter(name).texts for name in ("alpaca", "alpaca_short", "alpaca_short")]
    for folder, name, text in zip(folders[1:], ("alpaca", "alpaca_short", "alpaca"), texts, strict=True):
        facts = {"base": {"name": str(base), "fingerprint": lineage.fingerprint(str(base))}}
        step = {"kind": "train", "options": {}, "template": {"name": name, "texts": text}, **facts}
        (folder / lineage.FILE).write_text(json.dumps(step))
    combine(base, folders, [0.5, 0.25, 0.25, 0.5], tmp_path / "out")
    told = f"{folders[2]}, {folders[3]}: trained with another template than {folders[1]}, whose alpaca is kept"
    assert capsys.readouterr().out.splitlines()[0] == told
    assert lineage.read(tmp_path / "out")["template"] == {"name": "alpaca", "texts": Prompter("alpaca").texts}
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_both_chains_are_told_and_both_parents_data_replayed(base, pair, tmp_path):
    from utils.training.replay import parents_files

    folders = [shutil.copytree(folder, tmp_path / name) for folder, name in zip(pair, ("f1", "f2"), strict=True)]
    for folder in folders:
        facts = {"base": {"name": str(base), "fingerprint": lineage.fingerprint(str(base))}}
        data = {"files": {f"{folder.name}.json": f"hash of {folder.name}"}, "stage": "instruction"}
        step = {"kind": "train", "options": {"output_dir": str(folder)}, "data": data, **facts}
        (folder / lineage.FILE).write_text(json.dumps(step))
    combine(base, folders, [0.5, 0.5], tmp_path / "both")
    steps = lineage.chain(tmp_path / "both")
    assert [row[0] for row in lineage.table_rows(steps)] == ["step", "f1", "f2", "both"]
    assert lineage.table_rows(steps)[-1][-1] == "f1*0.5, f2*0.5"
    parent = {"name": "both", "sha256": "0", "lineage": lineage.read(tmp_path / "both")}
    assert [str(file) for file, _ in parents_files(parent, "instruction")] == ["f1.json", "f2.json"]


REFUSED = {
    "a weight that is no number": ("{a}*much", [], "needs a folder, .* and a number other than 0"),
    "a weight of nothing": ("{a}*0", [], "needs a folder, .* and a number other than 0"),
    "a weight without an end": ("{a}*inf", [], "needs a folder, .* and a number other than 0"),
    "a weight of no adapter": ("*0.3", [], "needs a folder, .* and a number other than 0"),
    "twice": ("{a}*0.3,{a}", [], "named twice"),
    "a folder that is not there": ("{a}*0.3,nowhere*2", [], "nowhere: "),
    "other ranks": ("{a}*0.3,{rank}", ["--combine", "linear"], "rank has rank 2; use cat or svd"),
    "ties of one": ("{a}*0.3", ["--combine", "ties"], "compares adapters, but there is 1"),
    "a density that nothing reads": ("{a}*0.3,{b}", ["--density", "0.3"], "cat drops nothing"),
    "a density of nothing": ("{a}*0.3,{b}", ["--combine", "ties", "--density", "0"], "above 0, at most 1"),
    "a density that is not a number": ("{a}*0.3,{b}", ["--combine", "ties", "--density", "nan"], "."),
    "a rank that nothing reads": ("{a}*0.3,{b}", ["--rank", "4"], "cat keeps its own rank"),
    "a rank above all": ("{a}*0.3,{b}", ["--combine", "svd", "--rank", "9"], "has rank [48] at most when combined"),
    "DoRA": ("{a}*0.3,{dora}", [], r"dora: cannot be combined with weights, since its magnitudes do not add up \(use_dora\)"),
    "whole layers": ("{a}*0.3,{whole}", [], r"it holds whole layers \(model.layers"),
    "layers that the base lacks": ("{a}*0.3,{deep}", [], r"it holds whole layers \(model.layers.0.self_attn.q_proj, "),
    "tokens": ("{a}*0.3,{tokens}", [], "it replaces rows of the embeddings"),
    "PiSSA": ("{a}*0.3,{pissa}", [], "belongs to a base changed by pissa"),
    "another base": ("{a}*0.3,{wide}", [], "another size of model"),
    "a base of other values": ("{a}*0.3,{told}", [], "told: was trained on another base"),
    "a type": ("{a}*0.3,{b}", ["--output_type", "adapter", "--dtype", "float16"], "--dtype: is for whole models"),
    "a comparison": ("{a}*0.3,{b}", ["--output_type", "adapter", "--verify"], "--verify: is for whole models"),
    "weights of a QLoRA": (
        "{a},{b}",
        ["--output_type", "adapter", "--merge_into", "dequantized"],
        "--merge_into: is for whole",
    ),
    "an exported adapter": ("{a}*0.3,{b}", ["--output_type", "adapter", "--export", "gguf"], "leave --output_type out"),
    "layers by two names": ("{a}*0.3,{bare}", [], "name the same layers differently; save them again with one version of peft"),
    "nothing to combine": ("", ["--combine", "ties"], "--combine: is for adapters, but there are none"),
}


@pytest.fixture(name="kinds", scope="module")
def fixture_kinds(base, pair, tmp_path_factory):
    """Adapters of all kinds, by name."""
    folder = tmp_path_factory.mktemp("kinds")
    settings = {
        "rank": {"r": 2}, "dora": {"use_dora": True}, "whole": {"modules_to_save": ["norm"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [3, 4]}}, "pissa": {"init_lora_weights": "pissa"},
        "told": {},
    }  # fmt: skip
    found = {name: tiny.adapter(base, folder / name, **more) for name, more in settings.items()}
    other = tiny.llama(folder / "other", seed=1)
    step = {"kind": "train", "options": {}, "base": {"name": "other", "fingerprint": lineage.fingerprint(str(other))}}
    (folder / "told" / lineage.FILE).write_text(json.dumps(step))
    wide = tiny.llama(folder / "wide-base", hidden_size=96, num_attention_heads=6)
    deep = tiny.llama(folder / "deep-base", num_hidden_layers=3)
    found["deep"] = tiny.adapter(deep, folder / "deep", target_modules=["k_proj"], modules_to_save=["q_proj"])
    found["bare"] = shutil.copytree(pair[1], folder / "bare")  # as of a base whose names lack their first part
    tensors = {name.replace("model.model.", "model."): tensor for name, tensor in read_tensors(pair[1]).items()}
    save_file(tensors, found["bare"] / "adapter_model.safetensors")
    return found | {"a": pair[0], "b": pair[1], "wide": tiny.adapter(wide, folder / "wide")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_sum_is_refused_in_one_line(base, kinds, tmp_path, case):
    named, options, error = REFUSED[case]
    with pytest.raises(UserError, match=error):
        merge(base, [named.format(**kinds)] if named else [], tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_embeddings_that_peft_saved_beside_their_lora_are_left_out_unless_trained(base, tmp_path):
    folders = [tiny.adapter(base, tmp_path / str(seed), seed=seed, target_modules=["embed_tokens"]) for seed in (0, 1)]
    held = read_tensors(folders[1])
    [saved] = [name for name in held if "base_layer" in name]
    combine(base, folders, [0.5, 0.5], tmp_path / "out")
    added = {f"base_model.model.model.embed_tokens.lora_embedding_{half}" for half in "AB"}
    assert read_tensors(tmp_path / "out").keys() == added
    for rows in (held[saved] + 1, held[saved][1:]):
        save_file(held | {saved: rows}, folders[1] / "adapter_model.safetensors")
        with pytest.raises(UserError, match=r"holds whole layers \(model\.embed_tokens\)"):
            combine(base, folders, [0.5, 0.5], tmp_path / "no")
