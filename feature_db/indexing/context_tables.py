"""Contexts of a bucket of features -> rows of `contexts`: which are shown, and their text.

Kinds: "top", the strongest; "quantile", sampled over a feature's acts; "negative", contexts of its
neighbours in which it is silent.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import IndexConfig
from .merging import ContextRows, NearMissRows
from .sorting import Float32, Float64, Int64
from .statistics import quantiles_in
from .tables import Features
from .text_rows import TextRows, flat_spans, rank_in_run

KINDS = ("top", "quantile", "negative")


class ShownContexts(NamedTuple):
    """Contexts of all kinds, by feature, kind and rank; all [n].

    rows: as in ContextRows. kinds: places in KINDS. quantiles: NaN but for "quantile".
    neighbors: whose context a "negative" is, -1 for others.
    """

    rows: ContextRows
    kinds: Int64
    quantiles: Float64
    neighbors: Int64


def shown_contexts(
    top: ContextRows,
    sample: ContextRows,
    missed: NearMissRows,
    histogram: Int64,
    config: IndexConfig,
) -> ShownContexts:
    """top: by rank. sample: in the order drawn. histogram: int64 [n_features, N_BINS]."""
    quantiles = sample_quantiles(sample, histogram)
    kept = _by_quantile(sample, quantiles, config)
    chosen = sample.take(kept)
    n_missed = len(missed.features)
    nothing = np.zeros(n_missed, np.int64)
    silent = ContextRows(
        missed.features,
        missed.rows,
        np.zeros(n_missed, np.float32),
        missed.before.astype(np.int64),
        missed.after.astype(np.int64),
        nothing,
        nothing[:0],
        np.zeros(0, np.float32),
    )
    lengths = [len(each.features) for each in (top, chosen, silent)]
    kinds = np.repeat(np.arange(len(KINDS)), lengths)
    rows = _joined([top, chosen, silent])
    order = np.argsort(rows.features * len(KINDS) + kinds, kind="stable")
    no_quantile, nobody = np.full(len(kinds), np.nan), np.full(len(kinds), -1)
    no_quantile[kinds == 1] = quantiles[kept]
    nobody[kinds == 2] = missed.neighbors
    return ShownContexts(rows.take(order), kinds[order], no_quantile[order], nobody[order])


def sample_quantiles(sample: ContextRows, histogram: Int64) -> Float64:
    """Share of its feature's acts that are weaker than each sampled one.

    Exact, (place + 0.5) / n, where the sample holds all of a feature's acts; elsewhere from the
    histogram of them all.
    """
    quantiles = quantiles_in(histogram, sample.features, sample.acts)
    order = np.lexsort((sample.rows, sample.acts, sample.features))
    features = sample.features[order]
    n_sampled = np.bincount(features, minlength=len(histogram))[features]
    exact = np.empty(len(order))
    exact[order] = (rank_in_run(features) + 0.5) / np.maximum(n_sampled, 1)
    is_whole = np.bincount(sample.features, minlength=len(histogram)) == histogram.sum(axis=1)
    return np.where(is_whole[sample.features], exact, quantiles)


def _by_quantile(sample: ContextRows, quantiles: Float64, config: IndexConfig) -> Int64:
    """Of each of n_quantiles equal parts those that were drawn first: no choice by content.

    Returns: places in the sample, by feature and descending quantile.
    """
    part = np.minimum((quantiles * config.n_quantiles).astype(np.int64), config.n_quantiles - 1)
    parts = sample.features * config.n_quantiles + part
    by_draw = np.argsort(parts, kind="stable")
    kept = by_draw[rank_in_run(parts[by_draw]) < config.contexts_per_quantile]
    return kept[np.lexsort((sample.rows[kept], -sample.acts[kept], sample.features[kept]))]


def contexts_table(
    where: Features, shown: ShownContexts, text: TextRows, texts: pa.Array
) -> pa.Table:
    """Rows of `contexts`. text: the tokens of every row. texts: of every token."""
    rows = shown.rows
    lengths = rows.before + 1 + rows.after
    ends = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
    token_ids = text.take("token_ids", flat_spans(rows.rows - rows.before, lengths))
    tokens = pa.ListArray.from_arrays(ends, texts.take(pa.array(token_ids)))
    peaks = pa.array(ends.to_numpy()[:-1] + rows.before)
    n = len(rows.features)
    return pa.table(
        {
            "sae_id": pa.array(np.full(n, where.sae_id, np.int32)),
            "feature_id": rows.features + where.first,
            "kind": pa.array(KINDS).take(pa.array(shown.kinds)),
            "rank": rank_in_run(rows.features * len(KINDS) + shown.kinds) + 1,
            "quantile": pa.array(shown.quantiles, from_pandas=True),
            "neighbor_id": pa.array(shown.neighbors, pa.int32(), mask=shown.neighbors < 0),
            "doc_id": text.take("doc_ids", rows.rows),
            "position": text.take("positions", rows.rows),
            "act": rows.acts,
            "token": tokens.values.take(peaks),
            "peak": rows.before,
            "text": pc.binary_join(tokens, ""),
            "token_ids": pa.ListArray.from_arrays(ends, pa.array(token_ids.astype(np.int32))),
            "acts": pa.ListArray.from_arrays(ends, pa.array(_dense_acts(rows, lengths))),
        }
    )


def _dense_acts(rows: ContextRows, lengths: Int64) -> Float32:
    """The feature's act on every token of all contexts, one after the other."""
    acts = np.zeros(int(lengths.sum()), np.float32)
    peaks = np.cumsum(lengths) - lengths + rows.before
    acts[peaks] = rows.acts
    acts[np.repeat(peaks, rows.n_around) + rows.steps] = rows.around
    return acts


def _joined(rows: list[ContextRows]) -> ContextRows:
    return ContextRows(*(np.concatenate(column) for column in zip(*rows, strict=True)))
