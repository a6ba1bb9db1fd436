"""Codes -> loss and the gradients of all four weights, without autograd or a dense gradient.

The loss of a batch x [batch, d_model] with variance V (the data's mean squared deviation from
its mean, estimated once, a constant):

    e        = x - x_hat,  x_hat = acts @ W_dec + b_dec
    loss     = |e|^2 / (batch V)
    aux_loss = coefficient * min(1, n_dead / k_aux) * |e - e_hat|^2 / (batch V)

so the first term is about the batch's FVU, whatever the model. e_hat reconstructs e, taken as a
constant, from the dead features alone: the k_aux largest of them in each row (AuxK).
Source: Gao et al. 2024, arXiv 2406.04093, section 2.4 and appendix A.2; the scale for few dead
features is that of EleutherAI/sparsify.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.codes import Codes
from sae.embedding_bags import (
    dot_by_entry,
    sort_by_feature,
    sum_by_feature,
    sum_by_row,
    weights_by_feature,
)
from sae.selection import TILE_ROWS


class Weights(NamedTuple):
    """The four weights, or their gradients, both matrices feature by feature.

    W_enc, W_dec: [d_sae, d_model]. b_enc: [d_sae]. b_dec: [d_model].
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


class Step(NamedTuple):
    """What one batch gives.

    gradients: of loss + aux_loss. loss, aux_loss: scalars. squared_error: scalar |x - x_hat|^2
    over the batch. n_active: [d_sae] int64, rows in which each feature was active.
    """

    gradients: Weights
    loss: Tensor
    aux_loss: Tensor
    squared_error: Tensor
    n_active: Tensor


def loss_and_gradients(
    x: Tensor, codes: Codes, weights: Weights, variance: float, auxk: AuxK | None = None
) -> Step:
    """Loss of a batch whose active features are chosen, and its gradients.

    x: [batch, d_model], not centred. codes: its active features under these weights.
    """
    scale = 1 / (len(x) * variance)
    x_centred = x - weights.b_dec
    error = x_centred - sum_by_row(codes, weights.W_dec)  # [batch, d_model]
    squared_error = error.square().sum()
    grad_x_hat = error * (-2 * scale)
    features = sort_by_feature(codes, d_sae=len(weights.b_enc))
    grad_acts = dot_by_entry(codes, grad_x_hat, weights.W_dec)  # also of pre_acts: all acts are > 0
    grad_W_enc = sum_by_feature(grad_acts, features, x_centred)
    grad_W_dec = sum_by_feature(codes.acts, features, grad_x_hat)
    grad_b_enc = weights_by_feature(grad_acts, features)
    aux_loss = squared_error.new_zeros(())
    if auxk is not None and len(auxk.dead_ids):
        aux_loss = _add_auxk_(
            Weights(grad_W_enc, grad_W_dec, grad_b_enc, weights.b_dec),
            x_centred,
            error,
            weights,
            auxk,
            scale,
        )
    # b_dec is added after the decoder and taken away before the encoder.
    grad_b_dec = grad_x_hat.sum(0) - grad_b_enc @ weights.W_enc
    gradients = Weights(grad_W_enc, grad_W_dec, grad_b_enc, grad_b_dec)
    return Step(gradients, squared_error * scale, aux_loss, squared_error, features.n_active())


def _add_auxk_(
    gradients: Weights,
    x_centred: Tensor,
    error: Tensor,
    weights: Weights,
    auxk: AuxK,
    scale: float,
) -> Tensor:
    """Add AuxK's gradients of W_enc, W_dec and b_enc in place; return its loss.

    Dead features are active in no row, so the problem is a small dense one on their columns.
    """
    dead = auxk.dead_ids
    W_enc, W_dec, b_enc = weights.W_enc[dead], weights.W_dec[dead], weights.b_enc[dead]
    grads = [torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(b_enc)]
    factor = auxk.coefficient * min(1.0, len(dead) / auxk.k) * scale
    loss = error.new_zeros(())
    for x, target in zip(x_centred.split(TILE_ROWS), error.split(TILE_ROWS), strict=True):
        acts = _largest_of_rows(torch.addmm(b_enc, x, W_enc.T), auxk.k)  # [tile, n_dead]
        left_over = torch.addmm(target, acts, W_dec, alpha=-1)  # e - e_hat
        loss += left_over.square().sum() * factor
        grad_e_hat = left_over * (-2 * factor)
        grad_pre_acts = (grad_e_hat @ W_dec.T) * (acts > 0)
        grads[0].addmm_(grad_pre_acts.T, x)
        grads[1].addmm_(acts.T, grad_e_hat)
        grads[2] += grad_pre_acts.sum(0)
    for total, part in zip((gradients.W_enc, gradients.W_dec, gradients.b_enc), grads, strict=True):
        total.index_add_(0, dead, part)
    return loss


def _largest_of_rows(pre_acts: Tensor, k: int) -> Tensor:
    """Positive pre_acts [batch, n] with all but the k largest of each row set to zero."""
    acts = pre_acts.relu()
    if k >= acts.shape[1]:
        return acts
    values, ids = acts.topk(k, dim=1, sorted=False)
    return torch.zeros_like(acts).scatter_(1, ids, values)
