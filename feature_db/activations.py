"""Every activation, where it was kept: Parquet files in the database's parts, read as one view.

    build_index(..., config=IndexConfig(keep_activations=True))
    db.sql("SELECT doc_id, position, act FROM activations WHERE feature_id = 4021")

The files are sorted by feature, so that one feature's activations are read alone.
"""

from pathlib import Path

import duckdb

from .indexing.parts import parts_folder

# Measured on real codes: feature, document, position and act after compression.
BYTES_AN_ACTIVATION = 8


def activations_view(connection: duckdb.DuckDBPyConnection, path: Path) -> str | None:
    """SQL that makes the temporary view `activations`; None where none were kept.

    path: of the database that `connection` is open on.
    """
    saes = connection.execute(
        "SELECT sae_id, weights_hash, n_tokens_indexed + n_tokens_skipped FROM saes ORDER BY ALL"
    ).fetchall()
    selects = []
    for sae_id, weights_hash, n_rows in saes:
        if files := _files(path, weights_hash, n_rows):
            names = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
            selects.append(f"SELECT {sae_id} AS sae_id, * FROM read_parquet([{names}])")
    return f"CREATE TEMP VIEW activations AS {' UNION ALL '.join(selects)}" if selects else None


def _files(path: Path, weights_hash: str, n_rows: int) -> list[Path]:
    """Of the parts that lie within the first n_rows rows, in the order of the text."""
    found = sorted(parts_folder(path).glob(f"*/{weights_hash}/activations.parquet"))
    return [file for file in found if int(file.parent.parent.name.partition("-")[2]) <= n_rows]
