"""The state of some features -> Arrow tables, one function a table of the database.

Every function takes a range of features, so that what is in memory stays small, and returns rows
sorted by feature and rank. Ranks count from 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .best_rows import ContextRows
from .codes import Float32, Int64, rank_in_run
from .collect import TokenSpool, flat_spans
from .config import IndexConfig
from .directions import LogitEffects, Ranked
from .token_pairs import TokenPairs
from .totals import FeatureTotals, Float64, bin_edges


class TokenUses(NamedTuple):
    """(feature, token) pairs with what they say, by feature; all [n].

    shares: of the feature's whole activation, the part on this token. lifts: see `token_uses`.
    """

    features: Int64
    token_ids: Int64
    n_active: Int64
    n_total: Int64
    mean_acts: Float64
    shares: Float64
    lifts: Float64


class Features(NamedTuple):
    """A range of features of one SAE: first <= feature < stop."""

    sae_id: int
    first: int
    stop: int


def features_table(
    where: Features, totals: FeatureTotals, labels: Sequence[str | None]
) -> pa.Table:
    """Rows of `features`. labels: one a feature, None for a dead one."""
    part = slice(where.first, where.stop)
    n_active = totals.n_active[part]
    is_dead = n_active == 0
    means = (totals.act_sum[part] / np.maximum(n_active, 1)).astype(np.float32)
    return pa.table(
        {
            "sae_id": _ids(where.sae_id, len(n_active)),
            "feature_id": pa.array(np.arange(where.first, where.stop, dtype=np.int32)),
            "density": totals.density[part],
            "n_active": n_active,
            "mean_act": pa.array(means, mask=is_dead),
            "max_act": pa.array(totals.max_act[part], mask=is_dead),
            "is_dead": is_dead,
            "label": pa.array(labels, pa.string()),
            "label_method": pa.array([label and "tokens" for label in labels], pa.string()),
        }
    )


def histogram_table(where: Features, totals: FeatureTotals) -> pa.Table:
    """Rows of `feature_histogram`: the bins that hold anything."""
    counts = totals.histogram[where.first : where.stop]
    features, bins = np.nonzero(counts)
    lo, hi = bin_edges()
    return pa.table(
        {
            "sae_id": _ids(where.sae_id, len(bins)),
            "feature_id": features + where.first,
            "bin": bins,
            "lo": lo[bins],
            "hi": hi[bins],
            "n": counts[features, bins],
        }
    )


def token_uses(pairs: TokenPairs, totals: FeatureTotals, config: IndexConfig) -> TokenUses:
    """What each pair of a feature and a token says.

    lift = P(active | token) / P(active), which is P(token | active) / P(token), the rate smoothed
    by `lift_prior` further occurrences on which the feature fires at its mean rate:

        lift = (n_active + prior * density) / (n_total + prior) / density

    A token seen once thus has a lift of at most (1 / density + prior) / (1 + prior) and doesn't
    win against one seen a thousand times; pairs of fewer than min_token_count are left out.
    """
    vocab_size = len(totals.token_counts)
    kept = pairs.counts >= config.min_token_count
    features, token_ids = np.divmod(pairs.keys[kept], vocab_size)
    n_active, n_total = pairs.counts[kept], totals.token_counts[token_ids]
    density = totals.density[features]
    rate = (n_active + config.lift_prior * density) / (n_total + config.lift_prior)
    return TokenUses(
        features,
        token_ids,
        n_active,
        n_total,
        pairs.act_sums[kept] / n_active,
        pairs.act_sums[kept] / totals.act_sum[features],
        rate / density,
    )


def best_uses(uses: TokenUses, score: Float64, n: int) -> TokenUses:
    """The n pairs of highest score of each feature, best first; ties by token id."""
    order = np.lexsort((uses.token_ids, -score, uses.features))
    order = order[rank_in_run(uses.features[order]) < n]
    return uses._replace(**{name: getattr(uses, name)[order] for name in uses._fields})


def tokens_table(where: Features, best: TokenUses, texts: pa.Array) -> pa.Table:
    """Rows of `feature_tokens`. best: by feature, then descending lift."""
    return pa.table(
        {
            "sae_id": _ids(where.sae_id, len(best.features)),
            "feature_id": best.features,
            "rank": rank_in_run(best.features) + 1,
            "token_id": best.token_ids,
            "token": texts.take(pa.array(best.token_ids)),
            "n_active": best.n_active,
            "n_total": best.n_total,
            "mean_act": best.mean_acts.astype(np.float32),
            "lift": best.lifts,
        }
    )


def logits_table(where: Features, effects: LogitEffects, texts: pa.Array) -> pa.Table:
    """Rows of `feature_logits`: promoted tokens with sign 1, suppressed ones with sign -1."""
    return pa.concat_tables(
        [
            _ranked_table(where, effects.promoted, 1, texts),
            _ranked_table(where, effects.suppressed, -1, texts),
        ]
    ).sort_by([("feature_id", "ascending"), ("sign", "descending"), ("rank", "ascending")])


def neighbors_table(where: Features, nearest: Ranked) -> pa.Table:
    """Rows of `neighbors`."""
    n_features, n = nearest.ids.shape
    return pa.table(
        {
            "sae_id": _ids(where.sae_id, n_features * n),
            "feature_id": np.repeat(np.arange(where.first, where.stop), n),
            "neighbor_id": nearest.ids.ravel(),
            "rank": np.tile(np.arange(1, n + 1), n_features),
            "cosine": nearest.values.ravel(),
        }
    )


class QuantileContexts(NamedTuple):
    """Contexts chosen by quantile, by feature and descending act; quantiles: float64 [n]."""

    contexts: ContextRows
    quantiles: Float64


def choose_quantiles(sample: ContextRows, config: IndexConfig) -> QuantileContexts:
    """Cut each feature's sample by act into n_quantiles equal parts; keep some of each part.

    A sampled act's quantile is estimated from its place among the sample's n acts,
    (place + 0.5) / n; part p holds quantiles from p / n_quantiles. Of each part those that were
    drawn first are kept: no choice by content.
    """
    order = np.lexsort((sample.rows, sample.acts, sample.features))
    features = sample.features[order]
    n_sampled = np.bincount(features, minlength=1)[features] if len(features) else features
    quantiles = (rank_in_run(features) + 0.5) / np.maximum(n_sampled, 1)
    parts = features * config.n_quantiles + (quantiles * config.n_quantiles).astype(np.int64)
    by_draw = np.lexsort((sample.ranks[order], parts))
    kept = by_draw[rank_in_run(parts[by_draw]) < config.contexts_per_quantile]
    kept = kept[np.lexsort((-quantiles[kept], features[kept]))]
    return QuantileContexts(sample.take(order[kept]), quantiles[kept])


def contexts_table(
    where: Features,
    top: ContextRows,
    chosen: QuantileContexts,
    spool: TokenSpool,
    texts: pa.Array,
) -> pa.Table:
    """Rows of `contexts`: of each feature the strongest, then those by quantile."""
    kinds = [
        _context_columns(where, "top", top, None, spool, texts),
        _context_columns(where, "quantile", chosen.contexts, chosen.quantiles, spool, texts),
    ]
    features = np.concatenate([top.features, chosen.contexts.features])
    return pa.concat_tables(kinds).take(pa.array(np.argsort(features, kind="stable")))


def _context_columns(
    where: Features,
    kind: str,
    rows: ContextRows,
    quantiles: Float64 | None,
    spool: TokenSpool,
    texts: pa.Array,
) -> pa.Table:
    n = len(rows.features)
    lengths = rows.before + 1 + rows.after
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
    token_ids = spool.spans(rows) if n else np.empty(0, np.int64)
    tokens = pa.ListArray.from_arrays(offsets, texts.take(pa.array(token_ids)))
    peaks = pa.array(offsets.to_numpy()[:-1] + rows.before)
    return pa.table(
        {
            "sae_id": _ids(where.sae_id, n),
            "feature_id": rows.features,
            "kind": pa.repeat(kind, n),
            "rank": rank_in_run(rows.features) + 1,
            "quantile": pa.nulls(n, pa.float64()) if quantiles is None else quantiles,
            "doc_id": rows.doc_ids,
            "position": rows.positions,
            "act": rows.acts,
            "token": tokens.values.take(peaks),
            "peak": rows.before,
            "text": pc.binary_join(tokens, ""),
            "token_ids": pa.ListArray.from_arrays(offsets, pa.array(token_ids.astype(np.int32))),
            "tokens": tokens,
            "acts": pa.ListArray.from_arrays(offsets, pa.array(_window_acts(rows, lengths))),
        }
    )


def _window_acts(rows: ContextRows, lengths: Int64) -> Float32:
    """The acts of all contexts, one after the other; a window's row is `before` from its peak."""
    if not len(lengths):
        return np.empty(0, np.float32)
    starts = np.arange(len(lengths)) * rows.windows.shape[1] + rows.peak - rows.before
    return rows.windows.ravel()[flat_spans(starts, lengths)]


def _ranked_table(where: Features, ranked: Ranked, sign: int, texts: pa.Array) -> pa.Table:
    n_features, n = ranked.ids.shape
    return pa.table(
        {
            "sae_id": _ids(where.sae_id, n_features * n),
            "feature_id": np.repeat(np.arange(where.first, where.stop), n),
            "sign": np.full(n_features * n, sign, np.int32),
            "rank": np.tile(np.arange(1, n + 1), n_features),
            "token_id": ranked.ids.ravel(),
            "token": texts.take(pa.array(ranked.ids.ravel())),
            "logit": ranked.values.ravel(),
        }
    )


def _ids(sae_id: int, n: int) -> pa.Array:
    return pa.array(np.full(n, sae_id, np.int32))
