"""Gated: whether a feature is active and how strongly are two paths that share a direction."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Forward, Moment, Push, thresholds_for_l0
from sae.codes import Codes
from sae.config import SAEConfig
from sae.gradients import Reconstruction, Weights
from sae.kernels import PreActs
from sae.sparsity import PenaltyConfig


class GatedConfig(PenaltyConfig):
    """Gated: the L1 penalty acts on gates, so that it doesn't shrink acts."""


class Tape(NamedTuple):
    """Of each entry: its gate and its magnitude before the ReLU."""

    gates: Tensor
    magnitudes: Tensor


class Gated(Architecture):
    """Gates choose, magnitudes say how strongly; both see the same directions.

        gates      = (x - b_dec) @ W_enc + b_enc
        magnitudes = exp(r_mag) * ((x - b_dec) @ W_enc) + b_mag
        acts       = ReLU(magnitudes) where gates > 0, 0 elsewhere
        x_hat      = acts @ W_dec + b_dec
        loss       = |x - x_hat|^2 + coefficient sum ReLU(gates) + |x - x_gate|^2
        x_gate     = ReLU(gates) @ W_dec + b_dec, in which the decoder counts as constant

    Both paths being monotone in the same product, a trained one is a JumpReLU: encoder
    exp(r_mag) W_enc and b_mag, threshold max(0, b_mag - exp(r_mag) b_enc). That is what is saved.
    Source: Rajamanoharan et al. 2024, arXiv 2404.16014.
    """

    name: ClassVar[str] = "gated"
    config_class: ClassVar[type[SAEConfig]] = GatedConfig

    def threshold_shape(self, config: SAEConfig) -> tuple[int, ...]:
        """One for each feature."""
        return (config.d_sae,)

    def start(self, weights: Weights, config: SAEConfig) -> dict[str, Tensor]:
        """r_mag and b_mag: [d_sae], zero: both paths are the same."""
        del config
        return {name: torch.zeros_like(weights.b_enc) for name in ("r_mag", "b_mag")}

    def fold_(
        self, weights: Weights, threshold: Tensor, learnt: dict[str, Tensor], config: SAEConfig
    ) -> None:
        """Gates into thresholds, magnitudes into the encoder."""
        del config
        gain, b_mag = learnt["r_mag"].exp(), learnt["b_mag"]
        threshold.copy_((b_mag - gain * weights.b_enc).clamp(min=0))
        weights.W_enc.mul_(gain.unsqueeze(1))
        weights.b_enc.copy_(b_mag)

    def calibrate(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Tensor:
        """Thresholds times a factor near 1, for target_l0 if there is one."""
        if config.expected_l0 is None:
            return threshold
        return thresholds_for_l0(pre_acts, threshold, config.expected_l0)

    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """All whose gate is open; active are those of a positive magnitude."""
        del config
        open_ = at.kernels.above_threshold(pre_acts, at.threshold.new_zeros(()))
        ids, gates = open_.feature_ids, open_.acts
        products = gates - at.weights.b_enc[ids]
        magnitudes = at.learnt["r_mag"].exp()[ids] * products + at.learnt["b_mag"][ids]
        codes = Codes(magnitudes.relu(), ids, open_.offsets)
        return Forward(codes, at.threshold, magnitudes > 0, tape=Tape(gates, magnitudes))

    def backward(self, made: Forward, found: Reconstruction, config: SAEConfig, at: Moment) -> Push:
        """Of gates and magnitudes, as gradients of the product that both are made from."""
        del config
        assert made.is_active is not None
        ids, tape, factor = made.codes.feature_ids, made.tape, at.coefficient * at.scale
        gate_codes = Codes(tape.gates, ids, made.codes.offsets)
        by_gates = at.kernels.reconstruct(gate_codes, at.target, at.weights.W_dec)
        of_gates = by_gates.dots * (-2 * at.scale) + factor
        of_magnitudes = found.dots * (-2 * at.scale) * made.is_active
        gain = at.learnt["r_mag"].exp()[ids]
        products = tape.gates - at.weights.b_enc[ids]
        sums = torch.zeros_like(at.learnt["r_mag"])
        learnt = {
            "r_mag": sums.index_add(0, ids, of_magnitudes * gain * products),
            "b_mag": sums.index_add(0, ids, of_magnitudes),
        }
        penalty = tape.gates.sum() * factor + by_gates.squared_error * at.scale
        return Push(
            of_gates + gain * of_magnitudes,
            penalty,
            learnt=learnt,
            b_enc=sums.index_add(0, ids, of_gates),
        )
