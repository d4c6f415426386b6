"""Dialogues with tools, in the formats in which they are published, as messages that chat templates take.

It knows OpenAI's (`tool_calls` on an assistant's message, the role `tool`, and the older `function_call` and `function`)
and those of ShareGPT, LLaMA-Factory and ms-swift (turns of `function_call` or `tool_call`, and of `observation` or
`tool_response`), with `tools` on the record as a list, or as JSON.
"""

import itertools
import json
from collections.abc import Collection, Iterable
from typing import Any

from utils.datasets.item_formats import (
    CALLS,
    DIALOGUES,
    KEPT,
    SYSTEMS,
    THOUGHTS,
    TOOL_ROLES,
    USED,
    USED_IN_TURNS,
    InvalidRecord,
    agreed_system,
    as_record,
    content_of,
    is_learned,
    is_set,
    parsed,
    record_flags,
    role_of,
    text_of_turn,
    turns_in,
    with_thought,
)

Message = dict[str, Any]
CARRIED = ("tools", "calls")  # what a template may support: the tools' definitions, and calls with their results
CALL_ROLES = ("function_call", "tool_call")
DEFINITIONS = ("tools", "functions")  # functions: OpenAI's first name for them
FIELDS_OF_CALLS = {"tool_calls", "function_call", "tool_call_id", "name", "id", "type"}


def as_record_with_tools(item: dict, carries: Collection[str]) -> dict:
    """Convert an item into a raw record that keeps what its template `carries` of "tools" and "calls": `tools`, and `messages`
    if tools are called. Raises InvalidRecord."""
    given = next((item[name] for name in DEFINITIONS if item.get(name)), None) if "tools" in carries else None
    rest = {name: item[name] for name in item if given is None or name not in DEFINITIONS}
    key, turns = dialogue_in(rest) if "calls" in carries else ("", [])
    raw = called(rest, key, turns) if any(map(is_about_tools, turns)) else as_record(rest)
    return raw | ({"tools": definitions(given)} if given else {})


def dialogue_in(item: dict) -> tuple[str, list[dict]]:
    """The field of an item that holds its dialogue ("": none does), and the turns there."""
    key = next((name for name in (*DIALOGUES, "prompt") if isinstance(parsed(item.get(name)), list)), "")
    if not key:
        return "", []
    more = parsed(item.get("completion")) if key == "prompt" else None
    return key, turns_in([*parsed(item[key]), *(more if isinstance(more, list) else [])])


def name_of_role(turn: dict) -> str:
    """The role of a turn as written in the file, in lower case."""
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    return role.lower() if isinstance(role, str) else ""


def is_about_tools(turn: dict) -> bool:
    """True for a turn that calls a tool or gives a tool's result."""
    return name_of_role(turn) in TOOL_ROLES or any(turn.get(name) for name in CALLS)


def called(item: dict, key: str, turns: list[dict]) -> dict:
    """The raw record of a dialogue in which tools are called. Raises InvalidRecord."""
    messages, flags = as_messages(turns)
    head = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    system = agreed_system([head, *(item.get(name) for name in SYSTEMS)])
    messages = messages[1:] if head is not None else messages
    check_order(messages)
    asked = [message["content"] for message in messages if message["role"] == "user"]
    is_open = messages[-1]["role"] != "assistant"
    flags = [flag and own for flag, own in zip(flags, record_flags(item, len(flags)), strict=True)]
    read = {key, "completion"} if key == "prompt" else {key}
    unused = sorted(name for name in item if name not in USED | read and is_set(item[name]))
    known = USED_IN_TURNS | FIELDS_OF_CALLS
    unused += sorted({f"{name} (in turns)" for turn in turns for name in turn if name not in known and is_set(turn[name])})
    raw = {"instruction": asked[-1], "input": "", "output": None if is_open else messages[-1]["content"], "messages": messages}
    raw |= {name: item[name] for name in KEPT if item.get(name) is not None}
    raw |= {"system": system} if system else {}
    return raw | ({"learn": flags} if not all(flags) else {}) | ({"unused": unused} if unused else {})


def as_messages(turns: list[dict]) -> tuple[list[Message], list[bool]]:
    """Turns as messages with the roles system, user, assistant and tool; and which of the assistant's are to be learned.

    Calls that directly follow each other or an assistant's text belong to one message. A result without an id answers the
    first call that has no result yet.
    """
    messages: list[Message] = []
    flags: list[bool] = []
    for turn in turns:
        role = name_of_role(turn)
        if role in TOOL_ROLES and role not in CALL_ROLES:
            messages.append(result(turn, messages))
        elif role in CALL_ROLES or any(turn.get(name) for name in CALLS):
            calls = calls_of(turn, sum(len(message.get("tool_calls", ())) for message in messages))
            text = "" if role in CALL_ROLES else spoken(turn)
            if role in CALL_ROLES and messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).extend(calls)
                flags[-1] = flags[-1] and is_learned(turn)
            else:
                messages.append({"role": "assistant", "content": text, "tool_calls": calls})
                flags.append(is_learned(turn))
        else:
            kind = role_of(turn)
            messages.append({"role": kind, "content": checked_text(text_of_turn(turn, kind))})
            flags += [is_learned(turn)] if kind == "assistant" else []
    return messages, flags


def spoken(turn: dict) -> str:
    """An assistant's text and thoughts beside its calls."""
    text = checked_text(content_of(turn.get("content") if turn.get("content") is not None else turn.get("value") or ""))
    thought = next((turn[name] for name in THOUGHTS if turn.get(name)), None)
    return with_thought(thought, text) if thought is not None else text


def checked_text(text: Any) -> str:
    """A text. Raises InvalidRecord if it is something else."""
    if not isinstance(text, str):
        raise InvalidRecord("a dialogue with a turn that is not a text")
    return text


def calls_of(turn: dict, before: int) -> list[dict]:
    """The calls of a turn as OpenAI writes them, each with an id; `before`: how many the dialogue has had.

    Arguments are left as JSON or an object. Raises InvalidRecord if a call has no name, or its arguments are not an object.
    """
    found = turn.get("tool_calls") or turn.get("function_call")
    if not found:
        found = parsed_json(turn.get("content") if turn.get("content") is not None else turn.get("value"))
    calls = []
    for number, call in enumerate(found if isinstance(found, list) else [found], before + 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise InvalidRecord("a tool call without a name")
        arguments: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
        if not isinstance(parsed_json(arguments or "{}"), dict):
            raise InvalidRecord("a tool call whose arguments are not an object")
        given = call.get("id")
        known = {"id": given if isinstance(given, str) and given else f"call{number:05}", "type": "function"}
        calls.append(known | {"function": {"name": name, "arguments": arguments or {}}})
    return calls


def result(turn: dict, before: list[Message]) -> Message:
    """A tool's result, with the id and name of the call that it answers."""
    content = parsed_result(turn.get("content") if turn.get("content") is not None else turn.get("value"))
    calls = [call for message in before for call in message.get("tool_calls", ())]
    answered = {message["tool_call_id"] for message in before if message["role"] == "tool"}
    open_calls = [call for call in calls if call["id"] not in answered]
    named = [call for call in calls if call["id"] == turn.get("tool_call_id")] or open_calls
    if not named:
        raise InvalidRecord("a tool's result without a call")
    name = turn.get("name") if isinstance(turn.get("name"), str) else None
    return {
        "role": "tool",
        "content": content,
        "tool_call_id": named[0]["id"],
        "name": name or named[0]["function"]["name"],
    }


def parsed_result(content: Any) -> str:
    """A tool's result as text; an object as JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    is_parts = isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    return checked_text(content_of(content)) if is_parts else json.dumps(content, ensure_ascii=False)


def parsed_json(value: Any) -> Any:
    """A text parsed as JSON; any other value unchanged. Raises InvalidRecord if a text is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRecord("a tool call that is not JSON") from None


def check_order(messages: list[Message]) -> None:
    """Raises InvalidRecord unless the user begins, questions and results are answered, and results follow calls."""
    after = {"user": ("assistant",), "tool": ("assistant", "tool"), "assistant": ("user", "tool")}
    roles = [message["role"] for message in messages]
    if not roles or roles[0] != "user" or any(two not in after.get(one, ()) for one, two in itertools.pairwise(roles)):
        raise InvalidRecord("a dialogue whose turns are out of order")
    if any(not (m["content"].strip() or m.get("tool_calls")) for m in messages if m["role"] in ("user", "assistant")):
        raise InvalidRecord("a dialogue with an empty turn")


def definitions(given: Any) -> list[dict]:
    """Tools as OpenAI defines them. Raises InvalidRecord if one has no name."""
    try:
        found = parsed_json(given)
    except InvalidRecord:
        raise InvalidRecord("tools is not JSON") from None
    tools = []
    for tool in found if isinstance(found, list) else [found]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRecord("a tool without a name")
        tools.append({"type": "function", "function": function})
    return tools


def open_part(messages: list[Message]) -> list[Message]:
    """The messages up to the last question or result, without the final answer if there is one."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def words_of(calls: Iterable[dict]) -> list[str]:
    """The names of calls and the texts in their arguments, each of which a rendered call must hold."""
    found: list[str] = []
    for call in calls:
        arguments = call["function"]["arguments"]
        found += [call["function"]["name"], *texts_in(parsed_json(arguments))]
    return found


def texts_in(value: Any) -> list[str]:
    """The texts in a JSON value."""
    if isinstance(value, dict):
        return [text for part in value.values() for text in texts_in(part)]
    return [text for part in value for text in texts_in(part)] if isinstance(value, list) else [value] * isinstance(value, str)
