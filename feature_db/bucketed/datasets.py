"""The files of a bucketed database as datasets of pyarrow, which DuckDB scans as it scans tables.

A dataset knows between which features or words each file lies, so that a query with
`feature_id = 4021` opens one file and reads one group of it; DuckDB's own reader opens them all.

Nothing of ours is imported: the process of untrusted SQL loads this module by its path.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

if TYPE_CHECKING:
    import duckdb

Files = Mapping[str, "Sequence[BucketFile]"]
FILES_SCHEMA = pa.schema(
    {
        "table": pa.string(),
        "name": pa.string(),
        "n_rows": pa.int64(),
        "n_bytes": pa.int64(),
        "footer_bytes": pa.int64(),
        "sae_id": pa.int32(),
        "first": pa.int64(),
        "last": pa.int64(),
        "first_word": pa.string(),
        "last_word": pa.string(),
    }
)


class BucketFile(NamedTuple):
    """One Parquet file. name: relative to the database.

    n_bytes, footer_bytes: of all of it, and of its footer with length and magic number. sae_id,
    first, last: between which feature_id its rows lie, both included; of `documents`, doc_id.
    first_word, last_word: likewise, of `words`.
    """

    table: str
    name: str
    n_rows: int
    n_bytes: int
    footer_bytes: int
    sae_id: int | None = None
    first: int | None = None
    last: int | None = None
    first_word: str | None = None
    last_word: str | None = None


def files_by_table(rows: pa.Table) -> dict[str, list[BucketFile]]:
    """What `files.parquet` holds, by table, in its order. Raises: KeyError, pa.ArrowException."""
    columns = rows.select(FILES_SCHEMA.names).cast(FILES_SCHEMA).columns
    files: dict[str, list[BucketFile]] = {}
    for values in zip(*(column.to_pylist() for column in columns), strict=True):
        file = BucketFile(*values)
        files.setdefault(file.table, []).append(file)
    return files


def dataset(
    files: Sequence[BucketFile], source: Callable[[BucketFile], str | pa.NativeFile], schema: Any
) -> ds.FileSystemDataset:
    """The files of one table. source: a path on this machine, or the file opened."""
    checked = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    parquet = ds.ParquetFileFormat(default_fragment_scan_options=checked)
    fragments = []
    for file in files:
        opened = source(file)
        here = LocalFileSystem() if isinstance(opened, str) else None
        fragments.append(
            parquet.make_fragment(
                opened, here, partition_expression=_bounds(file), file_size=file.n_bytes
            )
        )
    return ds.FileSystemDataset(fragments, schema, parquet, LocalFileSystem())


def tables_of(query: str, tables: Iterable[str], macros: Mapping[str, str]) -> list[str]:
    """Those tables that a query may name, by itself or in a macro. macros: name -> definition."""
    said = query.lower()
    used = [text for name, text in macros.items() if re.search(rf"\b{re.escape(name)}\b", said)]
    text = " ".join([said, *used]).lower()
    return [table for table in tables if table in text]


def make_empty(
    connection: "duckdb.DuckDBPyConnection", table: str, *, is_numbered: bool = False
) -> None:
    """Make an empty temporary table with the columns of the view of that name.

    is_numbered: with another column, `rowid`, as tables have one that isn't seen.
    """
    found = connection.execute(
        "SELECT column_name, data_type FROM duckdb_columns() "
        "WHERE table_name = ? AND database_name = current_database() ORDER BY column_index",
        [table],
    ).fetchall()
    found += [("rowid", "BIGINT")] if is_numbered else []
    columns = ", ".join(f'"{name}" {kind}' for name, kind in found)
    connection.execute(f"CREATE TEMP TABLE {table} ({columns})").fetchall()


def _bounds(file: BucketFile) -> ds.Expression:
    """What holds for every row of a file."""
    if file.first_word is not None:
        return (ds.field("word") >= file.first_word) & (ds.field("word") <= file.last_word)
    if file.sae_id is None:
        return (ds.field("doc_id") >= file.first) & (ds.field("doc_id") <= file.last)
    of_sae = ds.field("sae_id") == pa.scalar(file.sae_id, pa.int32())
    first, last = (pa.scalar(bound, pa.int32()) for bound in (file.first, file.last))
    return of_sae & (ds.field("feature_id") >= first) & (ds.field("feature_id") <= last)
