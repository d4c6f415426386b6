"""How to decode: each setting once, with its bounds, its help, and its control on the page.

The script's options, the page's controls, the endpoint's fields and the option tables in docs/ are made from these fields.
To add one, add a field here, its Chinese help to scripts/options_zh.json, and its Chinese label to utils/chat/labels.py.
"""

import dataclasses
import json
from typing import Any

from utils.cli import option
from utils.console import UserError


@dataclasses.dataclass(frozen=True)
class Control:
    """How the page shows a setting: the bounds, step and start of its control (start None: the script's value).

    An empty `label` keeps it off the page; `only` names a setting without which it has no effect.
    """

    least: float = 0
    most: float = 1
    step: float = 1
    label: str = ""
    info: str = ""
    start: float | None = None
    only: str = ""


def setting(default: Any, help: str, control: Control, **bounds: Any) -> Any:
    """A field of SamplingParams: an option of the script that page and endpoint also have."""
    field = option(default, help, **bounds)
    return dataclasses.field(default=default, metadata={**field.metadata, "control": control})


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to decode. Without `do_sample` the temperature, `top_p` and `top_k` have no effect."""

    num_beams: int = setting(
        4,
        "beams of the search (the page starts with 1)",
        Control(1, 8, label="Beams", start=1, info="With more than 1 nothing is streamed: the whole answer appears at once"),
        least=1,
        most=64,
        heading="Decoding",
    )
    max_new_tokens: int = setting(
        2048, "longest answer, in tokens", Control(1, 2048, label="Longest answer (tokens)", start=512), least=1
    )
    do_sample: bool = setting(
        False,
        "sample, using --temperature, --top_p and --top_k",
        Control(label="Sample", info="Otherwise the likeliest token is taken"),
    )
    temperature: float = setting(
        0.1,
        "flattens (above 1) or sharpens the scores",
        Control(0, 2, 0.01, "Temperature", only="do_sample"),
        least=0,
    )
    top_p: float = setting(
        0.75,
        "sample from the likeliest tokens that make up this share",
        Control(0, 1, 0.01, "top-p", only="do_sample"),
        least=0,
        most=1,
    )
    top_k: int = setting(
        40,
        "sample from at most this many tokens (0: all)",
        Control(0, 200, 1, "top-k (0: no limit)", only="do_sample"),
        least=0,
    )
    seed: int = setting(
        42,
        "random seed of sampling",
        Control(-1, 2**31 - 1, 1, "Seed (-1: another each time)", start=-1, only="do_sample"),
        least=0,
    )
    repetition_penalty: float = setting(
        1.0, "above 1: tokens already in the text become less likely", Control(1, 2, 0.01, "Repetition penalty"), least=0.01
    )
    no_repeat_ngram_size: int = setting(
        0, "no sequence of this many tokens occurs twice (0: no limit)", Control(0, 20), least=0
    )

    @property
    def samples(self) -> bool:
        """True if tokens are drawn at random; a temperature of 0 means the likeliest token."""
        return self.do_sample and self.temperature > 0


CONTROLS: dict[str, Control] = {field.name: field.metadata["control"] for field in dataclasses.fields(SamplingParams)}
SHOWN = tuple(name for name, control in CONTROLS.items() if control.label)  # on the page, in this order
KINDS: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(SamplingParams)}
STARTS = {  # the defaults on the page and at the endpoint
    field.name: field.default if field.metadata["control"].start in (None, -1) else field.metadata["control"].start
    for field in dataclasses.fields(SamplingParams)
}


def bounded(values: dict[str, Any], longest: int) -> SamplingParams:
    """Settings from the page or another program, with narrower bounds than the script's; `longest`: tokens of an answer.

    Raises UserError, naming the setting and its bounds, if one is out of bounds or of the wrong type.
    """
    typed: dict[str, Any] = {}
    for name, value in values.items():
        control, kind = CONTROLS[name], KINDS[name]
        most = longest if name == "max_new_tokens" else control.most
        least = max(control.least, 0)
        if kind is bool:
            good, wanted = isinstance(value, bool), "true or false"
        else:
            good = type(value) in (int, float) and least <= value <= most and (kind is float or value == int(value))
            wanted = f"a {'whole ' * (kind is int)}number from {least} to {most}"
        if not good:
            raise UserError(f"{name} {json.dumps(value, ensure_ascii=False)[:40]}: not allowed; give {wanted}")
        typed[name] = kind(value)
    return SamplingParams(**typed)
