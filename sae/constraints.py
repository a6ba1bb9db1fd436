"""What decoders and encoders are held to, whatever the architecture.

unit rows:    |W_dec row| = 1. The gradient's part along the row is taken away, and Adam's step is
              followed by a division by the norm: the row's size would only undo what acts do.
alignment:    W_enc column . W_dec row = 1 for each feature (option `aligned`), as a parametrisation
              W_enc = v + (1 - v . W_dec) W_dec. Source: arXiv 2605.18629.
orthogonality: a penalty on the largest squared cosine that a decoder row has with another one of
              its chunk, chunks being drawn anew each time (option). Source: OrtSAE, arXiv
              2509.22033.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.gradients import Weights
from sae.products import float32_products

# Features that are compared with each other, in one product.
CHUNK = 4096
# Steps between two evaluations of the penalty, which then counts as many times.
ORTHOGONALITY_EVERY = 5


def align_gradients_(gradients: Weights, weights: Weights) -> None:
    """Gradients of v and W_dec from those of W_enc and W_dec, at v = W_enc, in place."""
    along = (gradients.W_enc * weights.W_dec).sum(1, keepdim=True)
    gradients.W_dec.addcmul_(along, weights.W_enc, value=-1)
    gradients.W_enc.addcmul_(along, weights.W_dec, value=-1)


def align_(weights: Weights) -> None:
    """Make each feature's encoder and decoder have inner product 1 again, in place."""
    missing = 1 - (weights.W_enc * weights.W_dec).sum(1, keepdim=True)
    weights.W_enc.addcmul_(missing, weights.W_dec)


def add_orthogonality_(gradient: Tensor, W_dec: Tensor, coefficient: float, seed: int) -> Tensor:
    """Add the penalty's gradient to that of W_dec [d_sae, d_out], in place; return its loss.

        penalty = coefficient * mean over features i of max over j of cos(row i, row j)^2

    j goes over i's chunk without i; where the maximum is at j counts as constant. seed: of chunks.
    """
    n = len(W_dec)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(W_dec.device)
    total = W_dec.new_zeros(())
    for ids in order.tensor_split(-(-n // CHUNK)):
        rows = W_dec[ids]
        with float32_products("tf32"):
            cosines = rows @ rows.T  # [chunk, chunk]
        cosines.fill_diagonal_(0)
        nearest = cosines.abs().argmax(1)
        largest = cosines.gather(1, nearest.unsqueeze(1))
        total += largest.square().sum()
        pull = largest * (2 * coefficient / n)
        grad = pull * rows[nearest]
        grad.index_add_(0, nearest, pull * rows)
        gradient.index_add_(0, ids, grad.to(gradient.dtype))
    return total * (coefficient / n)
