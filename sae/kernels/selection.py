"""Centred activations -> codes: the encoder product, and the choice of active features.

The product is made in tiles of rows, small enough for the scores to be chosen from while they
lie in cache; dense pre-activations [batch, d_sae] never exist. Equal scores are ordered by row,
then by feature_id, so every choice is exact and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae.codes import Codes, offsets_of_counts, offsets_of_sorted
from sae.products import float32_products

# Rows a tile: fewer starve the matrix product, more push its scores out of cache.
TILE_ROWS = 512
# A tile's scores stay below this, whatever d_sae is.
TILE_BYTES = 64 * 2**20
# Candidates of a choice over the batch start at this fraction of the expected threshold: low
# enough that a step's drift doesn't pass it, high enough that few candidates are superfluous.
CANDIDATE_MARGIN = 0.95
# Rows that a guess at that threshold is made from.
GUESS_ROWS = 128
# Scores that are compared by their maximum alone first: see largest_of_rows.
GROUP_SIZE = 8


class PreActs(NamedTuple):
    """Pre-activations that aren't computed yet: x @ W.T + b.

    x: [batch, d_model], centred. W: [d_sae, d_model], the encoder feature by feature. b: [d_sae].
    """

    x: Tensor
    W: Tensor
    b: Tensor

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """First row and scores [tile, d_sae] of each tile; the scores' memory is used again."""
        row_bytes = self.b.numel() * self.b.element_size()
        height = min(TILE_ROWS, max(32, TILE_BYTES // row_bytes), len(self.x))
        scores = self.x.new_empty(height, len(self.b))
        for start in range(0, len(self.x), max(height, 1)):
            x = self.x[start : start + height]
            with float32_products("ieee"):
                torch.addmm(self.b, x, self.W.T, out=scores[: len(x)])
            yield start, scores[: len(x)]


class BatchChoice(NamedTuple):
    """codes, and the smallest act among them (a scalar tensor; 0 when there are none)."""

    codes: Codes
    smallest: Tensor


def top_k_of_rows(pre_acts: PreActs, k: int) -> Codes:
    """The k largest positive pre-activations of each row (fewer where fewer are positive)."""
    parts = [_top_k_of_tile(scores, k) for _, scores in pre_acts.tiles()]
    return Codes.concatenate(parts or [_no_codes(pre_acts)])


def above_threshold(pre_acts: PreActs, threshold: Tensor) -> Codes:
    """All pre-activations above a threshold: a scalar or [d_sae]. Below 0, so are the acts."""
    flats, values = [], []
    for start, scores in pre_acts.tiles():
        flat = (scores > threshold).view(-1).nonzero().squeeze(1)
        values.append(scores.view(-1)[flat])
        flats.append(flat + start * scores.shape[1])
    if not flats:
        return _no_codes(pre_acts)
    return codes_of_flat(torch.cat(flats), torch.cat(values), pre_acts)


def top_of_batch(
    pre_acts: PreActs,
    n_keep: int,
    expected: float,
    above: Callable[[PreActs, Tensor], Codes] = above_threshold,
) -> BatchChoice:
    """The n_keep largest positive pre-activations of the whole batch (all, if fewer are positive).

    expected: a guess at the smallest act that will be kept; <= 0 means unknown. It affects only
    speed: when too few candidates lie above it, the product is made again with a lower one.
    above: how candidates are found, as above_threshold finds them.
    """
    for lower in _falling_thresholds(pre_acts, n_keep, expected):
        codes = above(pre_acts, pre_acts.b.new_tensor(lower))
        if codes.nnz >= n_keep:
            break
    codes = keep_largest(codes, n_keep)
    smallest = codes.acts.min() if codes.nnz else codes.acts.new_zeros(())
    return BatchChoice(codes, smallest)


def largest_of_rows(scores: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row, unordered: [batch, n] -> [batch, k] int64.

    Of groups of columns, only the k with the largest maxima can hold them, so a row is narrowed
    down by that first: torch.topk costs much more a column. Which of several equal scores at the
    boundary are taken is open; the values taken are always the k largest.
    """
    n = scores.shape[1]
    n_groups = n // GROUP_SIZE
    if n % GROUP_SIZE or n_groups < 2 * k:
        return scores.topk(k, dim=1, sorted=False).indices
    best = largest_of_rows(scores.view(-1, GROUP_SIZE, n_groups).amax(1), k)
    starts = torch.arange(0, n, n_groups, device=scores.device)
    ids = (best.unsqueeze(1) + starts.unsqueeze(1)).flatten(1)  # [batch, GROUP_SIZE * k]
    places = scores.gather(1, ids).topk(k, dim=1, sorted=False).indices
    return ids.gather(1, places)


def top_k_ids(scores: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row, ascending; of equal scores, the first: [batch, k]."""
    d_sae = scores.shape[1]
    if k == d_sae:
        return torch.arange(k, device=scores.device).expand(len(scores), k)
    ids = largest_of_rows(scores, k + 1)
    values = scores.gather(1, ids)
    last, place = values.min(dim=1, keepdim=True)
    is_tied = ((values == last).sum(1) > 1) & (last.squeeze(1) > 0)
    # The (k + 1)th goes: sorted behind all others, and cut off.
    ids = ids.scatter(1, place, d_sae).sort(dim=1).values[:, :k]
    if is_tied.any():
        ordered = scores[is_tied].sort(dim=1, descending=True, stable=True).indices
        ids[is_tied] = ordered[:, :k].sort(dim=1).values
    return ids


def codes_of_rows(ids: Tensor, scores: Tensor) -> Codes:
    """Codes of the positive ones among scores [batch, k] of features ids [batch, k], ascending."""
    is_active = scores > 0
    return Codes(scores[is_active], ids[is_active], offsets_of_counts(is_active.sum(1)))


def _top_k_of_tile(scores: Tensor, k: int) -> Codes:
    ids = top_k_ids(scores, k)
    return codes_of_rows(ids, scores.gather(1, ids))


def _falling_thresholds(pre_acts: PreActs, n_keep: int, expected: float) -> Iterator[float]:
    """Thresholds to look for candidates above, cheapest first; the last, 0, is always enough."""
    if expected > 0:
        yield CANDIDATE_MARGIN * expected
    guess = _guess_smallest(pre_acts, n_keep)
    if guess > 0:
        yield CANDIDATE_MARGIN * guess
        yield CANDIDATE_MARGIN * guess / 2
    yield 0.0


def _guess_smallest(pre_acts: PreActs, n_keep: int) -> float:
    """The smallest act that would be kept if the first rows were the whole batch."""
    for _, scores in pre_acts._replace(x=pre_acts.x[:GUESS_ROWS]).tiles():
        n_kept = max(1, n_keep * len(scores) // len(pre_acts.x))
        if n_kept >= scores.numel():
            return 0.0
        kth = scores.reshape(-1).kthvalue(scores.numel() - n_kept + 1).values
        return max(0.0, float(kth))
    return 0.0


def keep_largest(codes: Codes, n_keep: int) -> Codes:
    """The n_keep largest acts of all rows together (all, if fewer); of equal acts, the first."""
    acts = codes.acts
    if len(acts) <= n_keep:
        return codes
    smallest = acts.kthvalue(len(acts) - n_keep + 1).values
    is_kept = acts > smallest
    n_missing = n_keep - int(is_kept.sum())
    is_kept[(acts == smallest).nonzero().squeeze(1)[:n_missing]] = True
    return codes.where(is_kept)


def codes_of_flat(flat: Tensor, acts: Tensor, pre_acts: PreActs) -> Codes:
    """Codes of acts [nnz] at ascending positions flat = row * d_sae + feature_id."""
    rows = flat // len(pre_acts.b)
    offsets = offsets_of_sorted(rows, n_bags=len(pre_acts.x))
    return Codes(acts, flat - rows * len(pre_acts.b), offsets)


def _no_codes(pre_acts: PreActs) -> Codes:
    ids = torch.empty(0, dtype=torch.int64, device=pre_acts.x.device)
    return Codes(pre_acts.x.new_empty(0), ids, ids.new_zeros(len(pre_acts.x) + 1))
