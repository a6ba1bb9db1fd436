"""One part of a text -> its files: everything about every feature of one SAE, on these rows.

One pass over the spooled entries, some features at a time; then, when all features' strongest rows
are known, their near misses.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..config import IndexConfig
from .best_rows import acts_around, best_entries, sample_scores
from .part_files import Columns, PartWriter, buckets
from .sorting import DOCUMENT, Float32, Int32, Int64
from .spool import Entries, EntrySpool, RowFeatures
from .statistics import FeatureTotals, Scales, feature_totals, fixed_acts
from .text_rows import PartRows, RowRecords
from .uses import companions, document_uses, near_misses, token_uses

TOP, SAMPLE = 0, 1
PREVIOUS, CURRENT, FOLLOWING = -1, 0, 1
# Contexts are chosen from this many times as many: those that repeat another's text are left out
# when all parts are known.
CANDIDATES = 2
# Strongest contexts of a neighbour in which a feature may be silent.
_CONTEXTS_OF_NEIGHBORS = 4
# Kept of each feature in each part; what is shown is chosen from them.
MOST_TOKENS = np.array([64, 128, 64])  # PREVIOUS, CURRENT, FOLLOWING
MOST_DOCUMENTS = 16
MOST_COMPANIONS = 32


class Counting(NamedTuple):
    """What all buckets of a part need.

    rows: of the part; records: of them. d_sae, vocab_size. scales: of the sums.
    neighbors: int64 [d_sae, n], nearest features first.
    """

    rows: PartRows
    records: RowRecords
    d_sae: int
    vocab_size: int
    scales: Scales
    neighbors: Int64
    config: IndexConfig


class Strongest(NamedTuple):
    """Of every feature, for its neighbours: rows int32 and acts float32 of its strongest contexts
    [d_sae, n]; rows are -1 where there are fewer."""

    rows: Int32
    acts: Float32

    def put(self, entries: Entries, top: Int64) -> None:
        """top: int64 [n_features, n], places of the strongest entries, -1 where there are fewer."""
        part, some = slice(entries.first, entries.stop), top[:, : self.rows.shape[1]]
        if len(entries.rows):
            chosen, n = np.maximum(some, 0), some.shape[1]
            self.rows[part, :n] = np.where(some >= 0, entries.rows[chosen], -1)
            self.acts[part, :n] = np.where(some >= 0, entries.acts[chosen], 0)


def write_counts(counting: Counting, spool: EntrySpool, writer: PartWriter) -> None:
    """Count all features."""
    shape = counting.d_sae, _CONTEXTS_OF_NEIGHBORS
    strongest = Strongest(np.full(shape, -1, np.int32), np.zeros(shape, np.float32))
    by_row = spool.by_row()
    for first, stop in buckets(counting.d_sae):
        for one_slice in spool.slices(first, stop):
            entries = spool.of_features(*one_slice, counting.records.table)
            top = _top(counting, entries)
            strongest.put(entries, top)
            for table, columns in _tables(counting, entries, top, spool.n_active, by_row):
                writer.write(table, columns)
        writer.end_bucket()
    for first, stop in buckets(counting.d_sae):
        writer.write("near_misses", _near_miss_columns(counting, spool, first, stop, strongest))
        writer.end_bucket()


def _tables(
    counting: Counting, entries: Entries, top: Int64, n_active: Int64, by_row: RowFeatures
) -> Iterator[tuple[str, Columns]]:
    """(table, its rows) of some features. top: places of their strongest entries."""
    fixed, first = fixed_acts(entries.acts, counting.scales.act), entries.first
    totals = _totals(counting, entries, fixed)
    yield "totals", _totals_columns(first, totals)
    for name, counts in (("histogram", totals.histogram), ("positions", totals.positions)):
        features, bins = np.nonzero(counts)
        yield name, _columns(first + features, {"bin": bins, "n": counts[features, bins]})
    yield "tokens", _token_columns(counting, entries, fixed)
    yield "documents", _document_columns(counting, entries, fixed)
    yield "contexts", _context_columns(counting, entries, top, _sample(counting, entries))
    yield "companions", _companion_columns(entries, n_active, by_row)
    if counting.config.keep_activations:
        yield "activations", _activation_columns(counting, entries)


def _near_miss_columns(
    counting: Counting, spool: EntrySpool, first: int, stop: int, strongest: Strongest
) -> Columns:
    """Rows of "near_misses" of the features first <= feature < stop."""
    rows, near = counting.rows, counting.neighbors[first:stop]
    n, runs = counting.config.n_negatives, spool.runs_of(first, stop)
    missed = near_misses(runs, near, strongest.rows, rows.spans, n)
    features, places = np.nonzero(missed.rows >= 0)
    local, neighbors = missed.rows[features, places], missed.neighbors[features, places]
    is_its = strongest.rows[neighbors] == local[:, None]
    misses: dict[str, Any] = {
        "row": local + rows.first_row,
        "neighbor_id": neighbors,
        "act": np.where(is_its, strongest.acts[neighbors], 0).max(axis=1, initial=0),
        "before": rows.spans.before[local],
        "after": rows.spans.after[local],
    }
    return _columns(first + features, misses)


def _companion_columns(entries: Entries, n_active: Int64, by_row: RowFeatures) -> Columns:
    """Rows of "companions"."""
    first = entries.first
    found = companions(entries.offsets, entries.rows, first, by_row, n_active, MOST_COMPANIONS)
    features, places = np.nonzero(found.others >= 0)
    columns: dict[str, Any] = {
        "other_id": found.others[features, places],
        "n_both": found.n_both[features, places],
    }
    return _columns(first + features, columns)


def _totals(counting: Counting, entries: Entries, fixed: Int64) -> FeatureTotals:
    doc_ids = counting.records.doc_ids
    totals = feature_totals(entries.offsets, entries.acts, fixed, entries.records, counting.scales)
    first, last = (
        np.where(place < 0, -1, doc_ids[place])
        for place in (totals.first_document, totals.last_document)
    )
    return totals._replace(first_document=first, last_document=last)


def _top(counting: Counting, entries: Entries) -> Int64:
    n, limit = CANDIDATES * counting.config.n_top, counting.config.max_per_document
    return best_entries(entries.offsets, entries.acts, entries.records[:, DOCUMENT], n, limit)


def _sample(counting: Counting, entries: Entries) -> Int64:
    config, rows, first_row = counting.config, entries.rows, counting.rows.first_row
    scores = sample_scores(entries.offsets, entries.first, rows, first_row, config.seed)
    return best_entries(entries.offsets, scores, scores, config.quantile_sample, 0)


def _context_columns(counting: Counting, entries: Entries, top: Int64, sample: Int64) -> Columns:
    """Rows of "contexts": of each feature its strongest, then its sampled ones."""
    both = np.concatenate([top, sample], axis=1)
    features, places = np.nonzero(both >= 0)
    chosen = both[features, places]
    spans, local = counting.rows.spans, entries.rows[chosen]
    around = acts_around(
        chosen,
        entries.offsets[features],
        entries.offsets[features + 1],
        entries.rows,
        entries.acts,
        spans,
    )
    ends = pa.array(np.concatenate(([0], np.cumsum(around.counts))).astype(np.int32))
    columns = {
        "kind": np.where(places < top.shape[1], TOP, SAMPLE).astype(np.int8),
        "row": local.astype(np.int64) + counting.rows.first_row,
        "act": entries.acts[chosen],
        "before": spans.before[local],
        "after": spans.after[local],
        "steps": pa.ListArray.from_arrays(ends, pa.array(around.steps)),
        "acts": pa.ListArray.from_arrays(ends, pa.array(around.acts)),
    }
    return _columns(entries.first + features, columns)


def _totals_columns(first: int, totals: FeatureTotals) -> Columns:
    """Rows of "totals": those of features that are active here."""
    alive = np.flatnonzero(totals.n_active)
    names = [name for name in totals._fields if name not in ("histogram", "positions")]
    return _columns(first + alive, {name: getattr(totals, name)[alive] for name in names})


def _token_columns(counting: Counting, entries: Entries, fixed: Int64) -> Columns:
    """Rows of "tokens"."""
    vocab_size = counting.vocab_size
    uses = token_uses(entries.offsets, fixed, entries.records, vocab_size, MOST_TOKENS)
    columns = {
        "place": uses.places + PREVIOUS,
        "token_id": uses.token_ids,
        "n_active": uses.n_active,
        "act_sum": uses.act_sums,
    }
    return _columns(entries.first + uses.features, columns)


def _document_columns(counting: Counting, entries: Entries, fixed: Int64) -> Columns:
    """Rows of "documents"."""
    found = document_uses(entries.offsets, entries.acts, fixed, entries.records, MOST_DOCUMENTS)
    features, places = np.nonzero(found.documents >= 0)
    columns = {
        "doc_id": counting.records.doc_ids[found.documents[features, places]],
        "n_active": found.n_active[features, places],
        "act_sum": found.act_sums[features, places],
        "max_act": found.max_acts[features, places],
    }
    return _columns(entries.first + features, columns)


def _activation_columns(counting: Counting, entries: Entries) -> Columns:
    columns = {
        "doc_id": counting.rows.doc_ids[entries.rows],
        "position": counting.rows.positions[entries.rows],
        "act": entries.acts,
    }
    return _columns(entries.first + entries.of_entry(), columns)


def _columns(features: Int64, columns: Mapping[str, Any]) -> Columns:
    return {"feature_id": features, **columns}
