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
from scripting import ROOT
from test_scripts import bash

import utils.batch_answers
import utils.memory
import utils.merging
import utils.training  # noqa: F401 (these four are warm for the forks)
from benchmarks import common
from utils.cli import parse

sys.path.insert(0, str(ROOT / "scripts"))
import readme_tables

torch.set_num_threads(1)
READMES = [ROOT / "README.md", ROOT / "README_EN.md"]
PAPERS = [*READMES, *ROOT.glob("[!.]*/README.md"), ROOT / "CONTRIBUTING.md"]
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


def test_both_readmes_have_the_same_commands_and_structure():
    chinese, english = READMES
    assert commands(chinese) == commands(english) and len(commands(chinese)) > 25
    assert outline(chinese) == outline(english)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_tables_are_those_that_the_code_gives(language):
    text = readme_tables.READMES[language].read_text("utf-8")
    assert all(f"<!-- options of {name} -->" in text for name in SCRIPTS) and "<!-- memory -->" in text
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
    programs = [file for folder in (".", "utils", "scripts", "data/*", "benchmarks") for file in ROOT.glob(f"{folder}/*.py")]
    trees = [ast.parse(file.read_text("utf-8")) for file in programs]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {file.stem for file in programs} | {folder.name for folder in ROOT.iterdir()}
    imported = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - own
    needed = {re.split("[>=]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert {"google": "protobuf"}.keys() & imported  # the one whose package has another name
    assert imported - {"google"} <= needed and "protobuf" in needed


def test_every_dependency_is_explained():
    needed = {line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()}
    for readme in READMES:
        heading = "## 依赖" if readme.name == "README.md" else "## Dependencies"
        text = readme.read_text("utf-8").split(heading)[1].split("\n## ")[0]
        assert all(re.search(rf"\b{name}\b", text) for name in needed), readme


def test_published_scores_are_marked_as_the_rows_say():
    """Bold is the best of the row; a star marks the second best, and all that are equal to it."""
    for readme in READMES:
        rows = re.findall(r"^\| [^|]+ ((?:\| [*\d]+ ){5})\|$", readme.read_text("utf-8"), re.MULTILINE)
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
            script(words[1], *words[2:], cwd=place).ok  # noqa: B018
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
    """The rooms, and the scripts, that a Python file imports, anywhere in it."""
    text = path.read_text("utf-8")
    found = re.findall(r"^\s*from utils\.(\w+) import|^\s*import utils\.(\w+)", text, re.MULTILINE)
    together = re.findall(r"^\s*from utils import (\([^)]*\)|[^\n#]+)", text, re.MULTILINE)
    names = {name for pair in found for name in pair if name} | {
        name for group in together for name in re.findall(r"\w+", re.sub(r" as \w+", "", group))
    }
    scripts = "|".join(name.removesuffix(".py") for name in SCRIPTS)
    return names, set(re.findall(rf"^\s*(?:import|from) ({scripts})\b", text, re.MULTILINE))


ROOMS = {path.stem: imports(path) for path in (ROOT / "utils").glob("*.py") if path.stem != "__init__"}


def test_every_room_is_named():
    named = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "utils" / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(ROOMS)


def test_no_room_imports_a_script_and_there_is_no_cycle():
    """Arrows go one way: scripts, rooms, libraries. `if TYPE_CHECKING` imports count, too."""
    assert {room: scripts for room, (_, scripts) in ROOMS.items() if scripts} == {}
    left = {room: names & set(ROOMS) for room, (names, _) in ROOMS.items()}
    while free := {room for room, names in left.items() if not names & left.keys()}:
        left = {room: names for room, names in left.items() if room not in free}
    assert left == {}, f"these import each other in a circle: {left}"
