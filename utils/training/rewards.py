"""Rewards: what an answer is worth, by built-in functions or by those of the user's own file.

A reward is a function of the answer's text and of the record with its question, such as

    def polite(answer: str, record: dict) -> float:
        return float(answer.endswith("谢谢。"))

and returns a number; the record is `{"instruction", "input", "output", …}`, its `output` the reference, or "".
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.console import UserError, reason
from utils.datasets.final_numbers import final_number
from utils.files import sha256

Reward = Callable[[str, dict[str, Any]], Any]
THINKING = r"<think>.+?</think>\s*\S.*"  # the pattern of `format` if no other is given


@dataclasses.dataclass(frozen=True)
class WeightedReward:
    """A named reward, and the factor its values are multiplied by."""

    name: str
    weight: float
    function: Reward


def exact(answer: str, record: dict[str, Any]) -> float:
    """1 if the answer is the reference, ignoring white space around it."""
    return float(answer.strip() == record["output"].strip())


def number(answer: str, record: dict[str, Any]) -> float:
    """1 if the final number of the answer (as judge.py reads it) equals that of the reference."""
    found = final_number(answer)
    return float(found is not None and found == final_number(record["output"]))


def length(answer: str, record: dict[str, Any]) -> float:
    """1 minus the relative difference from the reference's length in characters, and at least 0."""
    wanted = len(record["output"].strip())
    return max(0.0, 1 - abs(len(answer.strip()) - wanted) / wanted) if wanted else float(not answer.strip())


def of_format(pattern: str) -> Reward:
    """A reward of 1 for answers that match the whole regular expression. Raises UserError if `pattern` is not one."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"--reward_format {pattern}: is not a regular expression ({error}); correct it") from None
    return lambda answer, record: float(compiled.fullmatch(answer.strip()) is not None)


BUILT_IN: dict[str, Reward] = {"exact": exact, "number": number, "length": length}


def load_rewards(names: Sequence[str], pattern: str) -> list[WeightedReward]:
    """The rewards that `--rewards` names: `exact`, `number`, `length`, `format`, or `FILE.py:name`, each with `:weight`.

    `pattern` is the one `format` uses. Raises UserError if a reward is unknown, or its file cannot be run.
    """
    found = []
    for given in names:
        name, weight = split_weight(given)
        if name == "format":
            function = of_format(pattern or THINKING)
        elif name in BUILT_IN:
            function = BUILT_IN[name]
        else:
            function = from_file(name)
        found.append(WeightedReward(name.rpartition(":")[2], weight, function))
    if pattern and not any(one.name == "format" for one in found):
        raise UserError("--reward_format: is given, but --rewards does not name format; add it, or leave the pattern out")
    return found


def split_weight(given: str) -> tuple[str, float]:
    """A name and its weight (1 if none is given); a last part that is not a finite number belongs to the name."""
    name, _, last = given.rpartition(":")
    try:
        weight = float(last)
    except ValueError:
        return given, 1.0
    return (name, weight) if name and math.isfinite(weight) else (given, 1.0)


def from_file(given: str) -> Reward:
    """The function that `FILE.py:name` stands for. Raises UserError if there is none, or the file cannot be run."""
    file, _, name = given.rpartition(":")
    if not file:
        raise UserError(f"--rewards {given}: is unknown; give {', '.join([*BUILT_IN, 'format'])}, or FILE.py:name")
    if not Path(file).is_file():
        raise UserError(f"--rewards {given}: {file} is not there; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--rewards {given}: {file} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--rewards {given}: {file} cannot be run ({in_a_line(error)}); correct it") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--rewards {given}: {file} has no function {name}; define {name}(answer, record)")
    return function


def reward_files(names: Sequence[str]) -> dict[str, str]:
    """The files of the user's own rewards, with their hashes."""
    files = [split_weight(given)[0].rpartition(":")[0] for given in names]
    return {file: sha256(file) for file in files if file}


def value_of(reward: WeightedReward, answer: str, record: dict[str, Any]) -> float:
    """The value of one reward for an answer. Raises UserError if it raises, or returns no finite number."""
    asked = f"--rewards {reward.name}: on the question {record['instruction'][:40]!r} and the answer {answer[:40]!r}"
    try:
        value = reward.function(answer, record)
    except (Exception, SystemExit) as error:
        raise UserError(f"{asked} it raised {in_a_line(error)}; correct it and run the same command again") from None
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if isinstance(value, (str, bytes)) or not math.isfinite(result):
        raise UserError(f"{asked} it returned {str(value)[:40]!r}, not a number; have it return one")
    return result


def in_a_line(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {reason(error)}"


def try_out(rewards: Sequence[WeightedReward], record: dict[str, Any]) -> None:
    """Try each reward on the reference of one record, so that errors show before the model is loaded.

    Raises UserError if one fails, or compares with references and the record has none.
    """
    for reward in rewards:
        if reward.function in BUILT_IN.values() and not record["output"].strip():
            raise UserError(f"--rewards {reward.name}: compares with the output, which the records lack; give records with one")
        value_of(reward, record["output"], record)
