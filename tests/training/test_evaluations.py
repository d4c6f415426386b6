"""What is answered at each evaluation of a training: it equals what the other scripts give, and disturbs nothing."""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from scripting import warm
from trainings import history, options, same, tensors
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from utils import lineage
from utils.datasets.templates import Prompter
from utils.evaluation.during_training import Evaluator
from utils.evaluation.training_questions import TrainingQuestions, reference_of
from utils.files import write_json
from utils.models.tokenizer import load_tokenizer
from utils.training.evaluations import ANSWERS, Evaluated, evaluate_answers
from utils.training.trainer import StepCallback

warm("transformers.trainer", "utils.evaluation.during_training", "utils.inference.batch")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A few sums with their results, and questions with choices of two subjects, some of them not usable."""
    folder = tmp_path_factory.mktemp("asked")
    sums = [{"instruction": f"{n} + {n} = ?", "input": "", "output": str(2 * n)} for n in range(1, 6)]
    choices = [
        {"instruction": f"第{n}题选什么？", "choices": [f"甲{n}", f"乙{n}", f"丙{n}"], "answer": "ABC"[n % 3], "category": c}
        for n, c in enumerate("xxyyxxyyx")
    ]
    choices.append({"instruction": "没有正确答案", "choices": ["一", "二"], "answer": ""})
    choices.append({"instruction": "有两个正确答案", "choices": ["一", "二", "三"], "answer": "AB", "category": "x"})
    write_json(folder / "sums.json", sums)
    write_json(folder / "choices.json", choices)
    return folder


def evaluated(asked, **changes):
    """The options of a run that answers three times: each five steps, and at the end."""
    settings = {"eval_answers": asked / "sums.json", "eval_choices": asked / "choices.json", "max_new_tokens": 6}
    return settings | {"eval_steps": 4, "save_steps": 4} | changes


def test_answers_and_choices_are_those_of_the_other_scripts_and_change_nothing(script, bases, data, asked, tmp_path):
    """The last evaluation is that of the adapter that is kept: generate.py and judge.py give the same of it."""
    out = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **evaluated(asked))).ok()
    assert "choices.json: 1 of 11 questions dropped: the right choice is missing" in out
    entries = history(tmp_path / "out")
    scores = [entry for entry in entries if "eval_choices" in entry]
    answers = [entry for entry in entries if ANSWERS in entry]
    assert [entry["step"] for entry in scores] == [entry["step"] for entry in answers] == [4, 5, 8, 10]
    assert {"eval_choices", "eval_chrf", "eval_exact"} <= scores[0].keys() and "eval_loss" not in scores[0]
    behind = r"\(9 of 10 questions, 0 shots, plain text, likelihood of the letter, float32; 95 % interval [\d.]+ to [\d.]+\)"
    assert re.search(rf"step 10: right choices {scores[-1]['eval_choices']:.1f} % {behind}", out)
    assert re.search(r"step 10: chrF [\d.]+ \(5 prompts, template alpaca_short, greedy, float32; 95 % interval", out)
    assert "kept: the adapter of step 10 of 10, the last one (right choices (%)" in out
    kept = lineage.read(tmp_path / "out")["results"]
    assert kept["eval_choices"] == scores[-1]["eval_choices"] and kept["kept_step"] == 10

    script(
        "generate.py", "--lora_weights", tmp_path / "out", "--test_input_path", asked / "sums.json", "--is_ui", False,
        "--num_beams", 1, "--max_new_tokens", 6,
    ).ok()  # fmt: skip
    given = [record["output"] for record in json.loads((tmp_path / "out/test.json").read_text("utf-8"))]
    assert [one["answer"] for one in answers[-1][ANSWERS]] == given
    script(
        "judge.py", "--choices", asked / "choices.json", "--lora_weights", tmp_path / "out", "--output_dir", tmp_path / "judged"
    ).ok()
    table = json.loads((tmp_path / "judged/choices.json").read_text("utf-8"))["tables"][0]
    assert table["rows"][0]["values"]["out"] == pytest.approx(scores[-1]["eval_choices"])

    script("finetune.py", *options(bases["llama"], data, tmp_path / "plain", save_steps=4)).ok()
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))
    assert [entry["loss"] for entry in entries if "loss" in entry] == [
        entry["loss"] for entry in history(tmp_path / "plain") if "loss" in entry
    ]


def test_thoughts_are_no_part_of_an_answer_and_scores_are_those_that_the_references_allow(tiny_llama, monkeypatch):
    sums = [{"instruction": "一加一？", "input": "只写数", "output": "2", "history": [["你好", "好"]]}]
    several = TrainingQuestions([*sums, {"instruction": "问", "reference": "二"}], [], [])
    assert TrainingQuestions(sums, [None], []).scores() == ["eval_choices", "eval_chrf", "eval_exact"]
    assert reference_of({"reference": "二", "output": "三"}) == "二"
    assert several.scores() == ["eval_chrf"] and TrainingQuestions([{"instruction": "问"}, *sums], [], []).scores() == []
    model, words = AutoModelForCausalLM.from_pretrained(tiny_llama), load_tokenizer(tiny_llama)
    answer = Evaluator(words, Prompter("alpaca_short"), [2], TrainingQuestions(sums, [], []), 4, None, 1000, "float32")
    monkeypatch.setattr(answer.sampler, "text", lambda ids: "<think>\n3\n</think>\n\n2")
    monkeypatch.setattr(answer.sampler, "is_cut", lambda ids: True)
    scores, answers, notes = answer(model)
    assert scores == {"eval_chrf": 100, "eval_exact": 100}
    assert answers == [{"question": "你好\n好\n一加一？\n只写数", "answer": "2"}]
    basis = "1 prompts, template alpaca_short, greedy, float32; 95 % interval unknown for a single prompt"
    assert notes[0].startswith(f"chrF 100.0 ({basis}), exact numbers 100.0 % (") and "1 of 1 answers reached" in notes[1]


@pytest.mark.parametrize(
    ("greater", "best", "found", "saved"),
    [
        (True, 50, 60, True),
        (True, 50, 40, False),
        (False, 1, 0.5, True),
        (False, 1, 2, False),
        (True, None, 0, True),
        (True, 5, 5, False),
        (False, 5, 5, False),
    ],
)
def test_what_is_better_than_the_best_so_far_is_saved(tmp_path, greater, best, found, saved):
    args = TrainingArguments(str(tmp_path), metric_for_best_model="eval_choices", greater_is_better=greater, use_cpu=True)
    control, trainer = TrainerControl(), SimpleNamespace(eval_dataset=None, job=SimpleNamespace(evaluator=None))
    StepCallback(trainer).on_evaluate(args, TrainerState(best_metric=best), control, {"eval_choices": found})
    assert control.should_save == saved


@pytest.mark.parametrize("answers", [[], [{"question": "问", "answer": "答"}, {"question": "几", "answer": "二"}]])
def test_what_an_evaluator_finds_is_told_logged_and_shown_to_trackers(monkeypatch, capsys, answers):
    shown, written = [], []
    monkeypatch.setattr("utils.training.trackers.show_answers", lambda run, found: shown.append((run, found)))
    base = object()
    model = SimpleNamespace(get_base_model=lambda: base)
    run = SimpleNamespace(
        state=TrainerState(global_step=7), args=SimpleNamespace(world_size=1), model=model, is_world_process_zero=lambda: True,
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext, unwrap_model=lambda one: one),
        run_log=SimpleNamespace(add_newest=lambda state: written.append(state.log_history[-1])),
    )  # fmt: skip
    asked = []
    found = Evaluated({"eval_chrf": 5.0}, answers, ["one", "two"])
    assert evaluate_answers(run, lambda one: asked.append(one) or found) == {"eval_chrf": 5.0} and asked == [base]
    assert capsys.readouterr().out == "step 7: one\nstep 7: two\n"
    entry = [{"step": 7, ANSWERS: answers}] if answers else []
    assert (run.state.log_history, written, shown) == (entry, entry, [(run, answers)] if answers else [])


@pytest.mark.slow
def test_killed_amid_an_evaluation_the_same_command_ends_in_the_same_files(script, bases, data, asked, tmp_path):
    """The best adapter by the choices; killed while it answers for the second time."""
    changes = evaluated(asked, metric_for_best_model="choices", val_set_size=8, num_epochs=3)
    script("finetune.py", *options(bases["llama"], data, tmp_path / "whole", **changes)).ok()
    command = options(bases["llama"], data, tmp_path / "killed", **changes)
    running = script.start("finetune.py", *command)
    log = tmp_path / "killed/train_log.jsonl"
    running.wait_until(lambda: log.exists() and log.read_text("utf-8").count(f'"{ANSWERS}"') == 2)
    running.kill()
    running.wait()
    assert not (tmp_path / "killed/adapter_model.safetensors").exists()
    out = script("finetune.py", *command).ok()
    assert "resum" in out
    assert same(tensors(tmp_path / "killed"), tensors(tmp_path / "whole"))
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    best = max(entry["eval_choices"] for entry in history(tmp_path / "whole") if "eval_choices" in entry)
    first = next(entry["step"] for entry in history(tmp_path / "whole") if entry.get("eval_choices") == best)
    assert f"kept: the adapter of step {first} of 12, the first with the highest eval_choices" in out
    assert lineage.read(tmp_path / "killed")["results"]["kept_step"] == first
    write_json(tmp_path / "other.json", [{"instruction": "别的", "input": "", "output": "1"}])
    (tmp_path / "killed/adapter_model.safetensors").unlink()
    (tmp_path / "killed/lineage.json").unlink()
    changed = options(bases["llama"], data, tmp_path / "killed", **changes | {"eval_answers": tmp_path / "other.json"})
    assert "belongs to an unfinished run with other options or data" in script("finetune.py", *changed).error


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metric_for_best_model": "choices"}, "--metric_for_best_model choices: needs --eval_choices"),
        ({"metric_for_best_model": "eval_loss"}, "--metric_for_best_model eval_loss: needs a validation set"),
        ({"metric_for_best_model": "chrf", "eval_answers": "{open}"}, "with an output for each of its prompts"),
        ({"metric_for_best_model": "exact", "eval_answers": "{words}"}, "with a number as output for each of its prompts"),
        ({"metric_for_best_model": "bleu"}, "--metric_for_best_model bleu: unknown; give loss, choices, chrf or exact"),
        ({"eval_answers": "{none}"}, "none.json: no such file"),
        ({"eval_choices": "{words}"}, "no question in it can be used"),
        (
            {"metric_for_best_model": "exact", "eval_answers": "{sums}", "load_best_model_at_end": False},
            "--load_best_model_at_end is False",
        ),
        ({"eval_answers": "{long}"}, "--eval_answers: prompt 1 has"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_work(script, bases, data, asked, tmp_path, changes, told):
    files = {name: tmp_path / f"{name}.json" for name in ("open", "words", "none", "long")} | {"sums": asked / "sums.json"}
    write_json(files["open"], [{"instruction": "一"}, {"instruction": "二", "output": "三"}])
    write_json(files["words"], [{"instruction": "一", "output": "甲"}])
    write_json(files["long"], [{"instruction": "长" * 3000}])
    given = {name: str(value).format(**files) for name, value in changes.items()}
    failed = script("finetune.py", *options(bases["llama"], data, tmp_path / "out", **given))
    assert told in failed.error
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.slow
def test_only_the_first_of_several_ranks_answers(script, bases, data, asked, tmp_path):
    """Both ranks agree on the best adapter; it and the log are those of one process."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        changes = evaluated(asked, metric_for_best_model="choices", lora_dropout=0, learning_rate=1e-3)
        words = ["finetune.py", *options(bases["llama"], data, out, **changes)]
        printed = script.ranks(ranks, *words) if ranks > 1 else script(*words).ok()
        assert printed.count("step 10: right choices") == 1
        found[ranks] = [entry[key] for entry in history(out) for key in ("eval_choices", ANSWERS) if key in entry]
    assert found[1] == found[2]
