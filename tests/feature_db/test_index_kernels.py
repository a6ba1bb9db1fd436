"""The kernels that choose and count, against loops in plain Python."""

from collections import Counter, defaultdict
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_db.indexing import spool
from feature_db.indexing.best_rows import Spans, acts_around, best_entries, sample_scores
from feature_db.indexing.sorting import N_COLUMNS, sort_run
from feature_db.indexing.statistics import (
    N_BINS,
    N_POSITION_BINS,
    Scales,
    bin_edges,
    feature_totals,
    fixed_acts,
    position_bin,
    position_bins,
    position_edges,
    quantiles_in,
)
from feature_db.indexing.uses import companions, document_uses, near_misses, token_uses

D_SAE, N_ROWS = 5, 60


class Entries:
    """Random entries of D_SAE features on N_ROWS rows, documents of 7 rows."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.dense = rng.choice(np.array([0, 0, 0, 0, 0, 0.5, 1, 2], np.float32), (D_SAE, N_ROWS))
        features, rows = np.nonzero(self.dense)
        self.offsets = np.searchsorted(features, np.arange(D_SAE + 1))
        self.features, self.rows = features, rows.astype(np.int32)
        self.acts = self.dense[features, rows]
        self.documents = np.arange(N_ROWS) // 7
        self.tokens = rng.integers(-1, 4, N_ROWS).astype(np.int32)


@pytest.fixture(params=range(3))
def entries(request: pytest.FixtureRequest) -> Entries:
    return Entries(request.param)


def greedy(
    acts: "np.ndarray[tuple[int], np.dtype[np.float32]]", n: int, per_document: int
) -> list[int]:
    """Rows by descending act, the earlier first; at most some of each document of 7 rows."""
    chosen: list[int] = []
    for row in sorted(np.flatnonzero(acts).tolist(), key=lambda r: (-acts[r], r)):
        n_same = sum(other // 7 == row // 7 for other in chosen)
        if len(chosen) < n and (not per_document or n_same < per_document):
            chosen.append(row)
    return chosen


def test_entries_by_feature_keep_their_rows_in_order(entries: Entries) -> None:
    rows, features = np.nonzero(entries.dense.T)
    acts = entries.dense[features, rows]
    offsets = np.empty(D_SAE + 1, np.int64)
    new_rows, new_acts = np.empty(len(rows), np.uint16), np.empty(len(rows), np.float32)
    counts = np.bincount(rows, minlength=N_ROWS)
    sort_run(counts, features.astype(np.int64), acts, offsets, new_rows, new_acts)
    assert offsets.tolist() == entries.offsets.tolist()
    assert new_rows.tolist() == entries.rows.tolist()
    assert new_acts.tolist() == entries.acts.tolist()


def spooled(entries: Entries, folder: Path, edges: tuple[int, ...]) -> spool.EntrySpool:
    """edges: of the chunks."""
    made = spool.EntrySpool(folder, D_SAE)
    for begin, stop in pairwise(edges):
        rows, features = np.nonzero(entries.dense.T[begin:stop])
        acts = entries.dense[features, rows + begin]
        made.add(np.bincount(rows, minlength=stop - begin), features, acts, begin)
    return made


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("run_rows", [1 << 16, 7])
def test_chunks_by_feature_join_into_one_list(
    entries: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, run_rows: int
) -> None:
    """Whatever the chunks, the runs they are cut in, and the features asked for."""
    monkeypatch.setattr(spool, "_RUN_ROWS", run_rows)
    table = np.random.default_rng(1).integers(0, 99, (N_ROWS, N_COLUMNS)).astype(np.int32)
    made = spooled(entries, tmp_path, (0, 20, 21, 21, N_ROWS))
    found, start = made.of_features(first, D_SAE, table), entries.offsets[first]
    assert made.n_active.tolist() == np.diff(entries.offsets).tolist()
    assert found.offsets.tolist() == (entries.offsets[first:] - start).tolist()
    assert found.rows.tolist() == entries.rows[start:].tolist()
    assert found.acts.tolist() == entries.acts[start:].tolist()
    assert found.records.tolist() == table[entries.rows[start:]].tolist()
    by_row = made.by_row()
    features = [np.flatnonzero(column).tolist() for column in entries.dense.T]
    edges = by_row.offsets.tolist()
    assert [by_row.features[a:b].tolist() for a, b in pairwise(edges)] == features


def test_slices_cover_all_features_within_bounds(
    entries: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spooled(entries, tmp_path, (0, N_ROWS))
    for most in (1, int(made.n_active[:2].sum()), 10**6):
        monkeypatch.setattr(spool, "_SLICE_ENTRIES", most)
        for begin, end in ((0, D_SAE), (1, 4)):
            found = list(made.slices(begin, end))
            assert [f for first, stop in found for f in range(first, stop)] == list(
                range(begin, end)
            )
            sizes = [made.n_active[first:stop].sum() for first, stop in found]
            spans = [stop - first for first, stop in found]
            assert all(size <= most or n == 1 for size, n in zip(sizes, spans, strict=True))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=N_ROWS, max_size=N_ROWS),
    st.integers(0, N_ROWS),
    st.sampled_from([0, 1, 2]),
)
def test_best_of_two_parts_are_the_best_of_the_whole(
    values: list[float], cut: int, per_document: int
) -> None:
    acts, n = np.array(values, np.float32), 4

    def best(rows: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> list[int]:
        offsets = np.array([0, len(rows)])
        found = best_entries(offsets, acts[rows], rows // 7, n, per_document)[0]
        return [int(rows[i]) for i in found if i >= 0]

    rows = np.flatnonzero(acts)
    expected = greedy(acts, n, per_document)
    assert best(rows) == expected
    kept = sorted(best(rows[rows < cut]) + best(rows[rows >= cut]))
    assert best(np.array(kept, np.int64)) == expected


def test_sample_scores_depend_on_seed_feature_and_row_alone() -> None:
    offsets, rows = np.arange(51) * 2000, np.tile(np.arange(2000), 50)
    scores = sample_scores(offsets, 0, rows, 0, 0)
    later = sample_scores(offsets[7:] - offsets[7], 7, rows[offsets[7] :] - 5, 5, 0)
    assert (later == scores[offsets[7] :]).all()
    assert (sample_scores(offsets, 0, rows, 0, 1) != scores).mean() > 0.99
    assert len(np.unique(scores)) > 0.999 * len(scores)
    assert scores.min() >= 0
    assert scores.max() < 1 << 32
    drawn = rows[best_entries(offsets, scores, rows, 40, 0)]
    assert abs(drawn.mean() - 1000) < 60  # 2,000 draws: standard error 13


def test_acts_around_are_those_within_reach(entries: Entries) -> None:
    rng = np.random.default_rng(9)
    before, after = (rng.integers(0, 4, N_ROWS).astype(np.int32) for _ in range(2))
    chosen = np.arange(len(entries.rows))
    starts, stops = entries.offsets[entries.features], entries.offsets[entries.features + 1]
    found = acts_around(chosen, starts, stops, entries.rows, entries.acts, Spans(before, after))
    edges = np.cumsum([0, *found.counts])
    for i, (feature, row) in enumerate(zip(entries.features, entries.rows, strict=True)):
        reach = range(row - before[row], min(row + after[row] + 1, N_ROWS))
        expected = [
            (other - row, entries.dense[feature, other])
            for other in reach
            if other >= 0 and other != row and entries.dense[feature, other]
        ]
        mine = slice(edges[i], edges[i + 1])
        assert list(zip(found.steps[mine], found.acts[mine], strict=True)) == expected


def records_of(
    documents: "np.ndarray[Any, Any]",
    positions: "np.ndarray[Any, Any]",
    bins: "np.ndarray[Any, Any]",
) -> "np.ndarray[Any, np.dtype[np.int32]]":
    """Records of which these columns alone matter."""
    columns = [np.full(len(documents), -7)] * 3 + [documents, positions, bins]
    return np.stack(columns, axis=1).astype(np.int32)


def test_totals_equal_those_of_dense_acts(entries: Entries) -> None:
    positions = (np.arange(N_ROWS) % 7).astype(np.int32)
    scales = Scales.of(10.0)
    fixed = fixed_acts(entries.acts, scales.act)
    totals = feature_totals(
        entries.offsets,
        entries.acts,
        fixed,
        records_of(entries.documents, positions, position_bins(positions))[entries.rows],
        scales,
    )
    dense, is_active = entries.dense.astype(np.float64), entries.dense > 0
    assert totals.n_active.tolist() == is_active.sum(1).tolist()
    assert (totals.act_sum / scales.act).tolist() == dense.sum(1).tolist()
    assert (totals.square_sum / scales.square).tolist() == (dense**2).sum(1).tolist()
    assert totals.max_act.tolist() == dense.max(1).tolist()
    assert totals.position_sum.tolist() == (is_active * positions).sum(1).tolist()
    assert totals.histogram.sum(1).tolist() == totals.n_active.tolist()
    for feature in range(D_SAE):
        docs = entries.documents[is_active[feature]]
        assert totals.n_documents[feature] == len(set(docs))
        assert (totals.first_document[feature], totals.last_document[feature]) == (
            docs[0],
            docs[-1],
        )
        by_bin = Counter(position_bin(p) for p in positions[is_active[feature]])
        assert {i: n for i, n in enumerate(totals.positions[feature]) if n} == by_bin


@given(st.floats(min_value=2**-30, max_value=2**30, width=32))
def test_every_act_lies_in_its_bin(act: float) -> None:
    one = np.zeros(1, np.int32)
    totals = feature_totals(
        np.array([0, 1]),
        np.array([act], np.float32),
        one.astype(np.int64),
        records_of(one, one, one),
        Scales.of(1),
    )
    (number,) = np.flatnonzero(totals.histogram[0])
    lo, hi = bin_edges()
    assert 0 <= number < N_BINS
    assert lo[number] <= act < hi[number]


def test_position_bins_are_octaves() -> None:
    lo, hi = position_edges()
    assert len(lo) == len(hi) == N_POSITION_BINS
    for position in (0, 1, 2, 3, 4, 7, 8, 1000, 2**18 - 1, 2**18, 2**30):
        number = position_bin(position)
        assert lo[number] <= position
        assert hi[number] == -1 or position < hi[number]


def test_quantiles_from_a_histogram_come_near_the_exact_ones() -> None:
    acts = np.random.default_rng(0).lognormal(0, 1, 4000).astype(np.float32)
    rows = np.arange(4000, dtype=np.int32)
    totals = feature_totals(
        np.array([0, 4000]),
        acts,
        rows.astype(np.int64),
        records_of(rows, rows, rows % N_POSITION_BINS),
        Scales.of(100.0),
    )
    exact = np.argsort(np.argsort(acts)) / 4000
    found = quantiles_in(totals.histogram, np.zeros(4000, np.int64), acts)
    assert np.abs(found - exact).max() < 0.01


@pytest.mark.parametrize("most", [(2, 1), (100, 3)])
@pytest.mark.parametrize("vocab_size", [4, 200])
def test_token_uses_are_the_most_frequent_pairs(
    entries: Entries, most: tuple[int, int], vocab_size: int
) -> None:
    spread = np.where(entries.tokens < 0, -1, entries.tokens * (vocab_size // 4))
    places = np.stack([spread, np.roll(spread, 1)], axis=1).astype(np.int32)
    fixed = (entries.acts * 2).astype(np.int64)
    found = token_uses(entries.offsets, fixed, places[entries.rows], vocab_size, np.array(most))
    rows = list(zip(*(column.tolist() for column in found), strict=True))
    expected = []
    for feature, place in product(range(D_SAE), range(2)):
        on: dict[int, list[int]] = defaultdict(list)
        for row in np.flatnonzero(entries.dense[feature]).tolist():
            if places[row, place] >= 0:
                on[int(places[row, place])].append(int(entries.dense[feature, row] * 2))
        kept = sorted(on, key=lambda t: (-len(on[t]), t))[: most[place]]
        expected += [(feature, place, t, len(on[t]), sum(on[t])) for t in sorted(kept)]
    assert rows == expected


def test_document_uses_are_those_of_largest_sum(entries: Entries) -> None:
    fixed = (entries.acts * 2).astype(np.int64)
    nothing = np.zeros(N_ROWS)
    records = records_of(entries.documents, nothing, nothing)[entries.rows]
    found = document_uses(entries.offsets, entries.acts, fixed, records, 3)
    for feature in range(D_SAE):
        acts = entries.dense[feature] * 2
        sums = {d: acts[entries.documents == d] for d in set(entries.documents.tolist())}
        order = sorted((d for d in sums if sums[d].any()), key=lambda d: (-sums[d].sum(), d))[:3]
        n = len(order)
        assert found.documents[feature, :n].tolist() == order
        assert found.act_sums[feature, :n].tolist() == [sums[d].sum() for d in order]
        assert found.n_active[feature, :n].tolist() == [(sums[d] > 0).sum() for d in order]
        assert found.max_acts[feature, :n].tolist() == [sums[d].max() / 2 for d in order]
        assert (found.documents[feature, n:] == -1).all()


def by_row(entries: Entries) -> spool.RowFeatures:
    rows, features = np.nonzero(entries.dense.T)
    return spool.RowFeatures(
        np.searchsorted(rows, np.arange(N_ROWS + 1)), features.astype(np.uint16)
    )


def test_companions_are_active_on_the_same_rows(entries: Entries) -> None:
    active = entries.dense > 0
    n_active = active.sum(1)
    found = companions(
        entries.offsets[2:] - entries.offsets[2],
        entries.rows[entries.offsets[2] :],
        2,
        by_row(entries),
        n_active,
        3,
    )
    both = active.astype(int) @ active.T
    for feature in range(2, D_SAE):
        others = [g for g in range(D_SAE) if g != feature and both[feature, g]]
        order = sorted(others, key=lambda g: (-(both[feature, g] ** 2 / n_active[g]), g))[:3]
        assert found.others[feature - 2, : len(order)].tolist() == order
        assert found.n_both[feature - 2, : len(order)].tolist() == both[feature, order].tolist()


def test_more_features_than_16_bits_tell_apart(entries: Entries, tmp_path: Path) -> None:
    d_sae, wide = 70_000, np.array([0, 5, 65_535, 65_536, 69_999])
    rows, features = np.nonzero(entries.dense.T)
    made = spool.EntrySpool(tmp_path, d_sae)
    acts = entries.dense[features, rows]
    made.add(np.bincount(rows, minlength=N_ROWS), wide[features], acts, 0)
    assert made.by_row().features.tolist() == wide[features].tolist()
    assert made.n_active[wide].tolist() == np.diff(entries.offsets).tolist()
    last = made.of_features(65_536, d_sae, np.zeros((N_ROWS, N_COLUMNS), np.int32))
    found = companions(last.offsets, last.rows, 65_536, made.by_row(), made.n_active, 4)
    for place, feature in ((0, 3), (-1, 4)):
        both = ((entries.dense[feature] > 0) & (entries.dense > 0)).sum(1)
        expected = {int(wide[g]): int(both[g]) for g in range(D_SAE) if g != feature and both[g]}
        kept = found.others[place] >= 0
        pairs = zip(found.others[place][kept], found.n_both[place][kept], strict=True)
        assert {int(other): int(n) for other, n in pairs} == expected


def test_near_misses_are_contexts_of_neighbors_without_the_feature(
    entries: Entries, tmp_path: Path
) -> None:
    reach = np.arange(N_ROWS, dtype=np.int32)
    before, after = np.minimum(reach, 2), np.minimum(reach[::-1], 1)
    top = np.array([greedy(acts, 4, 0) for acts in entries.dense], np.int32)
    neighbors = np.array([[g for g in range(D_SAE) if g != f][:2] for f in range(D_SAE)])
    runs = spooled(entries, tmp_path, (0, 20, 21, N_ROWS)).runs_of(0, D_SAE)
    found = near_misses(runs, neighbors, top, (before, after), 5)
    n_found = 0
    for feature in range(D_SAE):
        expected: list[tuple[int, int]] = []
        for rank in range(4):
            for g in neighbors[feature].tolist():
                row = int(top[g, rank])
                silent = not entries.dense[feature, max(row - 2, 0) : row + 2].any()
                if silent and row not in [r for r, _ in expected]:
                    expected.append((row, g))
        expected = expected[:5]
        n_found += len(expected)
        pairs = zip(found.rows[feature].tolist(), found.neighbors[feature].tolist(), strict=True)
        assert [pair for pair in pairs if pair[0] >= 0] == expected
    assert n_found > 0
