"""Parquet: what was in the database is in the files, for every reader."""

import json
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from feature_db import SCHEMA_VERSION, FeatureDB, FeatureSet, build_index
from feature_db.exchange.chosen import table_columns
from sae.atomic_files import sha256
from tests.feature_db.conftest import World, small_config

LEFT_OUT = {"meta", "words"}


def test_every_table_reads_back_row_for_row(db: FeatureDB, tmp_path: Path) -> None:
    out = db.export(tmp_path / "all", "parquet")
    tables = set(table_columns(db)) - LEFT_OUT
    assert {path.stem for path in out.glob("*.parquet")} == tables
    for table in tables:
        rows = db.sql(f"SELECT * FROM {table}").arrow()
        assert pq.read_table(out / f"{table}.parquet").equals(rows), table
        found = duckdb.sql(f"SELECT * FROM '{out / table}.parquet'").fetchall()
        assert found == duckdb.sql("SELECT * FROM rows").fetchall(), table


def test_pandas_and_polars_read_it(db: FeatureDB, tmp_path: Path) -> None:
    out = db.export(tmp_path / "all", "parquet")
    there = db.sql("SELECT * FROM contexts").df()
    assert pd.read_parquet(out / "contexts.parquet").text.tolist() == there.text.tolist()
    polars = pl.read_parquet(out / "contexts.parquet")
    assert polars["acts"].to_list() == [list(acts) for acts in there.acts]


def test_chosen_features_bring_their_rows_and_documents_alone(
    db: FeatureDB, some: FeatureSet, tmp_path: Path
) -> None:
    out = some.export(tmp_path / "some", "parquet")
    assert pq.read_table(out / "features.parquet").column("feature_id").to_pylist() == [7, 3, 11]
    for table in ("contexts", "feature_logits", "feature_histogram", "feature_nearby_tokens"):
        found = pq.read_table(out / f"{table}.parquet")
        wanted = db.sql(
            f"SELECT * FROM {table} WHERE feature_id IN (7, 3, 11) "
            "ORDER BY CASE feature_id WHEN 7 THEN 0 WHEN 3 THEN 1 ELSE 2 END, rowid"
        )
        assert len(wanted) > 2
        assert found.equals(wanted.arrow()), table


def test_a_context_s_document_comes_with_it_and_no_other(db: FeatureDB, tmp_path: Path) -> None:
    sql = "SELECT feature_id FROM features WHERE NOT is_dead ORDER BY n_documents LIMIT 1"
    out = db.sql(sql).features().export(tmp_path / "one", "parquet")
    named = pq.read_table(out / "contexts.parquet").column("doc_id").to_pylist()
    named += pq.read_table(out / "feature_documents.parquet").column("doc_id").to_pylist()
    documents = pq.read_table(out / "documents.parquet")
    assert documents.column("doc_id").to_pylist() == sorted(set(named))
    assert len(documents) < len(db.sql("SELECT * FROM documents"))


def test_the_manifest_tells_what_is_there(db: FeatureDB, some: FeatureSet, tmp_path: Path) -> None:
    out = some.export(tmp_path / "some", "parquet")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["made_by"] == "saebase export"
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert (manifest["n_features"], manifest["is_all"]) == (3, False)
    (sae,) = manifest["saes"]
    assert sae["weights_hash"] == db.saes().df().weights_hash[0]
    for name, told in manifest["tables"].items():
        path = out / told["file"]
        assert told["n_rows"] == pq.read_metadata(path).num_rows, name
        assert told["sha256"] == sha256(path)


def test_features_of_one_sae_leave_the_other_one_out(world: World, tmp_path: Path) -> None:
    saes = [world.other, world.sae]
    path = build_index(
        world.lm, saes, world.cache, out=tmp_path / "two.duckdb", config=small_config()
    )
    with FeatureDB.open(path) as db:
        active = db.sql("SELECT * FROM features WHERE sae_id = 1 AND n_active > 5 LIMIT 1")
        out = active.features().export(tmp_path / "one", "parquet")
    assert pq.read_table(out / "saes.parquet").column("sae_id").to_pylist() == [1]
    assert set(pq.read_table(out / "contexts.parquet").column("sae_id").to_pylist()) == {1}
    assert len(json.loads((out / "manifest.json").read_text())["saes"]) == 1


@pytest.mark.parametrize("n_rows", [1, 7])
def test_the_size_of_blocks_changes_nothing(
    db: FeatureDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_rows: int
) -> None:
    chosen = db.features([2, 1, 30])
    one_block = chosen.export(tmp_path / "one", "parquet")
    for name in ("_BLOCK", "_BLOCK_ROWS", "_BLOCK_DOCUMENTS"):
        monkeypatch.setattr(f"feature_db.exchange.parquet_folder.{name}", n_rows)
    blocks = chosen.export(tmp_path / "blocks", "parquet")
    for path in one_block.glob("*.parquet"):
        assert pq.read_table(blocks / path.name).equals(pq.read_table(path)), path.name
