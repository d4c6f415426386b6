"""A chain of adapters side by side: trained, answered and compared by the scripts; log-likelihoods against the plain way."""

import json
import shutil

import pytest
import tiny
import torch
from api_server import fair
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.datasets.encoders import make_encoder
from utils.datasets.templates import Prompter
from utils.evaluation import forgetting
from utils.evaluation.chain import locate, name_of
from utils.evaluation.likelihood import load_engine, log_likelihoods
from utils.files import write_json
from utils.inference.answerers import BASE

PROMPTS = {
    "01qa": [
        {"instruction": "你是谁？", "reference": "我是梦想家。"},
        {"instruction": "天是什么颜色？", "reference": "蓝色。"},
    ],
    "10dialogue": [{"instruction": "再说一次", "history": [["你是谁？", "我是梦想家。"]], "reference": "我是梦想家。"}],
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A base, two steps trained one on the other, and each one's answers."""
    from scripting import Script

    folder = tmp_path_factory.mktemp("chain")
    script = Script(folder)
    tiny.llama(folder / "base")
    for category, records in PROMPTS.items():
        write_json(folder / f"prompts/{category}.json", records)
    for name, parent, output in (("f1", None, "我是梦想家。"), ("f2", "f1", "蓝色。")):
        write_json(folder / f"{name}.json", [{"instruction": f"问题{n}", "input": "", "output": output} for n in range(8)])
        resume = ["--resume_from_checkpoint", folder / parent] if parent else []
        assert script(
            "finetune.py", "--base_model", folder / "base", "--data_path", folder / f"{name}.json", "--val_set_size", 0,
            "--output_dir", folder / name, "--batch_size", 4, "--num_epochs", 2, "--learning_rate", 1e-2, *resume,
        ).ok()  # fmt: skip
    assert script(
        "generate.py", "--lora_weights", f"{folder}/f1,{folder}/f2", "--is_ui", False, "--num_beams", 1,
        "--test_input_path", folder / "prompts", "--max_new_tokens", 8,
    ).ok()  # fmt: skip
    return folder


def likelihood_by_hand(folder, step, record, template="alpaca"):
    """Mean log-probability of the reference's tokens, with peft and transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if step:
        model = PeftModel.from_pretrained(model, folder / step)
    prompt = Prompter(template).generate_prompt(record["instruction"])
    encoded = tokenizer(prompt + record["reference"], return_offsets_mapping=True)
    ids = torch.tensor([[*encoded["input_ids"], tokenizer.eos_token_id]])
    wanted = [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return scores[torch.tensor(wanted[1:])].mean().item()


def test_a_chain_is_compared_step_by_step(script, chain, tmp_path):
    out = script(
        "judge.py", "--chain", chain / "f2", "--test_input_path", chain / "prompts", "--output_dir", tmp_path / "out"
    ).ok()
    assert "3 of 3 prompts have a reference" in out
    tables = {table["title"]: table for table in json.loads((tmp_path / "out/metrics.json").read_text("utf-8"))["tables"]}
    assert tables["chrF · template alpaca, dtype float32"]["systems"] == ["f1", "f2"]
    likelihood = tables["log-likelihood of the reference (nats per token; own template, float32)"]
    assert likelihood["systems"] == ["base", "f1", "f2"]
    values = likelihood["rows"][0]["values"]
    for step in ("base", "f1", "f2"):
        by_hand = [likelihood_by_hand(chain, step if step != "base" else None, record) for record in PROMPTS["01qa"]]
        assert values[step] == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    assert values["base"] < values["f1"]
    text = (tmp_path / "out/chain.md").read_text("utf-8")
    gained = round(values["f1"], 3) - round(values["base"], 3)
    assert f"(+{gained:.3f}".rstrip("0") in text
    assert "chrF · template alpaca, dtype float32, and its change from the previous step" in text
    assert out.count("| 01qa |") + out.count("| 知识问答 |") == len(tables)  # each table is printed once
    assert "of the reference (nats per token; own template, float32), and its change from the previous step" in out
    assert (tmp_path / "out/chain.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_reference_that_fills_the_window_is_scored_and_a_longer_one_left_out(chain):
    engine, record = load_engine(str(chain / "base"), [], False), PROMPTS["01qa"][0]
    prompt = Prompter("alpaca").generate_prompt(record["instruction"])
    length = len(engine.tokenizers[BASE](prompt + record["reference"])["input_ids"]) + 1
    for window, wanted in ((length, pytest.approx(likelihood_by_hand(chain, None, record), abs=1e-4)), (length - 1, None)):
        engine.config.max_position_embeddings = window
        assert log_likelihoods(engine, BASE, [record]) == [wanted]


def test_a_chain_without_references_says_what_is_left_out(script, chain, tmp_path):
    write_json(tmp_path / "other.json", [{"instruction": "另一个问题"}])
    out = script("judge.py", "--chain", chain / "f2", "--test_input_path", tmp_path / "other.json", "--output_dir", tmp_path)
    assert "no log-likelihoods, BLEU, chrF or ROUGE-L; name the files with the references as --test_input_path" in out.ok()


def test_a_system_beside_the_chain_is_shown_with_it(script, chain, tmp_path):
    options = ["--answers", f"other={chain}/f1", "--test_input_path", chain / "prompts", "--likelihood", False]
    out = script("judge.py", "--chain", chain / "f2", *options, "--output_dir", tmp_path / "out").ok()
    assert "| 类别 | 样本数 | other | f1 | f2 |" in out
    assert "chrF · template alpaca, dtype float32, and its change from the previous step" in out


def test_steps_are_found_where_a_chain_was_moved_to(script, chain, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(chain, moved)
    lineage = json.loads((moved / "f2/lineage.json").read_text("utf-8"))
    lineage["parent"]["name"] = "/nowhere/f1"
    write_json(moved / "f2/lineage.json", lineage)
    options = ["--test_input_path", chain / "prompts", "--likelihood", False, "--output_dir", tmp_path / "out"]
    assert script("judge.py", "--chain", moved / "f2", *options).ok()
    assert "| 类别 | 样本数 | f1 | f2 |" in (tmp_path / "out/metrics.md").read_text("utf-8")
    shutil.rmtree(moved / "f1")
    out = script("judge.py", "--chain", moved / "f2", *options[:-1], tmp_path / "out2").ok()
    assert "/nowhere/f1: a step of the chain, but missing; left out" in out


def test_a_step_without_answers_is_named_with_the_command_that_makes_them(script, chain, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(chain, moved)
    (moved / "f2/test.json").unlink()
    error = script("judge.py", "--chain", moved / "f2", "--output_dir", tmp_path / "out").error
    assert f"--lora_weights {moved / 'f2'}" in error and not (tmp_path / "out").exists()


def test_answers_that_were_changed_are_not_said_to_be_made_as_they_were(script, chain, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(chain, moved)
    answers = json.loads((moved / "f2/test.json").read_text("utf-8"))
    write_json(moved / "f2/test.json", [answers[0] | {"output": "改了"}, *answers[1:]])
    options = ["--answers", f"f1={moved}/f1", "--answers", f"f2={moved}/f2", "--metrics", "--likelihood", False]
    out = script("judge.py", *options, "--test_input_path", chain / "prompts", "--output_dir", tmp_path / "out").ok()
    assert "chrF · f1: template alpaca, dtype float32; f2: template and dtype not recorded\n" in out


def test_a_step_made_anew_is_said(script, chain, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(chain, moved)
    lineage = json.loads((moved / "f2/lineage.json").read_text("utf-8"))
    lineage["parent"] |= {"name": str(moved / "f1"), "sha256": "0" * 64}
    write_json(moved / "f2/lineage.json", lineage)
    options = ["--test_input_path", chain / "prompts", "--likelihood", False, "--output_dir", tmp_path / "out"]
    assert "its weights are not those that" in script("judge.py", "--chain", moved / "f2", *options).ok()


def test_a_parent_is_where_it_was_recorded_or_else_beside_its_child(tmp_path):
    recorded, beside = tmp_path / "old/f1", tmp_path / "new/f1"
    for there, found in (((), recorded), ((beside,), beside), ((recorded, beside), recorded)):
        for folder in there:
            folder.mkdir(parents=True, exist_ok=True)
        assert locate(str(recorded), tmp_path / "new/f2") == found
    assert name_of(beside, None, {}) == "f1" and name_of(beside, None, {"f1": recorded}) == "new/f1"


def test_an_adapter_whose_base_is_not_there_is_measured_without_likelihoods(script, chain, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(chain / "f1", moved)
    (moved / "lineage.json").unlink()
    settings = json.loads((moved / "adapter_config.json").read_text("utf-8"))
    write_json(moved / "adapter_config.json", settings | {"base_model_name_or_path": str(tmp_path / "gone")})
    options = ["--answers", f"a={moved}", "--metrics", "--test_input_path", chain / "prompts"]
    out = script("judge.py", *options, "--output_dir", tmp_path / "out").ok()
    assert "log-likelihoods are left out" in out and "gone" in out
    error = script("judge.py", *options, "--output_dir", tmp_path / "out2", "--base_model", tmp_path / "gone").error
    assert "gone" in error
    out = script("judge.py", *options, "--output_dir", tmp_path / "out3", "--base_model", chain / "base").ok()
    assert "log-likelihood of the reference" in out


def test_no_judge_is_asked_for_a_run_that_cannot_end(script, chain, tmp_path, serve):
    server = serve(fair)
    moved, out, votes = tmp_path / "moved", tmp_path / "out", tmp_path / "votes.json"
    shutil.copytree(chain, moved)
    lineage = json.loads((moved / "f2/lineage.json").read_text("utf-8"))
    write_json(moved / "f2/lineage.json", lineage | {"parent": lineage["parent"] | {"name": str(moved / "f1")}})
    shutil.copytree(moved / "f1", tmp_path / "lost")
    (tmp_path / "lost/lineage.json").write_text("[]")
    write_json(votes, [{"instruction": "别的", "chosen": "好", "rejected": "坏"}])
    write_json(tmp_path / "none.json", [{"instruction": "没有回答"}])
    options = ["--chain", moved / "f2", "--judge_model", "m", "--api_base", server.url, "--report", "--output_dir", out]
    for wrong, why in (
        (["--held_out", f"f1={tmp_path}/none.json"], "none.json"),
        (["--votes", votes], "holds no votes on these systems' answers"),
        (["--run_code", "--test_input_path", chain / "prompts"], "holds no problem with tests"),
        (["--answers", f"lost={tmp_path}/lost"], "lost/lineage.json: not a lineage file"),
    ):
        assert why in script("judge.py", *options, *wrong, OPENAI_API_KEY="k").error
    weights = (moved / "f1/adapter_model.safetensors").read_bytes()
    (moved / "f1/adapter_model.safetensors").write_bytes(weights[:-100])
    assert "f1/adapter_model.safetensors" in script("judge.py", *options, OPENAI_API_KEY="k").error
    assert not server.bodies and not out.exists()
    (out / "scores.csv").mkdir(parents=True)
    assert "scores.csv: is a folder" in script("judge.py", *options, OPENAI_API_KEY="k").error
    (out / "scores.csv").rmdir()
    (moved / "f1/adapter_model.safetensors").write_bytes(weights)
    assert script("judge.py", *options, "--title", "一条 链", OPENAI_API_KEY="k").ok() and server.bodies
    page = (out / "report.html").read_text("utf-8")
    assert "<title>一条 链</title>" in page and "--title &#x27;一条 链&#x27;</code>" in page and 'alt="chain"' in page


def test_of_a_pair_the_likelier_answer_should_be_the_chosen_one(chain, tmp_path):
    engine = load_engine(str(chain / "base"), [chain / "f1"], False)
    encoder = make_encoder("preference", engine.prompters["f1"], engine.tokenizers["f1"], "", 512, False)
    learned, other = "我是梦想家。", "蓝色的天和别的。"
    pairs = [{"instruction": "问题1", "chosen": one, "rejected": two} for one, two in ((learned, other), (other, learned))]
    write_json(tmp_path / "pairs.json", pairs)
    rows = encoder(list(encoder.read(tmp_path / "pairs.json"))).to_pylist()
    loss, right = forgetting.measure(engine, "f1", forgetting.HeldOut("f1", "preference", rows, []))
    assert right == [True, False]
    alone = [forgetting.measure(engine, "f1", forgetting.HeldOut("f1", "preference", [row], []))[0] for row in rows]
    first, second = (sum(label != -100 for label in row["labels"]) for row in rows)
    assert first != second and alone[0] < alone[1]
    assert loss == pytest.approx((first * alone[0] + second * alone[1]) / (first + second), abs=1e-4)


@pytest.mark.slow
def test_the_matrix_of_forgetting(script, tmp_path, monkeypatch):
    """Two steps with validation sets: each one's own entry is its validation loss, and the loss by hand; f2 forgets f1."""
    tiny.llama(tmp_path / "base")
    for name, parent, output in (("f1", None, "我是梦想家。"), ("f2", "f1", "蓝色。")):
        asked = ["问" * (1 + n % 4) + str(n) for n in range(12)]  # unlike lengths, so that tokens weigh otherwise than records
        write_json(tmp_path / f"{name}.json", [{"instruction": one, "input": "", "output": output} for one in asked])
        resume = ["--resume_from_checkpoint", tmp_path / parent] if parent else []
        script(
            "finetune.py", "--base_model", tmp_path / "base", "--data_path", tmp_path / f"{name}.json", "--val_set_size", 3,
            "--output_dir", tmp_path / name, "--batch_size", 4, "--num_epochs", 10, "--learning_rate", 2e-2,
            "--train_on_inputs", name == "f1", "--seed", 7, *resume,
        ).ok()  # fmt: skip
    out = script("judge.py", "--chain", tmp_path / "f2", "--output_dir", tmp_path / "out").ok()
    assert "steps have no test.json" in out and "f1's records" in out
    loss, right = json.loads((tmp_path / "out/forgetting.json").read_text("utf-8"))["tables"]
    assert loss["systems"] == ["base", "f1", "f2"] and (tmp_path / "out/forgetting.png").is_file()
    values = {row["category"][:2]: row["values"] for row in loss["rows"]}
    for step in ("f1", "f2"):
        learned = json.loads((tmp_path / step / "lineage.json").read_text("utf-8"))["results"]["eval_loss"]
        assert values[step][step] == pytest.approx(learned, abs=1e-4)
    assert values["f1"]["f2"] > values["f1"]["f1"] + 0.1, "f2 has forgotten some of f1"
    assert [row["samples"] for row in right["rows"]] == [3, 3]
    assert right["rows"][1]["values"]["f2"] > 50 and right["rows"][1]["values"]["base"] == 0

    others = [{"instruction": f"问{n}", "input": "", "output": "我是梦想家。"} for n in (100, 101, 102)]
    write_json(tmp_path / "other.json", others)
    more = ["--held_out", f"f1={tmp_path}/other.json", "--output_dir", tmp_path / "more"]
    monkeypatch.setattr(forgetting, "MOST", 2)
    out = script("judge.py", "--chain", tmp_path / "f2", *more).ok()
    assert all(f"{step}: the first 2 of 3 held-out records are measured" in out for step in ("f1", "f2"))
    steps = {step: tmp_path / step for step in ("f1", "f2")}
    first, _ = forgetting.prepare(str(tmp_path / "base"), steps, [f"f1={tmp_path}/other.json"], False).data
    assert [record["instruction"] for record in first.records] == ["问100", "问101"]
    found = json.loads((tmp_path / "more/forgetting.json").read_text("utf-8"))["tables"][0]["rows"]
    assert [row["samples"] for row in found] == [2, 2]

    write_json(tmp_path / "f1.json", [{"instruction": "变了", "input": "", "output": "变了"}] * 12)
    out = script("judge.py", "--chain", tmp_path / "f2", "--output_dir", tmp_path / "third").ok()
    assert "f1.json has changed since it was learned" in out
    for step in ("f1", "f2"):  # so that there would be something to write before the matrix
        write_json(tmp_path / step / "test.json", [{"instruction": "问", "input": "", "output": "答"}])
    for wrong, why in (
        ("f9=x.json", "not a step of the chain"),
        ("f1", "give a step and its records"),
        ("f1=other.json --held_out f1=other.json", "f1 is given twice"),
        ("f1=none.json", "none"),
    ):
        words = ["--held_out", *wrong.replace("other", f"{tmp_path}/other").split()]
        assert why in script("judge.py", "--chain", tmp_path / "f2", *words, "--output_dir", tmp_path / "no").error
    assert not (tmp_path / "no").exists()
    assert "give both" in script("judge.py", "--answers", "a=b", "--metrics", "--held_out", "f1=x", "--output_dir", "o").error
