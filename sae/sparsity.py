"""How much an architecture's sparsity penalty counts: a coefficient, or an L0 that is aimed at.

With target_l0 the coefficient is the output of a controller: of e, the log of L0 over its target,
clipped and smoothed over a few steps, it follows e itself (PROPORTIONAL) and the sum of e over
the run (INTEGRAL, a run's length being 1). The first damps what the second would make swing; that
the second counts in runs, not steps, makes short and long runs alike, since learning rates fall as
runs grow. Ours; the gains are those that ended nearest their target in docs/experiments.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pydantic import Field, model_validator

from sae.config import SAEConfig

PROPORTIONAL = 2.0
INTEGRAL = 30.0
# L0 counts as at most this many times off its target: early codes are dense.
LARGEST_RATIO = 2.0
# The sum takes no larger e than this in: weights follow at their own pace, and it would run ahead.
LARGEST_SUMMAND = 0.2
# The first part raises the log of a coefficient by at most this where the penalty reaches weights:
# early codes are dense whatever it is, and features pushed down together come back slowly.
LARGEST_BOOST = 0.2
# Weight of the newest step in the smoothed e.
SMOOTHING = 0.2
# The integral moves the coefficient by at most this factor from where it starts.
LARGEST_FACTOR = 1000.0


class Control(NamedTuple):
    """Where the controller stands: the sum over e, as a log of coefficients; and the smoothed e."""

    integral: float = 0.0
    excess: float = 0.0


class PenaltyConfig(SAEConfig):
    """Settings of the architectures whose L0 comes from a penalty."""

    coefficient: float | None = Field(
        default=None,
        gt=0,
        description="Weight of the penalty; with target_l0, where it starts. None: 5; of "
        "jumprelu's recipe l0, 0.001. Rows are scaled to a mean squared norm of d_model, and the "
        "error is the squared one of a row.",
    )
    target_l0: float | None = Field(
        default=None,
        gt=0,
        description="L0 to end at: the coefficient is moved until it is. None: coefficient stays.",
    )
    sparsity_warmup_fraction: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Part of training in which the coefficient rises from 0.",
    )

    @model_validator(mode="after")
    def _target_fits(self) -> PenaltyConfig:
        if self.target_l0 is not None and self.target_l0 > self.d_sae:
            raise ValueError(
                f"target_l0={self.target_l0:g} is more than d_sae={self.d_sae} features; lower it"
            )
        return self

    @property
    def expected_l0(self) -> float | None:
        """target_l0."""
        return self.target_l0

    @property
    def first_coefficient(self) -> float:
        """coefficient, or its default."""
        return self.coefficient or 5.0

    @property
    def largest_boost(self) -> float:
        """How far the controller's proportional part may raise the log of the coefficient."""
        return LARGEST_BOOST

    def coefficient_at(self, control: Control, progress: float) -> float:
        """The coefficient that counts after a fraction of training."""
        log_factor = control.integral + min(PROPORTIONAL * control.excess, self.largest_boost)
        return self.first_coefficient * math.exp(log_factor) * self._warmed_up(progress)

    def next_control(self, control: Control, l0: float, progress: float, n_steps: int) -> Control:
        """Where the controller stands after a step of that L0. n_steps: of the whole run."""
        if self.target_l0 is None:
            return control
        limit = math.log(LARGEST_RATIO)
        now = math.log(max(l0 / self.target_l0, 1e-9))
        now = max(-limit, min(limit, now))
        excess = control.excess + SMOOTHING * (now - control.excess)
        if self._warmed_up(progress) < 1:  # what L0 is yet to become would only wind it up
            return Control(control.integral, excess)
        bound = math.log(LARGEST_FACTOR)
        summand = max(-LARGEST_SUMMAND, min(LARGEST_SUMMAND, excess))
        integral = control.integral + INTEGRAL / n_steps * summand
        return Control(max(-bound, min(bound, integral)), excess)

    def _warmed_up(self, progress: float) -> float:
        if self.sparsity_warmup_fraction == 0:
            return 1.0
        return min(1.0, progress / self.sparsity_warmup_fraction)
