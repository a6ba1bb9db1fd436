"""Databases that earlier versions of the schema wrote: refused, upgraded, and nothing lost."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from feature_db import SCHEMA_VERSION, FeatureDB, SchemaVersionError
from feature_db.schema import migrate, migrations

from .write_old_database import COMMAND, FOLDER, unpacked, written_by

Rows = list[tuple[object, ...]]
OLDER = range(1, SCHEMA_VERSION)


@pytest.fixture(params=OLDER, ids=lambda version: f"v{version}")
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A database as an earlier version left it."""
    return unpacked(request.param, tmp_path / "old.duckdb")


def rows_of(connection: duckdb.DuckDBPyConnection) -> dict[str, Rows]:
    """All rows of all tables but `meta`, in order."""
    names = connection.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database() "
        "ORDER BY ALL"
    ).fetchall()
    return {
        name: connection.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall()
        for (name,) in names
        if name != "meta"
    }


def columns_of(connection: duckdb.DuckDBPyConnection) -> Rows:
    return connection.execute(
        "SELECT table_name, column_index, column_name, data_type, is_nullable, column_default "
        "FROM duckdb_columns() WHERE NOT internal ORDER BY ALL"
    ).fetchall()


def keys_of(connection: duckdb.DuckDBPyConnection) -> Rows:
    return connection.execute(
        "SELECT table_name, constraint_type, constraint_column_names FROM duckdb_constraints() "
        "ORDER BY ALL"
    ).fetchall()


def read_raw(path: Path) -> dict[str, Rows]:
    """All rows, but `words`, which are made of the others, and were again for schema 4; contexts in
    the columns of schema 1, of which `tokens` were left out later."""
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = rows_of(connection)
        names = {
            row[0]
            for row in connection.execute(
                "SELECT column_name FROM duckdb_columns() WHERE table_name = 'contexts'"
            ).fetchall()
        }
        tokens = "tokens" if "tokens" in names else "tokens_of(token_ids)"
        rows["contexts"] = connection.execute(
            "SELECT sae_id, feature_id, kind, rank, quantile, doc_id, position, act, token, peak, "
            f"text, token_ids, {tokens}, acts FROM contexts ORDER BY ALL"
        ).fetchall()
    return {name: found for name, found in rows.items() if name != "words"}


def new_database(path: Path, rows_from: Path | None = None) -> Path:
    """A database that began at the newest version, with the rows of another one."""
    with duckdb.connect(str(path)) as connection:
        migrate(connection)
        if rows_from:
            connection.execute(f"ATTACH '{rows_from}' AS other (READ_ONLY)")
            for name in rows_of(connection):
                connection.execute(f"INSERT INTO main.{name} BY NAME FROM other.main.{name}")
    return path


def test_the_migrations_are_numbered_without_a_gap() -> None:
    assert [number for number, _ in migrations()] == list(range(1, SCHEMA_VERSION + 1))


@pytest.mark.parametrize("version", OLDER)
def test_every_earlier_version_has_left_a_database(version: int) -> None:
    assert written_by(version).is_file(), (
        f"{written_by(version)} is missing: check out the last commit of schema version {version}, "
        f"run `{COMMAND}` there, and commit the file"
    )


def test_the_kept_databases_are_small_and_of_the_version_they_say(tmp_path: Path) -> None:
    kept = sorted(FOLDER.iterdir())
    assert {file.name for file in kept} >= {f"v{version}.duckdb.xz" for version in OLDER}
    for file in kept:
        version = int(file.name.removeprefix("v").partition(".")[0])
        assert file.stat().st_size < 100_000, file
        path = unpacked(version, tmp_path / file.stem)
        with duckdb.connect(str(path), read_only=True) as connection:
            found = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'")
            assert found.fetchall() == [(str(version),)]


def test_reading_alone_says_how_to_upgrade_and_changes_nothing(old: Path) -> None:
    before = old.read_bytes()
    with pytest.raises(SchemaVersionError, match=r"read_only=False\) to upgrade") as caught:
        FeatureDB.open(old)
    assert "\n" not in str(caught.value)
    assert old.read_bytes() == before


def test_opening_for_writing_upgrades_and_keeps_every_row(old: Path) -> None:
    before = read_raw(old)
    assert before["features"]
    assert before["contexts"]
    FeatureDB.open(old, read_only=False).close()
    after = read_raw(old)
    for table, rows in before.items():
        width = len(rows[0]) if rows else 0
        assert [row[:width] for row in after[table]] == rows, table
    with FeatureDB.open(old) as db:
        stored = db.sql("SELECT value FROM meta WHERE key = 'schema_version'").fetchall()
        assert stored == [(str(SCHEMA_VERSION),)]


def test_upgraded_has_the_columns_and_keys_of_a_new_database(old: Path, tmp_path: Path) -> None:
    FeatureDB.open(old, read_only=False).close()
    with (
        duckdb.connect(str(old), read_only=True) as upgraded,
        duckdb.connect(str(new_database(tmp_path / "new.duckdb")), read_only=True) as new,
    ):
        assert columns_of(upgraded) == columns_of(new)
        assert keys_of(upgraded) == keys_of(new)


ANSWERS: dict[str, Callable[[FeatureDB], object]] = {
    "feature": lambda db: db.feature(3, sae_id=0),
    "feature of the other SAE": lambda db: db.feature(7, sae_id=1),
    "dead feature": lambda db: db.feature(47, sae_id=0),
    "neighbors": lambda db: db.neighbors(3, sae_id=0, n=5).fetchall(),
    "search": lambda db: db.search("golden gate").fetchall(),
    "SQL": lambda db: db.sql(
        "SELECT name, feature_id, label, contexts.text FROM saes JOIN features USING (sae_id) "
        "JOIN contexts USING (sae_id, feature_id) WHERE rank = 1 ORDER BY ALL"
    ).fetchall(),
}


@pytest.mark.parametrize("asked", ANSWERS)
def test_upgraded_answers_as_a_new_database_with_the_same_rows(
    old: Path, tmp_path: Path, asked: str
) -> None:
    FeatureDB.open(old, read_only=False).close()
    new = new_database(tmp_path / "new.duckdb", rows_from=old)
    with FeatureDB.open(old) as upgraded, FeatureDB.open(new) as made_new:
        answer = ANSWERS[asked](upgraded)
        assert answer
        assert answer == ANSWERS[asked](made_new)


def test_upgraded_can_be_asked_untrusted_sql(old: Path) -> None:
    FeatureDB.open(old, read_only=False).close()
    with FeatureDB.open(old) as db:
        sql = "SELECT feature_id, label, max_act FROM features ORDER BY ALL"
        assert db.sql(sql, untrusted=True).fetchall() == db.sql(sql).fetchall()
