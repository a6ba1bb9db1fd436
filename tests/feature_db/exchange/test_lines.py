"""JSONL, labels and CSV: everything is there, and nothing in it acts."""

import csv
import gzip
import io
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

import duckdb
import pandas as pd
import pytest

from feature_db import FeatureDB, FeatureSet, NotFoundError, read_label_file
from feature_db.exchange.flat_csv import csv_text
from tests.feature_db.conftest import World

from .conftest import FORMULA, HOSTILE, MARKUP, UNICODE


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def pages(text: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_says_all_that_a_page_says(db: FeatureDB, some: FeatureSet, tmp_path: Path) -> None:
    lines = pages(some.export(tmp_path / "some.jsonl", "jsonl").read_text())
    assert [line["feature_id"] for line in lines] == [7, 3, 11]
    for line, page in zip(lines, some, strict=True):
        for name in ("label", "label_method", "density", "n_active", "max_act", "sae_name"):
            assert line[name] == getattr(page, name), name
        kinds = {"top": page.top, "quantile": page.quantiles, "negative": page.negatives}
        for kind, contexts in kinds.items():
            found = [c for c in line["contexts"] if c["kind"] == kind]
            assert [c["tokens"] for c in found] == [list(c.tokens) for c in contexts]
            assert [c["acts"] for c in found] == [list(c.acts) for c in contexts]
        up = [e["token"] for e in line["feature_logits"] if e["sign"] == 1]
        assert up == [e.token for e in page.promoted]
        assert [t["token"] for t in line["feature_tokens"]] == [t.token for t in page.tokens]
        assert [b["n"] for b in line["feature_histogram"]] == [b.n for b in page.histogram]
        near = [n["neighbor_id"] for n in line["neighbors"]]
        assert near == [n.feature_id for n in page.neighbors]


def test_a_feature_that_never_fired_has_a_line_too(db: FeatureDB, tmp_path: Path) -> None:
    (line,) = pages(db.features([47]).export(tmp_path / "f.jsonl", "jsonl").read_text())
    assert line["is_dead"]
    assert line["contexts"] == line["feature_tokens"] == []
    assert line["max_act"] is None


def test_lines_are_compressed_by_name_and_the_same_each_time(db: FeatureDB, tmp_path: Path) -> None:
    plain = db.export(tmp_path / "a.jsonl", "jsonl").read_bytes()
    one = db.export(tmp_path / "a.jsonl.gz", "jsonl").read_bytes()
    other = db.export(tmp_path / "b.jsonl.gz", "jsonl").read_bytes()
    assert gzip.decompress(one) == plain
    assert one == other
    assert len(plain.splitlines()) == 48


def test_hostile_text_is_exact_in_json(hostile: FeatureDB, tmp_path: Path) -> None:
    lines = pages(hostile.export(tmp_path / "h.jsonl", "jsonl").read_text())
    for feature_id, label in HOSTILE.items():
        assert lines[feature_id]["label"] == label
    tokens = {t for line in lines for c in line["contexts"] for t in c["tokens"]}
    assert tokens <= set(hostile.vocabulary())
    assert any(token.startswith(MARKUP) for token in tokens)


def test_what_is_no_number_is_null(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copy(world.path, tmp_path / "copy.duckdb"))
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE neighbors SET cosine = 'nan' WHERE rank = 1").fetchall()
    with FeatureDB.open(path) as db:
        lines = pages(db.export(tmp_path / "f.jsonl", "jsonl").read_text())
    assert all(line["neighbors"][0]["cosine"] is None for line in lines)


def test_labels_go_out_and_come_in(hostile: FeatureDB, world: World, tmp_path: Path) -> None:
    file = hostile.export(tmp_path / "labels.jsonl", "labels")
    rows = read_label_file(file)
    assert {(row.feature_id, row.text, row.method) for row in rows} == {
        *((feature_id, label, "human") for feature_id, label in HOSTILE.items()),
        (9, "by a file", "my-tool"),
    }
    path = Path(shutil.copy(world.path, tmp_path / "copy.duckdb"))
    with FeatureDB.open(path, read_only=False) as other:
        other.import_labels(rows)
        shown = "SELECT feature_id, label, label_method FROM features ORDER BY 1"
        assert other.sql(shown).fetchall() == hostile.sql(shown).fetchall()
        again = other.export(tmp_path / "again.jsonl", "labels")
    assert again.read_bytes() == file.read_bytes()


def test_labels_that_nobody_gave_are_not_exported(db: FeatureDB, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="by a person or a file"):
        db.export(tmp_path / "labels.jsonl", "labels")
    assert list(tmp_path.iterdir()) == []


def test_a_flat_row_has_what_the_page_has(some: FeatureSet, tmp_path: Path) -> None:
    frame = pd.read_csv(some.export(tmp_path / "f.csv", "csv"))
    assert frame.feature_id.tolist() == [7, 3, 11]
    for (_, row), page in zip(frame.iterrows(), some, strict=True):
        assert row.density == page.density
        assert row.max_act == pytest.approx(page.max_act)
        assert json.loads(row.promoted) == [t.token for t in page.promoted[:5]]
        assert json.loads(row.neighbors) == [n.feature_id for n in page.neighbors[:5]]
        assert not row.is_dead


def test_no_cell_is_a_formula_and_no_character_acts(hostile: FeatureDB, tmp_path: Path) -> None:
    text = hostile.export(tmp_path / "h.csv", "csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 48
    assert rows[3]["label"] == f"'{FORMULA}"
    assert rows[8]["label"] == UNICODE
    assert rows[3]["example"].startswith(f"'{FORMULA}")
    for row in rows:
        assert not any(value.lstrip().startswith(("=", "+", "-", "@")) for value in row.values())
    unsafe = {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"}} - {"\n"}
    assert unsafe == set()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "＝1", "\r=1"])
def test_every_way_to_begin_a_formula_is_defused(text: str) -> None:
    (cells,) = csv.reader([csv_text([[text]])])
    assert cells[0][0] in "'⇥␍", cells


def test_numbers_stay_numbers() -> None:
    assert csv_text([[-1.5, True, None, "a,b"]]) == '-1.5,true,,"a,b"\n'
