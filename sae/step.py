"""One batch -> losses and the gradients of all parameters, the same for every architecture."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.architectures import Architecture
from sae.architectures.base import Forward, Moment, Push
from sae.config import SAEConfig
from sae.gradients import (
    AuxK,
    Reconstruction,
    Weights,
    add_auxk_,
    reconstruct,
    split_by_level,
)
from sae.kernels import PreActs


class Step(NamedTuple):
    """What one batch of all processes gives.

    gradients: by parameter, of loss + penalty + aux_loss. loss, penalty, aux_loss: scalars.
    squared_error: scalar |y - y_hat|^2 over the batch. n_active: [d_sae] int64, rows in which each
    feature was active. threshold: the SAE's from now on.
    """

    gradients: dict[str, Tensor]
    loss: Tensor
    penalty: Tensor
    aux_loss: Tensor
    squared_error: Tensor
    n_active: Tensor
    threshold: Tensor


def step_of(
    architecture: Architecture,
    config: SAEConfig,
    at: Moment,
    *,
    is_tied: bool,
    skip_input: Tensor | None = None,
    auxk: AuxK | None = None,
) -> Step:
    """Losses and gradients of a batch.

    is_tied: whether b_dec is taken from what is read too. skip_input: [batch, d_in], where the SAE
    has a W_skip.
    """
    made = architecture.forward(PreActs(at.x, at.weights.W_enc, at.weights.b_enc), config, at)
    found = reconstruct(made.codes, at.target, at.weights.W_dec, at.kernels, made.levels)
    push = architecture.backward(made, found, config, at)
    gradients, of_products, n_entries = _weights_gradients(made, found, push, at)
    aux_loss = found.loss.new_zeros(())
    if auxk is not None and len(auxk.dead_ids):
        of_products = of_products - gradients.b_enc
        aux_loss = add_auxk_(gradients, at.x, found.error, at.weights, auxk, at.scale, at.kernels)
        of_products = of_products + gradients.b_enc
    pull = found.pulls if found.pulls.dim() == 2 else found.pulls[:, 0]
    gradients.b_dec.copy_(pull.sum(0) * (-2 * at.scale))
    if is_tied:  # b_dec is added after the decoder and taken away before the encoder
        gradients.b_dec.sub_(of_products @ at.weights.W_enc)
    named = {**gradients._asdict(), **(push.learnt or {})}
    if skip_input is not None:
        named["W_skip"] = skip_input.T @ pull * (-2 * at.scale)
    n_active = n_entries if made.is_active is None else _count(made, len(n_entries))
    losses = torch.stack([found.loss * at.scale, push.penalty, aux_loss, found.squared_error])
    at.team.sum_(*named.values(), n_active, losses)
    loss, penalty, aux_loss, squared_error = losses
    return Step(named, loss, penalty, aux_loss, squared_error, n_active, made.threshold)


def _weights_gradients(
    made: Forward, found: Reconstruction, push: Push, at: Moment
) -> tuple[Weights, Tensor, Tensor]:
    """Gradients of the weights (b_dec's is left to do), of the products x @ W_enc summed over rows
    [d_sae], and each feature's number of entries [d_sae]."""
    codes, n_features = made.codes, len(at.weights.b_enc)
    of_errors = codes.acts * (-2 * at.scale)
    if made.levels is None:
        sums = at.kernels.feature_sums(
            codes, push.pre_acts, at.x, of_errors, found.pulls, n_features
        )
        W_enc, W_dec, b_enc, n_active = sums
    else:
        by_level = split_by_level(codes, made.levels)
        pulls = found.pulls.flatten(0, 1)
        W_dec = at.kernels.sum_by_feature(by_level, of_errors, pulls, n_features)
        W_enc = at.kernels.sum_by_feature(codes, push.pre_acts, at.x, n_features)
        b_enc = torch.zeros_like(at.weights.b_enc)
        b_enc.index_add_(0, codes.feature_ids, push.pre_acts)
        n_active = torch.bincount(codes.feature_ids, minlength=n_features)
    if (dtype := at.kernels.gradients_in) is not None:  # where the tier doesn't write it at once
        W_enc, W_dec = W_enc.to(dtype), W_dec.to(dtype)
    if push.uniform:
        W_enc.add_(at.x.sum(0), alpha=push.uniform)
        b_enc.add_(push.uniform * at.n_rows)
    if push.W_dec is not None:
        W_dec.add_(push.W_dec)
    biases = b_enc.clone() if push.b_enc is None else push.b_enc
    return Weights(W_enc, W_dec, biases, torch.zeros_like(at.weights.b_dec)), b_enc, n_active


def _count(made: Forward, n_features: int) -> Tensor:
    return torch.bincount(made.codes.feature_ids[made.is_active], minlength=n_features)
