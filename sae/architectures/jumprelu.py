"""JumpReLU: a threshold for each feature, learnt through its jump. Two recipes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from sae.architectures.base import Architecture, Forward, Moment, Push, thresholds_for_l0
from sae.codes import Codes
from sae.config import SAEConfig
from sae.gradients import Reconstruction, Weights
from sae.kernels import PreActs
from sae.sparsity import PenaltyConfig

# Of the tanh recipe: see JumpReLU.
TANH_C = 4.0
PRE_ACT_COEFFICIENT = 3e-6


class JumpReLUConfig(PenaltyConfig):
    """JumpReLU: a feature is active where its pre-activation passes its own threshold."""

    recipe: Literal["l0", "tanh"] = Field(
        default="l0",
        description="Penalty: l0 (Rajamanoharan et al. 2024), or tanh (Anthropic, January 2025).",
    )
    bandwidth: float = Field(
        default=2.0,
        gt=0,
        description="Width of the window around the threshold that its gradient comes from; 1 is "
        "about the standard deviation of a random direction's pre-activations.",
    )
    window_fraction: float = Field(
        default=0.125,
        gt=0,
        le=1,
        description="Part of a batch's rows whose windows gradients are estimated from; the others "
        "count for features that are active. 1: all rows, as in the sources, at several times the "
        "cost of a step: a wide window holds a third of all features.",
    )
    threshold_init: float = Field(
        default=1.0, gt=0, description="Thresholds' start, in the same unit."
    )

    @property
    def first_coefficient(self) -> float:
        """coefficient, or its recipe's default."""
        return self.coefficient or (0.001 if self.recipe == "l0" else 5.0)

    @property
    def largest_boost(self) -> float:
        """Of recipe l0 without bounds: its penalty reaches thresholds alone."""
        return math.inf if self.recipe == "l0" else super().largest_boost


class JumpReLU(Architecture):
    """Pre-activations above their feature's threshold.

        pre_acts = (x - b_dec) @ W_enc + b_enc
        acts     = pre_acts where pre_acts > threshold, 0 elsewhere; threshold [d_sae] = exp(t)
        x_hat    = acts @ W_dec + b_dec

    The jump has no gradient; a rectangle K(u) = 1 for |u| < 1/2, stretched over the bandwidth w
    around it, estimates one: d acts / d threshold = -threshold / w K((pre_acts - threshold) / w).
    Rows come in no order, so the sum over a batch of what holds K is that over its first rows
    (window_fraction), times as many as it is more.

    recipe l0:   loss = |x - x_hat|^2 + coefficient d_model L0, whose own estimate is
                 d L0 / d threshold = -1 / w K(...); only thresholds learn through the jump.
    recipe tanh: loss = |x - x_hat|^2 + coefficient sum tanh(4 acts)
                 + 3e-6 sum ReLU(threshold - pre_acts); all weights learn through the jump:
                 d acts / d pre_acts = 1 where active, + pre_acts / w K(...).

    Source: l0: Rajamanoharan et al. 2024, arXiv 2407.14435; tanh:
    transformer-circuits.pub/2025/january-update, with decoder rows of norm 1. In our units the
    first has 0.001 sqrt(d_model) for bandwidth and threshold_init, the second 2 and 0.1; ours also
    get there in short runs (docs/experiments.md).
    """

    name: ClassVar[str] = "jumprelu"
    config_class: ClassVar[type[SAEConfig]] = JumpReLUConfig

    def threshold_shape(self, config: SAEConfig) -> tuple[int, ...]:
        """One for each feature."""
        return (config.d_sae,)

    def start(self, weights: Weights, config: SAEConfig) -> dict[str, Tensor]:
        """log_threshold: [d_sae]."""
        threshold = cast(JumpReLUConfig, config).threshold_init
        return {"log_threshold": torch.full_like(weights.b_enc, math.log(threshold))}

    def fold_(
        self, weights: Weights, threshold: Tensor, learnt: dict[str, Tensor], config: SAEConfig
    ) -> None:
        """The thresholds."""
        del weights, config
        threshold.copy_(learnt["log_threshold"].exp())

    def calibrate(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Tensor:
        """Thresholds times a factor near 1, for target_l0 if there is one."""
        if config.expected_l0 is None:
            return threshold
        return thresholds_for_l0(pre_acts, threshold, config.expected_l0)

    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """All that are active, and all whose pre-activation is in the window."""
        chosen, threshold = cast(JumpReLUConfig, config), at.learnt["log_threshold"].exp()
        lowest = threshold - chosen.bandwidth / 2
        if chosen.recipe == "l0":  # which works on ReLU(pre_acts)
            lowest = lowest.clamp(min=0)
        n = _n_windowed(chosen, at)
        windowed, others = (pre_acts._replace(x=part) for part in pre_acts.x.tensor_split([n]))
        above = at.kernels.above_threshold
        codes = Codes.concatenate([above(windowed, lowest), above(others, threshold)])
        is_active = codes.acts > threshold[codes.feature_ids]
        active = Codes(codes.acts * is_active, codes.feature_ids, codes.offsets)
        return Forward(active, threshold, is_active, tape=codes.acts)

    def backward(self, made: Forward, found: Reconstruction, config: SAEConfig, at: Moment) -> Push:
        """Of pre-activations and thresholds, as the recipe has it."""
        chosen, ids = cast(JumpReLUConfig, config), made.codes.feature_ids
        assert made.is_active is not None
        is_active, threshold = made.is_active.to(found.dots.dtype), made.threshold[ids]
        width = chosen.bandwidth
        window = ((made.tape - threshold).abs() < width / 2) / width  # K / w
        n = _n_windowed(chosen, at)
        n_entries = int(made.codes.offsets[n])
        window[:n_entries] *= at.n_rows / n
        window[n_entries:] = 0
        acts_grad = found.dots * (-2 * at.scale)
        if chosen.recipe == "l0":
            factor = at.coefficient * at.scale * at.weights.W_dec.shape[1]
            of_threshold = -window * (threshold * acts_grad + factor)
            penalty = is_active.sum() * factor
            return Push(acts_grad * is_active, penalty, learnt=_logs(made, ids, of_threshold))
        factor = at.coefficient * at.scale
        tanh = (TANH_C * made.codes.acts).tanh()
        acts_grad = acts_grad + factor * TANH_C * (1 - tanh.square())
        inactive = PRE_ACT_COEFFICIENT * at.scale
        of_entry = acts_grad * (is_active + made.tape * window) + inactive * is_active
        learnt = _logs(made, ids, -window * threshold * acts_grad - inactive * is_active)
        learnt["log_threshold"] += inactive * at.n_rows * made.threshold
        penalty = tanh.sum() * factor + inactive * _below(made, at)
        return Push(of_entry, penalty, uniform=-inactive, learnt=learnt)


def _n_windowed(config: JumpReLUConfig, at: Moment) -> int:
    """The first rows, whose windows count."""
    return math.ceil(config.window_fraction * at.n_rows)


def _logs(made: Forward, ids: Tensor, of_threshold: Tensor) -> dict[str, Tensor]:
    """Entries' gradients of thresholds, added up by feature, as gradients of their logs."""
    sums = torch.zeros_like(made.threshold).index_add_(0, ids, of_threshold)
    return {"log_threshold": sums * made.threshold}


def _below(made: Forward, at: Moment) -> Tensor:
    """Sum over rows and features of ReLU(threshold - pre_acts): all, less those that are active."""
    sums = (
        at.x.sum(0) @ at.weights.W_enc.T + at.n_rows * at.weights.b_enc
    )  # of pre_acts, by feature
    everywhere = (made.threshold * at.n_rows - sums).sum()
    above = (made.threshold[made.codes.feature_ids] - made.tape) * made.is_active
    below: Tensor = everywhere - above.sum()
    return below
