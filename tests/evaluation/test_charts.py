"""The picture: Chinese labels that really have glyphs, and an honest word where no font has them."""

import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib import font_manager

from utils.evaluation.charts import draw, draw_chain, draw_matrix, find_font
from utils.evaluation.tables import Row, Table

SYSTEMS = [font for font in font_manager.findSystemFonts() if "CJK" in font]
DEJAVU = sorted((Path(matplotlib.get_data_path()) / "fonts/ttf").glob("*.ttf"))


def table(categories=("01qa", "02translate", "08alignment"), systems=("f1", "f2")):
    return Table("scores", list(systems), [Row(c, 10, {s: 50.0 + i for i, s in enumerate(systems)}) for c in categories])


def test_a_font_is_taken_only_if_it_has_every_character():
    assert find_font("scores", DEJAVU) is not None
    assert find_font("伦理、拒答类", DEJAVU) is None
    assert find_font("知识问答", [__file__, "/nowhere.ttf"]) is None


@pytest.mark.skipif(not SYSTEMS, reason="no font with Chinese on this machine")
def test_chinese_labels_render(tmp_path, capsys):
    found = find_font("伦理、拒答类", SYSTEMS)
    assert found is not None and "Regular" in found.name
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each glyph that is missing
        draw(table(), tmp_path / "one.png")
        draw(table(), tmp_path / "two.png")
    assert "no font" not in capsys.readouterr().out
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert b"matplotlib" not in (tmp_path / "one.png").read_bytes().lower(), "its version would make another file"


def test_without_such_a_font_the_plain_names_are_used_and_it_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, DEJAVU)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(table(), tmp_path / "p.png")
    assert "no font has all characters of the labels" in capsys.readouterr().out


@pytest.mark.parametrize("categories", [("01qa",), ("01qa", "mine"), tuple(f"c{n}" for n in range(14))])
def test_few_and_many_categories(tmp_path, categories):
    draw(table(categories, [f"s{n}" for n in range(8)]), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def figure(monkeypatch):
    """Keeps the figure that is drawn next, for its axes to be read."""
    kept = []
    monkeypatch.setattr("matplotlib.pyplot.close", kept.append)
    yield kept
    monkeypatch.undo()
    matplotlib.pyplot.close("all")


def test_missing_values_are_gaps(tmp_path, figure):
    rows = [Row(c, 10, {"a": value, "b": 70.0}) for c, value in (("01qa", 40.0), ("02translate", None), ("07code", 60.0))]
    draw(Table("t", ["a", "b"], rows), tmp_path / "p.png")
    radar = figure[0].axes[0].get_lines()
    assert [str(value) for value in radar[0].get_ydata()] == ["40.0", "nan", "60.0", "40.0"]
    assert list(radar[1].get_ydata()) == [70.0] * 4
    bars = figure[0].axes[1]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.4] * 6), "two beside each other"
    assert bars.get_gridspec().get_width_ratios() == [1, 1]


def test_cells_of_a_matrix_can_be_read(tmp_path, figure):
    """White on dark ones only: where all are equal, they are light."""
    equal = Table("t", ["a", "b"], [Row("x", 2, {"a": 50.0, "b": 50.0}), Row("y", 2, {"a": 50.0, "b": None})])
    draw_matrix([equal, Table("u", ["a"], [Row("x", 1, {"a": 0.5}), Row("y", 1, {"a": 2.25})], digits=2)], tmp_path / "p.png")
    cells = [[(one.get_position(), one.get_text(), one.get_color()) for one in panel.texts] for panel in figure[0].axes]
    light = [((0, 0), "50", "black"), ((1, 0), "50", "black"), ((0, 1), "50", "black"), ((1, 1), "—", "black")]
    assert cells == [light, [((0, 0), "0.5", "black"), ((0, 1), "2.25", "white")]]


@pytest.mark.parametrize("way", [draw, lambda one, path: draw_chain([one], one.systems, path)])
def test_names_are_only_names(tmp_path, figure, way):
    """No formulas, no hidden entries, no wider than the picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = ["$x_{$", "_f1", "\N{PARTY POPPER}", "<b>", "W" * 300]
        way(Table("of $x_{$", names, [Row(name, 1, dict.fromkeys(names, 50.0)) for name in names]), tmp_path / "p.png")
    shown = [text.get_text().strip() for text in figure[0].legends[0].get_texts()]
    assert shown == [*names[:-1], "W" * 23 + "…"]


def test_a_chain_is_drawn_from_its_first_step_with_a_line_a_category(tmp_path, figure):
    rows = [Row("01qa", 10, {"f2": 3.0, "f1": 1.0}), Row("07code", 10, {"f1": None, "f2": 5.0})]
    likelihood = Table("likelihood", ["base", "f2", "f1"], [Row("01qa", 10, {"f2": -1.0, "base": -3.0, "f1": -2.0})])
    draw_chain([Table("t", ["f2", "f1", "other"], rows), likelihood], ["base", "f1", "f2"], tmp_path / "p.png")
    first, second = figure[0].axes
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["f1", "f2"]
    assert [[str(value) for value in line.get_ydata()] for line in first.get_lines()] == [["1.0", "3.0"], ["nan", "5.0"]]
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["base", "f1", "f2"]
    assert list(second.get_lines()[0].get_ydata()) == [-3.0, -2.0, -1.0]
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
