"""What is known of a bucket of features -> Arrow tables, one function a table of the database.

All return rows sorted by feature and rank. Ranks count from 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..config import IndexConfig
from .directions import LogitEffects, Ranked
from .merging import DocumentCounts, PairCounts, TokenCounts
from .sorting import Float64, Int64
from .statistics import FeatureTotals, Scales, bin_edges, position_edges
from .text_rows import rank_in_run


class Features(NamedTuple):
    """A range of features of one SAE: first <= feature < stop. n_indexed: rows it was run on.

    scales: of the sums of their acts.
    """

    sae_id: int
    first: int
    stop: int
    n_indexed: int
    scales: Scales


# Features that met once have a large npmi and say nothing.
_LEAST_BOTH = 2


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


def features_table(
    where: Features, totals: FeatureTotals, labels: Sequence[str | None]
) -> pa.Table:
    """Rows of `features`. labels: one a feature, None for a dead one."""
    n_active, is_dead = totals.n_active, totals.n_active == 0
    n = np.maximum(n_active, 1)
    means = totals.act_sum / where.scales.act / n
    squares = totals.square_sum / where.scales.square / n
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    return _table(
        where,
        np.arange(len(n_active)),
        {
            "density": n_active / max(where.n_indexed, 1),
            "n_active": n_active,
            "mean_act": pa.array(means.astype(np.float32), mask=is_dead),
            "std_act": pa.array(deviations.astype(np.float32), mask=is_dead),
            "max_act": pa.array(totals.max_act, mask=is_dead),
            "n_documents": totals.n_documents,
            "mean_position": pa.array((totals.position_sum / n).astype(np.float32), mask=is_dead),
            "is_dead": is_dead,
            "label": pa.array(labels, pa.string()),
            "label_method": pa.array([label and "tokens" for label in labels], pa.string()),
        },
    )


def histogram_table(where: Features, totals: FeatureTotals) -> pa.Table:
    """Rows of `feature_histogram`: the bins that hold anything."""
    features, bins = np.nonzero(totals.histogram)
    lo, hi = bin_edges()
    n = totals.histogram[features, bins]
    return _table(where, features, {"bin": bins, "lo": lo[bins], "hi": hi[bins], "n": n})


def positions_table(where: Features, totals: FeatureTotals, n_rows: Int64) -> pa.Table:
    """Rows of `feature_positions`: the bins that hold anything. n_rows: indexed rows of each."""
    features, bins = np.nonzero(totals.positions)
    lo, hi = position_edges()
    n, is_open = totals.positions[features, bins], hi[bins] < 0
    ends = pa.array(hi[bins], mask=is_open)
    columns = {"bin": bins, "lo": lo[bins], "hi": ends, "n": n, "rate": n / n_rows[bins]}
    return _table(where, features, columns)


def token_uses(
    counts: TokenCounts, where: Features, totals: FeatureTotals, n_on: Int64, config: IndexConfig
) -> TokenUses:
    """What each pair of a feature and a token says. n_on: indexed rows on each token.

    lift = P(active | token) / P(active), which is P(token | active) / P(token), the rate smoothed
    by `lift_prior` further occurrences on which the feature fires at its mean rate:

        lift = (n_active + prior * density) / (n_total + prior) / density

    A token seen once thus has a lift of at most (1 / density + prior) / (1 + prior) and doesn't
    win against one seen a thousand times; pairs of fewer than min_token_count are left out.
    """
    kept = counts.n_active >= config.min_token_count
    features, token_ids, n_active, act_sums = (column[kept] for column in counts)
    density = totals.n_active[features] / max(where.n_indexed, 1)
    n_total = n_on[token_ids]
    rate = (n_active + config.lift_prior * density) / (n_total + config.lift_prior)
    return TokenUses(
        features,
        token_ids,
        n_active,
        n_total,
        act_sums / where.scales.act / n_active,
        act_sums / np.maximum(totals.act_sum[features], 1),
        rate / density,
    )


def best_uses(uses: TokenUses, score: Float64, n: int) -> TokenUses:
    """The n pairs of highest score of each feature, best first; ties by token id."""
    order = np.lexsort((uses.token_ids, -score, uses.features))
    order = order[rank_in_run(uses.features[order]) < n]
    return uses._replace(**{name: getattr(uses, name)[order] for name in uses._fields})


def tokens_table(where: Features, best: TokenUses, texts: pa.Array) -> pa.Table:
    """Rows of `feature_tokens`. best: by feature, then descending lift."""
    columns = {
        "rank": rank_in_run(best.features) + 1,
        "token_id": best.token_ids,
        "token": texts.take(pa.array(best.token_ids)),
        "n_active": best.n_active,
        "n_total": best.n_total,
        "mean_act": best.mean_acts.astype(np.float32),
        "lift": best.lifts,
    }
    return _table(where, best.features, columns)


def nearby_tokens_table(
    where: Features, best: Mapping[int, TokenUses], texts: pa.Array
) -> pa.Table:
    """Rows of `feature_nearby_tokens`. best: by how far from the active token, -1 or 1."""
    tables = [
        tokens_table(where, uses, texts).append_column(
            "place", pa.array(np.full(len(uses.features), place, np.int32))
        )
        for place, uses in best.items()
    ]
    keys = [("feature_id", "ascending"), ("place", "ascending"), ("rank", "ascending")]
    return pa.concat_tables(tables).sort_by(keys)


def documents_table(
    where: Features, counts: DocumentCounts, totals: FeatureTotals, n: int
) -> pa.Table:
    """Rows of `feature_documents`: the n of largest summed act."""
    order = np.lexsort((counts.doc_ids, -counts.act_sums, counts.features))
    order = order[rank_in_run(counts.features[order]) < n]
    features, n_active, act_sums = (
        column[order] for column in (counts.features, counts.n_active, counts.act_sums)
    )
    columns = {
        "rank": rank_in_run(features) + 1,
        "doc_id": counts.doc_ids[order],
        "n_active": n_active,
        "mean_act": (act_sums / where.scales.act / np.maximum(n_active, 1)).astype(np.float32),
        "max_act": counts.max_acts[order],
        "share": act_sums / np.maximum(totals.act_sum[features], 1),
    }
    return _table(where, features, columns)


def coactivations_table(where: Features, pairs: PairCounts, n_active: Int64, n: int) -> pa.Table:
    """Rows of `coactivations`: the n of largest npmi. n_active: of all features, int64 [d_sae].

    npmi = ln(P(both) / (P(one) P(other))) / -ln P(both): 1 where they are active on the same rows
    alone, 0 where independent. Source: Bouma 2009, Normalized (pointwise) mutual information.
    """
    pairs = PairCounts(*(column[pairs.n_both >= _LEAST_BOTH] for column in pairs))
    n_rows = max(where.n_indexed, 1)
    own, other = n_active[pairs.features + where.first], n_active[pairs.others]
    both = pairs.n_both / n_rows
    pmi = np.log(np.maximum(pairs.n_both * n_rows / (own * other), 1e-300))
    npmi = np.where(both < 1, pmi / np.maximum(-np.log(both), 1e-12), 1.0)
    order = np.lexsort((pairs.others, -npmi, pairs.features))
    order = order[rank_in_run(pairs.features[order]) < n]
    columns = {
        "rank": rank_in_run(pairs.features[order]) + 1,
        "other_id": pairs.others[order],
        "n_both": pairs.n_both[order],
        "npmi": npmi[order],
    }
    return _table(where, pairs.features[order], columns)


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
    columns = {
        "neighbor_id": nearest.ids.ravel(),
        "rank": np.tile(np.arange(1, n + 1), n_features),
        "cosine": nearest.values.ravel(),
    }
    return _table(where, np.repeat(np.arange(n_features), n), columns)


def similar_table(sae_id: int, other_sae_id: int, similar: Ranked) -> pa.Table:
    """Rows of `similar_features` for every feature of one SAE and one other."""
    n_features, n = similar.ids.shape
    size = n_features * n
    return pa.table(
        {
            "sae_id": pa.array(np.full(size, sae_id, np.int32)),
            "feature_id": np.repeat(np.arange(n_features), n),
            "rank": np.tile(np.arange(1, n + 1), n_features),
            "other_sae_id": pa.array(np.full(size, other_sae_id, np.int32)),
            "other_id": similar.ids.ravel(),
            "cosine": similar.values.ravel(),
        }
    )


def _ranked_table(where: Features, ranked: Ranked, sign: int, texts: pa.Array) -> pa.Table:
    n_features, n = ranked.ids.shape
    columns = {
        "sign": np.full(n_features * n, sign, np.int32),
        "rank": np.tile(np.arange(1, n + 1), n_features),
        "token_id": ranked.ids.ravel(),
        "token": texts.take(pa.array(ranked.ids.ravel())),
        "logit": ranked.values.ravel(),
    }
    return _table(where, np.repeat(np.arange(n_features), n), columns)


def _table(where: Features, features: Int64, columns: Mapping[str, Any]) -> pa.Table:
    """features: from 0 for the first of the range."""
    sae_ids = pa.array(np.full(len(features), where.sae_id, np.int32))
    ids = pa.array((features + where.first).astype(np.int32))
    return pa.table({"sae_id": sae_ids, "feature_id": ids, **columns})
