"""Converts the formats that an item of a file may have (several field names, dialogues) into one: a raw record.

A raw record has the fields of a record (see `utils.datasets.records`), not yet checked, and, if there is something to
report, `unused` (names of fields that are not read) and `read_as` (what was read under another name).
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

FIELDS = ("instruction", "input", "output")
ALPACA = frozenset(FIELDS)
KEPT = ("category", "reference")
KEPT_AS = {"class": "category", "std_answer": "reference"}  # BELLE's names
QUESTIONS = ("instruction", "prompt", "query", "question")
MATERIALS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
DIALOGUES = ("conversations", "messages", "conversation")
SYSTEMS = ("system", "system_prompt", "meta_instruction", "system_message")
PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("prompt", "response"))
ROLES = {"human": "user", "user": "user", "system": "system", "developer": "system"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant"
)
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "ipython", "tool_response", "function_response")
LEARNED = ("learn", "loss", "weight", "train", "train_on_turn", "output_with_loss")  # 0 or false: the answer is not learned
MASKED = ("mask", "masked")  # 1 or true: the answer is not learned
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
LABELS = ("label", "kto_tag")  # of answers that are good or not, in trl and in LLaMA-Factory
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
USED = {*FIELDS, *KEPT, *KEPT_AS, *SYSTEMS, *LEARNED, *MASKED, "history", "reasoning_content"}
USED_IN_TURNS = {"role", "from", "content", "value", "system", *LEARNED, *MASKED, *THOUGHTS}


class InvalidRecord(Exception):
    """Why an item of a file cannot become a record."""


def as_record(item: dict) -> dict:
    """Recognize the format of one item and make it a raw record. Raises InvalidRecord."""
    if item.keys() <= ALPACA:
        return item
    for name in MEDIA:
        if item.get(name):
            raise InvalidRecord(f"it has {name}, which is not read")
    if (label := label_of(item)) is False:
        raise InvalidRecord("label is false: the answer is not to be learned")
    if label:
        item = {name: item[name] for name in item if name not in LABELS}
    system = agreed_system([item.get(key) for key in SYSTEMS])
    key = next((key for key in DIALOGUES if item.get(key) is not None), None) if item.get("instruction") is None else None
    if key:
        raw = dialogue_record(item[key], system, {name: item[name] for name in item if name not in (key, "prompt")})
    else:
        raw = renamed(item)
    if isinstance(raw.get("instruction"), list):
        raw = dialogue_record(prompt_and_completion(raw), system, {key: item[key] for key in KEPT if key in item})
    if system:
        raw["system"] = system
    if item.get("reasoning_content"):
        raw["output"] = with_thought(item["reasoning_content"], raw.get("output"))
    earlier = parsed(raw.get("history"))
    answers = len(raw["learn"]) if "learn" in raw else 1 + (len(earlier) if isinstance(earlier, list) else 0)
    flags = [flag and own for flag, own in zip(record_flags(item, answers), raw.get("learn", [True] * answers), strict=True)]
    raw.pop("learn", None)
    return raw | ({} if all(flags) else {"learn": flags})


def label_of(item: dict) -> bool | None:
    """Whether an item's answer is labelled good; None if it has no such label: a number may as well name a class."""
    for name in LABELS:
        value = item.get(name)
        value = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value  # from a table
        if isinstance(value, bool):
            return value
    return None


def is_set(value: Any) -> bool:
    """True for the value of a field that says something: 0 and false do."""
    return value not in (None, "", [], {})


def renamed(item: dict) -> dict:
    """A raw record of an item with fields of any of the names above. Raises InvalidRecord if several compete."""
    chosen = {field: chosen_name(item, names) for field, names in zip(FIELDS, (QUESTIONS, MATERIALS, ANSWERS), strict=True)}
    raw: dict[str, Any] = {field: item.get(name) for field, name in chosen.items()}
    raw |= {name: item[key] for key, name in KEPT_AS.items() if item.get(key)}
    raw |= {key: item[key] for key in ("history", *KEPT) if item.get(key) is not None}
    other = [f"{name} read as {field}" for field, name in chosen.items() if name != field and item.get(name) is not None]
    unused = [name for name in item if name not in chosen.values() and is_unused(name, item[name])]
    return raw | ({"read_as": ", ".join(other)} if other else {}) | ({"unused": unused} if unused else {})


def chosen_name(item: dict, names: Sequence[str]) -> str:
    """Which of these names the item uses: the first if it is there and not empty, else whichever is.

    Raises InvalidRecord if several compete.
    """
    there = [name for name in names if item.get(name) not in (None, "", [])]
    if not there:
        return next((name for name in names if name in item), names[0])
    if names is MATERIALS and len(there) > 1 and item[there[0]] != item[there[1]]:
        raise InvalidRecord("both input and context are given")
    if there[0] != names[0] and len(there) > 1:
        raise InvalidRecord(f"both {there[0]} and {there[1]} are given")
    return there[0]


def dialogue_record(turns: Any, system: Any, rest: dict) -> dict:
    """The raw record of a dialogue; `rest` are the item's other fields."""
    turns = turns_in(parsed(turns))
    spoken = roles_and_texts(turns)
    roles = [role for role, _ in spoken]
    flags = [is_learned(turn) for turn, role in zip(turns, roles, strict=True) if role == "assistant"]
    raw = dialogue(spoken, system)
    if len(flags) <= len(raw["history"]):
        flags.append(True)  # the answer that is still to come
    unused = [name for name in rest if is_unused(name, rest[name])]
    in_turns = {f"{name} (in turns)" for turn in turns for name in turn if name not in USED_IN_TURNS and is_set(turn[name])}
    asked = {
        f"{name} (of a question)"
        for turn, role in zip(turns, roles, strict=True)
        for name in {*LEARNED, *THOUGHTS}
        if role != "assistant" and turn.get(name)
    }
    unused += sorted(in_turns | asked)
    kept = {key: rest[key] for key in KEPT if rest.get(key) is not None}
    return raw | kept | {"learn": flags} | ({"unused": unused} if unused else {})


def is_label(value: Any) -> bool:
    """True for what can be a category or a reference: a text, or a number, which stands for its digits."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def is_unused(name: str, value: Any) -> bool:
    """True for a field whose value is not read."""
    return is_set(value) and (name not in USED or (name in {*KEPT, *KEPT_AS} and not is_label(value)))


def prompt_and_completion(raw: dict) -> list:
    """The turns of a prompt and a completion that are both lists of turns."""
    answer = raw.get("output")
    return [*raw["instruction"], *(answer if isinstance(answer, list) else [])]


def parsed(value: Any) -> Any:
    """A list that is given as JSON text (as in tables); any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def agreed_system(texts: Iterable[Any]) -> Any:
    """The one system text among these. Raises InvalidRecord if there are two."""
    found = [text for text in texts if text]
    if any(text != found[0] for text in found):
        raise InvalidRecord("two system texts")
    return found[0] if found else None


def record_flags(item: dict, answers: int) -> list[bool]:
    """Which answers a record's own fields allow to be learned: one value for all, or a list with one per answer."""
    flags = [True] * answers
    for key in (*LEARNED, *MASKED):
        value = item.get(key)
        if value is None or isinstance(value, (str, dict)):
            continue  # a different field of the same name
        values = value if isinstance(value, list) else [value] * answers
        if len(values) != answers:
            raise InvalidRecord(f"{key} has {len(values)} entries for {answers} answers")
        flags = [flag and is_learned({key: one}) for flag, one in zip(flags, values, strict=True)]
    return flags


def is_learned(turn: dict) -> bool:
    """Whether an answer is to be learned. Raises InvalidRecord if a weight is neither 0 nor 1."""
    flags = []
    for key in (*LEARNED, *MASKED):
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise InvalidRecord(f"{key} is {str(value)[:30]}: only 0 and 1, false and true are supported")
        flags.append(bool(value) != (key in MASKED))
    return all(flags)


def dialogue(turns: list[tuple[str, Any]], system: Any = None) -> dict:
    """A record of `(role, text)` turns, roles "user", "assistant" and, in the first turn only, "system".

    Without a last answer the output is None, as in a prompt. Raises InvalidRecord if the turns do not alternate.
    """
    if turns and turns[0][0] == "system":
        system, turns = agreed_system([turns[0][1], system]), turns[1:]
    if not turns:
        raise InvalidRecord("a dialogue without turns")
    if any(role != ("user", "assistant")[index % 2] for index, (role, _) in enumerate(turns)):
        raise InvalidRecord("a dialogue whose turns are out of order")
    texts = [text for _, text in turns]
    if len(texts) % 2:
        texts.append(None)
    pairs = [[texts[index], texts[index + 1]] for index in range(0, len(texts), 2)]
    record = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1], "history": pairs[:-1]}
    return record | ({"system": system} if system else {})


def roles_and_texts(turns: Any) -> list[tuple[str, Any]]:
    """The turns of a dialogue in OpenAI's (role, content) or ShareGPT's (from, value) format. Raises InvalidRecord."""
    return [(role, text_of_turn(turn, role)) for turn, role in ((turn, role_of(turn)) for turn in turns_in(turns))]


def turns_in(turns: Any) -> list[dict]:
    """The turns of a dialogue; rounds that hold a question and its answer become two turns. Raises InvalidRecord."""
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns):
        raise InvalidRecord("a dialogue that is not a list of turns")
    found: list[dict] = []
    for turn in turns:
        pair = next((pair for pair in PAIRS if {*pair} <= turn.keys()), None)
        if "role" in turn or "from" in turn or not pair:
            found.append(turn)
            continue
        rest = {key: turn[key] for key in turn if key not in pair and key != "system"}
        if turn.get("system"):
            found.append({"role": "system", "content": turn["system"]})
        found += [{"role": "user", "content": turn[pair[0]]}, rest | {"role": "assistant", "content": turn[pair[1]]}]
    return found


def role_of(turn: dict) -> str:
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if any(turn.get(key) for key in CALLS) or (isinstance(role, str) and role.lower() in TOOL_ROLES):
        raise InvalidRecord("a dialogue with tool calls, which only chat templates that know tools carry")
    if any(turn.get(key) for key in MEDIA):
        raise InvalidRecord("a dialogue with parts that are not text")
    name = ROLES.get(role.lower()) if isinstance(role, str) else None
    if name is None:
        raise InvalidRecord(f"a dialogue with the unknown role {str(role)[:30]!r}")
    return name


def text_of_turn(turn: dict, role: str) -> Any:
    """The text of a turn; an answer begins with its thoughts."""
    text = content_of(turn.get("content") if turn.get("content") is not None else turn.get("value"))
    thought = next((turn[key] for key in THOUGHTS if turn.get(key)), None) if role == "assistant" else None
    return with_thought(thought, text) if thought is not None else text


def with_thought(thought: Any, text: Any) -> Any:
    """An answer after its thoughts, as reasoning models write them. Raises InvalidRecord if the thoughts are not a text."""
    if not isinstance(thought, str):
        raise InvalidRecord("reasoning_content is not a text")
    return f"<think>\n{thought.strip()}\n</think>\n\n{text}" if isinstance(text, str) and "</think>" not in text else text


def content_of(content: Any) -> Any:
    """The text of a message, its parts joined. Raises InvalidRecord if a part is an image or the like."""
    content = [content] if isinstance(content, dict) else content  # a single part
    if not isinstance(content, list):
        return content
    texts = [text_of_part(part) for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRecord("a dialogue with parts that are not text")
    return "".join(texts)


def text_of_part(part: Any) -> Any:
    """The text of a part of a message, or None if it is not text."""
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "input_text", "output_text"):
        return None
    return next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)
