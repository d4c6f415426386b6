"""What is compared before a merge is kept, and small parts of what is written, each whole."""

import io
import json
import struct
import zipfile
from types import SimpleNamespace

import pytest
import tiny
import torch
from merges import loaded, merge, tensors, with_peft
from safetensors.torch import save_file
from tokenizers import AddedToken

from utils.console import UserError
from utils.files import write_json
from utils.merging import experts, meta_writer, shards, verify
from utils.merging.merge import write_generation_config
from utils.merging.plan import plan_merge
from utils.merging.tensor_recipes import AddExperts, Replace, same_changes
from utils.merging.verify import PROMPTS, compare_logits, with_adapters
from utils.models.tokenizer import load_tokenizer
from utils.models.weights import Weights


def test_verify_compares_logits(base, adapter, tmp_path, capsys):
    out = merge(base, adapter, tmp_path / "out", "--verify")
    assert "verified on 4 prompts: scores differ by 0.00%" in capsys.readouterr().out
    plan = plan_merge(str(base), [str(adapter)], None, "huggingface", "5GB")
    compare_logits(plan, out)
    broken = tensors(out)
    broken["model.norm.weight"][0] = torch.nan
    save_file(broken, out / "model.safetensors", metadata={"format": "pt"})
    for folder in (base, out):
        with pytest.raises(UserError, match="does not match base and adapters, nothing was kept") as error:
            compare_logits(plan, folder)
        if folder == base:
            prompts = [torch.tensor([ids]) for ids in load_tokenizer(base)(list(PROMPTS))["input_ids"]]
            models = with_peft(base, adapter), loaded(base)
            ours, theirs = (torch.cat([model(ids).logits[0] for ids in prompts]) for model in models)
            spread = (ours - ours.mean(-1, keepdim=True)).square().mean()
            differ = ((theirs - ours).square().mean() / spread).sqrt().item()
            same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
            told = f"scores differ by {differ:.2%}, the next token is the same at {same} of {len(ours)} places"
            assert told in str(error.value)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.001), ("float16", 0.02), ("bfloat16", 0.1)])
def test_scores_may_differ_by_what_rounding_explains(base, adapter, monkeypatch, capsys, dtype, most):
    """Of a model whose scores are off by so much of their spread, in turns up and down."""
    plan = plan_merge(str(base), [str(adapter)], dtype)
    model = with_adapters(plan).eval()
    prompts = [torch.tensor([ids]) for ids in load_tokenizer(base)(list(PROMPTS))["input_ids"]]
    scores = torch.cat([model(prompt).logits[0] for prompt in prompts])
    spread = (scores - scores.mean(-1, keepdim=True)).square().mean().sqrt()

    class Near:
        def eval(self):
            return self

        def __call__(self, prompt):
            found = model(prompt).logits
            signs = 1 - 2 * (torch.arange(found.shape[-1]) % 2)
            return SimpleNamespace(logits=found + apart * spread * signs)

    monkeypatch.setattr(verify, "with_adapters", lambda _: model)
    monkeypatch.setattr(verify, "load_float32", lambda _: Near())
    for share in (0.98, 1.02):
        apart = share * most
        if share < 1:
            compare_logits(plan, base)
            assert f"verified on 4 prompts: scores differ by {apart:.2%}, the next" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match="nothing was kept"):
                compare_logits(plan, base)


def test_changes_that_leave_two_tensors_equal(tmp_path):
    rows = torch.randn(1024, 4)
    found = {"a": rows, "same": rows.clone(), "longer": torch.cat([rows, rows]), "other": torch.cat([rows[:-1], -rows[-1:]])}
    save_file(found, tmp_path / "a.safetensors")
    weights = Weights(tmp_path, [tmp_path / "a.safetensors"])
    one = {name: Replace(weights, name) for name in found}
    shift = object()
    assert same_changes([one["a"], shift], [one["same"], shift]) and same_changes([], [])
    for other in ("longer", "other"):
        assert not same_changes([one["a"]], [one[other]]) and not same_changes([one[other]], [one["a"]])
    assert not same_changes([one["a"]], [one["a"], shift]) and not same_changes([shift], [object()])


LAYOUT = "adapter: changes p, which the base's files store in another layout; use it through peft"
SHAPES = "adapter: has lora_A {} and lora_B {}, the base's p is (4, 12, 16); use the base model that it was trained on"
EXPERTS = {"weights": {"A": (8, 16), "B": (12, 8)}, "rows": {"gate": 5, "up": 7}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"rows": {"gate": 5, "up": 6}}, LAYOUT),
        ({"experts": 3}, LAYOUT),
        ({"weights": {"A": (8, 16), "B": (13, 8)}}, SHAPES.format((8, 16), (13, 8))),
        ({"weights": {"A": (6, 16), "B": (12, 6)}}, SHAPES.format((6, 16), (12, 6))),
    ],
)  # fmt: skip
def test_a_parameter_of_experts_that_lie_apart_in_the_files(change, words):
    given = EXPERTS | change
    weights = SimpleNamespace(shape=given["weights"].__getitem__, folder="adapter")
    parts = [[f"{name}{expert}" for name in given["rows"]] for expert in range(given.get("experts", 4))]
    shapes = {f"{name}{expert}": (rows, 16) for name, rows in given["rows"].items() for expert in range(4)}
    parameter = experts.Parameter("p", (4, 12, 16), 2.0, False)
    try:
        found = list(experts.additions(weights, {"A": "A", "B": "B"}, parameter, shapes, "", parts))
    except UserError as error:
        assert str(error) == words
        return
    cuts = {"gate": (0, 5), "up": (5, 12)}
    assert words == "" and found == [
        (f"{name}{expert}", AddExperts(weights, "A", "B", 2.0, None, False, 4, expert, cut))
        for expert in range(4)
        for name, cut in cuts.items()
    ]


def test_tokens_that_a_chat_template_taught_end_answers_where_the_tokenizer_has_them(tmp_path, capsys):
    """Of `<a>`, an ordinary `b` and a `<c>` that it lacks."""
    words, path = tiny.tokenizer(tmp_path), tmp_path / "generation_config.json"
    words.add_tokens([AddedToken("<a>", special=True)])
    taught, end = words.convert_tokens_to_ids("<a>"), words.eos_token_id
    for before, config, after in (
        (None, {}, [taught]),
        (None, {"eos_token_id": end}, [end, taught]),
        ({"temperature": 0.6, "eos_token_id": [end, taught]}, {}, [end, taught]),
        ({"temperature": 0.6, "eos_token_id": len(words)}, {"eos_token_id": end}, [end, taught]),
    ):
        path.unlink(missing_ok=True)
        if before:
            write_json(path, before)
        write_generation_config(tmp_path, config, words, {"texts": {"ends": "<a> b <c>"}})
        kept = {"temperature": 0.6} if before else {}
        found = json.loads(path.read_text())
        assert {name: found[name] for name in (*kept, "eos_token_id")} == kept | {"eos_token_id": after}
        told = "generation_config.json: <a> also ends answers, as the adapter learned with its chat template\n"
        assert capsys.readouterr().out.endswith(told) == (before is None or before["eos_token_id"] == len(words))


def test_tensors_in_meta_s_files_begin_at_multiples_of_64_bytes(tmp_path):
    for length in (1, 2, 7, 30, 64):
        file, kinds = tmp_path / f"{'c' * length}.pth", {name: ((3,), torch.float32) for name in ("a", "bc", "d" * 70)}
        meta_writer.write_pth(file, kinds, [shards.block_of(name, torch.ones(3)) for name in kinds])
        raw = file.read_bytes()
        for entry in zipfile.ZipFile(file).infolist():
            if "/data/" in entry.filename:
                name, extra = struct.unpack_from("<HH", raw, entry.header_offset + 26)
                start = entry.header_offset + 30 + name + extra
                assert start % 64 == 0 and raw[start : start + 12] == torch.ones(3).numpy().tobytes()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"attention_bias": True}, "has biases"),
        ({"mlp_bias": True}, "has biases"),
        ({"rope_scaling": {"rope_type": "linear"}}, "scales its rotary embeddings"),
        ({"head_dim": 32}, "has heads of another size"),
        ({"rope_scaling": {"rope_type": "default"}, "head_dim": 16, "attention_bias": False}, ""),
    ],
)
def test_llamas_that_meta_s_layout_cannot_hold(config, reason):
    plain = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
    plain |= {"num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    try:
        meta_writer.params_of(plain | config)
    except UserError as error:
        assert str(error) == f"--output_type pth: Meta's layout is for LLaMA, but this model {reason}; leave it out"
    else:
        assert not reason


def test_a_disk_that_takes_only_part_of_what_it_is_given_is_full(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data) - (len(data) == 48)

    monkeypatch.setattr(shards, "open", lambda file, *_, **__: Short(file, "w"), raising=False)
    kinds, blocks = {"a": ((3, 4), torch.float32)}, [shards.block_of("a", torch.ones(3, 4))]
    with pytest.raises(OSError, match="No space left on device") as error:
        shards.write_safetensors(tmp_path / "a.safetensors", kinds, blocks)
    assert error.value.filename == str(tmp_path / "a.safetensors")


def test_whole_numbers_keep_their_type(base, tmp_path):
    """Such as the positions that older conversions kept."""
    source = tmp_path / "base"
    source.mkdir()
    for file in base.glob("*.json"):
        (source / file.name).write_bytes(file.read_bytes())
    more = {"model.position_ids": torch.arange(5)}
    save_file(tensors(base) | more, source / "model.safetensors", metadata={"format": "pt"})
    found = tensors(merge(source, [], tmp_path / "out", "--dtype", "bfloat16"))
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(tensors(base), torch.bfloat16) | {
        "model.position_ids": torch.int64
    }
