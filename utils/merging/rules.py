"""The rule and the weights for combining adapters, from the options."""

import dataclasses
import math
import os

from utils.console import UserError

HALVES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # rules on lora_A and lora_B separately
FULL = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")  # the same rules on their product
METHODS = ("cat", "svd", *HALVES, *FULL)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How adapters are combined: one of METHODS; `density` is the share of values that pruning keeps, `rank` that of an
    SVD's result (0: the highest of the adapters'), `seed` determines what DARE drops."""

    method: str = "cat"
    density: float = 0.5
    rank: int = 0
    seed: int = 42


def read_weights(lora_model: list[str]) -> dict[str, float | None]:
    """Adapters, and the weight that each is given as `FOLDER*0.7` (None: none). Raises UserError if one is not a number."""
    found: dict[str, float | None] = {}
    for part in lora_model:
        name, star, number = (part, "", "") if os.path.exists(part) else part.rpartition("*")
        try:
            weight = float(number) if star else None
        except ValueError:
            weight = math.nan
        name = (name if star else part).strip()
        if weight is not None and (not math.isfinite(weight) or not weight or not name):
            raise UserError(f"--lora_model {part}: needs a folder, * and a number other than 0, such as output/f1*0.7")
        if name in found:
            raise UserError(f"--lora_model {name}: named twice, and would be added twice; name each once")
        found[name] = weight
    return found


def rule_of(method: str, density: float | None, rank: int | None, seed: int, count: int) -> Rule:
    """The rule that the options ask for, for `count` adapters. Raises UserError if they contradict each other."""
    method = method or "cat"
    prunes = method in HALVES[1:] or method in FULL
    if count < 2 and prunes:
        raise UserError(
            f"--combine {method}: compares adapters, but there is {count}; name several, as in --lora_model a*0.7,b*0.3"
        )
    if density is not None and not prunes:
        raise UserError(
            f"--density {density:g}: {method} drops nothing; leave it out, or choose a --combine with ties, dare or prune"
        )
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density {density:g}: is the share of values that are kept; give a number above 0, at most 1")
    if rank is not None and not method.endswith("svd"):
        raise UserError(f"--rank {rank}: {method} keeps its own rank; leave it out, or choose a --combine with svd")
    return Rule(method, 0.5 if density is None else density, rank or 0, seed)
