"""Faults in a record's texts that come from how the file was produced, not from the author: found, and fixed on request."""

import html
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# What a JSON parser makes of LaTeX's single backslashes: a backspace in \beta, a form feed in \frac, a tab in \times.
LATEX = re.compile(
    r"\x08(?=[A-Za-z])|\f(?=[A-Za-z])|\r(?=ight|ho\b|angle|ceil|floor|m\b|aise|ef\b)"
    r"|\t(?=imes\b|heta\b|ext(?:bf|it|rm|tt)?\{|frac\b|riangle|herefore\b|ilde\b)|\n(?=abla\b|otin\b|eq\b)"
)
IN_MATH = re.compile(r"\t(?=(?:au|an|anh|o|op)(?![A-Za-z]))|\n(?=(?:e|u|eg|i|ot|mid|leq|geq)(?![A-Za-z]))")  # between dollars
LETTERS = {"\b": "b", "\f": "f", "\r": "r", "\t": "t", "\n": "n"}
ENTITY = re.compile(r"&(?:quot|amp|lt|gt|nbsp|apos|[lr][ds]quo|hellip|mdash|middot|times|#\d{2,6}|#x[0-9A-Fa-f]{2,5});")
ZERO_WIDTH = re.compile("[\u200b\u2060]")
ESCAPED_LINE = re.compile(r"(?<!\\)\\n(?!(?:abla|eg|ewline|eq|i|ot|otin|u|um|e|mid|parallel|less|gtr)\b)")
PLACEHOLDER = re.compile(r"\{\{\s*[^\W\d][\w .]{0,40}\}\}|\{\{[^{}\n]{0,40}[\u4e00-\u9fff][^{}\n]{0,40}\}\}")
LOST = re.compile("\ufffd|锟斤拷|烫烫烫|屯屯屯")
TOKENS = re.compile(r"<[|｜][\w▁]{2,30}[|｜]>|</s>|<(?:start|end)_of_turn>")
NOTHING = {
    *("nan", "NaN", "None", "null", "NULL", "<NA>", "<noinput>", "<no input>", "<nooutput>", "<no output>"),
    *("undefined", "[object Object]", "#N/A", "#NAME?", "#VALUE!", "#REF!"),
}

BROKEN_LATEX = "control characters in a text where LaTeX has a backslash and a letter (JSON with single backslashes)"
CLEANED = {
    "breaks": "CRLF or byte-order mark within a text, made LF or removed",
    "controls": "control characters within a text, removed",
}


class Fault(NamedTuple):
    """A fault that is reported: a substring of every text with it, how to find it, and how to fix it (None: it cannot be)."""

    what: str
    mark: str
    found: Callable[[str], Any]
    fixed: Callable[[str], str] | None


def has_escaped_lines(text: str) -> bool:
    """True for a text on one line that has a backslash and an n in place of line breaks."""
    return "\n" not in text and ESCAPED_LINE.search(text) is not None


FAULTS = {
    "entities": Fault(
        "HTML entities such as &quot;", "&", ENTITY.search, lambda text: ENTITY.sub(lambda found: html.unescape(found[0]), text)
    ),
    "zero_width": Fault("zero-width spaces", "", ZERO_WIDTH.search, lambda text: ZERO_WIDTH.sub("", text)),
    "lines": Fault(
        r"a literal \n in place of a line break", "\\n", has_escaped_lines, lambda text: ESCAPED_LINE.sub("\n", text)
    ),
    "placeholders": Fault("an unfilled placeholder such as {{name}}", "{{", PLACEHOLDER.search, None),
    "lost": Fault("characters lost in an earlier conversion (\ufffd or 锟斤拷)", "", LOST.search, None),
    "control_tokens": Fault("a model's control token such as <|im_end|> or </s>", "<", TOKENS.search, None),
    "empty": Fault("nan, None, undefined or <noinput> for a text", "", lambda text: text.strip() in NOTHING, lambda text: ""),
}
FIXES = ("all", *FAULTS, "latex")


def is_clean(joined: str, texts: Collection[str]) -> bool:
    """True if there is nothing to fix or report in a batch of texts, where `joined` is all of them; a quick check."""
    if CONTROL.search(joined) or any(mark in joined for mark in ("\ufeff", "\\n", "\nabla", "\notin", "\neq")):
        return False
    if ("\t" in joined and LATEX.search(joined)) or ("$" in joined and IN_MATH.search(joined)):
        return False
    marked = (fault for name, fault in FAULTS.items() if name not in ("empty", "lines") and fault.mark in joined)
    return NOTHING.isdisjoint(map(str.strip, texts)) and not any(fault.found(joined) for fault in marked)


def texts_of(record: dict) -> list[str]:
    """All texts of a record."""
    texts: list[str] = []
    for name, value in record.items():
        if name == "history":
            texts += [text for turn in value for text in turn]
        elif name == "messages":
            texts += [message["content"] for message in value]
        elif isinstance(value, str):
            texts.append(value)
    return texts


def changed(record: dict, change: Callable[[str], str]) -> dict:
    """The record with each of its texts changed."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):  # a message, whose calls are not prose
            return value | {"content": change(value["content"])}
        return change(value) if isinstance(value, str) else [of(part) for part in value] if isinstance(value, list) else value

    return {name: value if name in ("learn", "tools") else of(value) for name, value in record.items()}


def has_broken_latex(record: dict) -> bool:
    """True if a text has a control character in place of a LaTeX backslash and letter."""
    return any(restored(text) != text for text in texts_of(record))


def with_backslashes(record: dict) -> dict:
    """The record with LaTeX backslashes restored where control characters replaced them."""
    return changed(record, restored)


def restored(text: str) -> str:
    """The text with LaTeX backslashes where control characters replaced them."""

    def backslash(found: re.Match) -> str:
        return "\\" + LETTERS[found[0]]

    text = LATEX.sub(backslash, text)
    parts = text.split("$")
    if len(parts) % 2 == 0:  # dollars that are not in pairs enclose no formulas
        return text
    return "$".join(IN_MATH.sub(backslash, part) if number % 2 else part for number, part in enumerate(parts))


def cleaned(record: dict) -> tuple[dict, str]:
    """The record with only LF line breaks and no byte-order marks or control characters; and what was removed ("": nothing)."""
    breaks = changed(record, lambda text: text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", ""))
    whole = changed(breaks, lambda text: CONTROL.sub("", text))
    return whole, CLEANED["controls"] if whole != breaks else CLEANED["breaks"] if breaks != record else ""


def faults_in(record: dict) -> list[str]:
    """The names of the faults that a record's texts have."""
    texts = texts_of(record)
    return [name for name, fault in FAULTS.items() if any(fault.mark in text and fault.found(text) for text in texts)]


def with_fixed(record: dict, name: str) -> dict:
    """The record without a fault that can be fixed."""
    fault = FAULTS[name]
    return changed(record, lambda text: fault.fixed(text) if fault.fixed and fault.found(text) else text)
