"""The three sums over codes that everything after the encoder is made of.

Each is an embedding bag: rows of a table, weighted and summed by bag, in a fixed order and
without a (nnz, d_model) intermediate. Where codes are dense, as ReLU's are early in training, the
same sums are matrix products, tile by tile.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae.codes import Codes, offsets_of_sorted

# From these parts of all entries on, dense products are faster (docs/experiments.md): for bags'
# sums, and for dot products.
DENSE_SUMS = 0.4
DENSE_DOTS = 0.15
# A dense tile stays below this.
TILE_BYTES = 2 * 2**20


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
    if codes.nnz > DENSE_DOTS * len(rows) * len(table):
        return _dots_by_tiles(codes, rows, table)
    if _has_sampled_products(rows, table):
        return _sampled_products(codes, rows, table)
    dot: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, table, codes.feature_ids, codes.offsets[:-1], codes.rows(), 0
    )
    return dot


def _weighted_bags(ids: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    n_bags = offsets.numel() - 1
    if ids.numel() > DENSE_SUMS * n_bags * len(table):
        tiles = [
            weights.new_zeros(n_bags_here, len(table)).index_put((bags, ids[part]), weights[part])
            @ table
            for part, bags, n_bags_here in _tiles(offsets, table)
        ]
        return torch.cat(tiles)
    return functional.embedding_bag(
        ids, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _has_sampled_products(rows: Tensor, table: Tensor) -> bool:
    is_plain = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
    return is_plain and not (rows.requires_grad or table.requires_grad)


def _sampled_products(codes: Codes, rows: Tensor, table: Tensor) -> Tensor:
    """Those products of rows with table's that codes have an entry for: a third faster."""
    pattern = _pattern(codes.offsets, codes.feature_ids, rows.new_zeros(codes.nnz), len(table))
    products: Tensor = torch.sparse.sampled_addmm(pattern, rows, table.T, beta=0.0).values()
    return products


def _pattern(offsets: Tensor, ids: Tensor, values: Tensor, n_features: int) -> Tensor:
    size = len(offsets) - 1, n_features
    return torch.sparse_csr_tensor(offsets, ids, values, size=size, check_invariants=False)


with warnings.catch_warnings():  # once a process torch tells that such tensors are in beta
    warnings.simplefilter("ignore")
    _pattern(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), 1)


def _dots_by_tiles(codes: Codes, rows: Tensor, table: Tensor) -> Tensor:
    dots, start = [], 0
    for part, bags, n_bags in _tiles(codes.offsets, table):
        products = rows[start : start + n_bags] @ table.T
        dots.append(products[bags, codes.feature_ids[part]])
        start += n_bags
    return torch.cat(dots)


def _tiles(offsets: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor, int]]:
    """Tiles of bags: the entries of each, their bags counted from the tile's first, and how many
    bags it has."""
    height = max(1, TILE_BYTES // (len(table) * table.element_size()))
    n_bags = offsets.numel() - 1
    for start in range(0, n_bags, height):
        bounds = offsets[start : min(start + height, n_bags) + 1]
        counts = bounds.diff()
        part = slice(int(bounds[0]), int(bounds[-1]))
        bags = torch.arange(len(counts), device=offsets.device)
        yield (
            part,
            bags.repeat_interleave(counts, output_size=part.stop - part.start),
            len(counts),
        )
