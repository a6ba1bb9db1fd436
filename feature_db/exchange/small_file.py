"""The small file of a bucketed database: its tables that aren't in buckets, and all macros.

In the place of each table in buckets stands a view of the same columns, so that `SHOW TABLES` and
`DESCRIBE` say what they say of any database. It can't be read: who opens the file alone is told.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from ..bucketed.layout import BUCKETED
from ..schema import new_database
from ..transactions import insert
from .chosen import rows_in_order, table_columns

if TYPE_CHECKING:
    from ..database import FeatureDB

_ROWS_AT_ONCE = 65_536


def write_small(db: "FeatureDB", path: Path) -> None:
    """Write it. path: of no file."""
    tables = table_columns(db)
    with new_database(path) as small:
        for table in tables:
            if table not in BUCKETED:
                _copy(db, small, table)
        for table in BUCKETED:
            _run(small, f"DROP TABLE {table}")
            _run(small, f"CREATE VIEW {table} AS {_unreadable(table, tables[table])}")


def _copy(db: "FeatureDB", small: duckdb.DuckDBPyConnection, table: str) -> None:
    _run(small, f"DELETE FROM {table}")  # a new database says its schema's version already
    for rows in rows_in_order(db, table, _ROWS_AT_ONCE):
        insert(small, table, rows)


def _unreadable(table: str, columns: dict[str, str]) -> str:
    """SQL: a table's columns, which can't be read."""
    told = (
        f"error('{table} lies in buckets beside this file: open their folder or URL with "
        f"FeatureDB, and call the table {table}')"
    )
    values = ", ".join(f'{told}::{kind} AS "{name}"' for name, kind in columns.items())
    return f"SELECT {values} WHERE {told}::BOOLEAN"


def _run(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    connection.execute(sql).fetchall()
