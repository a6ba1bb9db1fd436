"""TopK: the k largest features of each row."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field, model_validator
from torch import Tensor

from sae.architectures.base import Architecture, Forward, Moment
from sae.codes import Codes
from sae.config import SAEConfig
from sae.kernels import Kernels, PreActs


class TopKConfig(SAEConfig):
    """TopK: the k largest features of each row are active."""

    k: int = Field(gt=0, description="Active features a row.")
    k_start: int | None = Field(
        default=None, gt=0, description="Larger k to begin with (K-annealing). None: k throughout."
    )
    k_anneal_fraction: float = Field(
        default=0.5, gt=0, le=1, description="Part of training in which k_start falls to k."
    )

    @model_validator(mode="after")
    def _k_fits(self) -> TopKConfig:
        if self.k > self.d_sae:
            raise ValueError(
                f"k={self.k} is more than d_sae={self.d_sae} features; lower k or raise d_sae"
            )
        if self.k_start is not None and not self.k <= self.k_start <= self.d_sae:
            raise ValueError(
                f"k_start={self.k_start} falls to k={self.k} of d_sae={self.d_sae} features; give "
                "one between them"
            )
        return self

    @property
    def expected_l0(self) -> float | None:
        """k; of BatchTopK as a mean over rows."""
        return float(self.k)

    def k_at(self, progress: float) -> int:
        """k after a fraction of training: linearly from k_start to k."""
        if self.k_start is None:
            return self.k
        left = max(0.0, 1 - progress / self.k_anneal_fraction)
        return self.k + round((self.k_start - self.k) * left)


class TopK(Architecture):
    """The k largest of each row.

        pre_acts = (x - b_dec) @ W_enc + b_enc
        acts     = ReLU(the k largest pre_acts of a row), 0 elsewhere
        x_hat    = acts @ W_dec + b_dec

    So L0 <= k: it is below k where fewer than k are positive. Equal pre_acts are taken in the
    order of feature_id. The threshold is unused and stays 0.
    Source: Gao et al. 2024, arXiv 2406.04093.
    """

    name: ClassVar[str] = "topk"
    config_class: ClassVar[type[SAEConfig]] = TopKConfig
    selects_by_threshold: ClassVar[bool] = False

    def select(
        self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor, kernels: Kernels
    ) -> Codes:
        """The k largest positive pre-activations of each row."""
        del threshold
        return kernels.top_k_of_rows(pre_acts, cast(TopKConfig, config).k)

    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """The same as at inference."""
        k = cast(TopKConfig, config).k_at(at.progress)
        return Forward(at.kernels.top_k_of_rows(pre_acts, k), at.threshold)
