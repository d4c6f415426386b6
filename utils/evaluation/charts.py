"""Charts of score tables: a radar over the categories, and bars; with a font that has Chinese."""

import contextlib
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.console import say
from utils.evaluation.tables import Table
from utils.files import replacing

PREFERRED = (  # among fonts with every needed character, those made for Chinese on screens come first
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "Microsoft YaHei",
    "PingFang SC",
    "PingFang HK",
    "Hiragino Sans GB",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Arial Unicode MS",
)
BOXES = ("Last Resort", ".LastResort", "LastResort")  # they have every character, but as a box
MOST_SIDES = 12  # a radar with more is not readable
WIDEST = 44  # characters of a panel's title in one line
LONGEST_NAME = 24  # characters
PLAIN = {"axes.unicode_minus": False, "text.parse_math": False}  # a name with dollar signs is no formula


def find_font(text: str, files: Iterable[str | Path]) -> Path | None:
    """A font file among `files` that has every character of `text`, or None.

    Done by hand: matplotlib's fallbacks must be named, and draw boxes if none of them has a character.
    """
    from matplotlib.ft2font import FT2Font

    needed = {ord(sign) for sign in text if not sign.isspace()}
    fitting: dict[str, Path] = {}
    for file in files:
        try:
            font = FT2Font(str(file))
            family, style, fits = font.family_name, font.style_name, needed <= font.get_charmap().keys()
        except (RuntimeError, OSError):
            continue  # a bitmap font, or a broken file
        if fits and not family.startswith(BOXES) and (family not in fitting or style == "Regular"):
            fitting[family] = Path(file)
    ranked = [fitting[family] for family in PREFERRED if family in fitting]
    return next(iter([*ranked, *fitting.values()]), None)


def draw(table: Table, path: str | Path) -> None:
    """Write a PNG with a radar (if there are at least three categories) and bars of the table."""
    from matplotlib import pyplot

    with font_for([table], table.systems, path) as names:
        labels = list(names.values())
        radar = 3 <= len(labels) <= MOST_SIDES
        figure = pyplot.figure(figsize=(6 * radar + max(6.0, 1.1 * len(labels)), 6), layout="constrained")
        grid = figure.add_gridspec(1, 2 if radar else 1, width_ratios=[1, max(1.0, len(labels) / 6)] if radar else None)
        if radar:
            draw_radar(figure.add_subplot(grid[0, 0], projection="polar"), table, labels)
        draw_bars(figure.add_subplot(grid[0, -1]), table, labels)
        figure.suptitle(textwrap.fill(table.title, WIDEST + WIDEST * radar))
        figure.legend(
            *figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(table.systems))
        )
        save(figure, path)


def draw_chain(tables: list[Table], steps: list[str], path: str | Path) -> None:
    """Write a PNG with one panel per table: a line for each category over the `steps` of a chain that have a value."""
    from matplotlib import pyplot

    with font_for(tables, steps, path) as names:
        columns = min(3, len(tables))
        lines = math.ceil(len(tables) / columns)
        figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.5 * lines), squeeze=False, layout="constrained")
        for panel, table in zip(axes.flat, tables, strict=False):
            shown = [step for step in steps if step in table.systems]
            for row in table.rows:
                values = [math.nan if (value := row.values.get(step)) is None else value for step in shown]
                panel.plot(range(len(shown)), values, marker="o", markersize=3, label=names[row.category])
            panel.set_xticks(range(len(shown)), [textwrap.fill(short(step), max(1, 48 // len(shown))) for step in shown])
            panel.set_title(textwrap.fill(table.title, WIDEST), fontsize="medium")
            panel.grid(alpha=0.3)
        for panel in axes.flat[len(tables) :]:
            panel.set_axis_off()
        entries = {name: line for panel in axes.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(1 + 2 * columns, len(entries)))
        save(figure, path)


def draw_matrix(tables: list[Table], path: str | Path) -> None:
    """Write a PNG with one panel per table: a cell for each row and column with its value, darker the larger it is."""
    from matplotlib import pyplot

    with font_for(tables, [system for table in tables for system in table.systems], path) as names:
        most = max(len(table.rows) for table in tables)
        size = (2.5 + 1.3 * sum(len(table.systems) for table in tables), 1.8 + 0.7 * most)
        figure, axes = pyplot.subplots(1, len(tables), figsize=size, squeeze=False, layout="constrained")
        for panel, table in zip(axes.flat, tables, strict=True):
            values = [[math.nan if (v := row.values.get(s)) is None else v for s in table.systems] for row in table.rows]
            panel.imshow(values, cmap="Blues", aspect="auto")
            known = [value for row in values for value in row if not math.isnan(value)]
            middle = (min(known, default=0.0) + max(known, default=0.0)) / 2
            for y, row in enumerate(table.rows):
                for x, system in enumerate(table.systems):
                    color = "white" if (row.values.get(system) or 0) > middle else "black"
                    panel.text(x, y, table.shown(row.values.get(system)), ha="center", va="center", color=color)
            panel.set_xticks(range(len(table.systems)), [textwrap.fill(short(name), 12) for name in table.systems])
            panel.set_yticks(range(len(table.rows)), [names[row.category] for row in table.rows])
            panel.set_title(textwrap.fill(table.title, WIDEST), fontsize="medium")
        save(figure, path)


@contextlib.contextmanager
def font_for(tables: list[Table], systems: list[str], path: str | Path) -> Iterator[dict[str, str]]:
    """Draw within this context with one of the system's fonts that has all characters of the tables' titles, their categories'
    labels and the names of `systems`; yields each category's label.

    If none has them all, one that has the labels is taken; if none has these, that is printed, and the categories' plain names
    are their labels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager

    labels = {row.category: row.label for table in tables for row in table.rows}
    fonts = sorted(font_manager.findSystemFonts())
    text = "".join([*labels.values(), *systems, *(table.title for table in tables)])
    has_all = find_font(text, fonts)
    font = has_all or find_font("".join(labels.values()), fonts)
    if font is None and not text.isascii():
        say(f"{path}: no font has all characters of the labels (install e.g. Noto Sans CJK); categories get their plain names")
        labels = {category: category for category in labels}
    family = {}
    if font is not None:
        font_manager.fontManager.addfont(font)
        family = {"font.family": [font_manager.FontProperties(fname=str(font)).get_name(), "DejaVu Sans"]}
    with matplotlib.rc_context(family | PLAIN), warnings.catch_warnings():
        if has_all is None:
            warnings.simplefilter("ignore", UserWarning)  # about a box for each character that no font has
        yield {category: short(label) for category, label in labels.items()}


def short(name: str) -> str:
    """A name as written in a chart, whose legend would leave out what begins with an underscore."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, reproducibly, and close it."""
    from matplotlib import pyplot

    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def draw_radar(axes: Any, table: Table, labels: list[str]) -> None:
    """Draw a closed line per system; a missing value leaves a gap."""
    angles = [2 * math.pi * index / len(labels) for index in range(len(labels))]
    for system in table.systems:
        values = [math.nan if (value := row.values.get(system)) is None else value for row in table.rows]
        axes.plot([*angles, angles[0]], [*values, values[0]], marker="o", markersize=3, label=short(system))
    axes.set_xticks(angles, labels)
    axes.tick_params(axis="x", pad=12)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 100)


def draw_bars(axes: Any, table: Table, labels: list[str]) -> None:
    """Draw a group of bars per category, with one bar per system."""
    width = 0.8 / len(table.systems)
    for index, system in enumerate(table.systems):
        places = [place - 0.4 + (index + 0.5) * width for place in range(len(labels))]
        axes.bar(places, [row.values.get(system) or 0 for row in table.rows], width, label=short(system))
    axes.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) <= 6 else 30)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
