"""FeatureDB: opening, SQL, features, search, neighbours, live text."""

import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from feature_db import (
    SCHEMA_VERSION,
    ActiveFeatures,
    FeatureDB,
    FeatureDBError,
    NotFoundError,
    OpenError,
    QueryError,
    SchemaVersionError,
    build_index,
)
from feature_db.search import word_matches
from feature_db.search_texts import phrase_query, text_matches
from sae import SAE

from .conftest import HOOKPOINT, World, small_config, tiny_lm


@pytest.fixture(scope="module")
def both(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of two SAEs."""
    out = tmp_path_factory.mktemp("both") / "both.duckdb"
    saes = [world.sae, world.other]
    return build_index(world.lm, saes, world.cache, out=out, config=small_config())


def copy_with_version(world: World, folder: Path, version: str) -> Path:
    path = shutil.copy(world.path, folder / "copy.duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "UPDATE meta SET value = ? WHERE key = 'schema_version'", [version]
        ).fetchall()
    return Path(path)


def one_line_error(kind: type[FeatureDBError], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- opening ---------------------------------------------------------------------------------------


def test_missing_file_is_named(tmp_path: Path) -> None:
    message = one_line_error(OpenError, lambda: FeatureDB.open(tmp_path / "no.duckdb"))
    assert "no.duckdb does not exist" in message
    assert "saebase index" in message


def test_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in one_line_error(OpenError, lambda: FeatureDB.open(tmp_path))


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.duckdb"
    path.write_bytes(b"not a database " * 1000)
    assert "no DuckDB file" in one_line_error(OpenError, lambda: FeatureDB.open(path))


def test_duckdb_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE t (a INTEGER)").fetchall()
    assert "no feature database" in one_line_error(OpenError, lambda: FeatureDB.open(path))


@pytest.mark.parametrize("kept", [0.001, 0.3, 0.9, 0.999])
def test_torn_file_is_refused(world: World, tmp_path: Path, kept: float) -> None:
    whole = world.path.read_bytes()
    path = tmp_path / "torn.duckdb"
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert "torn.duckdb" in one_line_error(OpenError, lambda: FeatureDB.open(path))


def test_newer_version_names_both_versions_and_the_way_out(world: World, tmp_path: Path) -> None:
    path = copy_with_version(world, tmp_path, str(SCHEMA_VERSION + 7))
    for read_only in (True, False):
        message = one_line_error(
            SchemaVersionError, lambda ro=read_only: FeatureDB.open(path, read_only=ro)
        )
        assert f"version {SCHEMA_VERSION + 7}" in message
        assert f"version {SCHEMA_VERSION} " in message
        assert "upgrade" in message


def test_older_version_read_only_says_how_to_upgrade(world: World, tmp_path: Path) -> None:
    path = copy_with_version(world, tmp_path, "0")
    assert "read_only=False" in one_line_error(SchemaVersionError, lambda: FeatureDB.open(path))


def test_read_only_is_the_default_and_refuses_writing(db: FeatureDB) -> None:
    message = one_line_error(QueryError, lambda: db.sql("DELETE FROM features"))
    assert "read-only" in message


def test_opened_for_writing_it_can_be_changed(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copy(world.path, tmp_path / "w.duckdb"))
    with FeatureDB.open(path, read_only=False) as db:
        db.sql("UPDATE features SET label = $label WHERE feature_id = 3", {"label": "mine"})
    with FeatureDB.open(path) as db:
        assert db.feature(3).label == "mine"


def test_closed_database_leaves_results_usable(world: World) -> None:
    with FeatureDB.open(world.path) as db:
        found, page = db.saes(), db.feature(0)
    assert found.df().d_sae.tolist() == [48]
    assert page.feature_id == 0
    one_line_error(QueryError, db.saes)
    one_line_error(QueryError, lambda: db.feature(0))


# -- SQL -------------------------------------------------------------------------------------------


def test_results_come_in_every_form(db: FeatureDB) -> None:
    found = db.sql("SELECT feature_id, label FROM features WHERE feature_id < ? ORDER BY 1", [3])
    assert found.columns == ["feature_id", "label"]
    assert len(found) == 3
    assert [row[0] for row in found] == [0, 1, 2]
    assert found.fetchall() == list(found)
    assert found.df().feature_id.tolist() == [0, 1, 2]
    assert found.pl()["feature_id"].to_list() == [0, 1, 2]
    assert found.arrow().column("feature_id").to_pylist() == [0, 1, 2]
    assert "3 rows" in repr(found)


def test_named_parameters_are_bound(db: FeatureDB) -> None:
    assert db.sql("SELECT $a || $b", {"a": "x", "b": "'; DROP"}).fetchall() == [("x'; DROP",)]


def test_unknown_table_lists_the_tables(db: FeatureDB) -> None:
    message = one_line_error(QueryError, lambda: db.sql("SELECT * FROM feature"))
    assert "the tables are coactivations, contexts, documents, explanations" in message


def test_unknown_column_names_candidates(db: FeatureDB) -> None:
    message = one_line_error(QueryError, lambda: db.sql("SELECT densty FROM features"))
    assert "densty" in message
    assert "density" in message


def test_syntax_error_shows_what_is_near_it(db: FeatureDB) -> None:
    assert 'near "features"' in one_line_error(
        QueryError, lambda: db.sql("SELECT label FORM features WHERE density > 0")
    )


def test_error_while_running_is_one_line(db: FeatureDB) -> None:
    one_line_error(QueryError, lambda: db.sql("SELECT label::INTEGER FROM features"))


def test_error_with_a_place_shows_what_stands_there(db: FeatureDB) -> None:
    message = one_line_error(QueryError, lambda: db.sql("SELECT 'x'::INTEGER AS n"))
    assert message.endswith("near '::INTEGER AS n'")


def test_missing_parameter_is_one_line(db: FeatureDB) -> None:
    one_line_error(QueryError, lambda: db.sql("SELECT ?"))


def test_empty_query_gives_an_empty_result(db: FeatureDB) -> None:
    assert db.sql("-- nothing").fetchall() == []


# -- one feature -----------------------------------------------------------------------------------


def test_feature_holds_everything_the_tables_do(db: FeatureDB) -> None:
    feature = db.feature(3)
    ((density, n_active, label),) = db.sql(
        "SELECT density, n_active, label FROM features WHERE feature_id = 3"
    )
    assert (feature.density, feature.n_active, feature.label) == (density, n_active, label)
    assert (feature.sae_id, feature.hookpoint) == (0, HOOKPOINT)
    assert [c.rank for c in feature.top] == [1, 2, 3, 4, 5, 6]
    assert len(feature.quantiles) == 8
    assert feature.top[0].act == feature.max_act
    assert feature.top[0].tokens[feature.top[0].peak] == feature.top[0].token
    assert sum(b.n for b in feature.histogram) == feature.n_active
    assert len(feature.promoted) == len(feature.suppressed) == 10
    assert feature.promoted[0].logit > 0 > feature.suppressed[0].logit
    assert len(feature.neighbors) == 5
    assert feature.tokens[0].lift >= feature.tokens[-1].lift


def test_unknown_feature_names_the_range(db: FeatureDB) -> None:
    for feature_id in (48, -1):
        message = one_line_error(NotFoundError, lambda i=feature_id: db.feature(i))
        assert f"no feature {feature_id} " in message
        assert "0 to 47" in message


def test_with_several_saes_the_id_must_be_given(both: Path) -> None:
    with FeatureDB.open(both) as db:
        message = one_line_error(NotFoundError, lambda: db.feature(1))
        assert f"0 ({HOOKPOINT}-48), 1 ({HOOKPOINT}-20)" in message
        assert db.feature(1, sae_id=1).sae_id == 1
        assert len(db.neighbors(1, 2, sae_id=1)) == 2
        assert "has no SAE 5" in one_line_error(NotFoundError, lambda: db.feature(1, sae_id=5))


def test_neighbors_are_labelled_and_bounded(db: FeatureDB) -> None:
    found = db.neighbors(3, 2)
    assert found.columns == ["neighbor_id", "cosine", "label", "density"]
    assert len(found) == 2
    assert "n_neighbors=9" in one_line_error(NotFoundError, lambda: db.neighbors(3, 9))
    assert "0 to 47" in one_line_error(NotFoundError, lambda: db.neighbors(99))
    assert "n=0: expected 1" in one_line_error(NotFoundError, lambda: db.neighbors(3, 0))


# -- search ----------------------------------------------------------------------------------------


def test_search_finds_phrases_in_any_case_and_says_where(db: FeatureDB) -> None:
    found = db.search("Golden GATE").df()
    assert len(found) > 3
    assert found.score.is_monotonic_decreasing
    assert found.reason.str.contains("contexts").all()
    assert found.example.str.contains("golden gate").all()


def test_search_ranks_features_that_peak_on_the_word_first(db: FeatureDB) -> None:
    found = db.search("treaty").df()
    best = db.feature(int(found.feature_id[0]))
    assert "treaty" in (best.label or "") or "at the peak" in found.reason[0]


def test_search_matches_beginnings_of_words_alone(db: FeatureDB) -> None:
    assert len(db.search("gold"))
    assert len(db.search("olden")) == 0


def test_search_takes_hostile_text_literally(db: FeatureDB) -> None:
    for text in ("%e%", "g_te", "'; DROP TABLE features; --", r"\E.*", "(gate", "[a-z]", "$1"):
        assert len(db.search(text)) == 0
    assert len(db.search("<b>"))


def test_search_beyond_ascii(db: FeatureDB) -> None:
    assert len(db.search("ÉTÉ"))


def test_search_finds_the_best_where_many_beginnings_count_once() -> None:
    """Nine features hold ten words that begin so; of one, less in sum, the label says it."""
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE words AS SELECT 'car' || i AS word, 'context' AS field, 0 AS sae_id, "
            "f::INTEGER AS feature_id, 1::FLOAT AS weight, NULL::BIGINT AS example "
            "FROM range(10) AS t(i), range(9) AS u(f)"
        )
        connection.execute("INSERT INTO words VALUES ('cart', 'label', 0, 9, 4, NULL)")

        def rows(query: str, params: dict[str, object]) -> list[dict[str, object]]:
            return connection.execute(query, params).df().to_dict("records")

        found = word_matches(rows, "car", limit=2)
    assert [(match.pair, match.score()) for match in found] == [((0, 9), 4.0), ((0, 0), 1.0)]


def test_search_limit_and_empty_text(db: FeatureDB) -> None:
    assert len(db.search("the", limit=2)) == 2
    one_line_error(NotFoundError, lambda: db.search("  "))
    one_line_error(NotFoundError, lambda: db.search("the", limit=0))


# -- live text -------------------------------------------------------------------------------------


def test_active_equals_encoding_the_text(world: World, db: FeatureDB) -> None:
    text = "The golden gate spoke"
    found = db.active(world.lm, world.sae, text, n=3)
    assert isinstance(found, ActiveFeatures)
    captured = world.lm.capture(text, [HOOKPOINT])
    acts = world.sae.encode(captured.acts[HOOKPOINT][0]).numpy()
    assert found.tokens == world.lm.token_strings(captured.token_ids[0])
    frame = found.df()
    for index, rows in frame.groupby("token_index"):
        best = np.argsort(-acts[index])[: len(rows)]
        assert rows.feature_id.tolist() == best.tolist()
        assert rows.act.to_numpy() == pytest.approx(acts[index, best], rel=1e-5)
    assert frame.groupby("token_index").size().max() == 3
    highest = {r[0]: r[1] for r in db.sql("SELECT feature_id, max_act FROM features")}
    fractions = [a / highest[f] for f, a in zip(frame.feature_id, frame.act, strict=True)]
    assert frame.act_fraction.to_numpy() == pytest.approx(fractions)


def test_active_refuses_an_sae_that_is_not_in_the_database(world: World, db: FeatureDB) -> None:
    message = one_line_error(NotFoundError, lambda: db.active(world.lm, world.other, "a"))
    assert f"{HOOKPOINT}-48" in message


def test_active_refuses_another_model(world: World, db: FeatureDB) -> None:
    assert "tiny-0" in one_line_error(NotFoundError, lambda: db.active(tiny_lm(5), world.sae, "a"))


def test_active_takes_the_same_sae_loaded_again(
    world: World, db: FeatureDB, tmp_path: Path
) -> None:
    sae = SAE.load(world.sae.save(tmp_path / "sae"))
    assert len(db.active(world.lm, sae, "The golden gate"))


def test_macros_answer_what_the_tables_hold(db: FeatureDB) -> None:
    (feature, n_active, highest) = db.sql(
        "SELECT feature_id, n_active, max_act FROM features ORDER BY n_active DESC LIMIT 1"
    ).fetchall()[0]
    contexts = db.sql(f"SELECT rank, act FROM contexts_of({feature}, 3)").fetchall()
    assert [rank for rank, _ in contexts] == [1, 2, 3]
    assert contexts[0][1] == highest
    near = db.sql(f"SELECT neighbor_id, cosine FROM neighbors({feature}, 4)").fetchall()
    assert near == [row[:2] for row in db.neighbors(feature, 4)]
    assert db.sql(f"FROM quantile({feature}, 1.0)").fetchall()[0][0] == pytest.approx(highest)
    acts = db.sql("SELECT act FROM range(1, 10) AS q(q), LATERAL (FROM quantile(0, q / 10))")
    assert [row[0] for row in acts] == sorted(row[0] for row in acts)
    ((token, lift),) = db.sql(
        f"SELECT token, lift FROM feature_tokens WHERE feature_id = {feature} AND rank = 1"
    ).fetchall()
    found = db.sql("SELECT feature_id, lift FROM token_lift($token)", {"token": token})
    assert (feature, lift) in found.fetchall()
    shares = db.sql("SELECT feature_id, share FROM active_on($token)", {"token": token}).fetchall()
    assert feature in [row[0] for row in shares]
    assert [row[1] for row in shares] == sorted((row[1] for row in shares), reverse=True)
    ((other, both),) = db.sql(
        f"SELECT other_id, n_both FROM coactivations WHERE feature_id = {feature} AND rank = 1"
    ).fetchall()
    ((one, two, n_both, jaccard, _),) = db.sql(f"FROM overlap({feature}, {other})").fetchall()
    assert (one, n_both) == (n_active, both)
    assert jaccard == pytest.approx(both / (one + two - both))


def test_similar_features_of_another_sae_are_the_nearest(world: World, tmp_path: Path) -> None:
    path = build_index(
        world.lm,
        [world.sae, world.other],
        world.cache,
        out=tmp_path / "two",
        config=small_config(),
    )
    one, other = (torch.nn.functional.normalize(s.W_dec, dim=1) for s in (world.sae, world.other))
    cosines = one @ other.T
    with FeatureDB.open(path) as db:
        for feature in (0, 7):
            found = db.sql(f"SELECT other_sae_id, other_id, cosine FROM similar_to(0, {feature})")
            values, ids = cosines[feature].topk(5)
            assert [row[:2] for row in found] == [(1, int(i)) for i in ids]
            assert [row[2] for row in found] == pytest.approx(values.tolist(), rel=1e-4)
        assert len(db.sql("FROM similar_to(1, 3)")) == 5


def test_a_regular_expression_is_searched_for(db: FeatureDB) -> None:
    found = db.search("k(ee|i)p.r", regex=True)
    assert len(found)
    assert {row[1] for row in found} >= {row[1] for row in db.search("keeper", 3)}
    message = one_line_error(NotFoundError, lambda: db.search("k(", regex=True))
    assert "is no regular expression" in message


def test_search_by_words_finds_what_a_look_at_all_texts_finds(db: FeatureDB) -> None:
    for text, n in (("treaty", 5), ("golden gate", 1), ("judge", 5), ("opened", 5)):
        by_words = db.search(text, 5).fetchall()
        query = phrase_query(text)._replace(words=[])
        of_all = text_matches(db._queries.rows, db.vocabulary(), query, 5)
        scores = [match.score for match in of_all[:n]]
        assert [row[3] for row in by_words[:n]] == pytest.approx(scores)
