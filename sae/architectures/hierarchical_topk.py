"""HierarchicalTopK: one SAE that is good at every k up to the largest."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field, model_validator

from sae.architectures.base import Forward, Moment
from sae.architectures.topk import TopK, TopKConfig
from sae.codes import Codes
from sae.config import SAEConfig
from sae.gradients import Levels
from sae.kernels import PreActs


class HierarchicalTopKConfig(TopKConfig):
    """TopK whose strongest features reconstruct without the weaker ones."""

    ks: tuple[int, ...] | None = Field(
        default=None,
        description="Numbers of a row's strongest features that reconstruct alone, ascending, k "
        "last. None: 1, 2, 4, ... and k.",
    )

    @model_validator(mode="after")
    def _ks_nest(self) -> HierarchicalTopKConfig:
        if self.k_start is not None:
            raise ValueError(f"k_start={self.k_start}: HierarchicalTopK trains every k already")
        ks = self.all_ks
        if ks[0] < 1 or list(ks) != sorted(set(ks)) or ks[-1] != self.k:
            raise ValueError(f"ks={ks}: give ascending numbers of features, the last k={self.k}")
        return self

    @property
    def all_ks(self) -> tuple[int, ...]:
        """The numbers of features, k last."""
        if self.ks is not None:
            return self.ks or (0,)
        powers = [2**i for i in range(self.k.bit_length()) if 2**i < self.k]
        return (*powers, self.k)


class HierarchicalTopK(TopK):
    """TopK with a reconstruction for each of several k.

        x_hat_j = (the j largest acts of a row) @ W_dec + b_dec
        loss    = mean over j in ks of |x - x_hat_j|^2

    The trained SAE may be cut to any k:
    `sae.config = HierarchicalTopKConfig(d_sae=sae.d_sae, k=8)`.
    Source: Balagansky et al. 2025, arXiv 2505.24473, with all j from 1 to k.
    """

    name: ClassVar[str] = "hierarchical_topk"
    config_class: ClassVar[type[SAEConfig]] = HierarchicalTopKConfig

    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """TopK's, entries of a row in the order of their acts, so that levels ascend."""
        made = super().forward(pre_acts, config, at)
        ks = cast(HierarchicalTopKConfig, config).all_ks
        acts, feature_ids, offsets = made.codes
        rows = made.codes.rows()
        order = acts.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        ranks = torch.arange(len(acts), device=acts.device) - offsets[:-1][rows]
        ends = torch.tensor(ks, device=acts.device)
        levels = torch.bucketize(ranks, ends, right=True)
        ordered = Codes(acts[order], feature_ids[order], offsets)
        return made._replace(codes=ordered, levels=Levels(levels, len(ks)))
