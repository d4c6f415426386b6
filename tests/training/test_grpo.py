"""Learning by rewards: the loss against the paper's formulas, whole runs, and what is wrong with a reward."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from trainings import history, options, same, tensors
from transformers import AutoModelForCausalLM

import finetune
from utils import lineage
from utils.cli import parse
from utils.console import UserError
from utils.datasets.encoding import IGNORED, encode_prompt
from utils.datasets.templates import Prompter
from utils.files import digest, sha256
from utils.inference.rollouts import make_sampler
from utils.models.tokenizer import load_tokenizer
from utils.training.batching import pad
from utils.training.grpo import Answer, GRPOTrainer, Policy, advantages, policy_loss, policy_losses, sampling_seeds
from utils.training.loss import returning_loss
from utils.training.preferences import log_probs_by
from utils.training.rewards import exact, length, load_rewards, number, reward_files, try_out


def test_the_loss_is_clipped_and_has_the_kl_term_of_the_paper():
    log_probs, old = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-1.5, -1.0, -1.0])
    losses, kl = policy_losses(log_probs, old, torch.tensor([-1.2, -1.0, -2.5]), torch.tensor([2.0, -1.0, -1.0]), 0.2, 0.1)
    expected_kl = [math.exp(-0.2) + 0.2 - 1, 0, math.exp(-0.5) + 0.5 - 1]
    assert kl.tolist() == pytest.approx(expected_kl, abs=1e-6)
    plain = [-1.2 * 2, 1.0, 0.8]  # both ratios beyond their bounds: the first clipped, of the last the worse one counts
    assert losses.tolist() == pytest.approx([loss + 0.1 * term for loss, term in zip(plain, expected_kl, strict=True)])
    assert advantages([1, 0, 0, 1]) == pytest.approx([x / (math.sqrt(1 / 3) + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)])
    assert advantages([2, 2]) == [0, 0]


def test_each_answer_has_its_own_advantage_and_an_empty_micro_batch_loss_zero(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    answers = [([5, 6, 7], [8, 9], 2.0), ([7, 8], [9, 6, 5], -1.0)]
    by_hand = [
        model(torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
        for asked, ids, _ in answers
    ]
    change = torch.tensor([0.3, -0.3, 0.3, 0.1, -0.1])  # of the log-probabilities; the first is clipped
    old, wanted = torch.cat(by_hand).detach() - change, -2.4 - 2 * math.exp(-0.3) + sum(map(math.exp, (0.3, 0.1, -0.1)))
    batch = pad([{"input_ids": asked + ids, "labels": [IGNORED] * len(asked) + ids} for asked, ids, _ in answers], 8)
    policy, totals = Policy([], 2, 1.0, clip=0.2, beta=0.0, updates=2), torch.zeros(3)
    with returning_loss(model) as sparse:
        log_probs = log_probs_by(model, sparse)
        loss = policy_loss(log_probs, policy, totals, **batch, advantage=torch.tensor([row[2] for row in answers]), old=old)
        found = policy_loss(log_probs, policy, totals, **batch)
        assert loss.item() == pytest.approx(wanted, abs=1e-4) and totals.tolist() == [0, 1, 5]
        assert found.tolist() == pytest.approx(torch.cat(by_hand).tolist(), abs=1e-4)
        empty = policy_loss(log_probs, policy, totals, **pad([], 8), advantage=torch.zeros(1), old=torch.zeros(1))
        empty.backward()
    assert empty.item() == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_earlier_log_probabilities_are_computed_without_dropout():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, **inputs):
            seen.append((self.training, sorted(inputs)))
            return torch.zeros(1)

    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.model, trainer.args = Model(), SimpleNamespace(device=torch.device("cpu"))
    trainer.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    trainer.log_probs_of(pad([{"input_ids": [5, 6], "labels": [5, 6]}], 1) | {"advantage": torch.zeros(1)})
    assert seen == [(False, ["input_ids", "labels", "places"])] and trainer.model.training


@pytest.mark.parametrize("clip", [0, 0.5])
def test_each_update_on_the_answers_of_a_step_is_clipped_and_made_but_the_last_which_the_library_makes(monkeypatch, clip):
    done, trainer = [], GRPOTrainer.__new__(GRPOTrainer)
    trainer.settings = Policy([], 2, 1.0, 0.2, 0.0, updates=3)
    trainer.args, model = SimpleNamespace(max_grad_norm=clip), torch.nn.Linear(1, 1)
    trainer.accelerator = SimpleNamespace(clip_grad_norm_=lambda parameters, most: done.append((len([*parameters]), most)))
    trainer.optimizer = SimpleNamespace(step=lambda: done.append("step"))
    monkeypatch.setattr(model, "zero_grad", lambda: done.append("zero"))
    monkeypatch.setattr("utils.training.trainer.StepTrainer.training_step", lambda _, model, batches: done.append(batches))
    monkeypatch.setattr(trainer, "sampled", lambda numbers: done.append(numbers) or ["answers"], raising=False)
    monkeypatch.setattr(trainer, "micro_batches", lambda answers: [*answers, "cut"], raising=False)
    monkeypatch.setattr(trainer, "note", lambda answers: done.append(answers), raising=False)
    trainer.training_step(model, [{"records": [3, 1]}, {"records": [2]}])
    update = [["answers", "cut"], *[(2, clip)] * bool(clip), "step", "zero"]
    assert done == [[3, 1, 2], *update, *update, ["answers", "cut"], ["answers"]]
    assert trainer.step_records == [[3, 1, 2]] * 2


@pytest.mark.parametrize(
    ("values", "equal"), [([[1, 0], [2, 2], [4, 4], [4, 4]], 0.5), ([[1, 3], [1, 3], [0, 0], [0, 0]], 1.0)]
)
def test_a_step_s_figures_are_means_over_its_answers(capsys, monkeypatch, values, equal):
    trainer, rewards = GRPOTrainer.__new__(GRPOTrainer), load_rewards(["exact", "length:0.5"], "")
    trainer.args, trainer.state = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(global_step=7)
    trainer.accelerator = SimpleNamespace(reduce=lambda found, _: found)
    lengths, cuts = [3, 5, 2, 6], [True, False, True, True]
    means = [sum(row[place] for row in values) / 4 for place in (0, 1)]
    for count in (1, 2):
        trainer.settings = Policy(rewards[:count], 2, 1.0, 0.2, 0.0, 1)
        totals = [row[0] + 0.5 * row[1] * (count - 1) for row in values]
        trainer.note([
            Answer([1], [5] * size, "", cut, row[:count], total)
            for size, cut, row, total in zip(lengths, cuts, values, totals, strict=True)
        ])  # fmt: skip
        named = {"reward_exact": means[0], "reward_length": means[1]} if count > 1 else {}
        alike = sum(totals[start] == totals[start + 1] for start in (0, 2)) / 2
        wanted = {"reward": sum(totals) / 4, **named, "answer_tokens": 4.0, "answers_cut": 0.75, "groups_equal": alike}
        assert trainer.figures == wanted and trainer.nothing_to_learn == (alike == 1)
    assert alike == equal
    monkeypatch.setattr("utils.training.trainer.StepTrainer.check_step", lambda trainer: None)
    trainer.gradient_norm = torch.zeros(())
    trainer.check_step()
    told = "step 7: all answers of each group have the same reward; nothing is learned from them\n"
    assert capsys.readouterr().out == told * (equal == 1) and trainer.gradient_norm.item() == (equal == 1)


def test_each_answer_has_a_seed_of_its_own_at_each_step():
    found = [sampling_seeds(seed, step, [3, 5], 2) for seed, step in ((42, 0), (42, 1), (7, 0))]
    assert len({seed for seeds in found for seed in seeds}) == 12 and found[0] == sampling_seeds(42, 0, [3, 5], 2)


def test_ready_made_rewards():
    record = {"instruction": "3+4=", "input": "", "output": "等于 7。"}
    assert exact(" 等于 7。", record) == 1 and exact("7", record) == exact("a", {"output": "A"}) == 0
    answers = {"是7.0": 1, "7 个，不是 8": 0, "七": 0, "14/2": 1, "答案是 7 天，不是 9 天": 1}
    assert {answer: number(answer, record) for answer in answers} == answers
    assert [length(answer, {"output": " "}) for answer in ("", " \n", "一")] == [1, 1, 0]
    assert length("四个字呢", record) == length("  四个字呢\n\n", record) == pytest.approx(1 - 1 / 5)
    (form,) = load_rewards(["format:0.5"], "答案：[0-9]+")
    assert form.weight == 0.5 and form.function("答案：12\n", record) == 1 and form.function("答案：12。", record) == 0
    (thinking,) = load_rewards(["format"], "")
    shapes = {
        "<think>想\n想</think>\n\n答\n答 ": 1,
        "<think>想</think>答": 1,
        "答": 0,
        "<think></think>答": 0,
        "<think>想</think> ": 0,
    }
    assert {answer: thinking.function(answer, record) for answer in shapes} == shapes


REWARDS = """
def loud(answer, record):
    return answer.count("好")
def broken(answer, record):
    return 1 / len(answer.replace("答", ""))
def mute(answer, record):
    pass
def nothing(answer, record):
    return float("nan")
def huge(answer, record):
    return 10**400
def raw(answer, record):
    return b"1"
def several(answer, record):
    return [1.0, 2.0]
def leaving(answer, record):
    raise SystemExit(0)
def one(answer):
    return 1.0
"""


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("exct", "is unknown; give exact, number, length, format"),
        ("missing.py:loud", "missing.py is not there"),
        ("{file}:quiet", "has no function quiet"),
        ("{bad}:loud", "cannot be run (SyntaxError"),
        ("{file}:broken", "raised ZeroDivisionError: division by zero"),
        ("{file}:mute", "it returned 'None', not a number"),
        ("{file}:nothing", "it returned 'nan', not a number"),
        ("{file}:huge", "it returned '1000000000000000000000000000000000000000', not a number"),
        ("{file}:raw", """it returned "b'1'", not a number"""),
        ("{file}:several", "it returned '[1.0, 2.0]', not a number"),
        ("{file}:leaving", "raised SystemExit: "),
        ("exact:nan", "exact is not there"),
        ("{file}:one", "raised TypeError: one() takes 1 positional argument"),
    ],
)
def test_what_is_wrong_with_a_reward_is_one_line(tmp_path, names, words):
    (tmp_path / "rewards.py").write_text(REWARDS, "utf-8")
    (tmp_path / "bad.py").write_text("def loud(:", "utf-8")
    given = names.format(file=tmp_path / "rewards.py", bad=tmp_path / "bad.py")
    with pytest.raises(UserError) as error:
        try_out(load_rewards([given], ""), {"instruction": "问", "input": "", "output": "答"})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_run_is_tied_to_the_files_of_its_own_rewards(tmp_path):
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for file in files:
        file.write_text(f"{REWARDS}# {file.name}", "utf-8")
    names = ["exact", "length:0.5", f"{files[0]}:loud", f"{files[0]}:mute:2", f"{files[1]}:loud:0.5"]
    assert reward_files(names) == {str(file): sha256(file) for file in files} and reward_files(names[:2]) == {}
    found = [(one.name, one.weight, one.function.__name__) for one in load_rewards(names, "")]
    own = [("loud", 1.0, "loud"), ("mute", 2.0, "mute"), ("loud", 0.5, "loud")]
    assert found == [("exact", 1.0, "exact"), ("length", 0.5, "length"), *own]


def test_rewards_that_compare_need_an_output_and_ones_own_do_not(tmp_path):
    (tmp_path / "own.py").write_text("def short(answer, record):\n    return -len(answer)\n", "utf-8")
    record = {"instruction": "问", "input": "", "output": " "}
    try_out(load_rewards([f"{tmp_path / 'own.py'}:short"], ""), record)
    with pytest.raises(UserError, match="--rewards exact: compares with the output"):
        try_out(load_rewards(["exact"], ""), record)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twelve questions, and a reward for each ASCII character of an answer."""
    folder = tmp_path_factory.mktemp("questions")
    records = [{"instruction": f"第{n}题", "input": "", "output": "e" * 6} for n in range(12)]
    (folder / "questions.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    (folder / "rewards.py").write_text("def plain(answer, record):\n    return sum(map(str.isascii, answer)) / 8\n", "utf-8")
    return folder


def run_options(bases, questions, folder, **changes):
    settings = {
        "rewards": f"[{questions / 'rewards.py'}:plain,length:0.1]", "batch_size": 4, "micro_batch_size": 4, "num_epochs": 4,
        "group_size": 6, "max_new_tokens": 8, "kl_beta": 0.001, "num_iterations": 2, "val_set_size": 4, "save_steps": 2,
        "lora_target_modules": "[q_proj,k_proj,v_proj,o_proj,up_proj,down_proj]", "learning_rate": 2e-2,
        "lora_dropout": 0,
    }  # fmt: skip
    return options(bases["llama"], questions / "questions.json", folder, **(settings | changes))


NOTING = """
import json
def plain(answer, record):
    value = sum(map(str.isascii, answer)) / 8
    with open({file!r}, "a", encoding="utf-8") as file:
        file.write(json.dumps([record["instruction"], answer, value]) + "\\n")
    return value
"""


def test_what_is_sampled_learned_and_logged_is_what_the_adapter_of_each_step_answers(script, bases, questions, tmp_path):
    """Two steps with a validation each, sampled again from the checkpoints; then the first with two updates on its answers."""
    noted, tokenizer = tmp_path / "noted.jsonl", load_tokenizer(bases["llama"])
    (tmp_path / "noting.py").write_text(NOTING.format(file=str(noted)), "utf-8")
    changes = {
        "rewards": f"[{tmp_path / 'noting.py'}:plain,length:0.1]", "kl_beta": 0.5, "group_size": 3, "max_new_tokens": 5,
        "num_iterations": 1, "max_steps": 2, "eval_steps": 1, "save_steps": 1, "max_grad_norm": 0, "temperature": 0.7,
    }  # fmt: skip
    script("finetune.py", *run_options(bases, questions, tmp_path / "out", **changes)).ok()
    asked = [json.loads(line) for line in noted.read_text("utf-8").splitlines()][1:]  # behind the one that is tried out
    log = history(tmp_path / "out")
    trained, validated = [line for line in log if "loss" in line], [line for line in log if "eval_loss" in line]
    sampler = make_sampler(parse(finetune.Options, run_options(bases, questions, tmp_path / "out", **changes)), tokenizer)

    def drawn(model, rows, group, seeds):
        """Of the noted `rows`, `group` to a question: ids of question and answer, whether each is cut, and its reward."""
        prompts = [
            encode_prompt({"instruction": question, "input": ""}, Prompter("alpaca_short"), tokenizer)
            for question, _, _ in rows
        ]
        ids = sampler(model, prompts, seeds)
        assert [sampler.text(one) for one in ids] == [answer for _, answer, _ in rows]
        rewards = [value + 0.1 * length(answer, {"output": "e" * 6}) for _, answer, value in rows]
        return list(zip(prompts, ids, [sampler.is_cut(one) for one in ids], rewards, strict=True))

    @torch.no_grad()
    def log_probs(model, answers):
        found = [
            (model(torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1] / 0.7).log_softmax(-1)[range(len(ids)), ids]
            for asked, ids, _, _ in answers
        ]
        return torch.cat(found)

    def adapter_of(step):
        base = AutoModelForCausalLM.from_pretrained(bases["llama"])
        return PeftModel.from_pretrained(base, tmp_path / "out" / f"checkpoint-{step}").eval() if step else base

    base, at = adapter_of(0), 0
    for step, (line, checked) in enumerate(zip(trained, validated, strict=True)):
        rows, at = asked[at : at + 12], at + 12
        numbers = [int(question[1:-1]) for question, _, _ in rows[::3]]
        answers = drawn(adapter_of(step), rows, 3, sampling_seeds(42, step, numbers, 3))
        lengths, rewards = [len(ids) for _, ids, _, _ in answers], [reward for *_, reward in answers]
        groups = [rewards[start : start + 3] for start in range(0, 12, 3)]
        assert line["reward"] == pytest.approx(sum(rewards) / 12)
        assert line["reward_plain"] == pytest.approx(sum(value for _, _, value in rows) / 12)
        assert line["answer_tokens"] == sum(lengths) / 12 and line["answers_cut"] == sum(cut for _, _, cut, _ in answers) / 12
        assert line["groups_equal"] == sum(len(set(group)) == 1 for group in groups) / 4
        gap = log_probs(base, answers) - (now := log_probs(adapter_of(step), answers))
        kl = (gap.exp() - gap - 1).sum().item() / sum(lengths)
        assert line["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6) and (kl > 1e-3) == (step > 0)
        weights = torch.tensor([one for group in groups for one in advantages(group)]).repeat_interleave(torch.tensor(lengths))
        assert line["loss"] == pytest.approx(-weights.mean().item() + 0.5 * kl, abs=1e-4)
        if not step:
            first, weighed = answers, (now, weights)
        rows, at = asked[at : at + 4], at + 4
        seeds = [int(digest([42, int(question[1:-1])])[:12], 16) for question, _, _ in rows]
        rewards = [reward for *_, reward in drawn(adapter_of(step + 1), rows, 1, seeds)]
        assert checked["eval_reward"] == -checked["eval_loss"] == pytest.approx(sum(rewards) / 4)
    assert at == len(asked)

    more = changes | {"num_iterations": 2, "max_steps": 1}
    script("finetune.py", *run_options(bases, questions, tmp_path / "twice", **more)).ok()
    line = history(tmp_path / "twice")[0]
    (old, weights), now = weighed, log_probs(adapter_of(1), first)
    losses, _ = policy_losses(now, old, old, weights, 0.2, 0.5)
    assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-5) and line["reward"] == trained[0]["reward"]
    assert line["answers_clipped"] == pytest.approx(
        (((now - old).exp() - 1) * weights.sign() > 0.2).sum().item() / len(now) / 2
    )


@pytest.mark.slow
def test_the_reward_rises_and_a_killed_run_ends_the_same(script, bases, questions, tmp_path):
    out = script("finetune.py", *run_options(bases, questions, tmp_path / "out")).ok()
    assert "validation reward" in out
    log = history(tmp_path / "out")
    steps = [entry for entry in log if "reward" in entry]
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.1 and steps[-1]["kl"] > 0
    assert steps[0]["reward"] == pytest.approx(steps[0]["reward_plain"] + 0.1 * steps[0]["reward_length"])
    assert steps[0]["answers_cut"] > 0.5, "an untrained model seldom ends within 8 tokens"
    assert {"reward_plain", "reward_length", "answer_tokens", "answers_cut", "answers_clipped", "groups_equal"} <= steps[
        0
    ].keys()
    found = lineage.read(tmp_path / "out")
    assert found["data"]["stage"] == "reward"
    run = script.start("finetune.py", *run_options(bases, questions, tmp_path / "again"))
    run.wait_until(lambda: (tmp_path / "again" / "checkpoint-2" / "checkpoint.json").is_file())
    run.kill()
    run.wait()
    assert "checkpoint-" in script("finetune.py", *run_options(bases, questions, tmp_path / "again")).ok()
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "again"))
    more = {"resume_from_checkpoint": tmp_path / "out", "max_steps": 1, "num_iterations": 1, "val_set_size": 0}
    script("finetune.py", *run_options(bases, questions, tmp_path / "f2", **more)).ok()
    entry = history(tmp_path / "f2")[0]
    assert entry["kl"] < 1e-4 and entry["answers_clipped"] == 0, "at first the policy is the parent, and that is the reference"


def test_refused_before_anything_is_loaded(script, bases, questions, tmp_path):
    for changes, words in (
        ({"rewards": "[exct]"}, "--rewards exct: is unknown"),
        ({"reward_format": "a+"}, "--reward_format: is given"),
        ({"rewards": "[format]", "reward_format": "("}, "is not a regular expression"),
    ):
        assert words in script("finetune.py", *run_options(bases, questions, tmp_path / "no", **changes)).error
    assert not (tmp_path / "no").exists()
