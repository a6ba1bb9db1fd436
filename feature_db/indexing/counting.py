"""One part of a text -> its files: everything about every feature of one SAE, on these rows.

Two passes over the spooled entries, a bucket of features at a time: first what a feature does by
itself; then, when all features' strongest rows and counts are known, what it does beside others.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..config import IndexConfig
from .best_rows import acts_around, best_entries, sample_scores
from .part_files import BUCKET, Columns, PartWriter
from .sorting import Float32, Int32, Int64
from .spool import Entries, EntrySpool, buckets
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
_TOKEN_COLUMNS = {PREVIOUS: "previous", CURRENT: "token", FOLLOWING: "following"}
MOST_TOKENS = {PREVIOUS: 64, CURRENT: 128, FOLLOWING: 64}
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
    """Of every feature, for its neighbours: n_active int64 [d_sae]; rows int32 and acts float32 of
    its strongest contexts [d_sae, n]; rows are -1 where there are fewer."""

    n_active: Int64
    rows: Int32
    acts: Float32


def write_counts(counting: Counting, spool: EntrySpool, writer: PartWriter) -> None:
    """Count all features."""
    d_sae, n = counting.d_sae, _CONTEXTS_OF_NEIGHBORS
    strongest = Strongest(
        np.zeros(d_sae, np.int64),
        np.full((d_sae, n), -1, np.int32),
        np.zeros((d_sae, n), np.float32),
    )
    for first, stop in buckets(d_sae, BUCKET):
        entries = spool.of_features(first, stop)
        _write_alone(counting, entries, strongest, writer)
    by_row = spool.by_row()
    for first, stop in buckets(d_sae, BUCKET):
        entries = spool.of_features(first, stop)
        _write_beside(counting, entries, strongest, by_row, writer)


class _Bucket(NamedTuple):
    """Entries of some features, with what is known of their rows, by column of ENTRY_COLUMNS."""

    entries: Entries
    fixed: Int64
    rows: dict[str, Int32]


def _write_alone(
    counting: Counting, entries: Entries, strongest: Strongest, writer: PartWriter
) -> None:
    fixed = fixed_acts(entries.acts, counting.scales.act)
    bucket = _Bucket(entries, fixed, counting.records.of_entries(entries.rows))
    totals = _totals(counting, bucket)
    writer.write("totals", _totals_columns(entries.first, totals))
    for name, counts in (("histogram", totals.histogram), ("positions", totals.positions)):
        features, bins = np.nonzero(counts)
        columns = {"bin": bins, "n": counts[features, bins]}
        writer.write(name, _columns(entries.first + features, columns))
    writer.write("tokens", _token_columns(counting, bucket))
    writer.write("documents", _document_columns(counting, bucket))
    top = _top(counting, bucket)
    writer.write("contexts", _context_columns(counting, entries, top, _sample(counting, entries)))
    if counting.config.keep_activations:
        writer.write("activations", _activation_columns(counting, entries))
    part = slice(entries.first, entries.first + len(top))
    strongest.n_active[part] = totals.n_active
    some = top[:, :_CONTEXTS_OF_NEIGHBORS]
    chosen, n = np.maximum(some, 0), some.shape[1]
    if len(entries.rows):
        strongest.rows[part, :n] = np.where(some >= 0, entries.rows[chosen], -1)
        strongest.acts[part, :n] = np.where(some >= 0, entries.acts[chosen], 0)


def _write_beside(
    counting: Counting,
    entries: Entries,
    strongest: Strongest,
    by_row: tuple[Int64, Int32],
    writer: PartWriter,
) -> None:
    rows, first = counting.rows, entries.first
    found = companions(
        entries.offsets, entries.rows, first, *by_row, strongest.n_active, MOST_COMPANIONS
    )
    features, places = np.nonzero(found.others >= 0)
    columns: dict[str, Any] = {
        "other_id": found.others[features, places],
        "n_both": found.n_both[features, places],
    }
    writer.write("companions", _columns(first + features, columns))
    near = counting.neighbors[first : first + len(entries.offsets) - 1]
    missed = near_misses(
        entries.offsets, entries.rows, near, strongest.rows, rows.spans, counting.config.n_negatives
    )
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
    writer.write("near_misses", _columns(first + features, misses))


def _totals(counting: Counting, bucket: _Bucket) -> FeatureTotals:
    entries, rows, doc_ids = bucket.entries, bucket.rows, counting.records.doc_ids
    totals = feature_totals(
        entries.offsets,
        entries.acts,
        bucket.fixed,
        rows["position"],
        rows["position_bin"],
        rows["document"],
        counting.scales,
    )
    first, last = (
        np.where(place < 0, -1, doc_ids[place])
        for place in (totals.first_document, totals.last_document)
    )
    return totals._replace(first_document=first, last_document=last)


def _top(counting: Counting, bucket: _Bucket) -> Int64:
    config, entries = counting.config, bucket.entries
    return best_entries(
        entries.offsets,
        entries.acts,
        bucket.rows["document"],
        CANDIDATES * config.n_top,
        config.max_per_document,
    )


def _sample(counting: Counting, entries: Entries) -> Int64:
    config, rows = counting.config, entries.rows.astype(np.int64) + counting.rows.first_row
    scores = sample_scores(entries.offsets, entries.first, rows, config.seed)
    return best_entries(entries.offsets, scores, rows, config.quantile_sample, 0)


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


def _token_columns(counting: Counting, bucket: _Bucket) -> Columns:
    entries = bucket.entries
    uses = {
        place: token_uses(
            entries.offsets,
            bucket.fixed,
            bucket.rows[column],
            counting.vocab_size,
            MOST_TOKENS[place],
        )
        for place, column in _TOKEN_COLUMNS.items()
    }
    place = np.repeat(list(uses), [len(each.features) for each in uses.values()])
    features, token_ids, n_active, act_sums = (
        np.concatenate(column) for column in zip(*uses.values(), strict=True)
    )
    order = np.argsort(features, kind="stable")
    columns = {"place": place, "token_id": token_ids, "n_active": n_active, "act_sum": act_sums}
    taken = {name: values[order] for name, values in columns.items()}
    return _columns(entries.first + features[order], taken)


def _document_columns(counting: Counting, bucket: _Bucket) -> Columns:
    entries = bucket.entries
    found = document_uses(
        entries.offsets, entries.acts, bucket.fixed, bucket.rows["document"], MOST_DOCUMENTS
    )
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
