"""Buckets where they lie: what is written, what is asked over the network, what can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow.parquet as pq
import pytest

from activation_cache import remote_files
from activation_cache.store import open_store
from feature_db import (
    ExportError,
    ExportProgress,
    FeatureDB,
    FeatureDBError,
    OpenError,
    QueryError,
    SchemaVersionError,
)
from tests.feature_db.bucketed.conftest import small_buckets
from tests.s3_server import KEY, LET_BE, SECRET, Server

pytestmark = [pytest.mark.usefixtures("blocks"), *LET_BE]
TABLES_OF_A_PAGE = 7


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Buckets to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_buckets(monkeypatch)


def told(call: Callable[[], object], kind: type[Exception] = OpenError) -> str:
    """What an error says: one line without a secret."""
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    assert SECRET not in message
    assert KEY not in message
    return message


def opened(place: Path | str) -> Callable[[], FeatureDB]:
    return lambda: FeatureDB.open(place)


# -- writing -------------------------------------------------------------------------------------


def test_an_export_to_s3_is_the_same_as_one_to_a_folder(
    server: Server, bucket: str, one: FeatureDB, folder: Path, small: None
) -> None:
    reports = list[ExportProgress]()
    url = f"s3://{bucket}/some/where"
    one.export(url, "buckets", on_progress=reports.append)
    assert reports[-1].n_done == reports[-1].n_total
    written = {k.removeprefix("some/where/"): v for k, v in server.objects(bucket).items()}
    local = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert written.keys() == local.keys()
    for name in written.keys() - {"features.duckdb", "manifest.json"}:  # a random id is in them
        assert written[name] == local[name], name
    with FeatureDB.open(url) as db, FeatureDB.open(folder) as of_folder:
        assert db.content_hash() == of_folder.content_hash()
        assert db.name == "where"
        assert repr(db) == f"FeatureDB({url!r})"


def test_every_file_is_smaller_and_cut_by_features(folder: Path) -> None:
    listed = pq.read_table(folder / "files.parquet").to_pylist()
    assert {row["name"] for row in listed} == {
        str(path.relative_to(folder)) for path in folder.glob("*/*.parquet")
    }
    for row in listed:
        rows = pq.read_table(folder / row["name"])
        assert rows.num_rows == row["n_rows"]
        if row["sae_id"] is not None:
            ids = rows.column("feature_id").to_pylist()
            assert row["first"] <= min(ids) <= max(ids) <= row["last"]
            assert ids == sorted(ids)
            assert set(rows.column("sae_id").to_pylist()) == {row["sae_id"]}
    contexts = [row for row in listed if row["table"] == "contexts"]
    assert [(row["sae_id"], row["first"]) for row in contexts] == [
        *((0, 0), (0, 16), (0, 32), (1, 0), (1, 16)),
    ]
    assert pq.ParquetFile(folder / contexts[0]["name"]).metadata.num_row_groups > 3


def test_an_export_that_dies_leaves_no_database(
    server: Server, bucket: str, one: FeatureDB, small: None, tmp_path: Path
) -> None:
    def stop(progress: ExportProgress) -> None:
        if progress.n_done == 3:
            raise KeyboardInterrupt

    url = f"s3://{bucket}/db"
    for out in (url, str(tmp_path / "db")):
        with pytest.raises(KeyboardInterrupt):
            one.export(out, "buckets", on_progress=stop)
    assert not (tmp_path / "db").exists()
    assert "db/manifest.json" not in server.objects(bucket) != {}
    assert "db/.lock" not in server.objects(bucket)
    assert told(opened(url)) == (
        f"{url} holds no manifest.json: expected a database exported with --format buckets, to its "
        "end"
    )
    assert "(--overwrite)" in told(lambda: one.export(url, "buckets"), ExportError)
    one.export(url, "buckets", overwrite=True)
    with FeatureDB.open(url) as db:
        assert db.feature(3, 0) == one.feature(3, 0)


def test_overwriting_leaves_nothing_of_before(
    server: Server, bucket: str, one: FeatureDB, db: FeatureDB, small: None, tmp_path: Path
) -> None:
    for out in (f"s3://{bucket}/db", str(tmp_path / "db")):
        one.export(out, "buckets")
        message = told(lambda out=out: db.export(out, "buckets"), ExportError)  # type: ignore[misc]
        assert "overwrite" in message
        db.export(out, "buckets", overwrite=True)
        with FeatureDB.open(out) as opened:
            assert opened.content_hash() == db.content_hash()
            buckets = opened._queries.buckets
            assert buckets is not None
            listed = {file.name for files in buckets.files.values() for file in files}
        if out.startswith("s3"):
            names = {name.removeprefix("db/") for name in server.objects(bucket)}
            assert names == listed | {"manifest.json", "files.parquet", "features.duckdb"}


def test_what_no_export_made_is_never_overwritten(
    server: Server, bucket: str, one: FeatureDB
) -> None:
    server.client.put_object(Bucket=bucket, Key="db/thesis.tex", Body=b"1")
    url = f"s3://{bucket}/db"
    assert told(lambda: one.export(url, "buckets", overwrite=True), ExportError) == (
        f"{url} holds thesis.tex, which no export in buckets made, so it isn't overwritten: choose "
        "another place"
    )
    server.client.put_object(Bucket=bucket, Key="acts/manifest.json", Body=b'{"format": 3}')
    url = f"s3://{bucket}/acts"
    assert "holds manifest.json, which no" in told(
        lambda: one.export(url, "buckets", overwrite=True), ExportError
    )
    assert set(server.objects(bucket)) == {"db/thesis.tex", "acts/manifest.json"}


def test_one_process_writes_to_a_url(server: Server, bucket: str, one: FeatureDB) -> None:
    url = f"s3://{bucket}/db"
    with open_store(url).begin():
        assert "is being written by" in told(lambda: one.export(url, "buckets"), ExportError)


def test_a_part_of_a_database_is_refused(one: FeatureDB, tmp_path: Path) -> None:
    message = told(lambda: one.export(tmp_path / "x", "buckets", features=[(0, 1)]), ExportError)
    assert message.startswith("buckets hold whole databases: leave out --features")


def test_contexts_in_disorder_are_refused(both_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(both_path, tmp_path / "db.duckdb"))
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE other AS FROM contexts ORDER BY feature_id DESC"
        ).fetchall()
        connection.execute("DELETE FROM contexts").fetchall()
        connection.execute("INSERT INTO contexts FROM other").fetchall()
        connection.execute("DROP TABLE other").fetchall()
    with FeatureDB.open(path) as db:
        message = told(lambda: db.export(tmp_path / "x", "buckets"), ExportError)
    assert "aren't in the order of their features (row 0)" in message


def test_a_place_that_cannot_be_written_is_told(one: FeatureDB, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in told(lambda: one.export(tmp_path / "file" / "x", "buckets"), ExportError)
    assert "unknown protocol 's4'" in told(lambda: one.export("s4://a/b", "buckets"), ExportError)


# -- the network ---------------------------------------------------------------------------------


def asked(server: Server) -> list[str]:
    """The requests since the last time, without those that only look."""
    found = [request for request in server.asked if not request.startswith("HEAD")]
    server.asked.clear()
    return found


def test_a_page_asks_for_a_footer_and_a_group_of_each_table_once(server: Server, url: str) -> None:
    with FeatureDB.open(url) as db:
        assert len(asked(server)) == 4  # is it there; manifest; files; the small file
        db.feature(3, 0)
        assert len(asked(server)) == 2 * TABLES_OF_A_PAGE
        db.feature(3, 0)
        assert asked(server) == []
        db.feature(12, 0)  # the same files
        assert 0 < len(asked(server)) <= TABLES_OF_A_PAGE
    with FeatureDB.open(url) as db:
        assert len(asked(server)) == 2
        db.feature(3, 0)
        assert asked(server) == []


def test_a_word_and_a_macro_ask_of_the_files_that_may_hold_it(server: Server, url: str) -> None:
    with FeatureDB.open(url) as db:
        asked(server)
        db.sql("FROM contexts_of(20, 3)")
        requests = asked(server)
        files = {request.rpartition("/")[2] for request in requests}
        assert files == {"0-000000000.parquet", "0-000000016.parquet"}  # of the first its columns
        db.sql("SELECT count(*) FROM words WHERE word = 'golden'")
        n_files = len(db._queries.buckets.files["words"])  # type: ignore[union-attr]
        assert n_files > 4
        files = {request.rpartition("/")[2] for request in asked(server)}
        assert len(files) <= 3  # one for its columns, two that the word may lie in


def test_a_database_that_was_replaced_is_read_anew(
    server: Server, url: str, one: FeatureDB, both_path: Path, tmp_path: Path, small: None
) -> None:
    with FeatureDB.open(url) as db:
        before = db.feature(3, 0)
    changed = Path(shutil.copy(both_path, tmp_path / "db.duckdb"))
    with FeatureDB.open(changed, read_only=False) as db:
        db.label(3, "another label", 0)
        db._queries._connection.execute("UPDATE feature_tokens SET lift = lift + 1").fetchall()
        expected = db.feature(3, 0)
        db.export(url, "buckets", overwrite=True)
    with FeatureDB.open(url) as db:
        assert db.feature(3, 0) == expected != before


def test_what_is_damaged_on_this_machine_is_fetched_again(url: str, blocks: Path) -> None:
    with FeatureDB.open(url) as db:
        expected = db.feature(3, 0)
    for path in blocks.glob("*/*-*"):
        path.write_bytes(bytes(path.stat().st_size))
    with FeatureDB.open(url) as db:
        assert db.feature(3, 0) == expected


def test_faults_that_pass_are_not_noticed(
    server: Server, url: str, one: FeatureDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FeatureDB.open(url) as db:
        server.failing = ("contexts", 2)
        assert db.feature(3, 0) == one.feature(3, 0)
        server.failing = ("words", 2)
        assert db.search("golden").fetchall() == one.search("golden").fetchall()
    assert server.failing[1] == 0


def test_places_out_of_reach_are_told(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no bucket no-such-bucket" in told(opened("s3://no-such-bucket/db"))
    assert "holds no manifest.json" in told(opened(f"{url}/x"))
    assert "unknown protocol 's4'" in told(opened("s4://a/b"))
    with FeatureDB.open(url) as db:
        server.client.delete_object(
            Bucket=url.split("/")[2], Key="db/both/contexts/0-000000000.parquet"
        )
        message = told(lambda: db.feature(3, 0))
        assert message == (
            f"{url}/contexts/0-000000000.parquet is missing: copy it again, or export again"
        )
        assert told(lambda: db.sql("FROM contexts WHERE feature_id = 3")) == message


@pytest.fixture
def in_memory(folder: Path) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder)
            fsspec.filesystem("memory").pipe(f"memory://db/{name}", path.read_bytes())
    return "memory://db"


def test_other_file_systems_will_do(in_memory: str, one: FeatureDB) -> None:
    with FeatureDB.open(in_memory) as db:
        assert db.feature(3, 0) == one.feature(3, 0)
        assert db.sql("FROM contexts").arrow().equals(one.sql("FROM contexts").arrow())


# -- what can be wrong ---------------------------------------------------------------------------


def test_what_is_no_database_is_told(tmp_path: Path, one: FeatureDB) -> None:
    (tmp_path / "empty").mkdir()
    assert told(opened(tmp_path / "empty")) == (
        f"{tmp_path}/empty is a folder: expected a feature database, such as `saebase index` "
        "makes, or a folder that one was exported to with --format buckets"
    )
    one.export(tmp_path / "parquet", "parquet")
    assert "is an export as 'parquet': expected a feature database" in told(
        opened(tmp_path / "parquet")
    )
    for text in ("", "[]", "{}", '{"format": 3}'):
        (tmp_path / "empty" / "manifest.json").write_text(text)
        assert "is damaged, or of something else" in told(opened(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format_version": 2}, "layout version 2, newer than version 1"),
        ({"schema_version": 99}, "schema version 99, newer than"),
        ({"schema_version": 3}, "schema version 3, older than"),
    ],
)
def test_other_versions_are_told(copy: Path, change: dict[str, int], says: str) -> None:
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    assert says in told(opened(copy), SchemaVersionError)


def test_a_manifest_without_its_hashes_is_damaged(copy: Path) -> None:
    manifest = copy / "manifest.json"
    said = json.loads(manifest.read_text())
    del said["small"]["sha256"]
    manifest.write_text(json.dumps(said))
    assert "is damaged (small.sha256: Field required)" in told(opened(copy))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["features.duckdb", "files.parquet"])
@pytest.mark.parametrize("remote", [False, True])
def test_files_that_are_not_the_manifest_s_are_told(
    copy: Path, name: str, remote: bool, server: Server, url: str
) -> None:
    _flip(copy / name, 1000)
    place = str(copy)
    if remote:
        server.client.put_object(
            Bucket=url.split("/")[2], Key=f"db/both/{name}", Body=(copy / name).read_bytes()
        )
        place = url
    assert told(opened(place)) == (
        f"{place}/{name} is damaged (its sha256 isn't the manifest's): copy it again, or export "
        "again"
    )
    if not remote:
        (copy / name).unlink()
        assert f"{name} is missing: copy it again" in told(opened(place))


def test_a_missing_bucket_is_told(copy: Path) -> None:
    (copy / "contexts" / "0-000000000.parquet").unlink()
    with FeatureDB.open(copy) as db:
        db.feature(40, 0)
        message = told(lambda: db.feature(3, 0))
        assert message == (
            f"{copy}/contexts/0-000000000.parquet is missing: copy it again, or export again"
        )
        message = told(lambda: db.sql("FROM contexts"), FeatureDBError)
        assert "contexts/0-000000000.parquet" in message
        assert "export again" in message
        message = told(lambda: db.sql("FROM contexts", untrusted=True), QueryError)
        assert "contexts/0-000000000.parquet" in message
        assert "export again" in message


def test_a_later_missing_bucket_is_told_by_sql(copy: Path) -> None:
    (copy / "contexts" / "0-000000032.parquet").unlink()
    with FeatureDB.open(copy) as db:
        assert len(db.sql("FROM contexts_of(3, 3)")) == 3
        message = told(lambda: db.sql("FROM contexts_of(40, 3)"), QueryError)
    assert "contexts/0-000000032.parquet" in message
    assert "copy it again, or export again" in message


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_torn_bucket_is_told(copy: Path, kept: float) -> None:
    path = copy / "feature_tokens" / "0-000000000.parquet"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with FeatureDB.open(copy) as db:
        message = told(lambda: db.feature(3, 0))
        assert message.startswith(f"{path} is damaged (its end is missing)")
        assert "export again" in told(lambda: db.sql("FROM token_lift(' the')"), FeatureDBError)


def test_a_flipped_bit_is_told(copy: Path) -> None:
    path = copy / "feature_tokens" / "0-000000000.parquet"
    lift = pq.ParquetFile(path).metadata.row_group(1).column(8)
    assert lift.path_in_schema == "lift"
    begin = lift.dictionary_page_offset or lift.data_page_offset
    _flip(path, begin + lift.total_compressed_size - 3)
    with FeatureDB.open(copy) as db:
        message = told(lambda: db.pages([(0, 3), (0, 4), (0, 5)]).__next__())
        assert message.startswith(f"{path} is damaged (")
        message = told(lambda: db.sql("SELECT * FROM feature_tokens"), QueryError)
        assert "export again" in message


def test_buckets_are_not_written(copy: Path, url: str, world: Any) -> None:
    for place in (str(copy), url):
        message = told(lambda place=place: FeatureDB.open(place, read_only=False))  # type: ignore[misc]
        assert message == (
            f"{place} is in buckets, which can't be written: write to the database that it was "
            "exported from, and export again"
        )
        with FeatureDB.open(place) as db:
            assert "export again" in told(lambda db=db: db.label(3, "x", 0))  # type: ignore[misc]


def test_the_small_file_alone_says_what_it_lacks(folder: Path) -> None:
    with FeatureDB.open(folder / "features.duckdb") as db:
        assert db.sql("SELECT count(*) FROM features").fetchall() == [(68,)]
        for query in (
            "SELECT count(*) FROM contexts",
            "FROM contexts_of(3, 2)",
            "FROM features JOIN contexts USING (sae_id, feature_id)",
        ):
            message = told(lambda query=query: db.sql(query), QueryError)  # type: ignore[misc]
            assert "contexts lies in buckets beside this file: open their folder or URL" in message
