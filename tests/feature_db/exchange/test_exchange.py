"""Exports: everything that the database says, readable elsewhere, there whole or not at all."""

import csv
import gzip
import json
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pytest

from feature_db import ExportError, FeatureDB, LabelRow, export, read_label_file
from feature_db.exchange import FORMATS
from feature_db.exchange.lines import COLUMNS

HOSTILE = ["<script>alert(1)</script>", '=cmd|"/c calc"!A1', "+1", "été\u202ecod", "a\x1b[31m"]


@pytest.fixture
def path(world_copy: Path) -> Path:
    with FeatureDB.open(world_copy, read_only=False) as db:
        db.import_labels([LabelRow(n, 0, n, text, "human") for n, text in enumerate(HOSTILE)])
    return world_copy


@pytest.fixture
def db(path: Path) -> FeatureDB:
    return FeatureDB.open(path)


def lines(path: Path) -> list[dict[str, object]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.decode().splitlines()]


def test_tables_read_back_row_for_row(db: FeatureDB, tmp_path: Path) -> None:
    out = export(db, tmp_path / "tables", "parquet")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"]["features"] == 48
    assert manifest["saes"][0]["weights_hash"]
    for table, n in manifest["rows"].items():
        assert len(db.sql(f"FROM {table}")) == n
        file = str(out / f"{table}.parquet")
        with duckdb.connect() as other:
            same = other.execute(f"FROM '{file}'").fetchall()
        assert same == db.sql(f"FROM {table}").fetchall()
    file = str(out / "features.parquet")
    labels = [row[0] for row in db.sql("SELECT label FROM features")]
    assert pd.read_parquet(file).label.fillna("").tolist() == [label or "" for label in labels]
    assert pl.read_parquet(file)["label"].to_list() == labels


def test_chosen_features_alone(db: FeatureDB, tmp_path: Path) -> None:
    chosen = db.features([7, 3])
    out = chosen.export(tmp_path / "tables", "parquet")
    for table in ("features", "contexts", "feature_tokens"):
        ids = pd.read_parquet(out / f"{table}.parquet").feature_id
        assert set(ids) == {3, 7}, table
    assert len(pd.read_parquet(out / "documents.parquet")) > 2
    rows = lines(chosen.export(tmp_path / "some.jsonl", "jsonl"))
    assert [row["feature_id"] for row in rows] == [7, 3]


def test_lines_hold_the_page(db: FeatureDB, tmp_path: Path) -> None:
    told = list[tuple[int, int]]()
    out = export(
        db, tmp_path / "all.jsonl.gz", "jsonl", on_exported=lambda n, of: told.append((n, of))
    )
    rows = lines(out)
    assert told[-1] == (48, 48) == (len(rows), len(rows))
    page = db.feature(3)
    assert rows[3]["label"] == page.label
    top = rows[3]["top"]
    assert isinstance(top, list)
    assert top[0]["tokens"] == list(page.top[0].tokens)
    assert top[0]["acts"] == pytest.approx(page.top[0].acts)
    assert rows[0]["label"] == HOSTILE[0]


def test_csv_is_flat_and_no_cell_is_a_formula(db: FeatureDB, tmp_path: Path) -> None:
    out = export(db, tmp_path / "all.csv", "csv")
    with out.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert tuple(header) == COLUMNS
    assert len(rows) == 48
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "@", "\t"))]
    label = header.index("label")
    assert [row[label] for row in rows[:3]] == [HOSTILE[0], f"'{HOSTILE[1]}", "'+1"]
    assert (
        json.loads(rows[3][header.index("neighbors")])[0] == db.feature(3).neighbors[0].feature_id
    )


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.links, self.ids = set[str](), list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.links += [value for name in ("href", "src") if (value := found.get(name))]
        self.ids += [value for value in [found.get("id")] if value]


def test_the_page_is_by_itself_and_escaped(db: FeatureDB, tmp_path: Path) -> None:
    text = db.features(list(range(6))).export(tmp_path / "page.html", "html").read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert sorted(tags.links) == sorted(f"#{name}" for name in tags.ids)
    assert len(tags.ids) == 6
    assert "&lt;script&gt;" in text
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_neuronpedia_s_layout(db: FeatureDB, tmp_path: Path) -> None:
    out = export(db, tmp_path / "np", "neuronpedia")
    (home,) = [path.parent for path in out.rglob("source.jsonl")]
    assert home.parent.name == "tiny-0"
    assert home.name.startswith("1-resid-post")
    for name in ("release", "model", "sourceset", "source"):
        (row,) = lines(home / f"{name}.jsonl")
    assert row["id"] == home.name
    features = lines(home / "features" / "batch-0.jsonl.gz")
    page = db.feature(3)
    row = features[3]
    assert row["index"] == "3"
    assert row["pos_str"] == [token.token for token in page.promoted]
    assert row["frac_nonzero"] == page.density
    heights = row["freq_hist_data_bar_heights"]
    assert isinstance(heights, list)
    assert sum(heights) == page.n_active
    activations = [
        row for row in lines(home / "activations" / "batch-0.jsonl.gz") if row["index"] == "3"
    ]
    assert len(activations) == len(page.top) + len(page.quantiles)
    for row, context in zip(activations, page.top, strict=False):
        values, at = row["values"], row["maxValueTokenIndex"]
        assert isinstance(values, list)
        assert isinstance(at, int)
        assert values[at] == row["maxValue"] == max(values)
        assert row["tokens"] == list(context.tokens)
    explained = lines(home / "explanations" / "batch-0.jsonl.gz")
    assert explained[0]["description"] == HOSTILE[0]


def test_labels_go_round(db: FeatureDB, tmp_path: Path, world_copy: Path) -> None:
    rows = lines(export(db, tmp_path / "all.jsonl", "jsonl"))
    said = tmp_path / "labels.jsonl"
    kept = [
        {name: row[name] for name in ("sae_id", "feature_id", "label")}
        for row in rows
        if row["label_method"] == "human"
    ]
    said.write_text("".join(json.dumps(row) + "\n" for row in kept))
    before = db.sql(
        "SELECT feature_id, label FROM features WHERE label_method = 'human'"
    ).fetchall()
    db.close()
    with FeatureDB.open(world_copy, read_only=False) as again:
        for feature_id, _ in before:
            again.remove_label(int(feature_id))
        again.import_labels(read_label_file(said))
        found = again.sql("SELECT feature_id, label FROM features WHERE label_method = 'human'")
        assert found.fetchall() == before


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_stays_until_the_new_is_whole(
    db: FeatureDB,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,  # noqa: A002
) -> None:
    out = db.features([3]).export(tmp_path / "out", format)
    before = {file: file.read_bytes() for file in [*out.rglob("*"), out] if file.is_file()}
    with pytest.raises(ExportError, match="out exists: pass overwrite=True"):
        export(db, out, format, [(0, 4)])

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(FeatureDB, "pages", fails)
        patched.setattr(FeatureDB, "saes", fails)
        patched.setattr("feature_db.exchange.tables.write_json", fails)
        with pytest.raises(ExportError, match="No space left on device; choose another"):
            export(db, out, format, [(0, 4)], overwrite=True)
    assert {file: file.read_bytes() for file in before} == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("out")] == ["out"]
    export(db, out, format, [(0, 4)], overwrite=True)
    after = {file: file.read_bytes() for file in [*out.rglob("*"), out] if file.is_file()}
    assert after != before


def test_what_can_t_be_exported_is_refused(db: FeatureDB, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="format 'xml': expected one of parquet, jsonl"):
        export(db, tmp_path / "x", "xml")
    with pytest.raises(ExportError, match="3,000 features on one page"):
        export(db, tmp_path / "x", "html", [(0, n) for n in range(3000)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="can't write"):
        export(db, tmp_path / "file" / "x", "csv")
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "file") in (
        [],
        ["db.duckdb"],
    )
