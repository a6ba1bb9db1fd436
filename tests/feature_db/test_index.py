"""What `build_index` writes, against a plain dense computation."""

from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from feature_db import FeatureDB, QueryError, build_index
from sae import Origin

from .conftest import HOOKPOINT, World, random_sae, small_config
from .dense import Dense, dense_index, top_rows

TABLES = {
    "features": "sae_id, feature_id",
    "contexts": "sae_id, feature_id, kind, rank",
    "feature_logits": "sae_id, feature_id, sign, rank",
    "feature_tokens": "sae_id, feature_id, rank",
    "feature_nearby_tokens": "sae_id, feature_id, place, rank",
    "feature_histogram": "sae_id, feature_id, bin",
    "feature_positions": "sae_id, feature_id, bin",
    "feature_documents": "sae_id, feature_id, rank",
    "coactivations": "sae_id, feature_id, rank",
    "neighbors": "sae_id, feature_id, rank",
    "documents": "doc_id",
}


@pytest.fixture(scope="module")
def dense(world: World) -> Dense:
    return dense_index(world.sae, world.cache, HOOKPOINT)


def rows_of(path: Path, where: str = "TRUE") -> dict[str, list[tuple[object, ...]]]:
    with FeatureDB.open(path) as db:
        return {
            table: db.sql(
                f"SELECT * FROM {table} WHERE {where if 'sae_id' in order else 'TRUE'} "
                f"ORDER BY {order}"
            ).fetchall()
            for table, order in TABLES.items()
        }


def assert_same_rows(found: Path, expected: Path, but: Collection[str] = ()) -> None:
    """All tables equal but some; numbers to float32's rounding."""
    for table, rows in rows_of(expected).items():
        if table in but:
            continue
        others = rows_of(found)[table]
        assert len(others) == len(rows), table
        for other, row in zip(others, rows, strict=True):
            for a, b in zip(other, row, strict=True):
                if isinstance(b, float) or (isinstance(b, list) and isinstance(b[0], float)):
                    assert a == pytest.approx(b, rel=1e-4, abs=1e-6), table
                else:
                    assert a == b, table


def test_counts_means_and_maxima_equal_the_dense_ones(db: FeatureDB, dense: Dense) -> None:
    found = db.sql("SELECT * FROM features ORDER BY feature_id").df()
    n_active = (dense.acts > 0).sum(0)
    assert found.n_active.tolist() == n_active.tolist()
    assert found.density.to_numpy() == pytest.approx(n_active / dense.kept.sum())
    alive = n_active > 0
    assert (found.is_dead.to_numpy() == ~alive).all()
    assert 0 < (~alive).sum() < len(alive)
    means = dense.acts.sum(0)[alive] / n_active[alive]
    assert found.mean_act[alive].to_numpy() == pytest.approx(means, rel=1e-4)
    assert found.max_act[alive].to_numpy() == pytest.approx(dense.acts.max(0)[alive], rel=1e-4)
    for feature in np.flatnonzero(alive):
        rows = np.flatnonzero(dense.acts[:, feature])
        acts = dense.acts[rows, feature]
        row = found.iloc[feature]
        assert row.std_act == pytest.approx(acts.std(), rel=1e-3, abs=1e-3)
        assert row.mean_position == pytest.approx(dense.positions[rows].mean(), rel=1e-5)
        assert row.n_documents == len(set(dense.doc_ids[rows].tolist()))
    assert found.mean_act[~alive].isna().all()
    assert found.label[~alive].isna().all()
    assert found.label[alive].notna().all()


def test_rows_left_out_are_counted(world: World, db: FeatureDB, dense: Dense) -> None:
    ((indexed, skipped),) = db.sql("SELECT n_tokens_indexed, n_tokens_skipped FROM saes")
    assert indexed == dense.kept.sum()
    assert indexed + skipped == world.cache.n_tokens
    assert skipped >= 20  # a BOS for every block


def test_rows_outside_the_saes_domain_are_left_out(world: World, tmp_path: Path) -> None:
    sae = random_sae(world.sae.config, 0, world.cache)
    norms = np.concatenate([c.acts.norm(dim=1).numpy() for c in world.cache.chunks(HOOKPOINT)])
    median = float(np.median(norms))
    sae.origin = Origin(hookpoint=HOOKPOINT, max_norm=median)
    path = build_index(world.lm, [sae], world.cache, out=tmp_path / "x", config=small_config())
    with FeatureDB.open(path) as db:
        ((indexed,),) = db.sql("SELECT n_tokens_indexed FROM saes")
    assert indexed == dense_index(sae, world.cache, HOOKPOINT).kept.sum() < 0.6 * len(norms)


def test_histograms_count_every_act_in_its_bin(db: FeatureDB, dense: Dense) -> None:
    off = db.sql(
        "SELECT feature_id FROM features LEFT JOIN (SELECT feature_id, sum(n) AS n FROM "
        "feature_histogram GROUP BY ALL) USING (feature_id) WHERE coalesce(n, 0) <> n_active"
    )
    assert off.fetchall() == []
    for feature, lo, hi, n in db.sql("SELECT feature_id, lo, hi, n FROM feature_histogram"):
        acts = dense.acts[:, feature]
        assert abs(((acts >= lo) & (acts < hi) & (acts > 0)).sum() - n) <= 1  # an act at an edge


def test_top_contexts_are_the_strongest_rows_with_few_of_each_document(
    db: FeatureDB, dense: Dense
) -> None:
    found = db.sql("SELECT * FROM contexts WHERE kind = 'top' ORDER BY feature_id, rank").df()
    assert len(found) > 200
    for feature, contexts in found.groupby("feature_id"):
        rows = top_rows(dense, int(feature), n=6, max_per_document=2)
        assert contexts.doc_id.tolist() == dense.doc_ids[rows].tolist()
        assert contexts.position.tolist() == dense.positions[rows].tolist()
        assert contexts["rank"].tolist() == list(range(1, len(rows) + 1))
        assert contexts.act.to_numpy() == pytest.approx(dense.acts[rows, feature], rel=1e-4)


def test_contexts_hold_the_acts_and_tokens_around_their_peak(
    world: World, db: FeatureDB, dense: Dense
) -> None:
    place = {
        (int(d), int(p)): row
        for row, (d, p) in enumerate(zip(dense.doc_ids, dense.positions, strict=True))
        if p >= 0
    }
    lengths, n_split = set(), 0
    contexts = db.sql("SELECT *, tokens_of(token_ids) AS tokens FROM contexts")
    for c in contexts.arrow().to_pylist():
        row = place[c["doc_id"], c["position"]]
        window = dense.window(row, before=6, after=3)
        lengths.add(len(window))
        assert c["token_ids"] == dense.token_ids[window].tolist()
        assert c["acts"] == pytest.approx(dense.acts[window, c["feature_id"]], rel=1e-4, abs=1e-6)
        assert window[c["peak"]] == row
        assert c["acts"][c["peak"]] == c["act"]
        assert c["act"] > 0 or c["kind"] == "negative"
        assert c["tokens"] == world.lm.token_strings(c["token_ids"])
        assert c["token"] == c["tokens"][c["peak"]]
        joined = "".join(c["tokens"])
        whole = world.lm.tokenizer.decode(c["token_ids"])
        n_split += "<0x" in joined
        assert c["text"] == (whole if "<0x" in joined else joined)
    assert n_split > 0
    assert max(lengths) == 10
    assert min(lengths) < 6  # some are cut at a block's or a document's end


def test_quantile_contexts_have_exact_quantiles_when_all_acts_are_sampled(
    world: World, dense: Dense, tmp_path: Path
) -> None:
    config = small_config(quantile_sample=600, n_quantiles=5, contexts_per_quantile=3)
    path = build_index(world.lm, [world.sae], world.cache, out=tmp_path / "x", config=config)
    with FeatureDB.open(path) as db:
        found = db.sql("SELECT * FROM contexts WHERE kind = 'quantile'").df()
    for feature, contexts in found.groupby("feature_id"):
        acts = np.sort(dense.acts[:, feature][dense.acts[:, feature] > 0])
        expected = acts[(contexts["quantile"].to_numpy() * len(acts)).astype(int)]
        assert contexts.act.to_numpy() == pytest.approx(expected, rel=1e-4)
        parts = (contexts["quantile"] * 5).astype(int)
        assert parts.value_counts().max() <= 3
        if len(acts) >= 30:
            assert parts.value_counts().tolist() == [3] * 5


def test_sampled_quantiles_come_near_the_exact_ones(db: FeatureDB, dense: Dense) -> None:
    errors = []
    for feature, act, quantile in db.sql(
        "SELECT feature_id, act, quantile FROM contexts WHERE kind = 'quantile'"
    ):
        acts = dense.acts[:, feature][dense.acts[:, feature] > 0]
        errors.append(abs((acts < act).mean() - quantile))
    assert len(errors) > 200
    assert np.mean(errors) < 0.05


def test_lift_is_the_smoothed_ratio_of_rates(world: World, db: FeatureDB, dense: Dense) -> None:
    n_rows, n_seen = dense.kept.sum(), 0
    for feature in range(world.sae.d_sae):
        active = dense.acts[:, feature] > 0
        expected = {}
        for token in np.unique(dense.token_ids[active]):
            n_total = ((dense.token_ids == token) & dense.kept).sum()
            n_active = ((dense.token_ids == token) & active).sum()
            density = active.sum() / n_rows
            if n_active >= 2:
                rate = (n_active + 10 * density) / (n_total + 10)
                expected[int(token)] = (rate / density, n_active, n_total)
        found = db.sql(
            "SELECT token_id, lift, n_active, n_total, mean_act FROM feature_tokens "
            "WHERE feature_id = ? ORDER BY rank",
            [feature],
        ).fetchall()
        best = sorted(expected, key=lambda t: (-expected[t][0], t))[:10]
        assert [row[0] for row in found] == best
        for token, *numbers, mean in found:
            assert tuple(numbers) == pytest.approx(expected[token])
            acts = dense.acts[active & (dense.token_ids == token), feature]
            assert mean == pytest.approx(acts.mean(), rel=1e-4)
            n_seen += 1
    assert n_seen > 200


def test_a_token_seen_once_does_not_win_by_lift(db: FeatureDB) -> None:
    assert db.sql("SELECT * FROM feature_tokens WHERE n_active < 2").fetchall() == []


def test_logits_and_neighbors_equal_the_dense_products(world: World, db: FeatureDB) -> None:
    logits = (world.sae.W_dec @ world.lm.logit_matrix()).numpy()
    unit = world.sae.W_dec / world.sae.W_dec.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).numpy()
    for feature in range(world.sae.d_sae):
        for sign in (1, -1):
            found = db.sql(
                "SELECT token_id, logit FROM feature_logits WHERE feature_id = ? AND sign = ? "
                "ORDER BY rank",
                [feature, sign],
            ).df()
            best = np.argsort(-sign * logits[feature])[:10]
            assert found.token_id.tolist() == best.tolist()
            assert found.logit.to_numpy() == pytest.approx(logits[feature, best], rel=1e-4)
        near = db.neighbors(feature, 5).df()
        best = [i for i in np.argsort(-cosines[feature]) if i != feature][:5]
        assert near.neighbor_id.tolist() == best
        assert near.cosine.to_numpy() == pytest.approx(cosines[feature, best], rel=1e-4)


def test_hard_negatives_are_contexts_of_neighbors_without_the_feature(
    world: World, db: FeatureDB, dense: Dense
) -> None:
    place = {
        (int(d), int(p)): row
        for row, (d, p) in enumerate(zip(dense.doc_ids, dense.positions, strict=True))
    }
    near = defaultdict(set)
    for feature, neighbor in db.sql("SELECT feature_id, neighbor_id FROM neighbors"):
        near[feature].add(neighbor)
    found = db.sql("SELECT * FROM contexts WHERE kind = 'negative'").df()
    assert found.feature_id.nunique() > world.sae.d_sae / 2
    for c in found.itertuples():
        window = dense.window(place[c.doc_id, c.position], before=6, after=3)
        assert not dense.acts[window, c.feature_id].any()
        assert dense.acts[place[c.doc_id, c.position], c.neighbor_id] > 0
        assert c.neighbor_id in near[c.feature_id]
    assert (
        found.groupby("feature_id")["rank"]
        .apply(lambda r: list(r) == [*range(1, len(r) + 1)])
        .all()
    )
    kinds = db.sql(
        "SELECT count(*) FROM contexts WHERE (kind = 'negative') = (neighbor_id IS NULL)"
    )
    assert kinds.fetchall() == [(0,)]


@pytest.mark.parametrize("place", [-1, 1])
def test_tokens_beside_the_active_one_are_counted(db: FeatureDB, dense: Dense, place: int) -> None:
    rows = np.flatnonzero(dense.kept)
    windows = [dense.window(row, 1, 1) for row in rows]
    beside = [
        int(dense.token_ids[r + place]) if r + place in w else -1
        for r, w in zip(rows, windows, strict=True)
    ]
    n_on, n_seen = Counter(beside), 0
    for feature, token, n_active, n_total in db.sql(
        "SELECT feature_id, token_id, n_active, n_total FROM feature_nearby_tokens WHERE place = ?",
        [place],
    ):
        active = [t for t, row in zip(beside, rows, strict=True) if dense.acts[row, feature] > 0]
        assert (n_active, n_total) == (active.count(token), n_on[token])
        n_seen += 1
    assert n_seen > 100


def test_positions_and_documents_are_counted(db: FeatureDB, dense: Dense) -> None:
    n_seen = 0
    for feature, lo, hi, n, rate in db.sql(
        "SELECT feature_id, lo, hi, n, rate FROM feature_positions"
    ):
        inside = dense.kept & (dense.positions >= lo) & (dense.positions < hi)
        assert n == (dense.acts[inside, feature] > 0).sum()
        assert rate == pytest.approx(n / inside.sum())
        n_seen += 1
    for feature, doc, n, mean, highest, share in db.sql(
        "SELECT feature_id, doc_id, n_active, mean_act, max_act, share FROM feature_documents"
    ):
        acts = dense.acts[dense.doc_ids == doc, feature]
        assert n == (acts > 0).sum()
        assert mean == pytest.approx(acts.sum() / n, rel=1e-4)
        assert highest == pytest.approx(acts.max(), rel=1e-4)
        assert share == pytest.approx(acts.sum() / dense.acts[:, feature].sum(), rel=1e-4)
        n_seen += 1
    assert n_seen > 200


def test_coactivations_have_the_largest_npmi_of_those_counted(
    world: World, dense: Dense, tmp_path: Path
) -> None:
    config = small_config(part_rows=10**6)
    path = build_index(world.lm, [world.sae], world.cache, out=tmp_path / "x", config=config)
    active = dense.acts > 0
    both, n = active.T.astype(int) @ active, dense.kept.sum()
    n_active = active.sum(0)
    with FeatureDB.open(path) as db:
        found = db.sql("SELECT * FROM coactivations ORDER BY feature_id, rank").df()
    for c in found.itertuples():
        assert c.n_both == both[c.feature_id, c.other_id]
        pmi = np.log(c.n_both * n / (n_active[c.feature_id] * n_active[c.other_id]))
        assert c.npmi == pytest.approx(pmi / -np.log(c.n_both / n))
    assert (found.groupby("feature_id").npmi.diff().dropna() <= 1e-12).all()
    assert found.feature_id.nunique() > world.sae.d_sae / 2


def test_every_activation_is_kept_when_asked(world: World, dense: Dense, tmp_path: Path) -> None:
    config = small_config(keep_activations=True)
    out = tmp_path / "it's.duckdb"
    path = build_index(world.lm, [world.other, world.sae], world.cache, out=out, config=config)
    ask = "SELECT doc_id, position, act FROM activations WHERE sae_id = 1 AND feature_id = ?"
    for external_access in (True, False):
        with FeatureDB.open(path, external_access=external_access) as db:
            for feature in range(world.sae.d_sae):
                rows = np.flatnonzero(dense.acts[:, feature])
                found = db.sql(f"{ask} ORDER BY doc_id, position", [feature]).fetchall()
                places = zip(dense.doc_ids[rows], dense.positions[rows], strict=True)
                assert [row[:2] for row in found] == sorted(places)
                assert sum(r[2] for r in found) == pytest.approx(
                    dense.acts[:, feature].sum(), rel=1e-4
                )
    with FeatureDB.open(path, external_access=False) as db, pytest.raises(QueryError):
        db.sql(f"SELECT * FROM read_text('{__file__}')")


def test_documents_are_written_whole(world: World, db: FeatureDB) -> None:
    found = db.sql("SELECT doc_id, n_tokens, text FROM documents ORDER BY doc_id").fetchall()
    expected = list(world.cache.documents())
    assert [row[:2] for row in found] == [(d.doc_id, len(d.token_ids)) for d in expected]
    assert found[0][2].startswith(world.lm.tokenizer.decode(expected[0].token_ids)[:40])


@pytest.mark.parametrize("chunk_rows", [1, 300, 10**6])
def test_result_does_not_depend_on_chunk_size(
    world: World, tmp_path: Path, chunk_rows: int
) -> None:
    path = build_index(
        world.lm,
        [world.sae],
        world.cache,
        out=tmp_path / "x",
        config=small_config(chunk_rows=chunk_rows),
    )
    assert_same_rows(path, world.path)


@pytest.mark.parametrize("part_rows", [1, 10**6])
def test_result_does_not_depend_on_where_the_text_is_cut(
    world: World, tmp_path: Path, part_rows: int
) -> None:
    config = small_config(part_rows=part_rows, n_negatives=0)
    path = build_index(world.lm, [world.sae], world.cache, out=tmp_path / "x", config=config)
    cuts = len(list((tmp_path / "x.parts").glob("*/*/part.json")))
    assert cuts == (1 if part_rows > 1 else world.cache.n_shards)
    other = build_index(
        world.lm,
        [world.sae],
        world.cache,
        out=tmp_path / "y",
        config=small_config(n_negatives=0),
    )
    assert_same_rows(path, other, but={"coactivations"})  # see uses.companions


def test_building_twice_gives_the_same_rows(world: World, tmp_path: Path) -> None:
    paths = [
        build_index(world.lm, [world.sae], world.cache, out=tmp_path / name, config=small_config())
        for name in "ab"
    ]
    assert rows_of(paths[0]) == rows_of(paths[1])


def test_two_saes_in_one_pass_equal_each_alone(world: World, tmp_path: Path) -> None:
    both, alone = (
        build_index(world.lm, saes, world.cache, out=tmp_path / name, config=small_config())
        for name, saes in (("both", [world.other, world.sae]), ("alone", [world.other]))
    )
    assert rows_of(both, "sae_id = 0") == rows_of(alone)
    without_id = [
        [row[1:] for row in rows_of(path, f"sae_id = {sae_id}")["contexts"]]
        for path, sae_id in ((both, 1), (world.path, 0))
    ]
    assert without_id[0] == without_id[1]


def test_rows_lie_sorted_by_feature_and_rank(db: FeatureDB) -> None:
    for table in ("features", "contexts", "feature_tokens", "neighbors"):
        found = [row[0] for row in db.sql(f"SELECT feature_id FROM {table}")]
        assert found == sorted(found)
