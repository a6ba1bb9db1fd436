"""How much an architecture's sparsity penalty counts: a coefficient, or an L0 that is aimed at."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from sae.config import SAEConfig

# How fast the coefficient follows L0: e^RATE a step while L0 is twice what it should be.
RATE = 0.01
# L0 counts as no further off than this many times its target: early codes are dense.
LARGEST_RATIO = 2.0


class PenaltyConfig(SAEConfig):
    """Settings of the architectures whose L0 comes from a penalty."""

    coefficient: float = Field(
        gt=0,
        description="Weight of the penalty; with target_l0, where it starts. Rows are scaled to a "
        "mean squared norm of d_model, and the error is the squared one of a row.",
    )
    target_l0: float | None = Field(
        default=None,
        gt=0,
        description="L0 to end at: the coefficient is moved until it is. None: coefficient stays.",
    )
    sparsity_warmup_fraction: float = Field(
        default=0.2,
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
    def log_start(self) -> float:
        """Log of the coefficient before the first step."""
        return math.log(self.coefficient)

    def coefficient_at(self, log_coefficient: float, progress: float) -> float:
        """The coefficient that counts after a fraction of training."""
        return math.exp(log_coefficient) * self._warmed_up(progress)

    def next_log_coefficient(self, log_coefficient: float, l0: float, progress: float) -> float:
        """The coefficient's log after a step of that L0: towards target_l0, once warmed up."""
        if self.target_l0 is None or self._warmed_up(progress) < 1:
            return log_coefficient
        excess = l0 / self.target_l0 - 1
        return log_coefficient + RATE * max(-LARGEST_RATIO, min(LARGEST_RATIO, excess))

    def _warmed_up(self, progress: float) -> float:
        if self.sparsity_warmup_fraction == 0:
            return 1.0
        return min(1.0, progress / self.sparsity_warmup_fraction)
