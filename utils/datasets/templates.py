"""Templates: a record as the text that a model reads, one turn or many."""

import dataclasses
import re
import string
from pathlib import Path

from utils.console import UserError
from utils.datasets.records import Record
from utils.files import read_json

TEMPLATES = Path(__file__).parents[2] / "templates"
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.S)
CHAT = "chat"  # the name of the tokenizer's own template
REQUIRED = ("prompt_input", "prompt_no_input", "response_split")
PROMPTS = ("prompt_input", "prompt_no_input", "turn_input", "turn_no_input")
OPTIONAL = ("description", "turn_input", "turn_no_input")
Parts = list[tuple[str, str | None]]  # literal text, then the name of the field that follows it (or None)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question as the model reads it, and its answer ("" if it is still to come)."""

    prompt: str
    answer: str


class Prompter:
    """A template by name (a file of `templates/`) or by path.

    A template's `prompt_input` and `prompt_no_input` are the text before the first answer, for records with and
    without an input; `turn_input` and `turn_no_input` the same for later turns of a dialogue. If these are missing,
    the first prompt is repeated without its preamble, which is every block (blocks are separated by blank lines)
    before the one that contains `{instruction}`.
    Raises UserError, naming file and key, if the template is missing or not of this form.
    """

    carries: frozenset[str] = frozenset()  # these templates do not support tools

    def __init__(self, template: str = "", texts: dict[str, str] | None = None):
        """`texts`: those of a template as a lineage records them, so that no file is read."""
        self.path = Path(template) if texts else find_template(template or "alpaca")
        self.texts = texts or read_template(self.path)
        self.parts = {key: parse(text, f"{self.path}, key {key}") for key, text in self.texts.items() if key in PROMPTS}

    @property
    def name(self) -> str:
        """The template's name, without folder and ending."""
        return self.path.stem

    @property
    def stop_strings(self) -> list[str]:
        """What opens the next turn's question: a model that writes it has failed to stop."""
        heading = self.texts["turn_no_input"].partition("{instruction}")[0].strip()
        return [heading] if heading else []

    def turns(self, record: Record) -> list[Turn]:
        """Render a record, its history first; a record's `system` text replaces the preamble."""
        pairs = [*(record.get("history") or []), (record["instruction"], record.get("output") or "")]
        turns = []
        for index, (question, answer) in enumerate(pairs):
            given = record.get("input") or "" if index == len(pairs) - 1 else ""
            kind = "input" if given else "no_input"
            system = record.get("system") or "" if index == 0 else ""
            key = f"turn_{kind}" if index or system else f"prompt_{kind}"
            text = self._fill(key, {"instruction": question, "input": given})
            turns.append(Turn(f"{system}\n\n{text.lstrip()}" if system else text, answer))
        return turns

    def generate_prompt(self, instruction: str, input: str | None = None, label: str | None = None) -> str:
        """The text of one single-turn record, with the answer `label` if given; programs that used alpaca-lora call it."""
        turn = self.turns({"instruction": instruction, "input": input or "", "output": label or ""})[0]
        return turn.prompt + turn.answer

    def _fill(self, key: str, values: dict[str, str]) -> str:
        return "".join(literal + (values[field] if field else "") for literal, field in self.parts[key])


def split_thinking(text: str) -> tuple[str, str]:
    """The thoughts of an answer and the reply after them; unfinished thoughts leave an empty reply.

    A prompt may have opened the thoughts already, so that only their end is in the text.
    """
    before, closed, after = text.partition("</think>")
    if closed:
        return before.lstrip().removeprefix("<think>").strip(), after.lstrip()
    return (before.lstrip().removeprefix("<think>").strip(), "") if before.lstrip().startswith("<think>") else ("", text)


def without_thoughts(text: str) -> str:
    """A text without its `<think>…</think>` parts; an unfinished thought extends to the end of the text."""
    return THOUGHTS.sub("", text)


def check_template(name: str) -> None:
    """Raises UserError if there is no such template, before anything is loaded."""
    if name != CHAT:
        Prompter(name)


def find_template(name: str) -> Path:
    """The file of a template given by name or path. Raises UserError, listing the known names."""
    path = Path(name) if name.endswith(".json") else TEMPLATES / f"{name}.json"
    if not path.is_file() or (path.parent != TEMPLATES and not name.endswith(".json")):
        names = ", ".join([CHAT, *sorted(file.stem for file in TEMPLATES.glob("*.json"))])
        raise UserError(f"{name}: no such template; choose one of {names}, or give the path of a .json file")
    return path


def check_name(name: str) -> None:
    """Raises UserError if a client asks for a template that is not in `templates/`: it must not name files."""
    names = sorted(file.stem for file in TEMPLATES.glob("*.json"))
    if name and name not in names:
        raise UserError(f"template {name[:40]}: no such template; choose one of {', '.join(names)}")


def read_template(path: Path) -> dict[str, str]:
    """Read and check a template; the two texts for later turns are added if missing."""
    texts = read_json(path)
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UserError(f"{path}: a template is a JSON object of texts; see templates/README.md")
    for key in REQUIRED:
        if key not in texts:
            raise UserError(f"{path}: key {key} is missing; add it, see templates/README.md")
    for key in texts:
        if key not in REQUIRED + OPTIONAL:
            raise UserError(f"{path}: key {key} is unknown; keys are {', '.join(REQUIRED + OPTIONAL)}")
    for key in ("prompt_input", "prompt_no_input"):
        if texts["response_split"] not in texts[key]:
            raise UserError(f"{path}: key {key} does not contain the response_split {texts['response_split']!r}; add it")
    texts.setdefault("turn_input", "\n\n" + without_preamble(texts["prompt_input"]))
    texts.setdefault("turn_no_input", "\n\n" + without_preamble(texts["prompt_no_input"]))
    for key in PROMPTS:
        wanted = {"instruction", "input"} if key.endswith("_input") and not key.endswith("_no_input") else {"instruction"}
        found = {field for _, field in parse(texts[key], f"{path}, key {key}") if field is not None}
        if found != wanted:
            raise UserError(
                f"{path}: key {key} has the placeholders {{{'}, {'.join(sorted(found))}}}; "
                f"it must have {{{'}, {'.join(sorted(wanted))}}}"
            )
    return texts


def parse(text: str, where: str) -> Parts:
    """Split a template text at its placeholders; `{{` and `}}` stand for braces. Raises UserError on any other brace."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{where}: {error}; double each brace that is meant literally") from None
    for _, field, spec, conversion in pieces:
        if field is not None and (field not in ("instruction", "input") or spec or conversion):
            raise UserError(f"{where}: unknown placeholder {{{field}}}; use {{instruction}} or {{input}}, or double the braces")
    return [(literal, field) for literal, field, _, _ in pieces]


def without_preamble(prompt: str) -> str:
    """The blocks of a prompt, starting with the one that contains `{instruction}`."""
    blocks = prompt.split("\n\n")
    first = next((index for index, block in enumerate(blocks) if "{instruction}" in block), 0)
    return "\n\n".join(blocks[first:])
