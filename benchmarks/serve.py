"""Concurrent requests: one token for each in turn, as the page used to do, against one batch that requests join and leave.

    python benchmarks/serve.py --base_model models/smollm2-135m

With --gguf, a file of the same model (merge_weights.py --export gguf), llama.cpp's server is measured, too. The first two
decode the same prompts greedily, to answers of the same length, and must give the same answers (with a --dtype other than
float32, rounding may change some; whether it did is printed). Then each leads a dialogue of many turns, and the time to the
first token of turn 2 and of the last turn is measured.
"""

import atexit
import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, Figures, child, interleave, report
from utils.cli import option, run

Ask = Callable[[Any, int], Iterator[tuple[str, int]]]  # a record, the maximum number of tokens: text and tokens so far


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    base_model: str = option(help="base model")
    lora_weights: list[str] = option([], "adapters on it, which the requests use in turn")
    test_input_path: list[str] = option([str(ROOT / "test_data")], "prompts")
    streams: list[str] = option(["1", "4", "16"], "numbers of concurrent streams")
    max_new_tokens: int = option(64, "tokens per answer", least=2)
    turns: int = option(40, "turns of the dialogue (0: none)", least=0)
    dtype: str = option("float32", "compute dtype of the first two recipes", choices=("float32", "bfloat16"))
    gguf: str = option("", "the model as a GGUF file, for llama.cpp's server")
    repeats: int = option(3, "runs of each recipe", least=1)
    recipe: str = option("", "internal: run only this recipe", choices=("plain", "ours", "llama.cpp"))


def main(options: Options) -> None:
    """Run the recipes alternately, each in a process of its own, and print the figures."""
    if options.recipe:
        print(json.dumps(measure(options)))
        return
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    values = {name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()}
    given = [f"--{name}={value}" for name, value in values.items() if value != ""]
    recipes: dict[str, Callable[[], Figures]] = {
        name: partial(child, __file__, *given, f"--recipe={name}")
        for name in ("plain", "ours", *(["llama.cpp"] if options.gguf else []))
    }
    medians = interleave(recipes, options.repeats)
    plain, ours = medians["plain"], medians["ours"]
    ratios: Figures = {"peak_mb, ours / plain": ours["peak_mb"] / plain["peak_mb"]}
    for count in options.streams:
        name = f"{count}_streams_tokens_per_second"
        ratios[f"{name}, ours / plain"] = ours[name] / plain[name]
        if options.gguf:
            ratios[f"{name}, ours / llama.cpp"] = ours[name] / medians["llama.cpp"][name]
            name = f"{count}_streams_processor_ms_per_token"
            ratios[f"{name}, ours / llama.cpp"] = ours[name] / medians["llama.cpp"][name]
    if options.turns:
        for name, figures in medians.items():
            ratios[f"first token of the last turn / of turn 2, {name}"] = figures["last_turn_s"] / figures["turn_2_s"]
    medians.get("llama.cpp", {}).pop("answers", None)  # of another dtype, so they may differ
    equal = plain.pop("answers") == ours.pop("answers")
    if not equal and options.dtype == "float32":
        sys.exit("the recipes' answers differ")
    chosen = {"max_new_tokens": options.max_new_tokens, "dtype": options.dtype, "equal": equal}
    report(medians, ratios, ("torch", "transformers", "peft"), **chosen)


def measure(options: Options) -> dict[str, float]:
    """The figures of one recipe in this process; `answers` is a hash of all answers, for comparing them."""
    from utils.datasets.prompts import read_prompts
    from utils.inference.answerers import resolve
    from utils.inference.engine import Engine
    from utils.lineage import digest
    from utils.models.placement import place

    base_model, answerers = resolve(options.base_model, options.lora_weights, "")
    engine = Engine(base_model, answerers, place(False, False, dtype=options.dtype))
    kinds: dict[str, Callable[[Any], Ask]] = {"plain": in_turn, "ours": together, "llama.cpp": partial(llama_cpp, options)}
    ask = kinds[options.recipe](engine)
    records = [record for record in read_prompts(options.test_input_path) if not (record.get("history") or record["input"])]
    figures: dict[str, float] = {}
    said: list[str] = []
    list(ask(records[-1], 2))  # warm-up: the first request is slower
    for count in map(int, options.streams):
        chosen = records[:: len(records) // count][:count]
        used, started, results = processor_seconds(), time.perf_counter(), [("", 0, 0.0)] * count
        threads = [
            threading.Thread(target=stream, args=(ask, record, options.max_new_tokens, results, place))
            for place, record in enumerate(chosen)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        said += [text for text, _, _ in results]
        made = sum(tokens for _, tokens, _ in results)
        figures[f"{count}_streams_tokens_per_second"] = made / seconds
        figures[f"{count}_streams_processor_ms_per_token"] = (processor_seconds() - used) / made * 1000
        figures[f"{count}_streams_first_token_s"] = max(first for _, _, first in results)
    if options.turns:
        figures |= dialogue(ask, records, options.turns)
    return figures | {"answers": int(digest(said)[:12], 16)}


def processor_seconds() -> float:
    """CPU time of this process and its children: on a busy machine a better measure than the clock."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def stream(ask: Ask, record: Any, length: int, results: list, place: int) -> None:
    """Answer one prompt; stores the answer, its tokens, and the seconds to its first token in `results`."""
    started, first = time.perf_counter(), 0.0
    for text, tokens in ask(record, length):
        if tokens and not first:
            first = time.perf_counter() - started
        results[place] = (text, tokens, first)


def dialogue(ask: Ask, records: list[Any], turns: int) -> dict[str, float]:
    """Lead a dialogue; returns the seconds to the first token of turn 2 and of the last turn, each a median of three.

    The last three turns repeat the questions of turns 2 to 4, so that their new parts are equally long.
    """
    history: list[list[str]] = []
    firsts: list[float] = []
    for turn in range(turns + 1):
        results = [("", 0, 0.0)]
        place = turn - (turns - 3) if turn > max(3, turns - 3) else turn
        record = {"instruction": records[place % len(records)]["instruction"], "history": history}
        stream(ask, record, 16, results, 0)
        history = [*history, [record["instruction"], results[0][0]]]
        firsts.append(results[0][2])
    return {"turn_2_s": statistics.median(firsts[1:4]), "last_turn_s": statistics.median(firsts[-3:])}


def in_turn(engine: Any) -> Ask:
    """The baseline: each request is computed on its own, and one thread computes a token of each in turn."""
    from utils.inference.sampling_params import SamplingParams

    thread, name = ThreadPoolExecutor(1), engine.answerers[0].name

    def ask(record: Any, length: int) -> Iterator[tuple[str, int]]:
        ids, tokens = engine.encode(name, record), 0
        steps = engine.answer(name, [ids], SamplingParams(num_beams=1, max_new_tokens=length))
        ending = engine.ending(name)

        def step() -> Any:
            engine.use(name)
            return next(steps, None)

        while (found := thread.submit(step).result()) is not None:
            tokens += found.rows
            yield ending.text((found.finished or found.running)[0]), tokens

    return ask


def together(engine: Any) -> Ask:
    """This toolkit: all requests in one batch."""
    from utils.chat.sessions import ChatService
    from utils.inference.sampling_params import SamplingParams

    service, name = ChatService(engine, 2048), engine.answerers[0].name

    def ask(record: Any, length: int) -> Iterator[tuple[str, int]]:
        for reply in service.reply(name, record, SamplingParams(num_beams=1, max_new_tokens=length)):
            yield reply.text, reply.tokens

    return ask


def llama_cpp(options: Options, engine: Any) -> Ask:
    """llama.cpp's server, one slot per stream, with the same prompt ids as the others."""
    from utils.inference.llama_server import LlamaServer

    server = LlamaServer(Path(options.gguf), os.cpu_count() or 1, max(map(int, options.streams)), window=4096)
    atexit.register(server.__exit__)
    name = engine.answerers[0].name

    def ask(record: Any, length: int) -> Iterator[tuple[str, int]]:
        text = ""
        for part in server.stream({"prompt": engine.encode(name, record), "n_predict": length, "temperature": 0}):
            text += part["content"]
            yield text, part["tokens_predicted"]

    return ask


if __name__ == "__main__":
    run(main, Options)
