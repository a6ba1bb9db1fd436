"""The page: well formed, whole, and dead: nothing in it acts or is fetched."""

import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest

from feature_db import ExportError, FeatureDB, FeatureSet
from feature_db.exchange import static_page as module

from .conftest import FORMULA, HOSTILE, MARKUP, UNICODE

VOID = {"meta", "br"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "nav", "ol", "li", "a", "b", "i", "span"),
    *("main", "header", "h1", "h2", "h3", "p", "section", "dl", "div", "dt", "dd", "svg", "rect"),
    *("ul", "code", "details", "summary"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "aria-label", "href", "class", "style"),
    *("id", "width", "height", "role", "x", "y", "open", "title"),
}


class Page(HTMLParser):
    """Tags, ids, links and text of a page; every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.styles: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values["href"] or ""] if "href" in values else []
        self.styles |= {values["style"] or ""} if "style" in values else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_a_page_shows_its_features_in_order(some: FeatureSet, tmp_path: Path) -> None:
    page = Page(some.export(tmp_path / "p.html", "html").read_text())
    assert page.ids == ["f-0-7", "f-0-3", "f-0-11"]
    for feature in some:
        assert feature.shown_label in page.text
        assert f"{feature.n_active:,}" in page.text
        assert f"strongest contexts ({len(feature.top)})" in page.text


def test_its_contents_lead_to_its_features(db: FeatureDB, tmp_path: Path) -> None:
    page = Page(db.export(tmp_path / "p.html", "html").read_text())
    assert page.links[:48] == [f"#f-0-{i}" for i in range(48)]
    assert len(page.links) > 48  # neighbours that are on the page are linked too
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert "never active in the indexed text" in page.text


def test_hostile_text_is_text(hostile: FeatureDB, tmp_path: Path) -> None:
    text = hostile.export(tmp_path / "p.html", "html").read_text()
    page = Page(text)
    assert page.tags <= TAGS
    assert page.attributes <= ATTRIBUTES
    assert all(re.fullmatch(r"--a:[01]?\.\d+|--a:1", style) for style in page.styles)
    for shown in (MARKUP, FORMULA, UNICODE, "<U+202E>gnp.exe <U+001B>[31mred<U+0007>"):
        assert shown in page.text
    assert HOSTILE[5] in page.text
    unsafe = {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"}} - {"\n"}
    assert unsafe == set()


def test_a_page_asks_nobody_for_anything(db: FeatureDB, tmp_path: Path) -> None:
    text = db.export(tmp_path / "p.html", "html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"(https?:)?//\w|url\(|@import|<script|\bon\w+=", text)


def test_shades_grow_with_acts(db: FeatureDB, tmp_path: Path) -> None:
    sql = "SELECT feature_id FROM features WHERE NOT is_dead ORDER BY n_active DESC LIMIT 1"
    chosen = db.sql(sql).features()
    text = chosen.export(tmp_path / "p.html", "html").read_text()
    found = re.findall(r'style="--a:([\d.]+)" title="([\d.e+-]+)"', text)
    assert len(found) > 5
    pairs = sorted((float(act), float(shade)) for shade, act in found)
    assert [shade for _, shade in pairs] == sorted(shade for _, shade in pairs)
    assert pairs[-1][1] == 1.0


def test_a_page_has_a_largest_size(
    db: FeatureDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FEATURES", 47)
    with pytest.raises(ExportError, match=r"a page of 48 features .* choose 47 at most"):
        db.export(tmp_path / "p.html", "html")
    assert list(tmp_path.iterdir()) == []
