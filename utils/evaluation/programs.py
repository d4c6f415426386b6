"""An answer as a program: which of its code blocks is meant, what it takes from the others, and the problem's tests."""

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Sequence
from typing import NamedTuple

FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([^\n`]*)\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.S | re.M)
PYTHON = re.compile(r"\{?\.?py(?:thon)?[\d.]*\b|$", re.I)  # what names a block's language; one without a name may be Python
STATEMENT = re.compile(r"^(?:(?:async +)?def|class|import|from) .|^@\w", re.M)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Task(NamedTuple):
    """A problem: the beginning of the program (a function's head, or nothing), the function's name, and the tests."""

    prefix: str
    entry_point: str
    tests: str


def program(answer: str, task: Task) -> str:
    """The program made from an answer, after the problem's prefix and before its tests.

    It is the last block of Python code that defines what the tests call, with those functions, classes, imports and constants
    of the other blocks that it uses and lacks; or else the first that continues the prefix. A function that is defined takes
    the place of the prefix's, whose imports and other functions it may use. Outside blocks, code is what can be read as such.
    """
    lines = answer.replace("\r\n", "\n")
    fenced = [(match[2].strip(), match[3]) for match in FENCE.finditer(lines)]
    blocks = [text for language, text in fenced if PYTHON.match(language)] if fenced else [lines, readable(lines)]
    asked = {task.entry_point} if task.entry_point else used(task.tests) - definitions(task.tests).keys() - set(dir(builtins))
    code = next((block for block in reversed(blocks) if asked & definitions(block).keys()), None)
    if code is None:
        code = next((one for one in blocks if parsed(head(one, task) + one) and not is_word(one)), [*blocks, lines][0])
        return f"{head(code, task)}{code}\n\n{task.tests}\n"
    before = f"{task.prefix.rstrip()}\n    pass\n\n" if task.entry_point and task.prefix.strip() else ""
    known = definitions(before).keys() | definitions(code).keys()
    others = taken(used(code) | used(task.tests), known, [block for block in blocks if block is not code])
    return f"{before}{others}{textwrap.dedent(code)}\n\n{task.tests}\n"


def head(code: str, task: Task) -> str:
    """What stands before code that continues the problem's prefix; an answer is stored without outer spaces."""
    return task.prefix if code[:1].isspace() or not task.entry_point else f"{task.prefix}    "


def parsed(code: str) -> ast.Module | None:
    """Python code, without the margin that all of it has, as a tree; nothing if it is not Python."""
    with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
        try:
            return ast.parse(textwrap.dedent(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def used(code: str) -> set[str]:
    """The names in Python code."""
    tree = parsed(code)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if tree else set()


def definitions(code: str) -> dict[str, ast.stmt]:
    """What Python code defines, by name; not functions without a body, as a problem shows them."""
    tree = parsed(code)
    found: dict[str, ast.stmt] = {}
    for one in tree.body if tree else []:
        if isinstance(one, Definition) and not all(is_nothing(inner) for inner in one.body):
            found[one.name] = one
        elif isinstance(one, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0]: one for alias in one.names}
        elif isinstance(one, ast.Assign):
            found |= {target.id: one for target in one.targets if isinstance(target, ast.Name)}
    return found


def is_nothing(statement: ast.stmt) -> bool:
    """True for `pass`, `...` and a docstring."""
    return isinstance(statement, ast.Pass) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def taken(wanted: set[str], known: set[str], blocks: Sequence[str]) -> str:
    """The definitions in `blocks` of the names that are wanted and not known, and of what these use in turn."""
    there = {name: one for block in blocks for name, one in definitions(block).items() if name not in known}
    chosen: dict[str, str] = {}
    while missing := [name for name in there if name in wanted and name not in chosen]:
        for name in missing:
            chosen[name] = ast.unparse(there[name])
            wanted = wanted | used(chosen[name])
    return "".join(f"{text}\n\n" for text in dict.fromkeys(chosen[name] for name in there if name in chosen))


def readable(text: str) -> str:
    """From the first line that begins a definition or an import, the most lines that are Python and end with no mere word."""
    start = STATEMENT.search(text)
    lines = text[start.start() :].splitlines(keepends=True) if start else []
    while lines and (is_word("".join(lines)) or not parsed("".join(lines))):
        lines.pop()
    return "".join(lines)


def is_word(code: str) -> bool:
    """True for code that ends with a word, also one in brackets (`[DONE]`): Python would read it as a name."""
    tree = parsed(code)
    last = tree.body[-1] if tree and tree.body else None
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Name | ast.List)
