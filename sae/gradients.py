"""Codes -> loss and the gradients of all weights, without autograd or a dense gradient.

The loss of a batch of targets y [batch, d_out] with variance V (the data's mean squared deviation
from its mean, estimated once, a constant):

    e        = y - y_hat,  y_hat = acts @ W_dec + b_dec (+ x @ W_skip)
    loss     = |e|^2 / (batch V)
    penalty  = what the architecture adds, over (batch V) too
    aux_loss = coefficient * min(1, n_dead / k_aux) * |e - e_hat|^2 / (batch V)

so the first term is about the batch's FVU, whatever the model. e_hat reconstructs e, taken as a
constant, from the dead features alone: the k_aux largest of them in each row (AuxK).
Source: Gao et al. 2024, arXiv 2406.04093, section 2.4 and appendix A.2; the scale for few dead
features is that of EleutherAI/sparsify.

A nested loss (Matryoshka) is the mean of several: codes fall into levels, and y_hat_m is what
those of levels 0 to m add up to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import Kernels, PreActs
from sae.kernels.selection import TILE_ROWS
from sae.products import float32_products


class Weights(NamedTuple):
    """The weights of every SAE, or their gradients, both matrices feature by feature.

    W_enc: [d_sae, d_in]. W_dec: [d_sae, d_out]. b_enc: [d_sae]. b_dec: [d_out].
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor


class AuxK(NamedTuple):
    """What AuxK needs: which features are dead, how many may fire in a row, how much it counts.

    dead_ids: [n_dead] int64, ascending.
    """

    dead_ids: Tensor
    k: int
    coefficient: float


class Reconstruction(NamedTuple):
    """How far codes are from their target, and what that asks of them.

    error: [batch, d_out], of the last level: all codes. loss: scalar, unscaled: the mean over
    levels of summed squares. squared_error: scalar, the last level's. dots: [nnz], of each entry
    error . W_dec row, averaged over the levels it is part of; its act's gradient is
    -2 * scale * dots. pulls: [batch, d_out], or one for each level [batch, n_levels, d_out]: the
    errors that decoder rows follow.
    """

    error: Tensor
    loss: Tensor
    squared_error: Tensor
    dots: Tensor
    pulls: Tensor


class Levels(NamedTuple):
    """Which of n levels each entry of codes is in: [nnz] int64, ascending within a row."""

    of_entry: Tensor
    n: int


def reconstruct(
    codes: Codes, target: Tensor, W_dec: Tensor, kernels: Kernels, levels: Levels | None = None
) -> Reconstruction:
    """Compare codes with target [batch, d_out], which is what they should add up to."""
    if levels is None:
        error, squared_error, dots = kernels.reconstruct(codes, target, W_dec)
        return Reconstruction(error, squared_error, squared_error, dots, error)
    by_level = split_by_level(codes, levels)
    parts = kernels.sum_by_row(by_level, W_dec).view(len(target), levels.n, -1)
    errors = target.unsqueeze(1) - parts.cumsum(1)  # [batch, n_levels, d_out]
    # An entry is part of its own level's reconstruction and of all later ones.
    pulls = errors.flip(1).cumsum(1).flip(1) / levels.n
    dots = kernels.dot_by_entry(by_level, pulls.flatten(0, 1), W_dec)
    squares = errors.square().sum((0, 2))
    return Reconstruction(errors[:, -1].contiguous(), squares.mean(), squares[-1], dots, pulls)


def split_by_level(codes: Codes, levels: Levels) -> Codes:
    """The same entries with each (row, level) as a row of its own: n_rows * n_levels rows."""
    places = codes.rows() * levels.n + levels.of_entry
    counts = torch.bincount(places, minlength=codes.n_rows * levels.n)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(codes.acts, codes.feature_ids, offsets)


def add_auxk_(
    gradients: Weights,
    x_centred: Tensor,
    error: Tensor,
    weights: Weights,
    auxk: AuxK,
    scale: float,
    kernels: Kernels,
) -> Tensor:
    """Add AuxK's gradients of W_enc, W_dec and b_enc in place; return its loss.

    Dead features are active in no row, so the problem is a small one on their columns alone: dense
    where each row takes many of them.
    """
    dead = auxk.dead_ids
    W_enc, W_dec, b_enc = weights.W_enc[dead], weights.W_dec[dead], weights.b_enc[dead]
    factor = auxk.coefficient * min(1.0, len(dead) / auxk.k) * scale
    if auxk.k < kernels.sparse_below * len(dead):
        codes = kernels.top_k_of_rows(PreActs(x_centred, W_enc, b_enc), auxk.k)
        found = kernels.reconstruct(codes, error, W_dec)
        of_acts, of_rows = found.dots * (-2 * factor), codes.acts * (-2 * factor)
        sums = kernels.feature_sums(codes, of_acts, x_centred, of_rows, found.error, len(dead))
        parts, loss = [*sums[:3]], found.squared_error * factor
    else:
        parts, loss = _dense_auxk(x_centred, error, (W_enc, W_dec, b_enc), auxk.k, factor)
    for total, part in zip((gradients.W_enc, gradients.W_dec, gradients.b_enc), parts, strict=True):
        total.index_add_(0, dead, part.to(total.dtype))
    return loss


def _dense_auxk(
    x_centred: Tensor, error: Tensor, dead: tuple[Tensor, Tensor, Tensor], k: int, factor: float
) -> tuple[list[Tensor], Tensor]:
    """The same by products with the dead features' W_enc, W_dec and b_enc, tile by tile: their
    gradients, and the loss."""
    W_enc, W_dec, b_enc = dead
    grads = [torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(b_enc)]
    loss = error.new_zeros(())
    with float32_products("tf32"):
        for x, target in zip(x_centred.split(TILE_ROWS), error.split(TILE_ROWS), strict=True):
            acts = _largest_of_rows(torch.addmm(b_enc, x, W_enc.T), k)  # [tile, n_dead]
            left_over = torch.addmm(target, acts, W_dec, alpha=-1)  # e - e_hat
            loss += left_over.square().sum() * factor
            grad_e_hat = left_over * (-2 * factor)
            grad_pre_acts = (grad_e_hat @ W_dec.T) * (acts > 0)
            grads[0].addmm_(grad_pre_acts.T, x)
            grads[1].addmm_(acts.T, grad_e_hat)
            grads[2] += grad_pre_acts.sum(0)
    return grads, loss


def _largest_of_rows(pre_acts: Tensor, k: int) -> Tensor:
    """Positive pre_acts [batch, n] with all but the k largest of each row set to zero."""
    acts = pre_acts.relu()
    rows = ((acts > 0).sum(1) > k).nonzero().squeeze(1)
    if len(rows):
        values, ids = acts[rows].topk(k, dim=1, sorted=False)
        acts[rows] = torch.zeros_like(acts[rows]).scatter_(1, ids, values)
    return acts
