"""Matryoshka BatchTopK: nested prefixes of the features each reconstruct by themselves."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field, model_validator

from sae.architectures.base import Forward, Moment
from sae.architectures.batch_topk import BatchTopK, BatchTopKConfig
from sae.config import SAEConfig
from sae.gradients import Levels
from sae.kernels import PreActs


class MatryoshkaConfig(BatchTopKConfig):
    """BatchTopK whose first features reconstruct without the later ones."""

    prefixes: tuple[int, ...] | None = Field(
        default=None,
        description="Numbers of first features that reconstruct alone, ascending, d_sae last. "
        "None: d_sae / 16, / 8, / 4, / 2 and d_sae.",
    )

    @model_validator(mode="after")
    def _prefixes_nest(self) -> MatryoshkaConfig:
        sizes = self.sizes
        if sizes[0] < 1 or list(sizes) != sorted(set(sizes)) or sizes[-1] != self.d_sae:
            raise ValueError(
                f"prefixes={sizes} don't nest: give ascending numbers of features, the last of "
                f"them d_sae={self.d_sae}"
            )
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The prefixes, d_sae last."""
        if self.prefixes is not None:
            return self.prefixes or (0,)
        return tuple(dict.fromkeys(max(1, self.d_sae // part) for part in (16, 8, 4, 2, 1)))


class Matryoshka(BatchTopK):
    """BatchTopK with a reconstruction for each prefix of the features.

        x_hat_m = acts[:, :prefix_m] @ W_dec[:prefix_m] + b_dec
        loss    = mean over m of |x - x_hat_m|^2

    General features end up in the small prefixes, and special ones don't absorb them.
    Source: Bussmann et al. 2025, arXiv 2503.17547.
    """

    name: ClassVar[str] = "matryoshka"
    config_class: ClassVar[type[SAEConfig]] = MatryoshkaConfig

    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """BatchTopK's, each feature at the level of the first prefix that holds it."""
        made = super().forward(pre_acts, config, at)
        sizes = cast(MatryoshkaConfig, config).sizes
        ends = torch.tensor(sizes, device=made.codes.feature_ids.device)
        levels = torch.bucketize(made.codes.feature_ids, ends, right=True)
        return made._replace(levels=Levels(levels, len(sizes)))
