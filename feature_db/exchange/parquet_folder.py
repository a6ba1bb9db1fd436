"""Parquet: a folder with one file for each table, and a manifest that names what is in them."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae.atomic_files import fsync, sha256

from ..bucketed.layout import BUCKETED
from .chosen import CHOSEN, DERIVED, Chosen, rows_in_order, table_columns
from .destination import new_folder, write_manifest

FORMAT_VERSION = 1
_BLOCK = 1024
_BLOCK_ROWS = 65_536
_BLOCK_DOCUMENTS = 2048


def write_parquet(chosen: Chosen, out: Path, overwrite: bool) -> None:
    """Every table but `meta`, which goes into the manifest, and `words`, which is made of others.

    Of tables about features: the rows of those chosen; about SAEs: of their SAEs; documents: those
    in which they have contexts, or are strong. Other tables: whole.
    """
    tables = table_columns(chosen.db)
    names = [name for name in tables if name != "meta" and name not in DERIVED]
    written: dict[str, dict[str, Any]] = {}
    with new_folder(out, overwrite=overwrite) as folder:
        for i, name in enumerate(names):
            path = folder / f"{name}.parquet"
            n_rows = 0
            with pq.ParquetWriter(path, _schema(chosen, name), compression="zstd") as writer:
                for rows in _table_rows(chosen, name, tables[name]):
                    writer.write_table(rows)
                    n_rows += rows.num_rows
                    chosen.tell(i, len(names), "tables")
            fsync(path)
            written[name] = {"file": path.name, "n_rows": n_rows, "sha256": sha256(path)}
            chosen.tell(i + 1, len(names), "tables")
        write_manifest(folder, manifest(chosen, "parquet", tables=written))


def manifest(chosen: Chosen, format_name: str, **more: Any) -> dict[str, Any]:
    """What every export that is a folder says of itself."""
    meta = dict(chosen.db.sql("SELECT key, value FROM meta ORDER BY key").fetchall())
    saes = chosen.db.sql(
        "SELECT * REPLACE (created_at::VARCHAR AS created_at) FROM saes ORDER BY sae_id"
    )
    held = set(chosen.sae_ids)
    return {
        "format": format_name,
        "format_version": FORMAT_VERSION,
        "saebase_version": version("saebase"),
        "schema_version": int(meta["schema_version"]),
        "database": chosen.db.name,
        "meta": meta,
        "n_features": len(chosen.ids),
        "is_all": chosen.is_all,
        "saes": [row for row in saes.arrow().to_pylist() if row["sae_id"] in held],
        **more,
    }


def _schema(chosen: Chosen, table: str) -> pa.Schema:
    return chosen.db.sql(f"SELECT * FROM {table} LIMIT 0").arrow().schema


def _table_rows(chosen: Chosen, table: str, columns: dict[str, str]) -> Iterator[pa.Table]:
    """The rows of one table that belong to the export, a block at a time."""
    if not chosen.is_all and "feature_id" in columns:
        for block in chosen.blocks(_BLOCK):
            yield chosen.ask(_OF_FEATURES.format(table=table), block).arrow()
    elif not chosen.is_all and "sae_id" in columns:
        sql = f"SELECT * FROM {table} WHERE sae_id IN (SELECT unnest(?::INTEGER[]))"
        yield chosen.db.sql(sql, [chosen.sae_ids]).arrow()
    elif not chosen.is_all and "doc_id" in columns:
        yield from _documents(chosen, table)
    else:
        yield from _whole(chosen, table, _BLOCK_DOCUMENTS if "doc_id" in columns else _BLOCK_ROWS)


def _whole(chosen: Chosen, table: str, n_rows: int) -> Iterator[pa.Table]:
    """All rows, in their order."""
    if chosen.db.is_bucketed and table in BUCKETED:  # they have no row numbers
        return chosen.db.batches(f"SELECT * FROM {table}")
    return rows_in_order(chosen.db, table, n_rows)


def _documents(chosen: Chosen, table: str) -> Iterator[pa.Table]:
    ids: set[int] = set()
    for block in chosen.blocks(_BLOCK):
        ids |= {doc_id for (doc_id,) in chosen.ask(_DOC_IDS, block)}
    ordered = sorted(ids)
    sql = (
        f"SELECT * FROM {table} WHERE doc_id >= ? AND doc_id <= ? "
        "AND doc_id IN (SELECT unnest(?::BIGINT[])) ORDER BY doc_id"
    )
    for start in range(0, len(ordered), _BLOCK_DOCUMENTS):
        some = ordered[start : start + _BLOCK_DOCUMENTS]
        yield chosen.db.sql(sql, [some[0], some[-1], some]).arrow()


_OF_FEATURES = f"""
WITH {CHOSEN} SELECT t.* FROM {{table}} AS t JOIN chosen USING (sae_id, feature_id)
ORDER BY chosen.place, t.rowid
"""
_DOC_IDS = f"""
WITH {CHOSEN}
SELECT doc_id FROM contexts SEMI JOIN chosen USING (sae_id, feature_id)
UNION SELECT doc_id FROM feature_documents SEMI JOIN chosen USING (sae_id, feature_id)
"""
