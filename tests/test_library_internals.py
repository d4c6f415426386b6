"""What docs/library_internals.md lists is still there in the libraries, and everything that we lean on is listed."""

import ast
import importlib
import inspect
import re

import pytest
from scripting import ROOT
from transformers import Trainer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

TEXT = (ROOT / "docs" / "library_internals.md").read_text("utf-8")
ROWS = re.findall(r"^\| `([\w.]+)(?:\(([\w, ]+)\))?` \| (.+?) \| .+? \| (.+?) \|$", TEXT, re.MULTILINE)


def find(name):
    """The object of a dotted name: a module, and attributes of it."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ImportError:
            continue
        for part in parts[size:-1]:
            found = getattr(found, part)
        return found if size == len(parts) else (found, parts[-1])
    raise ImportError(name)


def exists(owner, name):
    """An attribute of a class or module, or one that its instances are given."""
    bases = inspect.getmro(owner) if inspect.isclass(owner) else ()
    return hasattr(owner, name) or any(f"self.{name}" in inspect.getsource(base) for base in bases if base is not object)


@pytest.mark.parametrize(("name", "parameters", "where", "why"), ROWS, ids=[row[0] for row in ROWS])
def test_the_library_still_has_it(name, parameters, where, why):
    found = find(name)
    if isinstance(found, tuple):
        owner, last = found
        assert exists(owner, last), f"{name} is gone from the library; it is used because: {why}"
        for parameter in filter(None, parameters.split(", ")):
            known = inspect.signature(getattr(owner, last)).parameters
            assert parameter in known, f"{name} takes no {parameter} any more; it is used because: {why}"
    last = name.rpartition(".")[2]
    for file in re.findall(r"`([\w/.]+)`", where):
        assert last in (ROOT / "utils" / file).read_text("utf-8"), f"{file} does not use {name} any more; take it off the list"


def test_every_private_name_of_a_library_is_listed():
    """Private names that are used in utils/ but defined nowhere there, or that replace one of a library."""
    used, own = set(), {"_asdict", "_fields", "_replace", "_exit"}  # namedtuple's and os's, which are documented
    for file in (ROOT / "utils").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                own.add(getattr(node.target, "id", None) or getattr(node.target, "attr", None))
    private = {name for name in used - own if re.match("_[a-z]", name)}
    replaced = {
        name for name in own if re.match("_[a-z]", name) and (hasattr(Trainer, name) or hasattr(SentencePieceBackend, name))
    }
    listed = {part for name, *_ in ROWS for part in name.split(".")}
    assert (private | replaced) - listed == set(), "add a row to docs/library_internals.md"
