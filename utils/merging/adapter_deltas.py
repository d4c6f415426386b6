"""What an adapter changes in a base model: which tensors, and how, in peft's order."""

from utils.adapters import fit
from utils.console import UserError
from utils.merging import experts
from utils.merging.tensor_recipes import Add, AddExperts, Change, Replace, ReplaceRows, Shift
from utils.models.names import Finder
from utils.models.weights import Kind


class Adapter(fit.Adapter):
    """An adapter folder, and the base's tensors that it changes."""

    def changes(self, kinds: dict[str, Kind], find: Finder) -> dict[str, list[Change]]:
        """The base's tensors that change, by name, and their changes in order; `kinds` are the current tensors.

        Raises UserError if the adapter does not fit the base, or cannot be merged.
        """
        found: dict[str, list[Change]] = {}
        shapes = {name: kind[0] for name, kind in kinds.items()}
        single = experts.parameters(find.config, self.folder) if self.settings.get("target_parameters") else {}
        shapes = self.check_fit(shapes, find, single)
        for name, name_in_file in self.replaced.items():
            found.setdefault(find(name), []).append(Replace(self.weights, name_in_file))
        for module, parts in self.modules.items():
            if module in single:
                name = single[module].name
                changes = experts.additions(self.weights, parts, single[module], shapes, find(name), find.joined(name))
                for target, change in changes:
                    found.setdefault(target, []).append(change)
                continue
            target = find(f"{module}.weight")
            rank = self.weights.shape(parts["A"])[0]
            columns = self.has_columns(module, shapes[target], find.config.get("model_type", ""))
            scaling, magnitude = self.scaling(module, rank), parts.get("magnitude_vector")
            addition = Add(self.weights, parts["A"], parts["B"], scaling, magnitude, columns)
            found.setdefault(target, []).append(addition)
            if "bias" in parts:
                bias = find(f"{module}.bias")
                if not bias:
                    raise UserError(
                        f"{self.folder}: {module} has a bias, the base's has none; it cannot be merged, use it through peft"
                    )
                shift = self.weights.tensor(parts["bias"]).float() * addition.scaling
                found.setdefault(bias, []).append(Shift(shift))
        for module in self.tokens:
            target = find(f"{module}.weight")
            rows = self.rows_of(module, shapes[target])
            found.setdefault(target, []).append(ReplaceRows(self.weights, self.tokens[module], rows))
        used = len(self.replaced) + len(self.tokens) + sum(map(len, self.modules.values()))
        if used != len(self.names) or used != self._count(found):
            raise RuntimeError(f"{self.folder}: {self._count(found)} of {len(self.names)} tensors would be used")
        return found

    @staticmethod
    def _count(found: dict[str, list[Change]]) -> int:
        """How many of the adapter's tensors the changes use; that of an expert's parameter may change several tensors."""
        changes = [change for changes in found.values() for change in changes]
        several = {change.a: 2 for change in changes if isinstance(change, AddExperts)}
        others = [change for change in changes if not isinstance(change, AddExperts)]
        return sum(several.values()) + sum((3 if c.magnitude else 2) if isinstance(c, Add) else 1 for c in others)
