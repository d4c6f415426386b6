"""A table of scores as a picture: a radar over the categories, and bars; with a font that has Chinese."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.console import say
from utils.files import replacing
from utils.tables import Table

PREFERRED = (  # of those that have every character needed, one made for Chinese on a screen comes first
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
BOXES = ("Last Resort", ".LastResort", "LastResort")  # they have every character, and show a box for it
MOST_SIDES = 12  # a radar with more is not readable


def find_font(text: str, files: Iterable[str | Path]) -> Path | None:
    """A font file out of `files` that has every character of `text`; None where there is none."""
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


def draw(table: Table, path: str | Path, fonts: Iterable[str | Path] | None = None) -> None:
    """Write a PNG with a radar (from three categories on) and bars of the table.

    Its font is found among the files `fonts`, or all of the system's. Where none has the characters of the labels,
    that is said, and the categories' plain names are used instead.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    labels = [row.label for row in table.rows]
    fonts = sorted(font_manager.findSystemFonts()) if fonts is None else fonts
    font = find_font("".join([*labels, *table.systems, table.title]), fonts)
    if font is None and not "".join(labels + table.systems + [table.title]).isascii():
        say(f"{path}: no font has all characters of the labels (install Noto Sans CJK, say); categories get their plain names")
        labels = [row.category for row in table.rows]
    family = {}
    if font is not None:
        font_manager.fontManager.addfont(font)
        family = {"font.family": [font_manager.FontProperties(fname=str(font)).get_name(), "DejaVu Sans"]}
    with matplotlib.rc_context(family | {"axes.unicode_minus": False}):
        radar = 3 <= len(labels) <= MOST_SIDES
        figure = pyplot.figure(figsize=(6 * radar + max(6.0, 1.1 * len(labels)), 6), layout="constrained")
        grid = figure.add_gridspec(1, 2 if radar else 1, width_ratios=[1, max(1.0, len(labels) / 6)] if radar else None)
        if radar:
            draw_radar(figure.add_subplot(grid[0, 0], projection="polar"), table, labels)
        draw_bars(figure.add_subplot(grid[0, -1]), table, labels)
        figure.suptitle(table.title)
        figure.legend(
            *figure.axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(table.systems))
        )
        with replacing(path) as aside:
            figure.savefig(aside, format="png", dpi=120, metadata={"Software": None})
        pyplot.close(figure)


def draw_radar(axes: Any, table: Table, labels: list[str]) -> None:
    """A closed line a system; a missing value leaves a gap."""
    angles = [2 * math.pi * index / len(labels) for index in range(len(labels))]
    for system in table.systems:
        values = [math.nan if (value := row.values.get(system)) is None else value for row in table.rows]
        axes.plot([*angles, angles[0]], [*values, values[0]], marker="o", markersize=3, label=system)
    axes.set_xticks(angles, labels)
    axes.tick_params(axis="x", pad=12)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 100)


def draw_bars(axes: Any, table: Table, labels: list[str]) -> None:
    """A group of bars a category, a bar a system."""
    width = 0.8 / len(table.systems)
    for index, system in enumerate(table.systems):
        places = [place - 0.4 + (index + 0.5) * width for place in range(len(labels))]
        axes.bar(places, [row.values.get(system) or 0 for row in table.rows], width, label=system)
    axes.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) <= 6 else 30)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
