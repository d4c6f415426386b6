"""Batch runs through another program: a file of prompts answered by any server that speaks OpenAI's protocol.

If a tokenizer is known, prompts are encoded here with the training template, and sent as token ids to /completions:
vLLM, SGLang, llama.cpp and this toolkit's own endpoint accept these, and the ids are those of a local run. Otherwise, and
for servers that take no ids (Ollama, OpenAI), messages go to /chat/completions, and the server's own template is used;
models written by merge_weights.py carry the training template.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import lineage
from utils.adapters.settings import read_settings
from utils.console import UserError, progress, say
from utils.datasets.encoding import encode_prompt
from utils.datasets.jinja_export import messages_of
from utils.datasets.prompters import make_prompter
from utils.datasets.prompts import Record, answered, check_output
from utils.files import digest, locked
from utils.inference.answer_file import AnswerFile
from utils.inference.answerers import ChatModel, choose_template, labels, named_base, tokenizer_home
from utils.inference.openai_client import Messages, ModelServer, served_models
from utils.inference.requests import Endpoint, Reply, RequestLimits, usage
from utils.inference.sampling_params import SamplingParams
from utils.models.tokenizer import load_tokenizer

ROUTES = ("completions", "chat")
SERVERS = "(the server's)"
Prompts = Sequence[Messages | list[int]]


@dataclasses.dataclass(frozen=True)
class Asking:
    """Which server to ask, and how: its `model` ("": the adapters' names), and one of ROUTES ("": depends on what is known)."""

    api_base: str
    model: str
    route: str
    settings: SamplingParams
    stops: Sequence[str]
    limits: RequestLimits
    thinking: bool | None = None


def run(
    asking: Asking,
    base_model: str,
    lora_weights: Sequence[str],
    template: str,
    outputs: list[Path],
    records: list[Record],
    overwrite: bool,
) -> None:
    """Answer `records` with each of the adapters, or with the server's one model, into the files `outputs`.

    Raises UserError before the first request if the server has no such model, or a setting cannot be sent.
    """
    fields = request_fields(asking.settings)
    names = model_names(asking, lora_weights)
    folders: list[Path | None] = [Path(folder) for folder in lora_weights] or [None]
    prompts = [encoded(asking, folder, base_model, template, records) for folder in folders]
    for name, (asked, stops, used), path in zip(names, prompts, outputs, strict=True):
        stop = {"stop": [*stops, *asking.stops]} if stops or asking.stops else {}
        temperature = asking.settings.temperature if asking.settings.samples else 0.0
        server = ModelServer(name, asking.api_base, temperature, asking.settings.max_new_tokens, more=fields | stop)
        with locked(path):
            check_output(path, records, overwrite)
            write_answers(server, asking.limits, path, asked, used, records, overwrite)


def request_fields(settings: SamplingParams) -> dict[str, Any]:
    """The further fields of a request: the protocol's own and extensions of other servers; prints what is left out.

    Raises UserError for a setting that no server has.
    """
    if settings.no_repeat_ngram_size:
        raise UserError("--no_repeat_ngram_size: not part of the protocol; leave it out, or leave out --api_base")
    if settings.num_beams > 1:
        say(f"--num_beams {settings.num_beams}: the protocol has no beams; the server takes the likeliest token, or samples")
    fields: dict[str, Any] = {}
    if settings.samples:
        fields |= {"top_p": settings.top_p, "seed": settings.seed} | ({"top_k": settings.top_k} if settings.top_k else {})
    return fields | ({"repetition_penalty": settings.repetition_penalty} if settings.repetition_penalty != 1 else {})


def model_names(asking: Asking, lora_weights: Sequence[str]) -> list[str]:
    """The server's names of the models to ask. Raises UserError if it has none of that name, or the name is missing."""
    if asking.model and len(lora_weights) > 1:
        raise UserError(f"--api_model {asking.model}: one name for {len(lora_weights)} adapters; leave it out, or name one")
    served = served_models(ModelServer(asking.model, asking.api_base))
    wanted = [asking.model] if asking.model else labels(lora_weights)
    if not asking.model and len(served) == 1 and len(wanted) <= 1:
        if wanted != list(served):
            say(f"{asking.api_base}: uses its only model, {next(iter(served))}")
        return list(served.values())
    names = {name: name_there(name, served) for name in wanted}
    missing = [name for name, there in names.items() if not there]
    if missing or not wanted:
        there = ", ".join(served) or "none"
        what = f"--api_model {missing[0]}: not served there" if missing else "--api_model: missing"
        raise UserError(f"{what}; {asking.api_base} serves {there}")
    for name, there in names.items():
        if name != there:
            say(f"{asking.api_base}: {name} is asked for as {there}")
    return list(names.values())


def name_there(name: str, served: Mapping[str, str]) -> str:
    """The name by which a server is asked for the model `name`; "" if it has none.

    Ollama lists a model without a tag as NAME:latest. A server that lists no adapters may have one of its model, BASE:NAME.
    """
    for listed in (name, f"{name}:latest"):
        if listed in served:
            return served[listed]
    lists_adapters = any(one != there for one, there in served.items())
    of_base = not lists_adapters and any(name.startswith(f"{one}:") for one in served)
    return name if name in served.values() or of_base else ""


def encoded(
    asking: Asking, folder: Path | None, base_model: str, template: str, records: list[Record]
) -> tuple[Prompts, Sequence[str], str]:
    """The prompts for one answerer, as ids or as messages (which is printed), the texts that end its answers, and the
    template's name."""
    route = asking.route or ("completions" if folder or base_model else "chat")
    if route == "chat":
        if template:
            raise UserError(f"--prompt_template {template}: with --api_route chat the server's own is used; leave it out")
        if any(record.get("tools") or record.get("messages") for record in records):
            raise UserError("--api_route chat: cannot send tools, which some prompts have; give --api_route completions")
        inputs = sum(bool(record.get("input")) for record in records)
        say(
            f"{asking.api_base}: sending messages, which the server puts into its own template"
            + (f"; {inputs} prompts have an input, which follows the instruction on a new line" if inputs else "")
        )
        return [messages(record) for record in records], (), SERVERS
    if not (folder or base_model):
        raise UserError("--api_route completions: needs a tokenizer; give --lora_weights or --base_model, or --api_route chat")
    name = template or "alpaca"
    if folder:
        known = lineage.read(folder)
        name = choose_template(template, known, str(folder))
        base_model = base_model or named_base(read_settings(folder), known)
    tokenizer = load_tokenizer(tokenizer_home(ChatModel(name, folder, name, None), base_model))
    prompter = make_prompter(name, tokenizer, {tokenizer.eos_token_id} - {None}, asking.thinking)
    say(f"{asking.api_base}: sending token ids with the template {name}")
    with progress(records, desc="encoding", leave=False) as bar:
        return [encode_prompt(record, prompter, tokenizer) for record in bar], prompter.stop_strings, name


def write_answers(
    server: ModelServer,
    limits: RequestLimits,
    path: Path,
    prompts: Prompts,
    template: str,
    records: list[Record],
    overwrite: bool,
) -> None:
    """Answer what the journal does not have yet, then write the result and the record of how it was made."""
    settings = {"temperature": server.temperature, "max_tokens": server.max_tokens} | server.more
    header = {"model": server.model, "api_base": server.url, "prompts": digest(prompts), "settings": settings}
    file = AnswerFile(path, header, {"template": template, "dtype": SERVERS})
    if not overwrite and file.is_done():
        return
    journal = file.open_journal(overwrite)
    if journal.values:
        say(f"{journal.path}: {sum('answer' in v for v in journal.values.values())} answers are there already; continuing")
    try:
        replies = ask_all(Endpoint(server, journal, limits), prompts, "--max_new_tokens")
    except BaseException:
        journal.close(done=not any("answer" in value for value in journal.values.values()))  # not worth keeping
        raise
    file.finish(answered(record, reply.text.strip()) for record, reply in zip(records, replies, strict=True))
    say(f"{path}: {len(records)} answers from {server.model}; {usage(journal, limits)}")
    journal.close(done=True)


def ask_all(endpoint: Endpoint, prompts: Prompts, limit: str) -> list[Reply]:
    """Have prompts answered in parallel; refused answers are empty. Prints how many were refused, or cut by `limit`."""
    replies = endpoint.gather(
        [endpoint.ask(f"prompt {number}", prompt) for number, prompt in enumerate(prompts, 1)], "answering"
    )
    for finish, what in (("refused", "refused by the server, and left empty"), ("length", f"cut off ({limit})")):
        count = sum(reply.finish == finish for reply in replies)
        if count:
            say(f"{count} of {len(replies)} answers were {what}")
    return [Reply("" if reply.finish == "refused" else reply.text, reply.finish) for reply in replies]


def last_turn(record: Record) -> str:
    """Instruction and input as one text."""
    return f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]


def messages(record: Record) -> Messages:
    """A record as the messages that ask a model to answer it."""
    return [*messages_of(record)[:-1], {"role": "user", "content": last_turn(record)}]
