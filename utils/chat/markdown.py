"""Texts of people and models in a view that renders Markdown: questions as typed, answers without HTML.

Characters are escaped here as `&#060;`, with a leading zero, which nobody else writes: page.js and `from_markdown` undo
exactly that when a text is copied or edited.
"""

import re

CODE = re.compile(r"^(`{3,})[^`\n]*$.*?(?:^ {0,3}\1[~`]*[ \t]*$|\Z)|(?<![`\\])`(?!`)[^`\n]+`(?!`)", re.S | re.M)
ESCAPED = re.compile(r"&#0(\d+);")
LATEX = [("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False)]  # left, right, on its own line


def answer_as_markdown(text: str) -> str:
    """An answer: anything like HTML outside code is shown literally; an unclosed code block is closed."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [escaped(text[end : code.start()], r"<(?=[A-Za-z/!?])|&(?=#?\w+;)"), code[0]]
        end = code.end()
        fence = code[1] or ""
        if fence and not re.search(rf"\n {{0,3}}{fence}[~`]*[ \t]*\Z", code[0]):
            parts.append(f"\n{fence}")
    return "".join([*parts, escaped(text[end:], r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")])


def question_as_markdown(text: str) -> str:
    """A question: nothing is rendered, so that the page shows it as typed."""
    return escaped(text, r"[^\w ]|_|(?<![^\n]) ")


def escaped(text: str, pattern: str) -> str:
    """A text whose ASCII characters that match are replaced by character references."""
    return re.sub(pattern, lambda found: f"&#0{ord(found[0])};" if found[0].isascii() else found[0], text)


def from_markdown(text: str) -> str:
    """The text before it was escaped."""
    return ESCAPED.sub(lambda found: chr(int(found[1])), text)
