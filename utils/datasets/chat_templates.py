"""The tokenizer's own chat template: how it renders a dialogue, which tokens are learned, and where an answer ends."""

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from utils.console import UserError, reason, say
from utils.datasets.bounded_jinja import TooMuch
from utils.datasets.records import Record
from utils.datasets.templates import CHAT, split_thinking
from utils.datasets.tool_calls import Message, open_part, parsed_json, words_of

IGNORED = -100  # the label that torch's cross-entropy leaves out
EMPTY_THOUGHT = re.compile(r"\A\s*(<think>)?\s*</think>\n*")
SEPARATE = ("reasoning_content", "thinking", "reasoning")  # keys of messages in which templates take thoughts
PROBE = "ANSWER-PROBE"
QUESTION = {"role": "user", "content": "Q"}
CALL: Message = {
    "id": "call_probe-1",
    "type": "function",
    "function": {"name": "name_probe", "arguments": '{"key": "VALUE-PROBE"}'},
}
SHORT_ID = "call00001"  # nine letters and digits, which some templates demand
OTHER = "chat_template:"  # prefix of the names of further templates in a lineage
Ids = list[int]


class Sequence(NamedTuple):
    """One sequence to learn from. `answer_tokens` of its labels belong to answers; `raw_answers` of its answers are taken
    from the record, since the template writes them differently."""

    input_ids: Ids
    labels: Ids
    answer_tokens: int
    raw_answers: int


class Channels(NamedTuple):
    """The ids that a template writes around the parts of an answer that words mark, as in gpt-oss: before a thought, between
    a thought and the reply, and before a reply without a thought; all empty if there are no such words."""

    thought: Ids
    between: Ids
    reply: Ids


class ChatPrompter:
    """The chat template of a tokenizer, with the interface of `Prompter` and encodings of its own.

    `ends` are the tokens that end an answer; the one that the template writes after an answer is added to them.
    `thinking` is passed to the template as its `enable_thinking` (None: the template's default). The empty thought that
    some templates write before an answer without thoughts is never learned; with `thinking` False it is part of the prompt.
    Raises UserError if the tokenizer has no chat template, or the template cannot be rendered.
    """

    name = CHAT

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], thinking: bool | None = None):
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template; name a template in templates/ instead of {CHAT}"
            )
        self.tokenizer, self.thinking = tokenizer, thinking
        if further := others(tokenizer):
            use = ", and tool_use for records with tools" * ("tool_use" in further)
            say(f"{tokenizer.name_or_path}: has several chat templates (default, {', '.join(further)}); default is used{use}")
        with refused_as(f"{tokenizer.name_or_path}: its chat template fails", "fix it, or name a template in templates/"):
            self._rendered([QUESTION], True)
        self.takes_system = self._takes_system()
        if not self.takes_system:
            say(f"{tokenizer.name_or_path}: its chat template takes no system text; it is put before the first question")
        if "strftime_now" in str(tokenizer.chat_template):
            say(f"{tokenizer.name_or_path}: its chat template writes the current date into prompts")
        self.thought_key = next(filter(self._takes_thoughts_as, SEPARATE), "")
        self.end, self.stop_strings = self._written_end()
        self.channels = self._channels()
        self.ends = frozenset([*ends, *([self.end] if self.end is not None else [])])
        if not self.ends:
            raise UserError(f"{tokenizer.name_or_path}: no token ends an answer; give its tokenizer_config.json an eos_token")
        self.call_ids, self.call_forms = self._call_forms()
        self.carries = frozenset(["tools"] * self._takes_tools() + ["calls"] * bool(self.call_forms))
        self.markers = self._markers_of_calls()

    @property
    def texts(self) -> dict[str, str]:
        """What prompts and labels depend on."""
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        texts = {"chat_template": with_switch(self.tokenizer.get_chat_template(), self.thinking), "ends": " ".join(ends)}
        return texts | {f"{OTHER}{name}": with_switch(text, self.thinking) for name, text in others(self.tokenizer).items()}

    def messages(self, record: Record) -> list[Message]:
        """A record as messages, ending with the open question or, if the record has an output, its answer.

        An input is joined to its instruction by a line break.
        """
        found = record.get("messages") or spoken(record)
        system = record.get("system")
        if not system:
            return found
        if self.takes_system:
            return [{"role": "system", "content": system}, *found]
        return [found[0] | {"content": f"{system}\n\n{found[0]['content']}"}, *found[1:]]

    def encode_prompt(self, record: Record) -> Ids:
        """The ids of the prompt for the record's last question."""
        messages = open_part(self.messages(record | {"output": ""}))
        return self._ids(self._render(messages, True, self.thinking, record.get("tools")))

    def sample_call(self) -> Ids:
        """An answer that calls a tool, as the template writes it; empty if it writes none."""
        message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        return self._turn([QUESTION], message, None)[1] if self.call_forms else []

    def encode(self, record: Record, train_on_inputs: bool) -> list[Sequence]:
        """The sequences of a record.

        Each answer is learned after its own prompt, up to its end token. If the template rewrites earlier turns (removing
        thoughts from the history, say), so that the next prompt does not continue the sequence so far, a new sequence
        begins. An answer that the record's `learn` excludes has no labels.
        Raises UserError if an answer holds the text of an end token, after which nothing would be learned.
        """
        messages = self.messages(record)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        sequences: list[Sequence] = []
        ids, labels, count, raw = Ids(), Ids(), 0, 0
        for place, learn in zip(answers, record.get("learn") or [True] * len(answers), strict=True):
            prompt, answer, is_raw = self._turn(messages[:place], messages[place], record.get("tools"))
            if ids and prompt[: len(ids)] != ids:
                sequences.append(Sequence(ids, labels, count, raw))
                ids, labels, count, raw = [], [], 0, 0
            new = prompt[len(ids) :]
            ids = prompt + answer
            labels = labels + (new if train_on_inputs else [IGNORED] * len(new))
            labels = labels + (answer if learn else [IGNORED] * len(answer))
            count += len(answer) if learn else 0
            raw += is_raw and learn
        sequences.append(Sequence(ids, labels, count, raw))
        return [one for one in sequences if one.answer_tokens] or sequences[-1:]

    def _turn(self, asked: list[Message], message: Message, tools: list[dict] | None) -> tuple[Ids, Ids, bool]:
        """The ids of a prompt and of its answer with its end, and whether the answer is raw.

        The answer is what the template writes after the prompt. If that differs from the record's (R1 opens a thought in
        the prompt and removes it from the answer), the answer is raw: taken from the record.
        """
        content, calls = message["content"], message.get("tool_calls") or []
        words = [word for text in words_of(calls) for word in [text.strip()] if word]
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        for text, token in ((text, token) for text in [content, *words] for token in ends if token in text):
            raise UserError(f"{shown(text)}: this answer contains {token}, which ends an answer; remove it from the record")
        thought, answer = split_thinking(content)
        for switch in (None, True) if thought else (self.thinking,):  # a template may not think by default
            prompt = self._render(asked, True, switch, tools)
            whole = self._render([*asked, message], False, switch, tools)
            rest = whole[len(prompt) :]
            is_raw = not (whole.startswith(prompt) and answer.strip() in rest and thought in rest)
            if not is_raw:
                break
        opened = prompt.rstrip().endswith("<think>")
        if is_raw:
            plain_answer = {"role": "assistant", "content": PROBE}
            other = self._render([*asked, plain_answer], False, self.thinking, tools) if calls else ""
            prompt, rest = self._raw_turn(message, prompt, whole, other, opened)
        elif not thought and (empty := EMPTY_THOUGHT.match(rest)):
            own = empty.end() - (len(content) - len(content.lstrip("\n")))  # keeps the answer's own leading line breaks
            start = own if rest[own:].startswith(content) else empty.end()
            prompt, rest = prompt + rest[:start] * opened, rest[start:]
        if not all(word in rest or json.dumps(word, ensure_ascii=False)[1:-1] in rest for word in words):
            raise UserError(f"{shown(' '.join(words))}: the chat template does not write all of this tool call; leave it out")
        return *self._boundary(prompt, rest, "tool" if calls else "user"), is_raw

    def _raw_turn(self, message: Message, prompt: str, whole: str, other: str, opened: bool) -> tuple[str, str]:
        """The texts of a prompt and of the record's own answer, for when the template does not write it after this prompt.

        Calls are what `whole` has where `other` has a plain answer. `opened`: the prompt opens a thought.
        """
        content = message["content"]
        thought, answer = split_thinking(content)
        if message.get("tool_calls"):
            rest = EMPTY_THOUGHT.sub("", whole[self._shared(whole, other) :], count=1)
            before = f"{content.partition('</think>')[0]}</think>\n\n" if thought and thought not in rest else ""
            content = answer = before + rest
        elif whole.startswith(prompt) and not (opened or thought):
            rest = whole[len(prompt) :]
            space = rest[: len(rest) - len(rest.lstrip())]
            content = space + content.lstrip() if space else content
        if not opened:
            return prompt, content
        if thought:
            return prompt, content.lstrip().removeprefix("<think>").lstrip("\n")
        return prompt + "\n</think>\n\n", answer

    def _shared(self, one: str, other: str) -> int:
        """The length in characters of two texts' common beginning that ends at a token boundary in both."""
        pairs = enumerate(zip(one, other, strict=False))
        length = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
        ids = self._ids(one), self._ids(other)
        while (head := self._ids(one[:length])) and any(whole[: len(head)] != head for whole in ids):
            length -= 1
        return length

    def _boundary(self, prompt: str, rest: str, next_role: str) -> tuple[Ids, Ids]:
        """The ids of a prompt and of its answer, up to the first end token; one is added if there is none."""
        before, both = self._ids(prompt), self._ids(prompt + rest)
        joined = both[: len(before)] == before  # otherwise a token straddles the boundary
        after = both[len(before) :] if joined else self._ids(rest)
        end = next((place for place, token in enumerate(after) if token in self.ends), None)
        return before, after[: end + 1] if end is not None else [*after, self._closing(next_role)]

    @functools.cache  # noqa: B019  (a prompter lives as long as the program)
    def _closing(self, next_role: str) -> int:
        """The end of an answer after which the template writes none: what opens the next turn if that is an end token (GLM),
        else the tokenizer's own."""
        if self.end is not None:
            return self.end
        answer: Message = {"role": "assistant", "content": PROBE}
        result: Message = QUESTION
        if next_role == "tool":
            answer = {"role": "assistant", "content": "", "tool_calls": [self._as_taken(CALL)]}
            result = {"role": "tool", "content": "R", "tool_call_id": self._as_taken(CALL)["id"], "name": "name_probe"}
        texts = [self._tried([QUESTION, answer, *more]) for more in ([], [result])]
        opens = self._ids(texts[1][len(texts[0]) :])[:1] if texts[0] and texts[1].startswith(texts[0]) else []
        default = self.tokenizer.eos_token_id
        return next((token for token in opens if token in self.ends), default if default in self.ends else min(self.ends))

    # What the template supports, found out by rendering probes

    def _takes_system(self) -> bool:
        """Whether the template renders a system text."""
        return "SYSTEM-PROBE" in self._tried([{"role": "system", "content": "SYSTEM-PROBE"}, QUESTION])

    def _takes_thoughts_as(self, key: str) -> bool:
        """Whether the template writes thoughts that a message has under this key."""
        answer = {"role": "assistant", "content": PROBE, key: "THOUGHT-PROBE"}
        return any("THOUGHT-PROBE" in self._tried([QUESTION, answer], **switch) for switch in ({}, {"enable_thinking": True}))

    def _written_end(self) -> tuple[int | None, tuple[str, ...]]:
        """The control token that the template writes after an answer (None if it writes none), and the text that it ends an
        answer with instead."""
        tail = self._render([QUESTION, {"role": "assistant", "content": PROBE}], False).rpartition(PROBE)[2]
        known = self.tokenizer.added_tokens_decoder
        end = next((token for token in self._ids(tail) if token in known), None)
        return end, (tail.strip(),) if end is None and tail.strip() else ()

    def _channels(self) -> Channels:
        """The ids around the parts of an answer, if words between control tokens mark the parts."""
        asked = self._render([QUESTION], True)
        thought = {self.thought_key: "THOUGHT-PROBE"} if self.thought_key else {}
        replied, both = (self._tried([QUESTION, {"role": "assistant", "content": PROBE, **more}]) for more in ({}, thought))
        head = self._ids(replied[len(asked) : replied.find(PROBE)]) if replied.startswith(asked) else []
        words = self.tokenizer.decode(head, skip_special_tokens=True).strip()
        if not words or words == self.tokenizer.decode(head).strip():
            return Channels([], [], [])
        before, found, after = both[len(asked) :].partition("THOUGHT-PROBE")
        parts = (before, after.partition(PROBE)[0]) if found and both.startswith(asked) else ("", "")
        return Channels(self._ids(parts[0]), self._ids(parts[1]), head)

    def _takes_tools(self) -> bool:
        """Whether the template writes the definitions of tools."""
        function = {"name": "name_probe", "description": "TOOL-PROBE", "parameters": {"type": "object", "properties": {}}}
        return "TOOL-PROBE" in self._tried([QUESTION], tools=[{"type": "function", "function": function}])

    def _call_forms(self) -> tuple[bool, tuple[type, ...]]:
        """Whether ids of calls must be short, and the forms in which the template takes their arguments: JSON (str), objects
        (dict), both if it writes them alike, or none if it does not write calls and results."""
        for short in (False, True):
            written = {form: text for form in (dict, str) if (text := self._written_call(form, short))}
            if written:
                return short, tuple(written) if len(set(written.values())) == 1 else (dict,)
        return False, ()

    def _written_call(self, form: type, short: bool) -> str:
        """A call with arguments of this form and its result, as the template writes them; "" if it does not."""
        function, name = CALL["function"], SHORT_ID if short else CALL["id"]
        arguments = function["arguments"] if form is str else json.loads(function["arguments"])
        calls = [CALL | {"id": name, "function": function | {"arguments": arguments}}]
        result = {"role": "tool", "content": "RESULT-PROBE", "tool_call_id": name, "name": "name_probe"}
        text = self._tried([QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}, result])
        as_written = function["arguments"] in text if form is str else "VALUE-PROBE" in text and "'VALUE-PROBE'" not in text
        return text if as_written and "name_probe" in text and "RESULT-PROBE" in text else ""

    def _markers_of_calls(self) -> frozenset[int]:
        """The control tokens that occur only in answers with calls, such as Mistral's [TOOL_CALLS]."""
        called = {"role": "assistant", "content": "", "tool_calls": [self._as_taken(CALL)]}
        if not self.call_forms:
            return frozenset()
        call, text = (self._ids(self._tried([QUESTION, one])) for one in (called, {"role": "assistant", "content": PROBE}))
        special = {token for token, known in self.tokenizer.added_tokens_decoder.items() if known.special}
        return frozenset(special.intersection(call).difference(text, self.ends))

    def _as_taken(self, call: dict, number: int = 1) -> dict:
        """A call in the form that the template takes."""
        arguments = call["function"]["arguments"]
        if type(arguments) not in self.call_forms:
            arguments = parsed_json(arguments) if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        given = {"id": f"call{number:05}"} if self.call_ids else {}
        return call | given | {"function": call["function"] | {"arguments": arguments}}

    def _for_template(self, messages: list[Message]) -> list[Message]:
        """Messages in the form that the template takes: thoughts under its key if it has one, calls in its form."""
        found, ids = [], dict[str, str]()
        for message in messages:
            message = dict(message)
            if message["role"] == "assistant" and self.thought_key and (thought := split_thinking(message["content"])[0]):
                answer = message["content"].partition("</think>")[2].lstrip("\n")
                message |= {"content": answer, self.thought_key: thought}
            if "tool_calls" in message:
                calls = [self._as_taken(call, len(ids) + place) for place, call in enumerate(message["tool_calls"], 1)]
                ids |= {old["id"]: new["id"] for old, new in zip(message["tool_calls"], calls, strict=True)}
                message["tool_calls"] = calls
            if message["role"] == "tool":
                message["tool_call_id"] = ids.get(message["tool_call_id"], message["tool_call_id"])
            found.append(message)
        return found

    def _tried(self, messages: list[Message], **more: Any) -> str:
        """The text of messages without a prompt for an answer; "" if the template refuses them."""
        try:
            return self._rendered(messages, False, **more)
        except TooMuch:
            raise
        except Exception:  # a template may raise anything
            return ""

    def _render(
        self, messages: list[Message], open_answer: bool, thinking: bool | None = None, tools: list[dict] | None = None
    ) -> str:
        """The text of messages, rendered in the library's sandbox. Raises UserError if the template refuses them."""
        switch = {} if thinking is None else {"enable_thinking": thinking}
        given = {"tools": tools} if tools and "tools" in self.carries else {}
        first = shown(messages[0]["content"])
        with refused_as(f"{first}: the chat template cannot render this dialogue", "change it"):
            return self._rendered(self._for_template(messages), open_answer, **switch, **given)

    def _rendered(self, messages: list[Message], open_answer: bool, **more: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=open_answer, tokenize=False, **more)

    def _ids(self, text: str) -> Ids:
        """A rendered text as transformers encodes it."""
        return self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


@contextlib.contextmanager
def refused_as(what: str, fix: str) -> Iterator[None]:
    """Raise UserError with `what` failed, why, and a `fix`, for anything that a template raises, but for TooMuch."""
    try:
        yield
    except TooMuch:
        raise
    except Exception as error:  # a template may raise anything
        raise UserError(f"{what} ({reason(error)}); {fix}") from None


def spoken(record: Record) -> list[Message]:
    """The messages of a record without tool calls, including the last answer if there is one."""
    question = "\n".join(filter(None, [record["instruction"], record.get("input")]))
    pairs = [*(record.get("history") or []), (question, record.get("output") or "")]
    texts = [text for pair in pairs for text in pair]
    found = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return found if found[-1]["content"] else found[:-1]


def others(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A tokenizer's chat templates other than the default one, by name."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    return {name: text for name, text in sorted(named.items()) if name != "default"}


def with_switch(template: str, thinking: bool | None) -> str:
    """A chat template whose `enable_thinking` defaults to `thinking`; None leaves it unchanged."""
    if thinking is None:
        return template
    value = str(thinking).lower()
    return f"{{%- if enable_thinking is not defined -%}}{{%- set enable_thinking = {value} -%}}{{%- endif -%}}\n{template}"


def shown(text: str) -> str:
    """The beginning of a text, in one line."""
    return repr(text[:40])
