"""All tables as Parquet files in a folder, of chosen features or all, and a manifest of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sae.atomic_files import write_json

from ..schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from ..database import FeatureDB

# `words` are made of the other tables; their examples are places in `contexts`.
_LEFT_OUT = ("meta", "words")


def write_tables(
    db: "FeatureDB",
    folder: Path,
    ids: Sequence[tuple[int, int]],
    on_exported: Callable[[int, int], None],
) -> None:
    """TABLE.parquet (zstd) of every table; manifest.json: schema version, SAEs, rows of each."""
    folder.mkdir()
    tables = db.sql(
        "SELECT table_name, list(column_name) FROM duckdb_columns() "
        "WHERE NOT internal AND table_name IN (SELECT table_name FROM duckdb_tables()) "
        "GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    ((n_features,),) = db.sql("SELECT count(*) FROM features").fetchall()
    is_part, n_rows = len(ids) < n_features, dict[str, int]()
    for table, columns in tables:
        if table in _LEFT_OUT:
            continue
        chosen = ""
        if is_part and "feature_id" in columns:
            pairs = (
                ", ".join(f"({sae_id}, {feature_id})" for sae_id, feature_id in ids) or "(-1, -1)"
            )
            chosen = f"WHERE (sae_id, feature_id) IN ({pairs})"
        elif is_part and "sae_id" in columns:
            saes = ", ".join(str(sae_id) for sae_id in sorted({pair[0] for pair in ids})) or "-1"
            chosen = f"WHERE sae_id IN ({saes})"
        path = str(folder / f"{table}.parquet").replace("'", "''")
        copied = db.sql(
            f"COPY (FROM {table} {chosen}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)"
        ).fetchall()
        n_rows[table] = int(copied[0][0])
    saes_row = db.sql(
        "SELECT sae_id, name, model, hookpoint, weights_hash FROM saes ORDER BY sae_id"
    )
    about = {"schema_version": SCHEMA_VERSION, "saes": saes_row.arrow().to_pylist(), "rows": n_rows}
    write_json(folder / "manifest.json", about)
    on_exported(len(ids), len(ids))
