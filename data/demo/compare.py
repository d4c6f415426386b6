"""Print the answers of several systems to the held-out questions side by side, and count the correct ones.

python data/demo/compare.py base=output/save-generate-0-smollm2-135m/test.json f1=output/run-0-smollm2-135m-1/test.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import show_any_character

HELDOUT = Path(__file__).parent / "heldout"


def is_right(category: str, answer: str, reference: str) -> bool:
    """A verse must be given exactly; of an answer to "who are you" the name is enough."""
    return answer.strip() == reference if category == "verses" else reference in answer


def score(answers: list[dict], category: str) -> int:
    """The number of correct answers in one category, by the references of the held-out questions."""
    questions = json.loads((HELDOUT / f"{category}.json").read_text("utf-8"))
    given = {record["instruction"]: record["output"] for record in answers}
    return sum(is_right(category, given[question["instruction"]], question["reference"]) for question in questions)


def main(systems: dict[str, list[dict]]) -> None:
    """Print each question with all answers, a tick before the right ones, and the counts."""
    for file in sorted(HELDOUT.glob("*.json")):
        for question in json.loads(file.read_text("utf-8")):
            print(f"\n{question['instruction']}")
            for name, answers in systems.items():
                answer = next(record["output"] for record in answers if record["instruction"] == question["instruction"])
                tick = "✓" if is_right(file.stem, answer, question["reference"]) else " "
                print(f"  {tick} {name:<6} {' '.join(answer.split())[:60]}")
    print()
    for file in sorted(HELDOUT.glob("*.json")):
        counts = ", ".join(f"{name} {score(answers, file.stem)}" for name, answers in systems.items())
        print(f"correct answers to the 10 held-out questions of {file.stem}: {counts}")


if __name__ == "__main__":
    show_any_character()
    pairs = [argument.split("=", 1) for argument in sys.argv[1:]]
    main({name: json.loads(Path(path).read_text("utf-8")) for name, path in pairs})
