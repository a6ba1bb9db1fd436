"""Selection with the encoder product in bfloat16, and with float32's result all the same.

The product in bfloat16 only nominates candidates; their pre-activations are then computed in
float32, and the choice is made among those. A bound on the error of the bfloat16 scores says
which features that weren't nominated could belong to the choice; where there are such, it is made
again with them.

A score s of row x and its bfloat16 estimate s' differ by at most

    2^-7 |s'| + |x - low(x)| max|W| + |low(x)| max|W - low(W)| + d_model 2^-22 |x| max|W|
             + max|b - low(b)|

where low() rounds to bfloat16 and the maxima go over features: the first term is the rounding of
the result (2^-8, once more where the bias is added apart), the next two that of the inputs by
Cauchy and Schwarz, the fourth summing in float32, which bfloat16 products do on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels.embedding_bags import dot_by_entry
from sae.kernels.selection import (
    PreActs,
    above_threshold,
    codes_of_flat,
    codes_of_rows,
    largest_of_rows,
    top_k_ids,
    top_k_of_rows,
)

UNIT = 2.0**-7
# Candidates beyond k in a row: enough that the bound certifies most rows.
SPARE = 32


class Estimates(NamedTuple):
    """Pre-activations in bfloat16, tile by tile, and how far off they can be.

    pre_acts: x, W and b in bfloat16. slack: [batch], the bound's terms that don't depend on s'.
    """

    pre_acts: PreActs
    slack: Tensor

    def upper(self, estimates: Tensor, start: int) -> Tensor:
        """The largest that scores estimated as estimates [tile] can be, rows from start on."""
        slack = self.slack[start : start + len(estimates)]
        return estimates.float() + UNIT * estimates.float().abs() + slack


def estimate(pre_acts: PreActs) -> Estimates:
    """The bfloat16 twin of pre-activations, with its error bound."""
    x, W, b = pre_acts.x, pre_acts.W, pre_acts.b
    low = PreActs(x.bfloat16(), W.bfloat16(), b.bfloat16())
    largest = W.norm(dim=1).max()
    largest_rest = torch.linalg.vector_norm(W - low.W, dim=1).max()
    rest = torch.linalg.vector_norm(x - low.x, dim=1)
    x_norm = x.norm(dim=1)
    # |low(x)| <= |x| + |x - low(x)|
    slack = rest * largest + (x_norm + rest) * largest_rest
    slack += x_norm * (largest * x.shape[1] * 2.0**-22) + (b - low.b).abs().max()
    return Estimates(low, slack)


def nominated_top_k_of_rows(pre_acts: PreActs, k: int) -> Codes:
    """top_k_of_rows, nominating in bfloat16."""
    n_features = len(pre_acts.b)
    if k + SPARE >= n_features or len(pre_acts.x) == 0:
        return top_k_of_rows(pre_acts, k)
    ids, scores = (torch.cat(parts) for parts in zip(*_top_k_tiles(pre_acts, k), strict=True))
    return codes_of_rows(ids, scores)


def _top_k_tiles(pre_acts: PreActs, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tile's ids [tile, k], ascending, and their float32 scores."""
    estimates = estimate(pre_acts)
    for start, low in estimates.pre_acts.tiles():
        candidates = largest_of_rows(_ordered(low), k + SPARE).sort(dim=1).values
        # Nothing that wasn't nominated is above it; negative ones are in no order.
        cutoff = low.gather(1, candidates).amin(1).clamp(min=0)
        scores = _rescored(pre_acts, candidates, start)
        places = top_k_ids(scores, k)
        ids, chosen = candidates.gather(1, places), scores.gather(1, places)
        unseen = estimates.upper(cutoff, start)
        smallest = chosen.amin(1)
        doubtful = ((unseen >= smallest) & (unseen > 0)).nonzero().squeeze(1)
        if len(doubtful):
            slack = estimates.slack[start + doubtful]
            some = low[doubtful] > _lowest(smallest[doubtful].clamp(min=0), slack).unsqueeze(1)
            rows = pre_acts._replace(x=pre_acts.x[start + doubtful])
            ids[doubtful], chosen[doubtful] = _top_k_among(rows, some, k)
        yield ids, chosen


def _lowest(limits: Tensor, slack: Tensor) -> Tensor:
    """What isn't estimated above it is below limits: bfloat16, its rounding included."""
    lower = limits - slack  # s' + UNIT |s'| + slack < limit
    return torch.where(lower > 0, lower * (1 - 2 * UNIT), lower * (1 + 2 * UNIT)).bfloat16()


def _top_k_among(pre_acts: PreActs, is_candidate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids of the k largest [batch, k], ascending, among candidates [batch, d_sae], k a row or more,
    and their float32 scores."""
    flat = is_candidate.view(-1).nonzero().squeeze(1)
    codes = codes_of_flat(flat, pre_acts.x.new_empty(len(flat)), pre_acts)
    scores = dot_by_entry(codes, pre_acts.x, pre_acts.W) + pre_acts.b[codes.feature_ids]
    counts, rows = codes.n_active(), codes.rows()
    columns = torch.arange(codes.nnz, device=flat.device) - codes.offsets[rows]
    width = int(counts.max())
    padded = scores.new_full((codes.n_rows, width), -torch.inf)
    padded[rows, columns] = scores
    ids = torch.zeros_like(padded, dtype=torch.int64)
    ids[rows, columns] = codes.feature_ids
    places = top_k_ids(padded, k)
    return ids.gather(1, places), padded.gather(1, places)


def nominated_above_threshold(pre_acts: PreActs, threshold: Tensor) -> Codes:
    """above_threshold, nominating in bfloat16 where every threshold is positive."""
    if not bool((threshold > 0).all()):
        return above_threshold(pre_acts, threshold)
    flat = _nominated_above(pre_acts, threshold)
    codes = codes_of_flat(flat, pre_acts.x.new_empty(len(flat)), pre_acts)
    scores = dot_by_entry(codes, pre_acts.x, pre_acts.W) + pre_acts.b[codes.feature_ids]
    limits = threshold[codes.feature_ids] if threshold.dim() else threshold
    return Codes(scores, codes.feature_ids, codes.offsets).where(scores > limits)


def _nominated_above(pre_acts: PreActs, threshold: Tensor) -> Tensor:
    """Flat positions, ascending, of all scores that may be above threshold: [n] int64."""
    estimates = estimate(pre_acts)
    flats = [torch.empty(0, dtype=torch.int64, device=pre_acts.x.device)]
    for start, low in estimates.pre_acts.tiles():
        slack = estimates.slack[start : start + len(low)]
        # A row for each threshold or, where features differ in it, one for the whole tile.
        lowest = _lowest(threshold, slack.max() if threshold.dim() else slack.unsqueeze(1))
        flat = _is_above(low, lowest).view(-1).nonzero().squeeze(1)
        flats.append(flat + start * low.shape[1])
    return torch.cat(flats)


def _ordered(low: Tensor) -> Tensor:
    """bfloat16 as integers: in the same order where it is positive, and compared faster."""
    return low.view(torch.int16)


def _is_above(low: Tensor, lowest: Tensor) -> Tensor:
    """Where bfloat16 scores are above lowest, and perhaps where they are no number."""
    if bool((lowest >= 0).all()):
        return _ordered(low) > _ordered(lowest)
    return low > lowest


def _rescored(pre_acts: PreActs, ids: Tensor, start: int) -> Tensor:
    """Float32 scores of features ids [tile, n], rows from start on: [tile, n]."""
    n_rows, n = ids.shape
    flat = ids.flatten()
    offsets = torch.arange(0, n_rows * n + 1, n, device=ids.device)
    x = pre_acts.x[start : start + n_rows]
    dots = dot_by_entry(Codes(x.new_empty(n_rows * n), flat, offsets), x, pre_acts.W)
    return (dots + pre_acts.b[flat]).view(n_rows, n)
