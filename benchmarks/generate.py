"""Answering all of test_data: one prompt at a time as alpaca-lora does, transformers' own batches, and this toolkit.

    python benchmarks/generate.py --base_model models/smollm2-135m

Prompts and answer lengths are the same for all recipes, and the answers must be, too: if two differ, their scores at the
point where the recipes diverged are printed and must be within 1e-3 of each other. For greedy decoding these are the
log-probabilities of the first differing tokens; beam search compares complete beams by their sum of log-probabilities
divided by their length.

On a shared machine, set OMP_NUM_THREADS=1 and look at the CPU seconds, which do not include waiting.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, Figures, interleave, report
from utils.cli import option, run
from utils.console import say

TOLERANCE = 1e-3
ROWS = 32  # of a left-padded batch, counting beams; 64 was no faster
Answers = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark."""

    base_model: str = option(help="base model")
    lora_weights: list[str] = option([], "adapter: unmerged in the baseline, merged in memory in ours")
    test_input_path: list[str] = option([str(ROOT / "test_data")], "prompts")
    prompts: int = option(0, "number of prompts to answer, evenly spaced (0: all)", least=0)
    num_beams: list[str] = option(["1", "4"], "numbers of beams to measure")
    max_new_tokens: int = option(48, "tokens per answer", least=1)
    repeats: int = option(1, "runs of each recipe", least=1)
    continuous: bool = option(True, "also measure model.generate_batch (greedy decoding only)")


def main(options: Options) -> None:
    """Measure each number of beams and print the figures."""
    from utils.datasets.prompts import read_prompts
    from utils.inference.answerers import resolve
    from utils.inference.engine import Engine
    from utils.models.placement import place

    base_model, answerers = resolve(options.base_model, options.lora_weights, "")
    engine = Engine(base_model, answerers, place(False, False))
    engine.loaded  # noqa: B018, load the model before the clock starts
    records = read_prompts(options.test_input_path)
    records = records[:: max(1, len(records) // options.prompts)][: options.prompts] if options.prompts else records
    prompts = [engine.encode(answerers[0].name, record) for record in records]
    medians: dict[str, Figures] = {}
    ratios: Figures = {}
    for beams in map(int, options.num_beams):
        measured, answers = measure(engine, prompts, beams, options)
        medians |= measured
        names = list(measured)
        for name in names[1:]:
            for key in ("seconds", "cpu_seconds"):
                ratios[f"{name} against {names[0]}, {key}"] = measured[names[0]][key] / measured[name][key]
            ratios[f"identical answers, {name}"] = compare(engine, prompts, answers[names[0]], answers[name], beams, name)
    lengths = sorted(map(len, prompts))
    facts = {"prompts": len(prompts), "prompt tokens": [lengths[0], lengths[len(lengths) // 2], lengths[-1]]}
    report(medians, ratios, ("torch", "transformers", "peft"), max_new_tokens=options.max_new_tokens, **facts)


def measure(engine: Any, prompts: Answers, beams: int, options: Options) -> tuple[dict[str, Figures], dict[str, Answers]]:
    """Run the recipes alternately; returns their figures and their answers."""
    recipes = {f"plain, {beams} beams": one_by_one, f"ours, {beams} beams": in_batches}
    recipes[f"left-padded batches, {beams} beams"] = padded
    if options.continuous and beams == 1:
        recipes["continuous batching, 1 beam"] = continuous
    answers: dict[str, Answers] = {}

    def timed(name: str, recipe: Callable) -> Callable[[], Figures]:
        def call() -> Figures:
            start, cpu = time.perf_counter(), time.process_time()
            answers[name] = recipe(engine, prompts, beams, options.max_new_tokens)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            return {"seconds": seconds, "cpu_seconds": cpu, "tokens_per_second": sum(map(len, answers[name])) / seconds}

        return call

    return interleave({name: timed(name, recipe) for name, recipe in recipes.items()}, options.repeats), answers


def one_by_one(engine: Any, prompts: Answers, beams: int, length: int) -> Answers:
    """The baseline, as in alpaca-lora's generate.py: one prompt per call, all scores kept."""
    import torch
    from transformers import GenerationConfig

    engine.use(engine.answerers[0].name)
    answers = []
    for prompt in prompts:
        input_ids = torch.tensor([prompt], device=engine.model.device)
        config = GenerationConfig(
            num_beams=beams, eos_token_id=engine.model.config.eos_token_id, pad_token_id=engine.model.config.pad_token_id
        )
        with torch.no_grad():
            output = engine.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=config,
                return_dict_in_generate=True,
                output_scores=True,
                max_new_tokens=length,
            )
        answers.append(until_end(output.sequences[0, len(prompt) :].tolist(), engine.model.config.eos_token_id))
    return answers


def in_batches(engine: Any, prompts: Answers, beams: int, length: int) -> Answers:
    """This toolkit, without stop strings, which the baseline does not have."""
    from utils.inference.batch import plan
    from utils.inference.decoding import decode
    from utils.inference.sampling_params import SamplingParams

    settings, end = SamplingParams(num_beams=beams, max_new_tokens=length), engine.model.config.eos_token_id
    answers: Answers = [[] for _ in prompts]
    with engine.merged(engine.answerers[0].name):
        for batch in plan(prompts, settings.num_beams, settings.max_new_tokens, engine.room, 0):
            chosen, limits = [prompts[place] for place in batch], [length] * len(batch)
            for step in decode(engine.model, chosen, limits, settings, lambda ids: ids[-1] == end, [0] * len(batch)):
                for row, ids in step.finished.items():
                    answers[batch[row]] = ids
    return answers


def padded(engine: Any, prompts: Answers, beams: int, length: int) -> Answers:
    """Batches of prompts of similar length, left-padded, through the library's `model.generate`."""
    import torch

    model, end, pad = engine.model, engine.model.config.eos_token_id, engine.model.config.pad_token_id
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    answers: Answers = [[] for _ in prompts]
    size = ROWS // beams
    with engine.merged(engine.answerers[0].name), torch.inference_mode():
        for start in range(0, len(order), size):
            places = order[start : start + size]
            width = len(prompts[places[0]])
            padding = [width - len(prompts[place]) for place in places]
            ids = [[pad or 0] * left + prompts[place] for left, place in zip(padding, places, strict=True)]
            mask = [[0] * left + [1] * (width - left) for left in padding]
            device = model.device
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                num_beams=beams,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=pad,
                max_new_tokens=length,
            )
            for place, row in zip(places, output[:, width:].tolist(), strict=True):
                answers[place] = until_end(row, end)
    return answers


def continuous(engine: Any, prompts: Answers, beams: int, length: int) -> Answers:
    """transformers' continuous batching."""
    from transformers import GenerationConfig

    end = engine.model.config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=length, eos_token_id=end, pad_token_id=engine.model.config.pad_token_id, do_sample=False
    )
    before = engine.model.config._attn_implementation
    with engine.merged(engine.answerers[0].name):
        outputs = engine.model.generate_batch(inputs=prompts, generation_config=config)
    engine.model.set_attn_implementation(before)
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [until_end(found[tuple(prompt)], end) for prompt in prompts]


def until_end(ids: list[int], end: int) -> list[int]:
    """An answer's ids up to and including the end-of-sequence token."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def compare(engine: Any, prompts: Answers, plain: Answers, ours: Answers, beams: int, name: str) -> float:
    """The share of identical answers; prints how the others differ, and ends the program if it is more than rounding."""
    same, wrong = 0, 0
    for prompt, one, other in zip(prompts, plain, ours, strict=True):
        if one == other:
            same += 1
            continue
        first = next(
            (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
        )
        scores = [log_probabilities(engine, prompt, ids) for ids in (one, other)]
        values = [float(s.mean()) for s in scores] if beams > 1 else [float(s[first]) for s in scores]
        wrong += abs(values[0] - values[1]) > TOLERANCE
        what = "mean log-probability" if beams > 1 else "log-probability"
        say(f"  {name}: differs from token {first} on; {what} {values[0]:.6f} (plain) and {values[1]:.6f}")
    if wrong:
        sys.exit(f"{name}: {wrong} answers differ by more than rounding")
    return same / len(prompts)


def log_probabilities(engine: Any, prompt: list[int], answer: list[int]) -> Any:
    """The model's log-probability of each token of an answer: (tokens,) float32."""
    import torch

    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([prompt + answer], device=engine.model.device)).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]


if __name__ == "__main__":
    run(main, Options)
