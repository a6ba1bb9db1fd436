"""What a database answers doesn't depend on where its tables lie: one file, a folder, or S3."""

import subprocess
import sys
from pathlib import Path

import pytest

from feature_db import (
    ExportError,
    FeatureDB,
    NotFoundError,
    QueryError,
    QueryLimitError,
    SqlLimits,
    untrusted,
)
from feature_db.exchange import FORMATS
from sae import SAE
from tests.feature_db.bucketed.conftest import small_buckets
from tests.feature_db.conftest import World
from tests.s3_server import LET_BE

pytestmark = LET_BE
QUERIES = [
    "SELECT count(*), sum(act), max(rank), count(DISTINCT text) FROM contexts",
    "FROM contexts",
    "FROM words WHERE word = 'golden' ORDER BY ALL",
    "SELECT word, count(*) FROM words GROUP BY ALL ORDER BY ALL",
    "FROM documents",
    "FROM feature_tokens WHERE sae_id = 1 AND feature_id IN (3, 17)",
    "SELECT f.label, c.text FROM features f JOIN contexts c USING (sae_id, feature_id) "
    "WHERE f.label LIKE '%golden%' ORDER BY ALL",
    "FROM contexts_of(7, 3)",
    "FROM contexts_of(19, 3, sae := 1)",
    "FROM neighbors(7, 4)",
    "FROM similar_to(0, 5)",
    "FROM token_lift(' the')",
    "FROM active_on(' the')",
    "FROM overlap(3, 4)",
    "FROM quantile(5, 0.5)",
    "SELECT feature_id, act FROM features, LATERAL (FROM quantile(feature_id, 0.5)) "
    "WHERE sae_id = 0 ORDER BY ALL",
    "SELECT source, n.text FROM contexts AS n JOIN documents USING (doc_id) WHERE feature_id = 12 "
    "ORDER BY ALL",
    "SELECT * FROM main.feature_positions WHERE feature_id BETWEEN 14 AND 17",
    'FROM CoActivations WHERE "feature_id" = 3',
    "FROM query_table('neighbors') WHERE feature_id = 2",
    "SELECT * FROM contexts WHERE feature_id = 47 AND sae_id = 0",
    "DESCRIBE contexts",
    "SHOW TABLES",
    "FROM vocabulary",
]


@pytest.mark.parametrize("query", QUERIES)
def test_sql_gives_the_same_rows_and_types(one: FeatureDB, folder: Path, query: str) -> None:
    expected = one.sql(query).arrow()
    with FeatureDB.open(folder, external_access=False) as db:
        found = db.sql(query).arrow()
    if not query.startswith("DESCRIBE"):  # views tell no NOT NULL
        assert found.equals(expected)
    assert found.column_names == expected.column_names
    assert found.num_rows == expected.num_rows


def test_sql_over_the_network_gives_the_same_rows(one: FeatureDB, url: str) -> None:
    with FeatureDB.open(url, external_access=False) as db:
        for query in QUERIES[:3] + QUERIES[7:13]:
            assert db.sql(query).arrow().equals(one.sql(query).arrow())


def test_every_page_is_the_same(one: FeatureDB, buckets: FeatureDB) -> None:
    ids = one.sql("SELECT sae_id, feature_id FROM features ORDER BY hash(feature_id)").fetchall()
    assert list(buckets.pages(ids)) == list(one.pages(ids))
    assert buckets.feature(3, 0) == one.feature(3, 0)
    assert buckets.feature(5, 1).tokens == one.feature(5, 1).tokens != ()
    with pytest.raises(NotFoundError, match="no feature 48 in SAE 0 of "):
        buckets.feature(48, 0)


@pytest.mark.parametrize(
    "text", ["golden", "the", "golden gate", "judge forgot", "日本", "été", "a zebra", "aardvarks"]
)
def test_search_finds_the_same(one: FeatureDB, buckets: FeatureDB, text: str) -> None:
    found = buckets.search(text).arrow()
    assert found.equals(one.search(text).arrow())
    assert found.num_rows


def test_search_by_expression_and_in_vain_is_the_same(one: FeatureDB, buckets: FeatureDB) -> None:
    for text in ("gold.*gate", "^nothing like this$"):
        expected = one.search(text, regex=True).arrow()
        assert buckets.search(text, regex=True).arrow().equals(expected)
    assert len(buckets.search("xylophone")) == 0


def test_neighbors_sets_and_live_text_are_the_same(
    one: FeatureDB, buckets: FeatureDB, world: World
) -> None:
    for feature_id in (0, 16, 47):
        expected = one.neighbors(feature_id, 5, 0).fetchall()
        assert buckets.neighbors(feature_id, 5, 0).fetchall() == expected
    sql = "SELECT sae_id, feature_id FROM features WHERE label LIKE '%golden%'"
    assert (
        buckets.sql(sql).features().table().fetchall() == one.sql(sql).features().table().fetchall()
    )
    text = "The keeper opened the golden gate"
    found, expected = (db.active(world.lm, world.sae, text) for db in (buckets, one))
    assert repr(found) == repr(expected)
    assert buckets.explanations(3, 0).fetchall() == one.explanations(3, 0).fetchall()


def test_features_found_in_buckets_steer(
    world: World, one: FeatureDB, buckets: FeatureDB, tmp_path: Path
) -> None:
    sae = SAE.load(world.sae.save(tmp_path / "sae"))
    sae.max_act.fill_(1.0)
    sql = "SELECT sae_id, feature_id FROM features WHERE sae_id = 0 AND feature_id IN (3, 7)"
    said = []
    for db in (one, buckets):
        with db.sql(sql).features().steer(world.lm, sae, strength=3):
            said.append(world.lm.generate("The golden", max_new_tokens=8))
    assert said[0] == said[1] != world.lm.generate("The golden", max_new_tokens=8)


@pytest.mark.parametrize(
    "kind", [kind for kind in FORMATS if kind not in ("buckets", "neuronpedia")]
)
@pytest.mark.parametrize("some", [False, True])
def test_exports_are_the_same(
    one: FeatureDB, folder: Path, tmp_path: Path, kind: str, some: bool
) -> None:
    features = [(1, 4), (0, 40), (0, 3), (0, 17)] if some or kind == "html" else None
    made = []
    with FeatureDB.open(folder) as buckets:
        for i, db in enumerate((one, buckets)):
            db.export(tmp_path / str(i), kind, features=features)
            if kind == "parquet":
                files = {path.name: path for path in (tmp_path / str(i)).glob("*.parquet")}
                made.append({name: _rows(path) for name, path in files.items()})
            else:
                text = (tmp_path / str(i)).read_text()
                made.append(text.replace("both.duckdb", "both"))
    assert made[0] == made[1]


def _rows(path: Path) -> list[dict[str, object]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, object]] = pq.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize(("n_features", "n_rows"), [(1, 1000), (7, 60), (16, 500), (4096, 10_000)])
def test_nothing_is_lost_whatever_the_size_of_buckets(
    world: World, db: FeatureDB, tmp_path: Path, n_features: int, n_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_buckets(patch, n_features, n_rows)
        db.export(tmp_path / "buckets", "buckets")
    with FeatureDB.open(tmp_path / "buckets") as buckets:
        assert buckets.content_hash() == db.content_hash()
        assert buckets.feature(5) == db.feature(5)
        assert buckets.search("judge").fetchall() == db.search("judge").fetchall()


def test_untrusted_sql_reads_the_folder_and_nothing_else(one: FeatureDB, folder: Path) -> None:
    with FeatureDB.open(folder) as db:
        for query in QUERIES[:2] + QUERIES[6:9] + QUERIES[21:]:
            if not query.startswith("DESCRIBE"):
                assert db.sql(query, untrusted=True).arrow().equals(one.sql(query).arrow())
        for query in (
            "FROM read_text('/etc/hostname')",
            "FROM read_parquet('files.parquet')",
            "FROM contexts, read_blob('manifest.json')",
        ):
            with pytest.raises(QueryError, match=r"disabled|does not exist"):
                db.sql(query, untrusted=True)


def test_untrusted_sql_over_buckets_has_limits(folder: Path) -> None:
    endless = "SELECT sum(a.act * b.act * c.act) FROM contexts a, contexts b, contexts c"
    with FeatureDB.open(folder) as db:
        with pytest.raises(QueryLimitError, match=r"stopped after 0.5 s"):
            db.sql(endless, untrusted=True, limits=SqlLimits(time_s=0.5))
        with pytest.raises(QueryLimitError, match=r"larger than 0.0001 MB"):
            db.sql("FROM contexts", untrusted=True, limits=SqlLimits(result_bytes=100))


_THREADS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import untrusted_child as child
child._import_libraries()
request = child.Request("features.duckdb", "", False, ["contexts", "words"], 10**9, 10, 10**9)
connection = child._opened(request)
child._attach(connection, request.buckets)
before = os.listdir("/proc/self/task")
for query in ("FROM contexts", "SELECT count(DISTINCT word) FROM words", "FROM contexts_of(3, 2)"):
    child._encoded(connection.sql(query), 10**9)
sys.exit(os.listdir("/proc/self/task") != before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_behind_its_locks_untrusted_sql_needs_no_new_thread(folder: Path) -> None:
    """The kernel would refuse one, but not to root, as whom tests may run."""
    package = Path(untrusted.__file__).parent
    subprocess.run([sys.executable, "-c", _THREADS, package], cwd=folder, check=True, timeout=60)


def test_untrusted_sql_of_a_url_is_refused(url: str) -> None:
    with FeatureDB.open(url) as db, pytest.raises(Exception, match="reads no network") as raised:
        db.sql("SELECT 1", untrusted=True)
    assert "copy it to a folder" in str(raised.value)


def test_errors_of_sql_are_those_of_any_database(buckets: FeatureDB) -> None:
    with pytest.raises(QueryError, match="the tables are coactivations, contexts, documents"):
        buckets.sql("FROM nothing")
    with pytest.raises(QueryError, match=r'"nothing" not found'):
        buckets.sql("SELECT nothing FROM contexts")


def test_buckets_of_buckets_are_refused(buckets: FeatureDB, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is in buckets already: copy its files"):
        buckets.export(tmp_path / "more", "buckets")
