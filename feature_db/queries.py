"""Queries: an open database file, and the buckets beside it, asked in SQL.

In: a path, then SQL. Out: Arrow or rows; DuckDB's errors in one line of ours.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from .activations import activations_view
from .bucketed import Buckets, Some, is_bucketed, is_url, unwritable
from .errors import OpenError, QueryError
from .indexing.parts import parts_folder
from .opening import connected, one_line, require_file, version_of
from .schema import check_version, migrate
from .token_text import visible
from .transactions import transaction
from .untrusted import Params, SqlLimits, run_untrusted


class Queries:
    """What an open database is asked with. path: the file, or the folder or URL of buckets.

    buckets: what lies beside the file. threads: for what is asked side by side.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        path: Path | str,
        activations: str | None,
        buckets: Buckets | None,
    ) -> None:
        """activations: SQL that makes the view of that name, which each cursor needs anew."""
        self._connection, self._activations = connection, activations
        self.path, self.buckets = path, buckets
        self.threads = buckets.threads if buckets else ThreadPoolExecutor(1, "feature-db")

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool, external_access: bool) -> "Queries":
        """As `FeatureDB.open`."""
        buckets = Buckets.open(path, read_only=read_only) if is_bucketed(path) else None
        file = buckets.small if buckets else Path(path)
        require_file(file)
        connection = connected(file, read_only)
        try:
            version = version_of(connection, file)
            check_version(version, str(path), may_migrate=not read_only)
            if not read_only:
                migrate(connection, version)
            view = None if buckets else activations_view(connection, file)
            if not external_access:
                if view:
                    connection.execute("SET allowed_directories = [?]", [f"{parts_folder(file)}/"])
                connection.execute("SET enable_external_access = false")
                connection.execute("SET lock_configuration = true")
        except BaseException:
            connection.close()
            raise
        shown = buckets.root if buckets and is_url(path) else Path(path)
        return cls(connection, shown, view, buckets)

    def close(self) -> None:
        """Close the database."""
        self.threads.shutdown()
        self._connection.close()

    def arrow(
        self, query: str, params: Params | None = None, about: Some | None = None
    ) -> pa.Table:
        """The rows of a query. about: as `asking`."""
        with self.asking(query, about) as cursor:
            relation = cursor.sql(query, params=params)
            return pa.table({}) if relation is None else relation.to_arrow_table()

    @contextmanager
    def asking(self, query: str, about: Some | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that has the tables that a query names. about: of these rows alone, where that
        saves reading. Raises: QueryError; OpenError for buckets that can't be read."""
        try:
            with self._connection.cursor() as cursor:
                if self.buckets:
                    self.buckets.attach(cursor, query, about)
                elif self._activations and "activations" in query.lower():
                    cursor.execute(self._activations).fetchall()
                yield cursor
        except duckdb.Error as error:
            raise QueryError(self._explained(str(error))) from None

    def untrusted(self, query: str, params: Params | None, limits: SqlLimits) -> pa.Table:
        """The rows of a stranger's query. Raises: as `run_untrusted`, with the file's name."""
        try:
            self._connection.cursor().close()  # closed, this says so as it does for other SQL
            if self.buckets is None:
                return run_untrusted(Path(self.path), query, params, limits)
            named = self.buckets.for_strangers(self._connection, query)
            return run_untrusted(self.buckets.small, query, params, limits, named)
        except (duckdb.Error, QueryError) as error:
            kind = type(error) if isinstance(error, QueryError) else QueryError
            raise kind(visible(self._explained(str(error)))) from None

    @contextmanager
    def writing(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction. Raises: OpenError if the database is read-only; QueryError."""
        try:
            with transaction(self._connection):
                yield self._connection
        except duckdb.Error as error:
            if "read-only" in str(error) and self.buckets:
                raise unwritable(self.path) from None
            if "read-only" in str(error):
                raise OpenError(
                    f"{self.path} is open for reading alone: to write labels, "
                    "FeatureDB.open(path, read_only=False)"
                ) from None
            raise QueryError(self._explained(str(error))) from None

    def rows(self, query: str, params: Params | None = None) -> list[dict[str, Any]]:
        """Few rows, in less time than by way of Arrow."""
        with self.asking(query, Some.of(params)) as cursor:
            found = cursor.execute(query, params)
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def _explained(self, message: str) -> str:
        """DuckDB's message in one line; where a table is unknown, with those that there are."""
        message = one_line(message)
        if self.buckets:
            message = self.buckets.explained(message)
        if not re.search(r"Table with name .* does not exist", message):
            return message
        return f"{message}; the tables are {', '.join(self.tables())}"

    def tables(self) -> list[str]:
        """The names of the tables, in order."""
        found = self.rows(
            "SELECT DISTINCT table_name FROM duckdb_columns() "
            "WHERE NOT internal AND database_name = current_database() ORDER BY table_name"
        )
        return [row["table_name"] for row in found]
