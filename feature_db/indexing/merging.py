"""Parts of a text -> what all of it says of a bucket of features.

Counts are added, and from all parts' best rows the best are chosen again: the order in which parts
were made, or where the text was cut, doesn't show in them. (Which tokens, documents and companions
are kept is decided in each part: see `uses`.)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..config import IndexConfig
from .best_rows import best_entries, sample_scores
from .counting import CANDIDATES, SAMPLE, TOP
from .part_files import BUCKET, PartReader, buckets
from .sorting import Float32, Int64
from .statistics import N_BINS, N_POSITION_BINS, FeatureTotals
from .text_rows import TextRows, flat_spans, rank_in_run

# Tokens of a context, before its peak and after, by which two are the same text.
_SAME_BEFORE, _SAME_AFTER = 8, 3


class ContextRows(NamedTuple):
    """Contexts, by feature; all [n]. features: from 0 for the bucket's first.

    rows: of the peak. acts: there, 0 for a near miss. before, after: tokens on either side.
    n_around: other acts of the feature in each context; steps, around: those, one context's after
    another's: how far from the peak, and the act.
    """

    features: Int64
    rows: Int64
    acts: Float32
    before: Int64
    after: Int64
    n_around: Int64
    steps: Int64
    around: Float32

    @classmethod
    def of(cls, first: int, table: pa.Table) -> "ContextRows":
        """Rows of "contexts"."""
        names = ("feature_id", "row", "act", "before", "after")
        features, rows, acts, before, after = (table[name].to_numpy() for name in names)
        steps, around = (table[name].combine_chunks() for name in ("steps", "acts"))
        return cls(
            features.astype(np.int64) - first,
            rows,
            acts,
            before.astype(np.int64),
            after.astype(np.int64),
            steps.value_lengths().to_numpy().astype(np.int64),
            steps.flatten().to_numpy().astype(np.int64),
            around.flatten().to_numpy(),
        )

    def take(self, places: Int64) -> "ContextRows":
        """The contexts at some places, in that order."""
        starts = np.cumsum(self.n_around) - self.n_around
        inner = flat_spans(starts[places], self.n_around[places])
        names = ("features", "rows", "acts", "before", "after", "n_around")
        outer: dict[str, Any] = {name: getattr(self, name)[places] for name in names}
        return ContextRows(**outer, steps=self.steps[inner], around=self.around[inner])


class TokenCounts(NamedTuple):
    """(feature, token) pairs of one place, by feature and then token; all [n]."""

    features: Int64
    token_ids: Int64
    n_active: Int64
    act_sums: Int64


class DocumentCounts(NamedTuple):
    """(feature, document) pairs, by feature and then document; all [n]."""

    features: Int64
    doc_ids: Int64
    n_active: Int64
    act_sums: Int64
    max_acts: Float32


class PairCounts(NamedTuple):
    """(feature, other feature) pairs, by feature and then the other one; all [n]."""

    features: Int64
    others: Int64
    n_both: Int64


class NearMissRows(NamedTuple):
    """Contexts of neighbours, by feature; all [n]. acts: the neighbour's, at the peak."""

    features: Int64
    rows: Int64
    neighbors: Int64
    acts: Float32
    before: Int64
    after: Int64

    def take(self, places: Int64) -> "NearMissRows":
        """The rows at some places, in that order."""
        return NearMissRows(**{name: getattr(self, name)[places] for name in self._fields})


class MergedBucket:
    """The features first <= feature < stop of one SAE, over all parts."""

    def __init__(self, parts: Sequence[PartReader], first: int, stop: int) -> None:
        self.first, self.stop = first, stop
        self._parts, self._bucket = parts, first // BUCKET

    def n_active(self) -> Int64:
        """Rows on which each feature is active, of `totals` this alone: int64 [n_features]."""
        n_active = np.zeros(self.stop - self.first, np.int64)
        for table in self._tables("totals"):
            n_active[table["feature_id"].to_numpy() - self.first] += table["n_active"].to_numpy()
        return n_active

    def totals(self) -> FeatureTotals:
        """Sums over all parts."""
        n = self.stop - self.first
        sums = {name: np.zeros(n, np.int64) for name in FeatureTotals._fields}
        max_act, last_document = np.zeros(n, np.float32), np.full(n, -1, np.int64)
        first_document = last_document.copy()
        for table in self._tables("totals"):
            at = table["feature_id"].to_numpy() - self.first
            for name in ("n_active", "act_sum", "square_sum", "position_sum", "n_documents"):
                sums[name][at] += table[name].to_numpy()
            max_act[at] = np.maximum(max_act[at], table["max_act"].to_numpy())
            begins, ends = (table[f"{which}_document"].to_numpy() for which in ("first", "last"))
            # A document that lies on both sides of a cut was counted on both.
            sums["n_documents"][at] -= last_document[at] == begins
            first_document[at] = np.where(first_document[at] < 0, begins, first_document[at])
            last_document[at] = ends
        merged: dict[str, Any] = sums | {
            "max_act": max_act,
            "first_document": first_document,
            "last_document": last_document,
            "histogram": self._cells("histogram", N_BINS),
            "positions": self._cells("positions", N_POSITION_BINS),
        }
        return FeatureTotals(**merged)

    def tokens(self, place: int) -> TokenCounts:
        """Counts of the tokens at a place: CURRENT, PREVIOUS or FOLLOWING."""
        rows = pa.concat_tables(self._tables("tokens"))
        rows = rows.filter(pa.array(rows["place"].to_numpy() == place))
        order = self._order(rows, "token_id")
        return TokenCounts(*_added(rows, order, ("n_active", "act_sum")))

    def documents(self) -> DocumentCounts:
        """Counts of the documents that were kept."""
        rows = pa.concat_tables(self._tables("documents"))
        order = self._order(rows, "doc_id")
        acts = rows["max_act"].to_numpy()[order.places]
        highest = np.maximum.reduceat(acts, order.starts) if len(acts) else acts
        features, doc_ids, n_active, act_sums = _added(rows, order, ("n_active", "act_sum"))
        return DocumentCounts(features, doc_ids, n_active, act_sums, highest)

    def companions(self) -> PairCounts:
        """Counts of the pairs that were kept."""
        rows = pa.concat_tables(self._tables("companions"))
        return PairCounts(*_added(rows, self._order(rows, "other_id"), ("n_both",)))

    def near_misses(self, n: int) -> NearMissRows:
        """The first n of each feature: every part's first, by act, then every part's second."""
        tables = list(self._tables("near_misses"))
        rows = pa.concat_tables(tables)
        features = rows["feature_id"].to_numpy().astype(np.int64) - self.first
        ranks = np.concatenate([rank_in_run(table["feature_id"].to_numpy()) for table in tables])
        acts = rows["act"].to_numpy()
        order = np.lexsort((rows["row"].to_numpy(), -acts, ranks, features))
        order = order[rank_in_run(features[order]) < n]
        names = ("row", "neighbor_id", "act", "before", "after")
        columns = [rows[name].to_numpy()[order] for name in names]
        return NearMissRows(features[order], *columns)

    def contexts(self, config: IndexConfig, text: TextRows) -> tuple[ContextRows, ContextRows]:
        """The strongest rows of each feature, by descending act; and the sampled ones, as drawn."""
        table = pa.concat_tables(self._tables("contexts"))
        kinds = table["kind"].to_numpy()
        top, sample = (
            ContextRows.of(self.first, table.filter(pa.array(kinds == kind)))
            for kind in (TOP, SAMPLE)
        )
        return self._strongest(top, config, text), self._sampled(sample, config)

    def _strongest(self, rows: ContextRows, config: IndexConfig, text: TextRows) -> ContextRows:
        rows = rows.take(np.lexsort((rows.rows, rows.features)))
        documents = text.take("doc_ids", rows.rows)
        offsets = self._offsets(rows.features)
        n, limit = CANDIDATES * config.n_top, config.max_per_document
        best = best_entries(offsets, rows.acts, documents, n, limit)
        chosen = rows.take(best[best >= 0])
        chosen = chosen.take(np.flatnonzero(_is_first_of_text(chosen, text)))
        return chosen.take(np.flatnonzero(rank_in_run(chosen.features) < config.n_top))

    def _sampled(self, rows: ContextRows, config: IndexConfig) -> ContextRows:
        rows = rows.take(np.lexsort((rows.rows, rows.features)))
        offsets = self._offsets(rows.features)
        scores = sample_scores(offsets, self.first, rows.rows, 0, config.seed)
        best = best_entries(offsets, scores, rows.rows, config.quantile_sample, 0)
        return rows.take(best[best >= 0])

    def _offsets(self, features: Int64) -> Int64:
        return np.searchsorted(features, np.arange(self.stop - self.first + 1))

    def _tables(self, name: str) -> list[pa.Table]:
        return [part.read(name, self._bucket) for part in self._parts]

    def _cells(self, table: str, n_bins: int) -> Int64:
        """A dense table of counts: int64 [n_features, n_bins]."""
        counts = np.zeros((self.stop - self.first, n_bins), np.int64)
        for rows in self._tables(table):
            features = rows["feature_id"].to_numpy() - self.first
            counts[features, rows["bin"].to_numpy()] += rows["n"].to_numpy()
        return counts

    def _order(self, rows: pa.Table, key: str) -> "_Order":
        """Rows by (feature, key)."""
        features = rows["feature_id"].to_numpy().astype(np.int64) - self.first
        keys = rows[key].to_numpy().astype(np.int64)
        places = np.lexsort((keys, features))
        features, keys = features[places], keys[places]
        is_new = np.ones(len(places), dtype=bool)
        is_new[1:] = (np.diff(features) != 0) | (np.diff(keys) != 0)
        starts = np.flatnonzero(is_new)
        return _Order(places, starts, features[starts], keys[starts])


class _Order(NamedTuple):
    """Rows by pairs. places: int64 [n], of the rows, in that order. starts: where each new pair
    begins in it; features, keys: of each, int64 [n_pairs]."""

    places: Int64
    starts: Int64
    features: Int64
    keys: Int64


def _added(rows: pa.Table, order: _Order, summed: Sequence[str]) -> list[Int64]:
    """Columns feature, key and sums, a row for each pair."""
    sums = (rows[name].to_numpy()[order.places] for name in summed)
    added = (np.add.reduceat(each, order.starts) if len(each) else each for each in sums)
    return [order.features, order.keys, *added]


def _is_first_of_text(
    rows: ContextRows, text: TextRows
) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Whether no context before it, of the same feature, has the same tokens around its peak."""
    before = np.minimum(rows.before, _SAME_BEFORE)
    after = np.minimum(rows.after, _SAME_AFTER)
    hashes = before.astype(np.uint64) * np.uint64(31) + after.astype(np.uint64)
    for step in range(-_SAME_BEFORE, _SAME_AFTER + 1):
        inside = (-step <= before) & (step <= after)
        tokens = np.zeros(len(before), np.uint64)
        tokens[inside] = text.take("token_ids", rows.rows[inside] + step).astype(
            np.uint64
        ) + np.uint64(1)
        hashes = (hashes ^ tokens) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    order = np.lexsort((np.arange(len(hashes)), hashes, rows.features))
    is_first = np.zeros(len(hashes), dtype=bool)
    same = (np.diff(rows.features[order]) == 0) & (hashes[order][1:] == hashes[order][:-1])
    is_first[order] = np.concatenate(([True], ~same))[: len(order)]
    return is_first


def merged_buckets(parts: Sequence[PartReader], d_sae: int) -> list[MergedBucket]:
    """All features, a bucket at a time."""
    return [MergedBucket(parts, first, stop) for first, stop in buckets(d_sae)]
