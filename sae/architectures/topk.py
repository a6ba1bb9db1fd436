"""TopK: the k largest features of each row."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field, model_validator
from torch import Tensor

from sae.architectures.base import Architecture, Selection
from sae.codes import Codes
from sae.config import SAEConfig
from sae.nomination import nominated_top_k_of_rows
from sae.selection import PreActs, top_k_of_rows


class TopKConfig(SAEConfig):
    """TopK: the k largest features of each row are active."""

    k: int = Field(gt=0, description="Active features a row.")

    @model_validator(mode="after")
    def _k_fits(self) -> TopKConfig:
        if self.k > self.d_sae:
            raise ValueError(
                f"k={self.k} is more than d_sae={self.d_sae} features; lower k or raise d_sae"
            )
        return self


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

    def select_training(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Selection:
        """The same as at inference."""
        choose = nominated_top_k_of_rows if pre_acts.nominate else top_k_of_rows
        return Selection(choose(pre_acts, cast(TopKConfig, config).k), threshold)

    def select(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Codes:
        """The k largest positive pre-activations of each row."""
        del threshold
        return top_k_of_rows(pre_acts, cast(TopKConfig, config).k)

    def expected_l0(self, config: SAEConfig) -> float | None:
        """k."""
        return float(cast(TopKConfig, config).k)
