"""Encoded data: cached by what it was made of, counted, split; and what --dry_run shows of it."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from peft import LoraConfig
from scripting import ROOT
from trainings import options

from utils.adapters import adapters
from utils.console import UserError
from utils.datasets import dataset
from utils.datasets.encoders import Encoder, make_encoder
from utils.datasets.encoding import IGNORED, encode, encode_prompt
from utils.datasets.sources import data_files
from utils.datasets.stages import INSTRUCTION, LABELLED, PREFERENCE, REWARD, TEXT
from utils.datasets.templates import Prompter
from utils.files import sha256
from utils.models.architecture import meta_model
from utils.models.placement import DeviceConfig
from utils.models.tokenizer import load_tokenizer
from utils.models.tokenizer_files import tokenizer_hash
from utils.training import dry_run, memory

F1 = ROOT / "data/demo/f1.json"


def encode_all(tiny_llama, data_path, cutoff_len=256, template="alpaca_short", train_on_inputs=False, keep=True, seed=42):
    tokenizer = load_tokenizer(tiny_llama)
    encoder = Encoder(Prompter(template), tokenizer, tokenizer_hash(tiny_llama), cutoff_len, train_on_inputs)
    hashes = {str(file): sha256(file) for file in data_files(str(data_path))}
    return dataset.encode_all(encoder, str(data_path), hashes, seed, keep)


def test_records_are_encoded_where_no_home_can_be_written_to(tiny_llama, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").touch()  # nothing can be made in it, by nobody
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home" / "cache")
    write(tmp_path / "data.json", 3)
    for _ in range(2):
        table, _ = encode_all(tiny_llama, tmp_path / "data.json")
        assert len(table) == 3 and "encoded records are not kept for later runs" in capsys.readouterr().out


def write(path, count, name=""):
    records = [{"instruction": f"{name}{number}", "input": "", "output": "x"} for number in range(count)]
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    return records


def test_encoded_records_are_found_again_but_a_stale_cache_is_never_used(tiny_llama, tmp_path, capsys):
    def table(**changes):
        found = encode_all(tiny_llama, file, **changes)[0]
        return found[:], "are already in" in capsys.readouterr().out

    file = tmp_path / "records.json"
    file.write_text(F1.read_text("utf-8").replace("梦想家", f"梦想家{time.time_ns()}"), "utf-8")
    first, was_found = table()
    assert not was_found
    assert table() == (first, True)
    for changes in ({"cutoff_len": 30}, {"template": "alpaca"}, {"train_on_inputs": True}):
        other, was_found = table(**changes)
        assert other != first and not was_found
    records = json.loads(file.read_text("utf-8"))
    records[0]["output"] += "！"
    file.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    other, was_found = table()
    assert other != first and not was_found


def test_a_text_is_no_record_though_their_bytes_are_the_same(tiny_llama, tmp_path):
    encoder = make_encoder(TEXT, Prompter("alpaca"), load_tokenizer(tiny_llama), "", 64, False)
    rows = []
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text(json.dumps({"text": str(time.time_ns() if not rows else rows[0][0])}), "utf-8")
        (tmp_path / "a.txt").write_bytes((tmp_path / "a.jsonl").read_bytes())
        rows.append(dataset.encode_file(encoder, tmp_path / name, sha256(tmp_path / name), keep=True)[:]["full_length"])
    assert rows[0] != rows[1]


def test_whatever_rules_the_rows_is_what_a_cache_is_found_by(tiny_llama):
    words = load_tokenizer(tiny_llama)
    usual = {"prompter": Prompter("alpaca"), "tokenizer_hash": "a", "cutoff_len": 64, "train_on_inputs": True, "room": 8}
    other = {"prompter": Prompter("chinese"), "tokenizer_hash": "b", "cutoff_len": 65, "train_on_inputs": False, "room": 9}
    kinds = [usual | {"stage": stage} for stage in (TEXT, INSTRUCTION, PREFERENCE, LABELLED, REWARD)]
    made = [make_encoder(tokenizer=words, **one).made_of for one in kinds]
    made += [make_encoder(tokenizer=words, **usual | {name: other[name]}, stage=REWARD).made_of for name in other]
    assert len({json.dumps(one) for one in made}) == 10


def test_a_question_is_asked_as_long_as_a_longest_answer_fits_beside_it(tiny_llama):
    how = {"prompter": Prompter("alpaca"), "tokenizer": load_tokenizer(tiny_llama), "tokenizer_hash": "", "room": 8}
    record = {"instruction": "你是谁？", "input": "", "output": "我是梦想家。"}
    needed = len(encode_prompt(record, how["prompter"], how["tokenizer"])) + 8
    for most, room in ((needed, 8), (needed - 1, 0)):
        [row] = make_encoder(REWARD, cutoff_len=most, train_on_inputs=True, **how)([record]).to_pylist()
        assert (row["answer_tokens"], set(row["labels"]), json.loads(row["record"])) == (room, {IGNORED}, record)


def test_what_was_dropped_is_said_again_though_the_file_is_not_read_again(tiny_llama, tmp_path, capsys):
    records = write(tmp_path / "a.json", 3, name=str(time.time_ns()))
    (tmp_path / "a.json").write_text(json.dumps([*records, {"instruction": "", "output": ""}]), "utf-8")
    shutil.copy(tmp_path / "a.json", tmp_path / "其他.json")
    printed = []
    for name in ("a.json", "其他.json"):
        encode_all(tiny_llama, tmp_path / name)
        printed.append(capsys.readouterr().out.replace(name, "a.json").splitlines())
    first, again = printed
    assert any("dropped" in line for line in first) and "already in" in again[0] and again[1:] == first


def test_several_files_with_weights(tiny_llama, tmp_path, capsys):
    """Pitfall 20: what a weight draws follows from the seed."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write(a, 10, "a"), write(b, 9, "b")

    def numbers(data_path, **changes):
        return encode_all(tiny_llama, data_path, **changes)[1].tolist()

    assert numbers(f"{a},{b}") == list(range(19))
    assert numbers(f"{a}:2") == [*range(10)] * 2
    mixed = numbers(f"{a}:1.5, {b}:0.4", seed=1)
    assert mixed[:10] == list(range(10))
    half, half_b = mixed[10:15], mixed[15:]
    assert half == sorted(set(half)) and half[-1] < 10
    assert len(half_b) == 4 and half_b == sorted(set(half_b)) and half_b[0] >= 10
    said = capsys.readouterr().out
    assert f"{a}: weight 1.5 makes 15 of 10 records" in said
    assert f"{b}: weight 0.4 makes 4 of 9 records" in said
    assert numbers(f"{a}:1.5,{b}:0.4", seed=1) == mixed
    assert numbers(f"{a}:1.5,{b}:0.4", seed=2) != mixed
    twice = numbers(f"{a}:0.5,{a}:0.5")
    assert twice[:5] != [number - 10 for number in twice[5:]], "each source is drawn from by itself"
    with pytest.raises(UserError, match="the weights leave no record"):
        numbers(f"{a}:0.01")


def test_a_record_that_weighs_more_is_never_in_both_sets():
    train, validation = dataset.split(np.tile(np.arange(50), 3), 10, 42)
    assert len(validation) == 10 and len(train) == 3 * 40
    assert not set(train) & set(validation)


def test_many_records_are_encoded_by_several_processes_as_by_one(tiny_llama, tmp_path, monkeypatch):
    records = write(tmp_path / "many.json", dataset.FEW * dataset.CHUNK + 500, str(time.time_ns()))
    table, _ = encode_all(tiny_llama, tmp_path / "many.json", keep=False)
    monkeypatch.setattr(dataset.os, "sched_getaffinity", lambda _: {0})
    alone, _ = encode_all(tiny_llama, tmp_path / "many.json", keep=False)
    assert len(table) == len(records) and table[:] == alone[:]


@pytest.mark.slow
@pytest.mark.long
def test_memory_stays_flat_however_many_records(tiny_llama, tmp_path):
    """The peak of a process that encodes 40 times as many records grows by less than a tenth of what these take."""
    program = (
        "import sys\nsys.path[:0] = sys.argv[1:4]\n"
        "import pathlib, re, test_dataset\n"
        "for file in sys.argv[5:]:\n"
        "    table, _ = test_dataset.encode_all(pathlib.Path(sys.argv[4]), file, keep=False)\n"
        "    peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "    print(int(peak) >> 10)\n"
    )
    text = "问" * 200
    for name, count in (("few", 5_000), ("many", 60_000)):
        with (tmp_path / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
            for number in range(count):
                lines.write(json.dumps({"instruction": f"{number}{text}", "output": text}, ensure_ascii=False) + "\n")
    arguments = [ROOT, ROOT / "tests", ROOT / "tests" / "datasets", tiny_llama, tmp_path / "few.jsonl", tmp_path / "many.jsonl"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=True)
    few, many = (int(line) for line in done.stdout.splitlines() if line.isdigit())
    print(done.stdout)
    assert many - few < 60


def test_a_prompt_that_fills_the_cutoff_is_counted_and_dropped(tiny_llama, tmp_path, capsys):
    """Rows 10 and 19."""
    records = [{"instruction": "长" * 200, "input": "", "output": "好"}, *json.loads(F1.read_text("utf-8"))]
    file = tmp_path / "long.json"
    file.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    numbers = dataset.usable(*encode_all(tiny_llama, file, cutoff_len=150), 150)
    out = capsys.readouterr().out
    assert 0 not in numbers and len(numbers) == 30
    assert "cuts 1 of 31 records (1 of them dropped" in out and "would keep 95 % uncut" in out
    table, every = encode_all(tiny_llama, file, cutoff_len=1000)
    longest = max(table["full_length"])  # of which no token is cut where so many are kept
    assert len(dataset.usable(table, every, longest)) == 31 and "cuts" not in capsys.readouterr().out
    with pytest.raises(UserError, match="leaves no answer in any of 31 records"):
        dataset.usable(*encode_all(tiny_llama, file, cutoff_len=5), 5)


@pytest.mark.parametrize("records", [10, 1000])
def test_the_lengths_that_keep_95_and_99_percent(records):
    lengths = np.arange(1, records + 1)
    low, high = dataset.lengths_that_keep(lengths)
    assert (lengths <= low).mean() >= 0.95 > (lengths <= low - 2).mean()
    assert (lengths <= high).mean() >= 0.99 > (lengths <= high - 2).mean()


def test_the_split_is_seeded_and_takes_a_count_or_a_fraction():
    numbers = np.arange(100)
    assert len(dataset.split(numbers, 0.026, 0)[1]) == 3
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
        out = script("finetune.py", *argv).ok()
    finally:
        (tmp_path / "away").rename(tiny_llama / "model.safetensors")
    trained = 2 * 8 * ((64 + 64) + (64 + 32))
    total = trained + sum(parameter.numel() for parameter in meta_model(str(tiny_llama)).parameters())
    *_, steps, parameters, kept, again, last = out.splitlines()
    assert steps == "4 optimizer steps per epoch, 8 in all"
    assert parameters == f"{trained:,} of {total:,} parameters would be trained"
    assert kept.startswith("memory on cpu, float32, --gradient_checkpointing False: about 0.0 GB (base 0.00, adapter 0.00, ")
    assert again.startswith("memory on cpu, float32, --gradient_checkpointing True: about 0.0 GB (base 0.00, adapter 0.00, ")
    assert last == "dry run: no weights were loaded and nothing was written"
    for words in ("records by length", "would keep 99 %", "example 1 ([[supervised]], {{end of sequence}}):", "[[我是梦想家"):
        assert words in out, words
    assert out.count("\nexample ") == 2 and "\nexample 2 (" in out and "{{</s>}}" in out
    assert not (tmp_path / "out").exists()


def test_a_report_shows_how_long_the_records_are_and_where_the_cutoff_falls(capsys):
    dry_run.print_report([*range(1, 121), 5, 5, 5], 111, [], None)
    rows = [(f"{low:>7} … {low + 10:<7}", 13 if low == 1 else 10, low) for low in range(1, 121, 10)]
    bars = [
        f"{edges}{'#' * (40 * count // 13 + (count < 13)):<40} {count}{' < --cutoff_len' * (low == 111)}"
        for edges, count, low in rows
    ]
    told = ["records by length in tokens:", *bars, "--cutoff_len 114 would keep 95 % uncut, 119 would keep 99 %"]
    assert capsys.readouterr().out.splitlines() == told


def test_the_only_colors_of_an_example_are_ours(tiny_llama, monkeypatch):
    """A record cannot steer the terminal on which it is shown."""
    words = load_tokenizer(tiny_llama)
    ids = words("a\x1b[41mb\n中", add_special_tokens=False)["input_ids"]
    assert dry_run.example({"input_ids": ids, "labels": ids}, words) == "[[a\\x1b[41mb\n中]]", "no color in a pipe"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert dry_run.example({"input_ids": ids, "labels": ids}, words) == "\033[32ma\\x1b[41mb\n中\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in dry_run.example({"input_ids": ids, "labels": ids}, words)


def test_the_estimate_counts_weights_by_their_bits(tiny_llama):
    import torch

    base = meta_model(str(tiny_llama))
    frozen = 2 * sum(parameter.numel() for parameter in base.parameters())
    model = adapters.add(base, LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    sizes = {
        bits: memory.estimate(model, DeviceConfig(torch.device("cpu"), torch.bfloat16, bits), 4, 256)
        for bits in (None, "8bit", "4bit")
    }
    quantized = sum(m.weight.numel() for name, m in meta_model(str(tiny_llama)).named_modules() if name.endswith("_proj"))
    assert [sizes[bits].base for bits in sizes] == pytest.approx([frozen, frozen - quantized, frozen - 1.47 * quantized])
    trained = 2 * 8 * (64 + 64)
    assert {(one.adapter, one.logits) for one in sizes.values()} == {(16 * trained, 3 * 512 * 4 * base.config.vocab_size)}
    assert sizes[None].described(True).startswith(f"about {sizes[None].total(True) / 1e9:.1f} GB (base {frozen / 1e9:.2f}, ")
    assert sizes[None].checkpointed < sizes[None].activations < sizes["8bit"].activations


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_answers_that_a_record_excludes_are_read_and_not_learned(tiny_llama, train_on_inputs):
    tokenizer, ids = load_tokenizer(tiny_llama), []
    record = {"instruction": "三", "input": "", "output": "四四", "history": [["一", "二二"]]}
    for learn in (None, [False, True], [True, False]):
        marked = record | ({"learn": learn} if learn else {})
        (found,) = encode([marked], Prompter("alpaca_short"), tokenizer, 256, train_on_inputs)
        ids.append((found.input_ids, found.labels, found.answer_tokens))
    (whole, labels, count), *marked = ids
    first = len(tokenizer("二二", add_special_tokens=False)["input_ids"]) + 1  # and its end of sequence
    second = count - first
    end = whole.index(tokenizer.eos_token_id) + 1
    places = [range(end - first, end), range(len(whole) - second, len(whole))]
    for excluded, (same, found, left) in zip(places, marked, strict=True):
        assert same == whole
        assert found == [IGNORED if place in excluded else label for place, label in enumerate(labels)]
        assert left == count - len(excluded)
