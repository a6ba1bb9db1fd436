"""The three sums over codes that everything after the encoder is made of.

Each is an embedding bag: rows of a table, weighted and summed by bag, in a fixed order and
without a (nnz, d_model) intermediate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae.codes import Codes, offsets_of_sorted


class FeatureOrder(NamedTuple):
    """Entries of codes sorted by feature, rows ascending within a feature.

    order: [nnz] int64, the entry at each place. rows: [nnz] int64, its row.
    offsets: [d_sae + 1] int64; feature i holds places offsets[i] to offsets[i + 1].
    """

    order: Tensor
    rows: Tensor
    offsets: Tensor

    def n_active(self) -> Tensor:
        """Rows in which each feature is active: [d_sae] int64."""
        return self.offsets.diff()


def sort_by_feature(codes: Codes, d_sae: int) -> FeatureOrder:
    """The codes' entries feature by feature: a stable, so deterministic, sort."""
    feature_ids, order = codes.feature_ids.sort(stable=True)
    return FeatureOrder(order, codes.rows()[order], offsets_of_sorted(feature_ids, n_bags=d_sae))


def sum_by_row(codes: Codes, table: Tensor) -> Tensor:
    """Decode: each row's sum of act * table[feature_id].

    table: [d_sae, d_model]. Returns: [batch, d_model]. Autograd flows to acts and table.
    """
    return _weighted_bags(codes.feature_ids, table, codes.offsets, codes.acts)


def sum_by_feature(weights: Tensor, features: FeatureOrder, table: Tensor) -> Tensor:
    """Each feature's sum of weight * table[row] over the rows in which it is active.

    weights: [nnz], in the codes' own order. table: [batch, d_model]. Returns: [d_sae, d_model].
    """
    return _weighted_bags(features.rows, table, features.offsets, weights[features.order])


def weights_by_feature(weights: Tensor, features: FeatureOrder) -> Tensor:
    """Each feature's sum of weights [nnz] (in the codes' own order): [d_sae]."""
    ones = torch.ones_like(weights)
    table = weights[features.order].unsqueeze(1)
    places = torch.arange(weights.numel(), device=weights.device)
    return _weighted_bags(places, table, features.offsets, ones).squeeze(1)


def dot_by_entry(codes: Codes, rows: Tensor, table: Tensor) -> Tensor:
    """rows[row] . table[feature_id] of each entry: the gradient of acts.

    rows: [batch, d_model]. table: [d_sae, d_model]. Returns: [nnz].
    """
    if codes.nnz == 0:
        return rows.new_empty(0)
    dot: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, table, codes.feature_ids, codes.offsets[:-1], codes.rows(), 0
    )
    return dot


def _weighted_bags(ids: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return functional.embedding_bag(
        ids, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
