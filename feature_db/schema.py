"""The schema and its versions: numbered SQL files in, a database of the newest version out."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import duckdb

from .errors import SchemaVersionError
from .words import write_words


def migrations() -> Iterator[tuple[int, str]]:
    """(version, SQL) of every migration, in order; the file's number is its version."""
    folder = files("feature_db") / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    for name in names:
        yield int(name.split("_")[0]), (folder / name).read_text(encoding="utf-8")


SCHEMA_VERSION = max(version for version, _ in migrations())

# The last version that changed the table `words`.
_WORDS_SINCE = 4
# What is asked for are some rows of one feature: small groups, of which most are passed over.
_ROW_GROUP = 16_384


@contextmanager
def new_database(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database of the newest schema, open for writing; closed and whole after the context.

    path: of no file.
    """
    with duckdb.connect() as connection:
        quoted = str(path).replace("'", "''")
        connection.execute(f"ATTACH '{quoted}' AS made (ROW_GROUP_SIZE {_ROW_GROUP})").fetchall()
        connection.execute("USE made").fetchall()
        connection.execute(f"SET temp_directory = '{quoted}.spill'").fetchall()
        migrate(connection)
        yield connection
        connection.execute("CHECKPOINT").fetchall()
        connection.execute("USE memory").fetchall()
        connection.execute("DETACH made").fetchall()


def migrate(connection: duckdb.DuckDBPyConnection, version: int = 0) -> None:
    """Bring a database of schema `version` (0: empty) to `SCHEMA_VERSION`, in one transaction."""
    connection.execute("BEGIN TRANSACTION").fetchall()
    try:
        for number, sql in migrations():
            if number > version:
                for statement in connection.extract_statements(sql):
                    connection.execute(statement).fetchall()
        if 0 < version < _WORDS_SINCE:
            write_words(connection)
        set_meta(connection, "schema_version", str(SCHEMA_VERSION))
        connection.execute("COMMIT").fetchall()
    except BaseException:
        connection.execute("ROLLBACK").fetchall()
        raise


def set_meta(connection: duckdb.DuckDBPyConnection, key: str, value: str) -> None:
    """Write one row of the `meta` table, replacing what it held."""
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [key, value]).fetchall()


def get_meta(connection: duckdb.DuckDBPyConnection, key: str) -> str | None:
    """The value of one row of the `meta` table, or None where there is none."""
    found = connection.execute("SELECT value FROM meta WHERE key = ?", [key]).fetchall()
    return str(found[0][0]) if found else None


def check_version(found: int, path: str, *, may_migrate: bool) -> None:
    """Refuse a database that this code can't read.

    found: the schema_version that the file holds.
    may_migrate: whether an older one may be brought up to date.
    Raises: SchemaVersionError.
    """
    if found > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path} has schema version {found}, newer than version {SCHEMA_VERSION} that this "
            "saebase reads: upgrade with `pip install -U saebase`, or build the index again"
        )
    if found < SCHEMA_VERSION and not may_migrate:
        raise SchemaVersionError(
            f"{path} has schema version {found}, older than version {SCHEMA_VERSION} that this "
            "saebase reads: open it once with FeatureDB.open(path, read_only=False) to upgrade it"
        )
