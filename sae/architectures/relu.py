"""ReLU with an L1 penalty: the first SAEs, and what the others are compared with."""

from __future__ import annotations

from typing import ClassVar

import torch

from sae.architectures.base import Architecture, Forward, Moment, Push
from sae.config import SAEConfig
from sae.gradients import Reconstruction
from sae.kernels import PreActs
from sae.sparsity import PenaltyConfig


class ReLUConfig(PenaltyConfig):
    """ReLU + L1: every positive pre-activation is active, and acts cost what they are."""


class ReLU(Architecture):
    """Every positive pre-activation is active.

        pre_acts = (x - b_dec) @ W_enc + b_enc
        acts     = ReLU(pre_acts)
        x_hat    = acts @ W_dec + b_dec
        loss     = |x - x_hat|^2 + coefficient * sum over features of acts * |W_dec row|

    Decoder rows have norm 1 over all that is reconstructed; a crosscoder's row has a part for
    each place, and |W_dec row| is then the sum of their norms, which makes features choose places.
    Source: Anthropic, transformer-circuits.pub/2024/april-update; crosscoders: Lindsey et al. 2024.
    """

    name: ClassVar[str] = "relu"
    config_class: ClassVar[type[SAEConfig]] = ReLUConfig

    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """Every positive pre-activation."""
        del config
        return Forward(at.kernels.above_threshold(pre_acts, at.threshold), at.threshold)

    def backward(self, made: Forward, found: Reconstruction, config: SAEConfig, at: Moment) -> Push:
        """The reconstruction's, and the penalty's: of acts, and of the norms of a row's parts."""
        del config
        factor, codes, W_dec = at.coefficient * at.scale, made.codes, at.weights.W_dec
        parts = W_dec.split(at.widths, dim=1)
        norms = [part.norm(dim=1) for part in parts]
        of_entry = torch.stack(norms).sum(0)[codes.feature_ids]
        pre_acts = found.dots * (-2 * at.scale) + factor * of_entry
        penalty = (codes.acts * of_entry).sum() * factor
        if len(parts) == 1:  # a row's norm is 1, and stays so
            return Push(pre_acts, penalty)
        sums = factor * torch.zeros_like(norms[0]).index_add(0, codes.feature_ids, codes.acts)
        directions = [
            part * (sums / norm.clamp(min=1e-12)).unsqueeze(1)
            for part, norm in zip(parts, norms, strict=True)
        ]
        return Push(pre_acts, penalty, W_dec=torch.cat(directions, dim=1))
