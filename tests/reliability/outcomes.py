"""Plain references for what the campaign's runs leave: each check of a script says what is wrong with its results, or ""."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from programs import content
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from utils.datasets.encoding import encode_prompt
from utils.datasets.templates import Prompter
from utils.models.tokenizer import load_tokenizer

LONGEST_PROMPT = 2000  # tokens that a prompt and its answer may have to be compared: the windows have 2048
GREEDY = {"do_sample": False, "num_beams": 1, "pad_token_id": 3}
RESULTS = (".safetensors", ".json")


def plain_model(given: dict[str, str], adapter: str | Path) -> torch.nn.Module:
    """The base with an adapter (none: "") as transformers and peft load them."""
    base = AutoModelForCausalLM.from_pretrained(given["--base_model"], dtype=torch.float32)
    return (PeftModel.from_pretrained(base, adapter) if adapter else base).eval()


@torch.no_grad()
def merged(given: dict[str, str], out: Path) -> str:
    """The merged model's scores are those of the base with the adapter."""
    ids = torch.randint(4, 400, (1, 16), generator=torch.Generator().manual_seed(0))
    expected = plain_model(given, given["--lora_model"])(ids).logits
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids).logits
    apart = ((found - expected).abs().max() / expected.abs().max()).item()
    most = 0.02 if given.get("--dtype") == "float16" else 1e-4
    return f"scores differ by {apart:.1e}" if apart > most else ""


@torch.no_grad()
def trained(given: dict[str, str], out: Path) -> str:
    """The adapter loads, has moved, and was trained for as many steps as the records make."""
    tensors, known = load_file(out / "adapter_model.safetensors"), json.loads((out / "lineage.json").read_text("utf-8"))
    if not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name):
        return "no lora_B has moved"
    if not plain_model(given, out)(torch.tensor([[5, 6, 7]])).logits.isfinite().all():
        return "scores that are not finite"
    wanted = math.ceil(known["data"]["train"] / int(given["--batch_size"])) * int(given["--num_epochs"])
    steps = known["results"]["steps"]
    return f"{steps} steps, not {wanted}" if steps != wanted else ""


@torch.no_grad()
def answered(given: dict[str, str], out: Path) -> str:
    """Each answer of a greedy search is the one that transformers' own generate gives."""
    answers = json.loads((out / "test.json").read_text("utf-8"))
    if not answers or not all({"instruction", "output"} <= answer.keys() for answer in answers):
        return "no answers"
    if given["--num_beams"] != "1":
        return ""
    model, words = plain_model(given, given.get("--lora_weights", "")), load_tokenizer(given["--base_model"])
    prompter, most = Prompter("alpaca"), int(given["--max_new_tokens"])
    for answer in answers:
        ids = torch.tensor([encode_prompt(answer | {"output": ""}, prompter, words)])
        if ids.shape[1] + most > LONGEST_PROMPT:
            continue
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **GREEDY)
        text = words.decode(made[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for stop in prompter.stop_strings:
            text = text.partition(stop)[0]
        if text.strip() != answer["output"]:
            return f"{answer['output']!r}, not {text.strip()!r}, for {answer['instruction'][:80]!r}"
    return ""


def judged(_given: dict[str, str], out: Path) -> str:
    """Two systems with the same answers have the same metrics."""
    found = json.loads((out / "metrics.json").read_text("utf-8"))
    values = [row["values"] for table in found["tables"] for row in table["rows"]]
    other = [one for one in values if one["a"] != one["b"]]
    return f"two systems with one file of answers differ: {other[:1]}" if other or not values else ""


def cleaned(given: dict[str, str], out: Path) -> str:
    """Nothing is left that was not there; without repairs, each record is one of those given."""
    records = json.loads((out / "clean.json").read_text("utf-8"))
    raw = Path(given["--data_path"]).read_bytes().decode("utf-8", "replace")
    known = {str(value).strip() for item in lenient(raw) if isinstance(item, dict) for value in item.values()}
    if given["--fix_texts"] != "[]":
        return "" if len(records) <= len(lenient(raw)) else "more records than were given"
    strange = next((r for r in records if r["instruction"].strip() not in known), None)
    return f"a record that was not given: {strange}" if strange else ""


def lenient(raw: str) -> list[Any]:
    """The items of an array or of lines of JSON, without what is broken."""
    with contextlib.suppress(ValueError):
        found = json.loads(raw)
        return found if isinstance(found, list) else [found]
    items = []
    for line in raw.splitlines():
        with contextlib.suppress(ValueError):
            items.append(json.loads(line))
    return items


def other_results(out: Path, undisturbed: Path) -> str:
    """The first result file that is not the same, to the byte but for its time, as in the undisturbed run; "" if all are."""
    results = sorted(file.relative_to(undisturbed) for file in undisturbed.rglob("*") if file.suffix in RESULTS)
    if not results:
        return "the undisturbed run left no result"
    other = [name for name in results if not (out / name).is_file() or content(out / name) != content(undisturbed / name)]
    return f"after a kill {other[0]} is not that of an undisturbed run" if other else ""
