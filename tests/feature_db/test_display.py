"""What people see: token text is hostile, and never reaches a page or a terminal as it is."""

import io
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from feature_db import FeatureDB, Result, visible
from feature_db.feature import HistogramBin, sparkline
from feature_db.shading import shaded_html, shaded_text, shades

from .conftest import World

HOSTILE = ["<script>alert(1)</script>", "\u202egnp.exe", "\x1b[31mred", "a\nb", '" onload="x']


def terminal(shown: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system="truecolor").print(shown)
    return out.getvalue()


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@given(st.text())
def test_visible_text_holds_nothing_unsafe(text: str) -> None:
    for character in visible(text):
        assert unicodedata.category(character) not in {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}


def test_newlines_tabs_and_bidi_are_shown_as_signs() -> None:
    assert visible("a\nb\tc\u202ed") == "a↵b⇥c<U+202E>d"
    assert visible("naïve 日本 été") == "naïve 日本 été"


def test_hostile_tokens_are_escaped_in_html() -> None:
    html = shaded_html(HOSTILE, [1.0, 0.5, 0.2, 0.0, 0.9], peak=0)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert '" onload' not in html
    assert "a↵b" in html


def test_hostile_tokens_are_escaped_in_a_terminal() -> None:
    shown = without_styles(terminal(shaded_text(HOSTILE, [1.0, 0.5, 0.2, 0.0, 0.9])))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "<script>" in shown
    assert shown.count("\n") == 1


def test_shades_lie_between_zero_and_one() -> None:
    assert shades([0.0, 1.0, 2.0]) == [0.0, 0.5, 1.0]
    assert shades([1.0, 9.0], highest=3.0) == [1 / 3, 1.0]
    assert shades([0.0, 0.0]) == [0.0, 0.0]
    assert shades([]) == []


def test_stronger_acts_are_shaded_darker() -> None:
    alphas = [
        float(a) for a in re.findall(r"rgba\(255,150,30,([\d.]+)\)", shaded_html("ab", [1, 4]))
    ]
    assert alphas[0] < alphas[1] == 1.0


def test_feature_renders_in_notebook_and_terminal(db: FeatureDB) -> None:
    feature = db.feature(3)
    html, shown = feature._repr_html_(), without_styles(terminal(feature))
    for text in (html, shown):
        assert "feature 3" in text
        assert "strongest" in text
        assert "by quantile" in text
    assert "rgba(" in html
    assert not re.search(r"<(script|link|img)|src=|https?://", html)
    assert "<b>feature" in html
    assert "&lt;" in html  # the corpus says <b>
    assert "Feature(3" in repr(feature)


def test_dead_feature_renders(db: FeatureDB) -> None:
    assert "never active" in without_styles(terminal(db.feature(47)))
    assert "never active" in db.feature(47)._repr_html_()


@pytest.mark.parametrize("tokens", ["token_ids", "tokens_of(token_ids) AS tokens"])
def test_result_renders_contexts_as_shaded_text(db: FeatureDB, tokens: str) -> None:
    found = db.sql(f"SELECT feature_id, {tokens}, acts, peak FROM contexts LIMIT 3")
    html = found._repr_html_()
    assert html.count("rgba(") >= 3
    assert ">acts<" not in html
    assert "tokens" in without_styles(terminal(found))


def test_result_escapes_values_and_column_names(db: FeatureDB) -> None:
    found = db.sql("""SELECT '<script>' AS "<b>", '[red]x' AS "[bold]", NULL AS n, [1, 2] AS l""")
    html = found._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    shown = without_styles(terminal(found))
    for text in ("<script>", "[red]x", "[bold]", "—", "[1, 2]"):
        assert text in shown


def test_long_results_say_how_many_rows_there_are(db: FeatureDB) -> None:
    found = db.sql("SELECT * FROM range(100)")
    assert "30 of 100 rows" in found._repr_html_()
    assert "30 of 100 rows" in terminal(found)


def test_empty_result_renders() -> None:
    import pyarrow as pa

    assert "Result(0 rows" in repr(Result(pa.table({})))
    terminal(Result(pa.table({})))
    assert Result(pa.table({}))._repr_html_()


def test_active_features_render_shaded(world: World, db: FeatureDB) -> None:
    found = db.active(world.lm, world.sae, "The <b>\ngolden gate")
    html, shown = found._repr_html_(), without_styles(terminal(found))
    assert "rgba(" in html
    assert "<b>\n" not in html
    assert "↵" in shown
    assert "standing out" in repr(found)


def test_hostile_labels_and_names_are_escaped(world: World, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copy(world.path, tmp_path / "x.duckdb"))
    with FeatureDB.open(path, read_only=False) as db:
        db.sql("UPDATE features SET label = ?", ["<script>\u202e\x1b[2J"])
        db.sql("UPDATE saes SET name = ?", ["<script>\x1b[2J"])
        feature = db.feature(3)
        for html in (feature._repr_html_(), db.search("script")._repr_html_()):
            assert "<script" not in html
            assert "\u202e" not in html
        assert "\x1b[2J" not in terminal(feature)
        assert "\u202e" not in repr(feature)


@pytest.mark.parametrize(
    ("bins", "expected"),
    [
        ([], ""),
        ([HistogramBin(1, 1.5, 8)], "1 █ 1.5"),
        ([HistogramBin(1, 1.5, 8), HistogramBin(2, 3, 1)], "1 █ ▁ 3"),
    ],
)
def test_sparkline(bins: list[HistogramBin], expected: str) -> None:
    assert sparkline(bins) == expected
