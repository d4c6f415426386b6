"""Computing one tensor of a merged model: the base's rows, then what adapters change in them, rounded once.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
"""

import dataclasses
import functools

import torch

from utils.console import UserError
from utils.models.weights import Kind, Weights, dtype_name


@dataclasses.dataclass(frozen=True)
class Replace:
    """A tensor in place of the base's, such as the embeddings of an extended vocabulary."""

    weights: Weights
    name: str

    def rows(self, index: slice | torch.Tensor, columns: slice) -> torch.Tensor:
        """The new values of these rows and columns, in float32."""
        return as_float32(self.weights.rows(self.name, index), columns)


@dataclasses.dataclass(frozen=True)
class Add:
    """lora_B @ lora_A, scaled, is added; then, for DoRA, each output is scaled to its magnitude.

    The tensor's outputs are its rows, or (`outputs_are_columns`) its columns, as in GPT-2's layers and in embeddings.
    `a`, `b` and `magnitude` (None: not DoRA) are names in the adapter's file.
    """

    weights: Weights
    a: str
    b: str
    scaling: float
    magnitude: str | None = None
    outputs_are_columns: bool = False

    @functools.lru_cache(maxsize=8)  # the tensors in use; all of a large adapter's would fill the memory # noqa: B019
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """left (rows, rank) and right (rank, columns), whose product is added, and the magnitude (outputs,); float32."""
        names = (self.a, self.b, self.magnitude) if self.magnitude else (self.a, self.b)
        # copies, since a view would keep the whole file mapped
        a, b, *rest = (self.weights.tensor(name).to(torch.float32, copy=True) for name in names)
        b, magnitude = b * self.scaling, rest[0].reshape(-1) if rest else None
        return (a.T.contiguous(), b.T.contiguous(), magnitude) if self.outputs_are_columns else (b, a, magnitude)


@dataclasses.dataclass(frozen=True)
class AddExperts(Add):
    """A LoRA on a parameter that holds all `experts`: lora_A (experts · rank, inputs), lora_B (outputs, rank · experts).

    The tensor is the whole parameter, or (`expert` and `part`) these outputs of one expert.
    """

    experts: int = 1
    expert: int | None = None
    part: tuple[int, int] = (0, 0)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """left (experts, rows, rank) and right (experts, rank, columns), or of one expert without the first; float32."""
        a, b = (self.weights.tensor(name).to(torch.float32, copy=True) for name in (self.a, self.b))
        right = a.reshape(self.experts, -1, a.shape[-1])
        left = (b * self.scaling).reshape(len(b), -1, self.experts).permute(2, 0, 1)
        if self.outputs_are_columns:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        if self.expert is not None:
            left, right = left[self.expert, slice(*self.part)], right[self.expert]
        return left.contiguous(), right.contiguous(), None


@dataclasses.dataclass(frozen=True)
class ReplaceRows:
    """Row `index[n]` becomes row n of a tensor, as when single tokens were trained."""

    weights: Weights
    name: str
    index: tuple[int, ...]

    def put(self, values: torch.Tensor, rows: list[int], columns: slice) -> None:
        """Replace those of `values` (rows, columns) that are among the `rows` of the whole tensor, in place."""
        new = {row: number for number, row in enumerate(self.index)}
        places = [place for place, row in enumerate(rows) if row in new]
        if places:
            values[places] = as_float32(self.weights.tensor(self.name), columns)[[new[rows[place]] for place in places]]


@dataclasses.dataclass(frozen=True)
class Shift:
    """A vector is added to a bias."""

    values: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Grow:
    """The base's tensor with as many rows as `count`; row `index` is the mean of the base's rows `pieces[index]`."""

    weights: Weights
    name: str
    count: int
    pieces: dict[int, list[int]]

    def rows(self, index: slice | torch.Tensor, columns: slice) -> torch.Tensor:
        """These rows and columns, old or new, in float32."""
        groups = [self.pieces.get(row, [row]) for row in torch.arange(self.count)[index].tolist()]
        return torch.stack([self.weights.rows(self.name, torch.tensor(group))[:, columns].float().mean(0) for group in groups])


Change = Replace | ReplaceRows | Grow | Add | Shift


class Recipe:
    """How one tensor of a merged model is computed: the base's tensor `source`, then `changes`, rounded once.

    `rows` computes values in float32; it is thread-safe, and the result does not depend on the division into rows.
    `kind` is the final shape and dtype; `changed` tells whether any rows computed so far differ from the base's."""

    def __init__(self, base: Weights, source: str, kind: Kind):
        self.base, self.source, self.kind = base, source, kind
        self.changes: list[Change] = []
        self.changed = False
        self._norms: dict[int, torch.Tensor] = {}

    def rows(self, index: slice | torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """Rows `index`, and of these `columns`, in the type of `kind`.

        Raises UserError if a value is not a number, or too large for that type.
        """
        if not self.changes and self.kind[1] == self.base.dtype(self.source):
            values = rounded = self.base.rows(self.source, index)
        else:
            by_rows = any(isinstance(c, Add) and c.magnitude and not c.outputs_are_columns for c in self.changes)
            values = self._after(len(self.changes), index, slice(None) if by_rows else columns)
            rounded = values.to(self.kind[1])
        if values.dim() > 1 and values.shape[1] != len(range(self.kind[0][1])[columns]):
            values, rounded = values[:, columns], rounded[:, columns]
        if rounded.is_floating_point() and rounded.numel():
            extremes = torch.stack(torch.aminmax(values)).to(self.kind[1])
            if not extremes.isfinite().all():
                raise self._not_finite(extremes)
        if self.changes and not self.changed:
            self.changed = self._differs(rounded, index, columns)
        return rounded

    def _after(self, count: int, index: slice | torch.Tensor, columns: slice) -> torch.Tensor:
        """Values in float32 after the first `count` changes."""
        first = max((n for n, change in enumerate(self.changes[:count]) if isinstance(change, (Replace, Grow))), default=-1)
        if first >= 0:
            values = self.changes[first].rows(index, columns)  # type: ignore[union-attr]
        else:
            values = as_float32(self.base.rows(self.source, index), columns)
        for number, change in enumerate(self.changes[first + 1 : count], first + 1):
            if isinstance(change, Shift):
                values += change.values[index]
            elif isinstance(change, ReplaceRows):
                change.put(values, torch.arange(self.kind[0][0])[index].tolist(), columns)
            elif isinstance(change, Add):
                left, right, magnitude = change.matrices()
                if left.dim() == 3:  # all experts in one tensor
                    values.baddbmm_(left[index][:, columns], right[index])
                else:
                    values.addmm_(left[index], right[:, columns])
                if magnitude is not None and change.outputs_are_columns:
                    values *= (magnitude / self._column_norms(number))[columns]
                elif magnitude is not None:
                    values *= (magnitude[index] / values.norm(dim=1)).unsqueeze(1)
        return values

    def _column_norms(self, number: int) -> torch.Tensor:
        """The norm of each column after the LoRA of change `number` was added, before DoRA scales it."""
        if number not in self._norms:
            left, right, _ = self.changes[number].matrices()  # type: ignore[union-attr]
            squares = torch.zeros(right.shape[1], dtype=torch.float64)
            for start in range(0, len(left), 1024):
                index = slice(start, start + 1024)
                values = self._after(number, index, slice(None)).addmm_(left[index], right)
                squares += values.double().square().sum(0)
            self._norms[number] = squares.sqrt().float()
        return self._norms[number]

    def _differs(self, rounded: torch.Tensor, index: slice | torch.Tensor, columns: slice) -> bool:
        if self.kind[0] != self.base.shape(self.source):
            return True
        stored = self.base.rows(self.source, index)
        return not torch.equal(rounded, (stored[:, columns] if stored.dim() > 1 else stored).to(self.kind[1]))

    def _not_finite(self, extremes: torch.Tensor) -> UserError:
        if extremes.isnan().any():
            return UserError(
                f"{self.source}: holds values that are not numbers (NaN); the base or the adapter is broken, download it again"
            )
        return UserError(
            f"{self.source}: holds values too large for {dtype_name(self.kind[1])}; give --dtype bfloat16 or float32"
        )


def as_float32(stored: torch.Tensor, columns: slice) -> torch.Tensor:
    """A copy in float32, which may be changed in place; `stored` may be a view of a file."""
    return (stored[:, columns] if stored.dim() > 1 else stored).to(torch.float32, copy=True)


def same_changes(one: list[Change], other: list[Change]) -> bool:
    """True if two initially equal tensors stay equal: embeddings and output layer may then stay tied."""

    def same(a: Change, b: Change) -> bool:
        if not isinstance(a, Replace) or not isinstance(b, Replace):
            return a is b
        shapes = [change.weights.shape(change.name) for change in (a, b)]
        steps = [slice(start, start + 1024) for start in range(0, shapes[0][0], 1024)]
        return shapes[0] == shapes[1] and all(torch.equal(a.rows(s, slice(None)), b.rows(s, slice(None))) for s in steps)

    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
