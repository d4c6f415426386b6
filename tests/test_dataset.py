"""Encoded data: cached by what it was made of, counted, split; and what --dry_run shows of it."""

import json

import numpy as np
import pytest
from scripting import ROOT
from test_training import options

from utils import dataset, memory
from utils.console import UserError
from utils.modeling import Placement
from utils.prompter import Prompter
from utils.records import load_records
from utils.tokenizer import load_tokenizer
from utils.tokenizer_files import tokenizer_hash

F1 = ROOT / "data/demo/f1.json"


def table_of(tiny_llama, file, cutoff_len=256, template="alpaca_short", train_on_inputs=False, keep=True, calls=None):
    tokenizer = load_tokenizer(tiny_llama)
    encoder = dataset.Encoder(Prompter(template), tokenizer, tokenizer_hash(tiny_llama), cutoff_len, train_on_inputs)

    def read():
        calls.append(1)
        return load_records(str(file))

    calls = [] if calls is None else calls
    from utils.files import sha256

    return dataset.encode_all(encoder, {str(file): sha256(file)}, str(file), read, keep)


def test_encoded_records_are_found_again_but_a_stale_cache_is_never_used(tiny_llama, tmp_path):
    calls = []
    file = tmp_path / "records.json"
    file.write_bytes(F1.read_bytes())
    first = table_of(tiny_llama, file, calls=calls)
    assert table_of(tiny_llama, file, calls=calls)[:] == first[:] and len(calls) == 1
    for changes in ({"cutoff_len": 30}, {"template": "alpaca"}, {"train_on_inputs": True}):
        assert table_of(tiny_llama, file, calls=calls, **changes)[:] != first[:]
    assert len(calls) == 4
    records = json.loads(file.read_text("utf-8"))
    records[0]["output"] += "！"
    file.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    assert table_of(tiny_llama, file, calls=calls)[0] != first[0] and len(calls) == 5


def test_a_prompt_that_fills_the_cutoff_is_counted_and_dropped(tiny_llama, tmp_path, capsys):
    """Rows 10 and 19."""
    records = [{"instruction": "长" * 200, "input": "", "output": "好"}, *json.loads(F1.read_text("utf-8"))]
    file = tmp_path / "long.json"
    file.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    table = table_of(tiny_llama, file, cutoff_len=150)
    numbers = dataset.usable(table, 150)
    out = capsys.readouterr().out
    assert 0 not in numbers and len(numbers) == 30
    assert "cuts 1 of 31 records (1 of them dropped" in out and "would keep 95 % whole" in out
    with pytest.raises(UserError, match="leaves no answer in any of 31 records"):
        dataset.usable(table_of(tiny_llama, file, cutoff_len=5), 5)


def test_the_lengths_that_keep_95_and_99_percent():
    lengths = np.arange(1, 1001)
    low, high = dataset.lengths_that_keep(lengths)
    assert (lengths <= low).mean() >= 0.95 > (lengths <= low - 2).mean()
    assert (lengths <= high).mean() >= 0.99 > (lengths <= high - 2).mean()


def test_the_split_is_seeded_and_takes_a_count_or_a_fraction():
    numbers = np.arange(100)
    train, validation = dataset.split(numbers, 20, 42)
    assert sorted([*train, *validation]) == list(range(100)) and len(validation) == 20
    assert (dataset.split(numbers, 0.2, 42)[1] == validation).all()
    assert (dataset.split(numbers, 20, 43)[1] != validation).any()
    assert len(dataset.split(numbers, 0, 42)[1]) == 0
    with pytest.raises(UserError, match=r"--val_set_size 100: takes 100 of the 100 records"):
        dataset.split(numbers, 100, 42)


def test_a_dry_run_shows_everything_and_writes_nothing(script, tiny_llama, tmp_path):
    argv = options(tiny_llama, F1, tmp_path / "out", dry_run=True, cutoff_len=80, train_on_inputs=False)
    (tiny_llama / "model.safetensors").rename(tmp_path / "away")  # the weights are not needed
    try:
        out = script("finetune.py", *argv).ok
    finally:
        (tmp_path / "away").rename(tiny_llama / "model.safetensors")
    for words in ("records by length", "would keep 99 %", "4 optimizer steps an epoch, 8 in all", "parameters would be trained",
                  "memory on cpu", "example 2", "\033[32m我是梦想家", "\033[1;31m</s>"):  # fmt: skip
        assert words in out, words
    assert not (tmp_path / "out").exists()


def test_the_estimate_counts_weights_by_their_bits(tiny_llama):
    import torch

    model = memory.skeleton(str(tiny_llama))
    for parameter in model.parameters():
        parameter.requires_grad = False
    sizes = {
        bits: memory.estimate(model, Placement(torch.device("cpu"), torch.float16, bits), "float16", 1024, False)
        for bits in (None, "8bit", "4bit")
    }
    assert sizes["4bit"].base < sizes["8bit"].base < sizes[None].base == 2 * sum(p.numel() for p in model.parameters())
    less = memory.estimate(model, Placement(torch.device("cpu"), torch.float16, None), "float16", 1024, True)
    assert less.activations < sizes[None].activations
