"""Questions with choices: the forms they come in, likelihoods against the plain way, what is read from answers, the script."""

import csv
import gzip
import json
from functools import partial

import families
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import judge
from utils.console import UserError
from utils.datasets.choices import Choice, as_choice, as_record, read_choices
from utils.datasets.item_formats import InvalidRecord
from utils.evaluation import forgetting, ready, setup
from utils.evaluation.choices import GENERATED, Marked, Way, as_text, encode, encode_fitting, read_examples, tabulate
from utils.evaluation.chosen import read_answer
from utils.evaluation.likelihood import load_engine
from utils.evaluation.report import Findings
from utils.files import write_json
from utils.inference.batch import greedy_texts
from utils.inference.continuations import Asked, log_likelihoods

ONE = Choice("一加一等于几？", ("一", "二", "三", "四"), (1,))


@pytest.mark.parametrize(
    "item",
    [
        {"instruction": "一加一等于几？", "choices": ["一", "二", "三", "四"], "answer": "B"},
        {"question": "一加一等于几？", "a": "一", "b": "二", "c": "三", "d": "四", "answer": "B", "": "0"},
        {"question": "一加一等于几？", "choices": ["一", "二", "三", "四"], "answer": 1},
        {"passage": None, "question": "一加一等于几？", "options": ["(A)一", "(B)二", "(C)三", "(D)四"], "label": "B"},
        {"question": "一加一等于几？", "options": ["A．一", "B．二", "C．三", "D．四"], "label": ["B"], "answer": None},
    ],
)
def test_questions_are_read_in_every_published_form(item):
    assert as_choice(item) == ONE
    assert as_choice(as_record(as_choice(item))) == ONE


def test_several_right_choices_and_a_passage():
    item = {"passage": "甲乙丙", "question": "哪些？", "options": ["(A)甲", "(B)乙", "(C)丁"], "label": ["A", "B"]}
    assert as_choice(item) == Choice("甲乙丙\n哪些？", ("甲", "乙", "丁"), (0, 1))
    assert as_choice(item | {"label": "CA"}).right == (0, 2)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"answer": ""}, "the right choice is missing"),
        ({"answer": True}, "the right choice is missing"),
        ({"answer": "E"}, "the right choice is not among the choices"),
        ({"answer": 4}, "the right choice is not among the choices"),
        ({"answer": "BB"}, "the right choice is not among the choices"),
        ({"choices": ["一", "二", "二", "四"]}, "a choice occurs twice"),
        ({"choices": ["一", " ", "三"]}, "a choice is empty or not a text"),
        ({"choices": ["A. 一", "B. ", "C. 三"]}, "a choice is empty or not a text"),
        ({"choices": ["一"]}, "1 choices, not 2 to 10"),
        ({"instruction": " "}, "the question is missing"),
        ({"choices": None}, "it has no choices"),
    ],
)
def test_bad_questions_are_counted_and_named(tmp_path, capsys, changes, cause):
    item = as_record(ONE)
    with pytest.raises(InvalidRecord, match=cause):
        as_choice(item | changes)
    path = tmp_path / "set.json.gz"
    path.write_bytes(gzip.compress(json.dumps([item, item | changes]).encode()))
    assert read_choices([str(path)]) == [ONE._replace(category="set")]
    assert capsys.readouterr().out == f"{path}: 1 of 2 questions dropped: {cause} (the first: {path}, line 1, item 2)\n"


def test_a_choice_that_stands_there_twice_is_not_chosen_between():
    with pytest.raises(InvalidRecord, match="choice A stands there twice, as A and a"):
        as_choice({"question": "一加一？", "A": "1", "a": "2", "B": "3", "answer": "B"})


def test_a_file_without_questions_is_refused(tmp_path):
    write_json(tmp_path / "set.json", [{"instruction": "你好", "output": "好"}])
    with pytest.raises(UserError, match="no question in it can be used"):
        read_choices([str(tmp_path / "set.json")])


@pytest.mark.parametrize("kind", ["llama", "bloom", "mistral", "mamba", "lfm2", "qwen3_5_text"])
def test_likelihoods_are_those_of_each_text_alone(tmp_path, kind):
    """Of models with a state, too, whose caches padding would become a part of."""
    getattr(tiny, kind, partial(families.make, kind))(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    chance = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(4, 300, (count,), generator=chance).tolist()

    opening = ids(20)
    asked = [Asked(opening + ids(length), [ids(size) for size in sizes]) for length, sizes in
             [(3, [1, 1, 1, 1]), (9, [1, 4, 2, 1]), (30, [3, 3]), (4, [2, 1])]]  # fmt: skip
    found = log_likelihoods(model, asked, 1 << 20)
    for one, numbers in zip(asked, found, strict=True):
        for rest, number in zip(one.continuations, numbers, strict=True):
            with torch.no_grad():
                scores = model(torch.tensor([one.prompt + rest])).logits[0].log_softmax(-1)
            places = range(len(one.prompt) - 1, len(one.prompt) + len(rest) - 1)
            assert number == pytest.approx(sum(scores[p, t].item() for p, t in zip(places, rest, strict=True)), abs=1e-4)
    rows = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    with_little_room = log_likelihoods(model, asked, 60)  # half of it are fewer tokens than two prompts have
    assert set(rows) == {1} and with_little_room == [pytest.approx(numbers, abs=1e-4) for numbers in found]


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("B", [1]), ("B. 二", [1]), ("答案是B。", [1]), ("正确答案为：（C）", [2]), ("我选 D", [3]), ("二", [1]),
        ("选AB", [0, 1]), ("选BA", [0, 1]),
        ("<think>A 还是 C？</think>答案：C", [2]), ("<think>答案：A</think>答案：C", [2]),
        ("经过计算，应该是 B 这一项", [1]), ("The answer is (b).", [1]),
        ("ＡＢ", [0, 1]),
        ("A、C", [0, 2]), ("答案是 A。不，答案是 B。", None), ("可能是 A 也可能是 B", None), ("不知道", None), ("", None),
        ("答案是 F", None), ("五", None),
        ("A错误，B正确", None), ("B和C都对", [1, 2]), ("答案：A。不对，应该是B", None), ("A或B", None), ("A、B都有可能", None),
        ("答案：ABCD中的B", None), ("A is wrong", None), ("A不对", None), ("非A", None), ("除A外都对", None), ("B or C", None),
        ("A bird", None), ("答案是B，不是A", [1]), ("排除A、C、D，所以选B", [1]), ("选B，因为A不对", [1]),
        ("B because A is wrong", [1]),
    ],
)  # fmt: skip
def test_a_generated_answer_is_read_or_left_alone(text, places):
    assert read_answer(text, ONE.choices) == places
    assert read_answer("甲", ["甲。", "甲！", "乙"]) is None and read_answer("乙", ["甲。", "甲！", "乙"]) == [2]
    assert read_answer("！", ["？", "乙"]) is None


REVISIONS = "不对 更正 修正 纠正 改为 改选 重新 抱歉 wait actually sorry correction"
DENIALS = "不是 并非 非 除 除了 排除 不选 不能选 不应选 不该选 not except"
DOUBTS = "不行 错 误 可能 或 还是 中 外 以外 之外 or isn't is~not are~wrong is~incorrect is~false wrong incorrect"


def test_a_letter_that_is_taken_back_denied_or_doubted_is_not_certain():
    for word in REVISIONS.split():
        assert read_answer(f"答案：A。{word} B", ONE.choices) is None, word
    for word in DENIALS.split():
        assert read_answer(f"{word} A", ONE.choices) is None, word
    for word in DOUBTS.split():
        assert read_answer(f"A {word.replace('~', ' ')}", ONE.choices) is None, word


def test_shares_and_intervals_worked_out_by_hand():
    questions = [ONE._replace(category=subject, groups=groups) for subject, groups in
                 [("加法", ("数学",))] * 3 + [("诗", ("文", "中国"))] * 2]  # fmt: skip
    questions.append(ONE._replace(right=(0, 1), category="诗"))
    questions[0] = questions[0]._replace(choices=("一", "二"))
    right, wrong = Marked([1], [-2.0, -1.0, -3.0, -4.0]), Marked([0], [-1.0, -2.0, -3.0, -4.0])
    marks = {"base": [right, right, wrong, wrong, right, right], "f1": [right, right, right, right, None, right]}
    tables, notes = tabulate(questions, marks, Way(), "float32")
    rows = {row.category: row for row in tables[0].rows}
    assert rows["all questions"].samples == 4 and rows["all questions"].values == {"base": 50.0, "f1": 100.0}
    assert rows["数学"].samples == 3 and rows["文"].samples == rows["中国"].samples == 1
    low, high = rows["all questions"].intervals["base"]
    assert (low, high) == (pytest.approx(15.00, abs=0.01), pytest.approx(85.00, abs=0.01))  # Wilson, 2 of 4
    assert tables[0].title == "right choices in % (0 shots, plain text, likelihood of the letter, float32)"
    assert "4 of 6 questions count, in 2 subjects; intervals are 95 % (Wilson)" in notes
    assert any("1 questions have several right choices" in line for line in notes)
    assert any("1 questions are longer than the model's window" in line for line in notes)
    assert "guessing would give 31.2 %" in notes and "base: mean over the subjects 33.3 %" in notes
    assert any(line.startswith("base and f1: no difference can be told") for line in notes)
    equal = {"base": [right, Marked([0], [-1.0, -1.0, -3.0, -4.0])]}
    assert (
        "base: in 1 of 2 questions several choices are the most likely; the first is taken"
        in tabulate(questions[:2], equal, Way(), "float32")[1]
    )
    several, given = questions[-1:] * 4, [Marked(chosen, "") for chosen in ([0, 1], [0], [0, 1, 2], None)]
    tables, notes = tabulate(several, {"base": given}, Way(by="answer"), "float32")
    assert tables[0].rows[0].values == {"base": 25.0} and not any("several right choices" in line for line in notes)
    for count, told in ((7, False), (8, True)):  # of ten
        notes = tabulate([ONE] * 10, {"base": [right] * count + [wrong] * (10 - count)}, Way(), "float32")[1]
        assert (f"base: chooses B for {10 * count} % of the questions" in notes) == told


def test_examples_have_one_right_choice_and_are_beside_the_questions(tmp_path):
    several, plain = ONE._replace(right=(0, 1), category="x"), [ONE._replace(question=text, category="x") for text in "甲乙丙"]
    write_json(tmp_path / "dev.json", [as_record(one) for one in (several, *plain)])
    write_json(tmp_path / "test.json", [as_record(plain[0])])
    for named in (tmp_path, tmp_path / "test.json"):
        assert read_examples("", plain, [str(named)], 2) == {"x": plain[:2]}
    assert GENERATED == {"plain": 16, "own": 256}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A tiny base and adapter, questions of two subjects with examples, and a CSV file of one."""
    folder = tmp_path_factory.mktemp("choices")
    tiny.llama(folder / "base")
    tiny.adapter(folder / "base", folder / "f1")
    for split, start, count in (("test", 0, 5), ("dev", 50, 3)):
        records = [
            {"instruction": f"{n} 之后是几？", "choices": [str(n + 1), str(n + 2), str(n), "没有"], "answer": "ABCD"[n % 4],
             "category": subject, "topic": topic, "groups": ["数"]}
            for subject, topic in (("next", "数数"), ("after", "顺序")) for n in range(start, start + count)
        ]  # fmt: skip
        write_json(folder / f"{split}.json", records)
    return folder


def likelihood_by_hand(folder, adapter, text, rest):
    """The log-likelihood of `rest` after `text`, with peft and transformers alone."""
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, folder / adapter) if adapter else model
    before, whole = tokenizer(text)["input_ids"], tokenizer(text + rest)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    return sum(scores[p, whole[p + 1]].item() for p in range(len(before) - 1, len(whole) - 1))


@pytest.mark.parametrize("by", ["letter", "text"])
def test_base_and_adapter_are_scored_by_the_script(script, questions, tmp_path, by):
    options = ["--choices", questions / "test.json", "--base_model", questions / "base", "--lora_weights", questions / "f1"]
    out = script("judge.py", *options, "--shots", 2, "--choices_by", by, "--output_dir", tmp_path / "out").ok()
    assert "10 of 10 questions count, in 2 subjects" in out and "2 shots, plain text" in out and "float32" in out
    found = json.loads((tmp_path / "out/questions.json").read_text("utf-8"))
    known, examples = read_choices([str(questions / "test.json")]), read_choices([str(questions / "dev.json")])
    for place in (0, 7):
        own = [one for one in examples if one.category == known[place].category][:2]
        text = as_text(known[place], own, by)
        for adapter, name in ((None, "base"), ("f1", "f1")):
            rests = [f" {choice}" for choice in (known[place].choices if by == "text" else "ABCD")]
            by_hand = [likelihood_by_hand(questions, adapter, text, rest) for rest in rests]
            assert found[place]["systems"][name]["log_likelihoods"] == pytest.approx(by_hand, abs=2e-4)
            assert "ABCD".index(found[place]["systems"][name]["chosen"]) == by_hand.index(max(by_hand))
    table = json.loads((tmp_path / "out/choices.json").read_text("utf-8"))["tables"][0]
    right = [one["systems"]["f1"]["chosen"] == one["answer"] for one in found]
    assert table["rows"][0]["values"]["f1"] == 100 * sum(right) / 10
    rows = list(csv.DictReader((tmp_path / "out/choices.csv").open(encoding="utf-8")))
    assert float(rows[0]["f1 low"]) < float(rows[0]["f1"]) < float(rows[0]["f1 high"]) or rows[0]["f1"] in ("0", "100")


def test_a_stopped_run_goes_on_to_the_same_tables(script, questions, tmp_path):
    options = ["--choices", questions / "test.json", "--base_model", questions / "base", "--lora_weights", questions / "f1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert script("judge.py", *options, "--output_dir", whole).ok()
    lines = (whole / "choices.jsonl").read_bytes().splitlines(keepends=True)
    cut.mkdir()
    (cut / "choices.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert "2 of 4 subjects are already done; continuing" in script("judge.py", *options, "--output_dir", cut).ok()
    for name in ("choices.md", "choices.csv", "choices.json", "questions.json", "choices.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert "other settings (way)" in script("judge.py", *options, "--choices_by", "text", "--output_dir", cut).error


@pytest.mark.parametrize("template", ["plain", "own"])
def test_answers_are_generated_and_read(script, questions, tmp_path, template):
    options = ["--choices", questions / "test.json", "--base_model", questions / "base", "--choices_by", "answer"]
    out = script("judge.py", *options, "--choices_template", template, "--output_dir", tmp_path / "out").ok()
    found = json.loads((tmp_path / "out/questions.json").read_text("utf-8"))
    unclear = 0
    for one in found:
        mark = one["systems"]["base"]
        places = read_answer(mark["answer"], one["choices"])
        assert mark["chosen"] == (None if places is None else "".join("ABCD"[p] for p in places))
        unclear += places is None
    assert f"base: {unclear} of 10 answers name no clear choice, and count as wrong" in out or not unclear


def test_the_own_template_asks_as_was_trained(script, questions, tmp_path):
    options = ["--choices", questions / "test.json", "--base_model", questions / "base", "--shots", 1]
    out = script("judge.py", *options, "--choices_template", "own", "--output_dir", tmp_path / "out").ok()
    assert "1 shots, own template, likelihood of the letter" in out
    from utils.datasets.templates import Prompter
    from utils.evaluation.choices import as_dialogue

    known, examples = read_choices([str(questions / "test.json")]), read_choices([str(questions / "dev.json")])
    *earlier, last = Prompter("alpaca").turns(as_dialogue(known[0], examples[:1], "letter"))
    tokenizer = AutoTokenizer.from_pretrained(questions / "base")
    assert "以下是关于数数的单项选择题" in earlier[0].prompt and earlier[0].answer == "C"
    model = AutoModelForCausalLM.from_pretrained(questions / "base")
    ids = tokenizer(earlier[0].prompt + earlier[0].answer)["input_ids"] + [tokenizer.eos_token_id]
    ids += tokenizer(last.prompt, add_special_tokens=False)["input_ids"]
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABCD"]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = json.loads((tmp_path / "out/questions.json").read_text("utf-8"))[0]["systems"]["base"]["log_likelihoods"]
    assert found == pytest.approx([scores[letter[0]].item() for letter in letters], abs=2e-4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--shots", 3, "--choices", "{}/alone/test.json"], "no dev.json beside the questions"),
        (["--choices", "{}/nowhere.json"], "nowhere.json"),
        (["--choices", "{}/test.json", "--judge_model", "m"], "scores models, and the other options answers"),
        *(
            (["--choices", "{}/test.json", *words], "scores models, and the other options answers")
            for words in (
                ["--refusals"],
                ["--metrics"],
                ["--run_code"],
                ["--held_out", "f=x"],
                ["--answers", "a=b"],
                ["--votes", "x"],
            )
        ),
        (["--choices", "{}/test.json", "--chain", "x", "--lora_weights", "y"], "--chain and --lora_weights: both given"),
        (["--choices", "{}/several.json"], "all questions have several right choices"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(script, questions, tmp_path, options, error):
    (questions / "alone").mkdir(exist_ok=True)
    (questions / "alone/test.json").write_bytes((questions / "test.json").read_bytes())
    write_json(questions / "several.json", [as_record(ONE._replace(right=(0, 1)))])
    options = [str(value).format(questions) for value in options]
    ended = script("judge.py", *options, "--base_model", questions / "base", "--output_dir", tmp_path / "out")
    assert error in ended.error and not (tmp_path / "out").exists()


def test_the_base_is_loaded_as_the_options_say(questions, tmp_path, monkeypatch):
    seen = []

    def loaded(*how):
        seen.append(how)
        raise UserError("enough")

    for place in ("likelihood", "forgetting"):
        monkeypatch.setattr(f"utils.evaluation.{place}.load_engine", loaded)
    options = partial(judge.Options, output_dir=str(tmp_path / "out"), base_model="b", load_8bit=True)
    with pytest.raises(UserError, match="enough"):
        setup.have_chosen(options(choices=[str(questions / "test.json")], lora_weights=["f1"]))
    with pytest.raises(UserError, match="enough"):
        forgetting.prepare("b", {"f1": questions / "f1"}, [], True)
    assert seen == [("b", ["f1"], True), ("b", [questions / "f1"], True)]
    monkeypatch.setattr("utils.evaluation.likelihood.engine_where_possible", loaded)
    with pytest.raises(UserError, match="enough"):
        ready.prepare(options(metrics=True), Findings(), [{"reference": "x"}], {}, {"f1": questions / "f1/test.json"})
    assert seen[2:] == [("b", [questions / "f1"], True)]


def test_a_subject_without_examples_is_said(script, questions, tmp_path):
    record = {"instruction": "三？", "choices": ["一", "二"], "answer": "A", "category": "unknown"}
    write_json(tmp_path / "test.json", [record])
    options = ["--choices", tmp_path / "test.json", "--shots", 2, "--shots_path", questions / "dev.json"]
    out = script("judge.py", *options, "--base_model", questions / "base", "--output_dir", tmp_path / "out").ok()
    assert "1 subjects have fewer than 2 worked examples, which are all used: unknown 0" in out


def test_fewer_examples_where_the_window_is_short(script, questions, tmp_path):
    tiny.llama(tmp_path / "base", max_position_embeddings=210)
    long = {"instruction": "很长" * 200, "choices": ["一", "二"], "answer": "A", "category": "next"}
    write_json(tmp_path / "test.json", [*json.loads((questions / "test.json").read_text("utf-8")), long])
    options = ["--choices", tmp_path / "test.json", "--shots", 3, "--shots_path", questions / "dev.json"]
    out = script("judge.py", *options, "--base_model", tmp_path / "base", "--output_dir", tmp_path / "out").ok()
    assert "questions were asked with fewer examples, to fit 210 tokens" in out
    assert "10 of 11 questions count" in out and "1 questions are longer than the model's window" in out
    engine, way, (one, *_) = (
        load_engine(str(tmp_path / "base"), [], False),
        Way(3),
        read_choices([str(questions / "test.json")]),
    )
    examples = [example for example in read_choices([str(questions / "dev.json")]) if example.category == one.category][:3]
    asked, count = encode_fitting(engine, "base", one, examples, way)
    assert 0 < count < 3 and asked == encode(engine, "base", one, examples[-count:], way), "the last ones stay"
    full = (asked.prompt * 2)[: engine.window]
    assert [bool(text) for text in greedy_texts(engine, "base", [full, full[1:]], 8)] == [False, True], "room for one token"
