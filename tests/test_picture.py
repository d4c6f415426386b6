"""The picture: Chinese labels that really have glyphs, and an honest word where no font has them."""

import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib import font_manager

from utils.picture import draw, find_font
from utils.tables import Row, Table

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


def test_without_such_a_font_the_plain_names_are_used_and_it_is_said(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(table(), tmp_path / "p.png", DEJAVU)
    assert "no font has all characters of the labels" in capsys.readouterr().out


@pytest.mark.parametrize("categories", [("01qa",), ("01qa", "mine"), tuple(f"c{n}" for n in range(14))])
def test_few_and_many_categories(tmp_path, categories):
    draw(table(categories, [f"s{n}" for n in range(8)]), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_missing_values_are_gaps(tmp_path):
    rows = [Row(c, 10, {"a": None, "b": 70.0}) for c in ("01qa", "02translate", "07code")]
    draw(Table("t", ["a", "b"], rows), tmp_path / "p.png")
