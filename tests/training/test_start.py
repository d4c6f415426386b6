"""Where finetune.py starts: from the base, from an adapter, from its own checkpoint; and what cannot be lost on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trainings import history, losses, options, same, tensors
from transformers import AutoModelForCausalLM

from utils import lineage
from utils.console import UserError
from utils.training import checkpoints, start

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def first(bases, data, tmp_path_factory):
    """A finished run with checkpoints on the way, and its command."""
    from scripting import Script

    folder = tmp_path_factory.mktemp("first")
    argv = options(bases["llama"], data, folder / "run", lora_r=4, lora_alpha=8, save_steps=2)
    Script(folder)("finetune.py", *argv).ok()
    return folder / "run"


def again(bases, data, output, **changes):
    return options(bases["llama"], data, output, **({"save_steps": 2, "lora_r": 4, "lora_alpha": 8} | changes))


def test_an_adapter_from_elsewhere_is_trained_on_with_its_own_settings(script, bases, data, first, tmp_path):
    """Rows 2 and 3: rank, alpha and targets are the adapter's; optimizer and steps start over; the weights do not."""
    argv = options(bases["llama"], data, tmp_path / "out", resume_from_checkpoint=first, num_epochs=1, lora_dropout=0.25)
    out = script("finetune.py", *argv).ok()
    assert f"incremental training: weights from {first}; optimizer and schedule start fresh" in out
    assert f"taken from {first}: --lora_r 4, --lora_alpha 8, --lora_target_modules [q_proj,v_proj]\n" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    assert config["lora_dropout"] == 0.25, "each run chooses it"
    assert losses(tmp_path / "out")[0] < losses(first)[0] * 0.9
    steps = lineage.chain(tmp_path / "out")
    assert [step["options"]["output_dir"] for step in steps] == [str(first), str(tmp_path / "out")]
    assert lineage.table(steps).count("\n") == 3


def test_training_goes_on_from_an_adapter_with_a_larger_vocabulary(script, bases, data, tmp_path):
    """As of Chinese-LLaMA: the base's rows grow as they did for its parent, whose values they then have."""
    words = tiny.tokenizer(tmp_path / "words")
    words.add_tokens([f"梦{number}" for number in range(24)])
    large = tiny.llama(tmp_path / "large", vocab_size=len(words))
    parent = tiny.adapter(large, tmp_path / "parent", modules_to_save=["embed_tokens", "lm_head"])
    words.save_pretrained(parent)
    changes = {"resume_from_checkpoint": parent, "num_epochs": 1, "learning_rate": 1e-9}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **changes)).ok()
    before, after = tensors(parent), tensors(tmp_path / "out")
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["missing", "empty", "foreign", "truncated", "code"])
def test_what_is_no_adapter_is_an_error(script, bases, data, first, tmp_path, kind):
    """Rows 2 and 21: never "not found" and a start from scratch; never code out of a pickle."""
    folder = tmp_path / "adapter"
    if kind != "missing":
        shutil.copytree(first, folder)
        (folder / "adapter_model.safetensors").unlink()
    if kind == "truncated":
        (folder / "adapter_model.safetensors").write_bytes((first / "adapter_model.safetensors").read_bytes()[:-100])
    if kind == "foreign":
        torch.save({"model.layers.0.weight": torch.zeros(3)}, folder / "adapter_model.bin")
    if kind == "code":

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'owned'}",)

        torch.save({"a": Evil()}, folder / "adapter_model.bin")
    error = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", resume_from_checkpoint=folder)).error
    assert str(folder) in error and not (tmp_path / "out").exists() and not (tmp_path / "owned").exists()


def test_another_base_is_an_error_that_says_how_it_differs(script, bases, data, first, tmp_path):
    """Row 7."""
    error = script("finetune.py", *options(bases["qwen2"], data, tmp_path / "out", resume_from_checkpoint=first)).error
    assert "model_type llama against qwen2" in error and not (tmp_path / "out").exists()


def test_the_same_base_in_another_dtype_and_shards_is_the_same(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases["llama"]).half()
    model.save_pretrained(tmp_path / "half", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["llama"] / name, tmp_path / "half" / name)
    one, other = lineage.fingerprint(str(bases["llama"])), lineage.fingerprint(str(tmp_path / "half"))
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1 and lineage.differences(one, other) == []
    other["samples"] = {name: [value + 1 for value in values] for name, values in other["samples"].items()}
    assert any("other values in" in difference for difference in lineage.differences(one, other))


def test_checkpoints_of_alpaca_lora_are_accepted(script, bases, data, first, tmp_path):
    """A full pytorch_model.bin with the base's weights beside, no adapter_config.json, the adapter's name in its keys."""
    old = tmp_path / "checkpoint-200"
    old.mkdir()
    saved = {f"base_model.model.{name}": tensor for name, tensor in load_file(bases["llama"] / "model.safetensors").items()}
    saved |= {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors(first).items()}
    torch.save(saved, old / "pytorch_model.bin")
    out = script(
        "finetune.py", *options(bases["llama"], data, tmp_path / "out", resume_from_checkpoint=old, lora_alpha=8, num_epochs=1)
    ).ok()
    told = "has no adapter_config.json; its weights show rank 4 on q_proj, v_proj; alpha 8 is assumed"
    assert f"{old}: {told}\n" in out and f"taken from {old}: --lora_r 4, --lora_target_modules [q_proj,v_proj]\n" in out
    assert losses(tmp_path / "out")[0] < losses(first)[0] * 0.9


def test_a_finished_run_is_not_overwritten_unasked(script, bases, data, first, tmp_path):
    shutil.copytree(first, tmp_path / "out")
    before = tensors(tmp_path / "out")
    assert "finished run" in script("finetune.py", *again(bases, data, tmp_path / "out")).error
    assert same(tensors(tmp_path / "out"), before)
    script("finetune.py", *again(bases, data, tmp_path / "out", overwrite_output_dir=True, seed=7)).ok()
    assert not same(tensors(tmp_path / "out"), before)


def test_what_a_run_starts_from(bases, first, tmp_path, capsys):
    """By what the output folder holds, what is named and whether it may be overwritten."""
    run = shutil.copytree(first, tmp_path / "run")
    (run / lineage.FILE).unlink()
    newest, older = run / "checkpoint-10", run / "checkpoint-8"
    (run / "checkpoint-9").mkdir()
    for named in (None, "", "None", "False", "auto"):
        assert start.decide(str(run), named, False) == start.RunStart(None, newest)
    assert start.decide(str(run), str(first), False) == start.RunStart(first, newest)
    assert start.decide(str(run), str(older), False) == start.RunStart(None, older)
    assert start.decide(str(run), str(first), True) == start.RunStart(first, None)
    assert start.decide(str(run), None, True) == start.RunStart(None, None)
    assert start.decide(str(tmp_path / "new"), str(older), False) == start.RunStart(older, None)
    place = "with its optimizer, schedule, random state and place in the data"
    skipped = f"{run}/checkpoint-9: incomplete (interrupted while being written, or changed since); skipped"
    (newest / "trainer_state.json").write_text("{}")
    capsys.readouterr()
    start.decide(str(run), None, False)
    start.decide(str(run), str(first), True)
    start.decide(str(run), None, True)
    assert capsys.readouterr().out.splitlines() == [
        skipped.replace("checkpoint-9", "checkpoint-10"),
        skipped,
        f"resuming this run from {older}, {place}",
        f"incremental training: weights from {first}; optimizer and schedule start fresh",
        "warm start: a fresh adapter on the base model",
    ]
    whole = {"lora_target_modules": "all-linear"}
    start.check_parent(start.RunStart(None, newest), whole, str(bases["llama"]))
    with pytest.raises(UserError, match=r"--lora_target_modules is all-linear, the adapter's is \[q_proj,v_proj\]; leave"):
        start.check_parent(start.RunStart(first, None), whole, str(bases["llama"]))
    (tmp_path / "link").symlink_to(run)
    for output, named, words in (
        (run, run, "is the output folder itself"),
        (run, tmp_path / "link", "is the output folder itself"),
        (run, run / "checkpoint-9", "is not a complete checkpoint of this run; give --resume_from_checkpoint auto"),
        (first, None, "holds a finished run"),
    ):
        with pytest.raises(UserError, match=words):
            start.decide(str(output), named and str(named), False)


@pytest.mark.parametrize("moment", [0, 1, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (2, 3))])
def test_killed_at_any_moment_the_same_command_ends_in_the_same_adapter(script, bases, data, first, tmp_path, moment):
    """SIGKILL while training or while a checkpoint is written; dropout is on; equal to the bit."""
    numbers = random.Random(moment)
    running = script.start("finetune.py", *again(bases, data, tmp_path / "out"))
    step = numbers.randint(1, 9)
    if moment % 2:
        running.wait_until(lambda: (tmp_path / "out" / f"checkpoint-{step - step % 2 or 2}").exists())
    else:
        log = tmp_path / "out" / "train_log.jsonl"
        running.wait_until(lambda: log.exists() and log.read_text().count('"loss"') >= step)
    running.kill()
    running.wait()
    out = script("finetune.py", *again(bases, data, tmp_path / "out")).ok()
    assert "resuming this run" in out or "warm start" in out
    assert same(tensors(tmp_path / "out"), tensors(first))
    assert (tmp_path / "out" / "train_log.jsonl").read_text() == (first / "train_log.jsonl").read_text()
    assert lineage.read(tmp_path / "out")["results"] == lineage.read(first)["results"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(script, bases, data, first, tmp_path, number):
    running = script.start("finetune.py", *again(bases, data, tmp_path / "out", save_steps=100))
    log = tmp_path / "out" / "train_log.jsonl"
    running.wait_until(lambda: log.exists() and '"loss"' in log.read_text())
    running.kill(number)
    ended = running.wait()
    assert ended.status == 128 + number and "Traceback" not in ended.err
    stopped = checkpoints.step_of(checkpoints.newest_whole(tmp_path / "out"))
    assert ended.out.splitlines()[-2:] == [
        "stopping after this step, with a checkpoint; once more stops at once",
        f"stopped at step {stopped}; run the same command again to resume",
    ]
    script("finetune.py", *again(bases, data, tmp_path / "out", save_steps=100)).ok()
    assert same(tensors(tmp_path / "out"), tensors(first))


def test_what_nohup_has_ignored_stays_so(script, bases, data, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as a forked program finds it under nohup
    try:
        running = script.start("finetune.py", *again(bases, data, tmp_path / "out", max_steps=6))
    finally:
        signal.signal(signal.SIGHUP, before)
    log = tmp_path / "out" / "train_log.jsonl"
    running.wait_until(lambda: log.exists() and '"loss"' in log.read_text())
    running.kill(signal.SIGHUP)
    ended = running.wait()
    assert ended.status == 0 and "stopping" not in ended.out and len(losses(tmp_path / "out")) == 6


@pytest.fixture
def unfinished(script, bases, data, first, tmp_path):
    """A run on top of `first` that was stopped with a checkpoint."""
    running = script.start("finetune.py", *again(bases, data, tmp_path / "out", resume_from_checkpoint=first))
    running.wait_until(lambda: checkpoints.newest_whole(tmp_path / "out") is not None)
    running.kill()
    running.wait()
    return tmp_path / "out"


@pytest.mark.slow
def test_a_checkpoint_of_its_own_wins_over_the_parent_that_the_command_names(script, bases, data, first, unfinished):
    """Row 3: every rerun names its parent, also after a kill."""
    other = unfinished.parent / "undisturbed"
    script("finetune.py", *again(bases, data, other, resume_from_checkpoint=first)).ok()
    for asked in (first, "auto", unfinished / checkpoints.newest_whole(unfinished).name):
        copied = unfinished.parent / "out"  # the folder's own name: a checkpoint belongs to it
        saved = unfinished.parent / "saved"
        shutil.copytree(copied, saved)
        out = script("finetune.py", *again(bases, data, copied, resume_from_checkpoint=asked)).ok()
        assert "resuming this run from" in out
        assert same(tensors(copied), tensors(other))
        assert lineage.read(copied)["parent"]["name"] == str(first)
        shutil.rmtree(copied)
        saved.rename(copied)


def test_changed_options_or_data_beside_a_checkpoint_are_listed(script, bases, data, first, unfinished, tmp_path):
    error = script(
        "finetune.py", *again(bases, data, unfinished, resume_from_checkpoint=first, learning_rate=0.5, num_epochs=9)
    ).error
    assert "learning_rate was 0.01, is 0.5" in error and "num_epochs was 2, is 9" in error and "seed" not in error
    shorter = json.loads(data.read_text())[:30]
    (tmp_path / "other.json").write_text(json.dumps(shorter))
    error = script("finetune.py", *again(bases, tmp_path / "other.json", unfinished, resume_from_checkpoint=first)).error
    assert "data file" in error
    error = script("finetune.py", *again(bases, data, unfinished)).ok()
    assert "resuming" in error, "leaving the parent out is not a change"


def test_a_half_written_checkpoint_is_never_taken_for_whole(script, bases, data, first, unfinished):
    newest = checkpoints.newest_whole(unfinished)
    files = sorted(file for file in newest.iterdir() if file.name != checkpoints.MANIFEST)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        assert not checkpoints.is_whole(newest), file
        file.write_bytes(content)
    assert checkpoints.is_whole(newest)
    (newest / checkpoints.MANIFEST).unlink()
    assert checkpoints.newest_whole(unfinished) != newest


def test_killed_after_its_last_step_amid_an_epoch(script, bases, data, tmp_path):
    """It goes on without a step more, and deletes the checkpoints that it had no time to delete."""
    common = {"max_steps": 3, "save_steps": 1}
    script("finetune.py", *options(bases["llama"], data, tmp_path / "out", save_total_limit=3, **common)).ok()
    whole = tensors(tmp_path / "out")
    for name in (lineage.FILE, "adapter_model.safetensors"):
        (tmp_path / "out" / name).unlink()
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", save_total_limit=1, **common)).ok()
    assert "resuming this run" in out and lineage.read(tmp_path / "out")["results"]["steps"] == 3
    assert [folder.name for folder in checkpoints.in_order(tmp_path / "out")] == ["checkpoint-3"]
    assert same(tensors(tmp_path / "out"), whole) and len(losses(tmp_path / "out")) == 3


def test_the_best_adapter_is_kept_unless_the_last_is_asked_for(script, bases, data, tmp_path):
    """With so high a rate the second step makes the validation loss worse than the first did."""
    common = {"val_set_size": 8, "learning_rate": 0.5, "max_steps": 2, "eval_steps": 1, "lr_scheduler_type": "constant"}
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "best", **common)).ok()
    script("finetune.py", *options(bases["llama"], data, tmp_path / "last", load_best_model_at_end=False, **common)).ok()
    entries = history(tmp_path / "best")
    validation = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    best = min(validation, key=validation.get)
    results = lineage.read(tmp_path / "best")["results"]
    assert results["kept_step"] == best < max(validation) and results["eval_loss"] == validation[best]
    assert f"kept: the adapter of step {best}" in out
    assert same(tensors(tmp_path / "best"), tensors(tmp_path / "best" / f"checkpoint-{best}"))
    assert lineage.read(tmp_path / "last")["results"]["kept_step"] == max(validation)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(bases, data, tmp_path):
    """DDP with gloo: without dropout, losses and adapter equal those of one process to 1e-5."""
    common = {"lora_dropout": 0, "val_set_size": 5, "max_grad_norm": 0}
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "finetune.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, words in (("one", ["finetune.py"]), ("two", command)):
        done = subprocess.run(
            [sys.executable, *words, *options(bases["llama"], data, tmp_path / name, **common)],
            capture_output=True, text=True, env=env, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_fsdp_that_would_quietly_be_something_else_is_refused(script, bases, data, tmp_path):
    argv = options(bases["llama"], data, tmp_path / "out")
    full = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for version, words in (("1", "fsdp_version is 1, but must be 2"), ("2", "FSDP was asked for")):
        assert words in script("finetune.py", *argv, ACCELERATE_USE_FSDP="true", FSDP_VERSION=version, **full).error


def test_a_loss_that_is_not_finite_stops_with_step_and_records(script, bases, data, tmp_path):
    """Row 10."""
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["llama"] / name, tmp_path / "base" / name)
    left = sorted(torch.randperm(40, generator=torch.Generator().manual_seed(42)).tolist()[38:])  # by validation
    run = options(tmp_path / "base", data, tmp_path / "out", val_set_size=38)
    assert script("finetune.py", *run).error == (
        f"finetune.py: error: step 1: the loss is not finite in the micro-batches of records {left[0]}, {left[1]} "
        "(counted from 0 over --data_path); look at these, or check the model's weights, which have not been trained yet"
    )


def test_a_full_disk_leaves_the_last_whole_checkpoint(script, bases, data, first, tmp_path):
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        argv = again(bases, data, disk / "out", save_total_limit=100)
        running = script.start("finetune.py", *argv)
        running.wait_until(lambda: checkpoints.newest_whole(disk / "out") is not None)
        (disk / "filler").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 60_000))
        error = running.wait().error
        assert "No space left" in error or "could not be written" in error
        assert checkpoints.newest_whole(disk / "out")
        (disk / "filler").unlink()
        script("finetune.py", *argv).ok()
        assert same(tensors(disk / "out"), tensors(first))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_seed_rules_everything(script, bases, data, tmp_path):
    """Row 20."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script("finetune.py", *options(bases["llama"], data, tmp_path / name, seed=seed, val_set_size=0.2)).ok()
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b")) and not same(tensors(tmp_path / "a"), tensors(tmp_path / "c"))


def test_an_adapter_on_a_full_model_gives_its_logits(bases, first):
    """What was saved is what was trained: read back by peft, in a fresh model, it lowers the loss of its data."""
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    assert PeftModel.from_pretrained(base, first).peft_config["default"].r == 4


def test_names_that_no_record_can_hold_are_refused_at_the_start(script, bases, data, tmp_path):
    """GBK names, as archives from Chinese Windows have them: the first checkpoint could not be written."""
    strange = os.fsdecode("数据".encode("gbk"))
    shutil.copy(data, tmp_path / f"{strange}.json")
    for changes in ({"data_path": tmp_path / f"{strange}.json"}, {"output_dir": tmp_path / strange}):
        settings = {"data_path": data, "output_dir": tmp_path / "out"} | changes
        argv = options(bases["llama"], settings["data_path"], settings["output_dir"])
        assert "the name is not UTF-8; rename" in script("finetune.py", *argv).error
    assert not (tmp_path / strange).exists() and not (tmp_path / "out").exists()


def test_a_cutoff_beyond_the_window_of_rotary_positions_is_printed(script, bases, data, tmp_path):
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", cutoff_len=4096, max_steps=1)).ok()
    assert "exceeds the 2048 tokens" in out
