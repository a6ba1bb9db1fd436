"""The running merge: any split into chunks keeps the same rows as one sort of everything."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_db.best_rows import BestRows, act_scores, sample_scores
from feature_db.codes import ChunkRows, FeatureEntries, stable_order
from feature_db.totals import N_BINS, bin_edges, histogram_bins

D_SAE, N = 3, 4


def entries_of(acts: np.ndarray, first: int, stop: int) -> tuple[FeatureEntries, ChunkRows]:
    """Rows first to stop of dense acts [rows, D_SAE] as a chunk; documents of 5 rows."""
    features, rows = np.nonzero(acts[first:stop].T)
    numbers = np.arange(first, stop)
    chunk = ChunkRows(
        first,
        numbers % 7,
        numbers // 5,
        numbers % 5,
        np.maximum(numbers // 5 * 5 - first, 0),
        np.minimum(numbers // 5 * 5 + 5, stop) - first,
    )
    return FeatureEntries(features, rows, acts[first:stop].T[features, rows]), chunk


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=60, max_size=60),
    st.lists(st.integers(1, 11), max_size=4),
    st.sampled_from([None, 1, 2]),
)
def test_merged_chunks_keep_the_best_rows(
    values: list[float], cuts: list[int], limit: int | None
) -> None:
    acts = np.array(values, np.float32).reshape(20, D_SAE)
    edges = sorted({0, 20, *cuts})
    best = BestRows(D_SAE, N, before=1, after=1, max_per_document=limit)
    for first, stop in pairwise(edges):
        entries, chunk = entries_of(acts, first, stop)
        best.add(entries, act_scores(entries.acts), chunk)
    found = best.of_features(0, D_SAE)
    for feature in range(D_SAE):
        rows = sorted(np.flatnonzero(acts[:, feature]), key=lambda r: (-acts[r, feature], r))
        documents = [row // 5 for row in rows]
        allowed = [
            row
            for i, row in enumerate(rows)
            if limit is None or documents[:i].count(row // 5) < limit
        ][:N]
        mine = found.features == feature
        assert found.rows[mine].tolist() == allowed
        assert found.acts[mine].tolist() == [acts[row, feature] for row in allowed]
        assert found.doc_ids[mine].tolist() == [row // 5 for row in allowed]
        assert (found.windows[mine][:, 1] == found.acts[mine]).all()


def test_sample_scores_depend_on_seed_feature_and_row_alone() -> None:
    features, rows = np.repeat(np.arange(50), 2000), np.tile(np.arange(2000), 50)
    scores = sample_scores(features, rows, seed=0)
    assert (sample_scores(features[7000:], rows[7000:], seed=0) == scores[7000:]).all()
    assert (sample_scores(features, rows, seed=1) != scores).mean() > 0.99
    assert len(np.unique(scores)) > 0.999 * len(scores)
    assert scores.min() > 0
    assert scores.max() < 1 << 32
    drawn = rows.reshape(50, -1)[
        np.arange(50)[:, None], np.argsort(-scores.reshape(50, -1))[:, :40]
    ]
    assert abs(drawn.mean() - 1000) < 60  # 2,000 draws: standard error 13


@given(st.lists(st.integers(0, 2**40), max_size=200))
def test_stable_order_sorts_stably(values: list[int]) -> None:
    array = np.array(values, np.int64)
    assert (stable_order(array) == np.argsort(array, kind="stable")).all()


@given(st.floats(min_value=2**-30, max_value=2**30, width=32))
def test_every_act_lies_in_its_bin(act: float) -> None:
    (number,) = histogram_bins(np.array([act], np.float32))
    lo, hi = bin_edges()
    assert 0 <= number < N_BINS
    assert lo[number] <= act < hi[number]
