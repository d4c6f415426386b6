"""Tables of results: one row per category, one column per system, the best in bold, the second best starred."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.evaluation.intervals import Interval
from utils.files import replacing, write_json

LABELS = {
    "01qa": "知识问答",
    "02translate": "翻译",
    "03generate": "文本生成",
    "04analyse": "情感分析",
    "05understanding": "阅读理解",
    "06chinese": "中文特色",
    "07code": "代码生成",
    "08alignment": "伦理、拒答类",
    "09math": "数学推理",
    "10dialogue": "多轮对话",
}
NOTHING = "—"
Values = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One category: its number of samples, and for each system a value (or None) and its 95 % interval, if there is one."""

    category: str
    samples: int
    values: Values
    intervals: Mapping[str, Interval | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, category: str, samples: int, found: Mapping[str, tuple[float | None, Interval | None]]) -> "Row":
        """A row from each system's value and interval."""
        values, intervals = ({system: pair[part] for system, pair in found.items()} for part in (0, 1))
        return cls(category, samples, values, intervals)  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """The category's Chinese name, for the ten that have one."""
        return LABELS.get(self.category, self.category)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of categories and columns of systems. `marked` is False if more is not better, so that nothing is best.

    Values are compared as shown, with `digits` decimals: what looks equal is equal.
    """

    title: str
    systems: list[str]
    rows: list[Row]
    digits: int = 1
    marked: bool = True

    def marks(self, row: Row) -> tuple[list[str], list[str]]:
        """The best and the second best systems of a row; nobody if more is not better."""
        return marks(row.values, self.digits) if self.marked else ([], [])

    def telling(self, how: str) -> "Table":
        """The same table, with a title that tells how its numbers were made."""
        return dataclasses.replace(self, title=f"{self.title} · {how}") if how else self

    def shown(self, value: float | None) -> str:
        """A value as shown: rounded, whole numbers without decimals."""
        if value is None:
            return NOTHING
        text = f"{rounded(value, self.digits):.{self.digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text

    def doubt(self, row: Row, system: str) -> str:
        """The interval of a value as shown after it; "" if there is none."""
        known = row.intervals.get(system)
        return "" if known is None else f" [{self.shown(known[0])}, {self.shown(known[1])}]"


def rounded(value: float, digits: int) -> float:
    """`value` with `digits` decimals, never minus zero."""
    return round(value, digits) + 0.0


def marks(values: Values, digits: int = 1) -> tuple[list[str], list[str]]:
    """The systems with the highest value, and those with the next lower one; each may be several equal ones."""
    known = {system: rounded(value, digits) for system, value in values.items() if value is not None}
    ranks = [*sorted(set(known.values()), reverse=True), None, None]
    best, second = ([system for system, value in known.items() if value == rank] for rank in ranks[:2])
    return best, second


def markdown(table: Table) -> str:
    """The table as Markdown, with bold and stars."""

    def cells(row: Row) -> list[str]:
        best, second = table.marks(row)
        texts = []
        for system in table.systems:
            text = table.shown(row.values.get(system))
            marked = f"**{text}**" if system in best else f"{text}*" if system in second else text
            texts.append(marked + table.doubt(row, system))
        return texts

    return grid(table, cells)


def gains(table: Table) -> str:
    """The table as Markdown for systems that are steps of a chain: each value with its change from the previous step."""

    def cells(row: Row) -> list[str]:
        texts: list[str] = []
        before: float | None = None
        for system in table.systems:
            value = row.values.get(system)
            change = None if value is None or before is None else rounded(value, table.digits) - before
            sign = "+" if change and change > 0 else "−" if change and change < 0 else "±"
            texts.append(table.shown(value) + table.doubt(row, system))
            texts[-1] += f" ({sign}{table.shown(abs(change))})" if change is not None else ""
            before = before if value is None else rounded(value, table.digits)
        return texts

    return grid(table, cells)


def grid(table: Table, cells: Callable[[Row], list[str]]) -> str:
    """Markdown with one column for the categories, one for their numbers of samples, and one for each system."""
    rows = [["类别", "样本数", *table.systems], ["---", *["---:"] * (len(table.systems) + 1)]]
    rows += [[row.label, str(row.samples), *cells(row)] for row in table.rows]
    texts = [[" ".join(text.splitlines()).replace("|", "\\|") for text in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in texts)


def comma_separated(tables: list[Table]) -> str:
    """Tables as CSV, one below the other: title, category, label, samples, one column per system, best and second best; then,
    if there are intervals, two columns per system for these."""
    systems = list(dict.fromkeys(system for table in tables for system in table.systems))
    doubtful = [system for system in systems if any(row.intervals.get(system) for table in tables for row in table.rows)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    edges = [f"{system} {edge}" for system in doubtful for edge in ("low", "high")]
    writer.writerow(["table", "category", "label", "samples", *systems, "best", "second", *edges])
    for table in tables:
        for row in table.rows:
            numbers = ["" if value is None else table.shown(value) for value in map(row.values.get, systems)]
            names = ["; ".join(systems) for systems in table.marks(row)]
            known = [row.intervals.get(system) for system in doubtful]
            limits = [table.shown(edge) if edge is not None else "" for pair in known for edge in (pair or (None, None))]
            writer.writerow([table.title, row.category, row.label, row.samples, *numbers, *names, *limits])
    return out.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    """The table as JSON values, unrounded."""
    rows = []
    for row in table.rows:
        best, second = table.marks(row)
        values = {system: row.values.get(system) for system in table.systems}
        found: dict[str, Any] = {"category": row.category, "label": row.label, "samples": row.samples, "values": values}
        found |= {"intervals": row.intervals} if row.intervals else {}
        rows.append(found | ({"best": best, "second": second} if table.marked else {}))
    return {"title": table.title, "systems": table.systems, "rows": rows}


def write(base: Path, tables: list[Table], notes: Sequence[str] = (), facts: dict[str, Any] | None = None) -> None:
    """Write tables as `base`.md (with notes below), .csv and .json (with further facts)."""
    texts = [f"## {table.title}\n\n{markdown(table)}" for table in tables]
    texts += ["".join(f"- {note}\n" for note in notes)] if notes else []
    for ending, text in ((".md", "\n".join(texts)), (".csv", comma_separated(tables))):
        with replacing(base.with_name(base.name + ending)) as aside:
            aside.write_text(text, "utf-8")
    found = {"tables": [as_json(table) for table in tables], "notes": list(notes)} | (facts or {})
    write_json(base.with_name(base.name + ".json"), found)


def write_gains(path: Path, tables: list[Table], steps: list[str]) -> str:
    """Write, as Markdown, how the values of the systems `steps` change from one to the next; returns the text."""
    parts = []
    for table in tables:
        chain = dataclasses.replace(table, systems=[system for system in steps if system in table.systems])
        parts.append(f"## {table.title}, and its change from the previous step\n\n{gains(chain)}")
    with replacing(path) as aside:
        aside.write_text("\n".join(parts), "utf-8")
    return "\n".join(parts)
