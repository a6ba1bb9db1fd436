"""Writing rows: a transaction as a context, Arrow rows into a table."""

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import pyarrow as pa


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commit when the context closes; roll back when it closes with an error."""
    connection.execute("BEGIN TRANSACTION").fetchall()
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK").fetchall()
        raise
    connection.execute("COMMIT").fetchall()


@contextmanager
def registered(connection: duckdb.DuckDBPyConnection, rows: pa.Table) -> Iterator[None]:
    """`rows` as the view `incoming` while the context is open; an error's rollback removes it."""
    connection.register("incoming", rows)
    yield
    connection.unregister("incoming")


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Append Arrow rows to a table, columns matched by name."""
    with registered(connection, rows):
        connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming").fetchall()
