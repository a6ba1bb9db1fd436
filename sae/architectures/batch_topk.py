"""BatchTopK: the batch * k largest features of a batch; at inference, those above a threshold."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor

from sae.architectures.base import Architecture, Forward, Moment, top_of_all_batches
from sae.architectures.topk import TopKConfig
from sae.config import SAEConfig
from sae.kernels import PreActs
from sae.kernels.selection import CANDIDATE_MARGIN, top_of_batch

# Weight of the newest batch in the running mean that the threshold is in training.
THRESHOLD_RATE = 0.05


class BatchTopKConfig(TopKConfig):
    """BatchTopK: k features a row are active on average over a batch."""


class BatchTopK(Architecture):
    """The batch * k largest of the whole batch, so that rows may differ in how many they use.

        pre_acts = (x - b_dec) @ W_enc + b_enc
        training:  acts = ReLU(the batch * k largest pre_acts of the batch), 0 elsewhere
        inference: acts = pre_acts where pre_acts > threshold, 0 elsewhere
        x_hat    = acts @ W_dec + b_dec

    threshold is a running mean of the smallest act kept in a batch, made anew from the final
    weights by the calibration after training.
    Source: Bussmann et al. 2024, arXiv 2412.06410.
    """

    name: ClassVar[str] = "batch_topk"
    config_class: ClassVar[type[SAEConfig]] = BatchTopKConfig

    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """The batch * k largest, and the running mean moved towards the smallest of them."""
        k, threshold = cast(TopKConfig, config).k_at(at.progress), at.threshold
        made = top_of_all_batches(pre_acts, k, float(threshold), at)
        smallest = made.threshold.to(threshold.dtype)
        mean = torch.lerp(threshold, smallest, THRESHOLD_RATE)
        # A mean that has fallen behind costs a second product in every step: begin it anew.
        is_useful = (threshold > 0) & (smallest > CANDIDATE_MARGIN * threshold)
        return made._replace(threshold=torch.where(is_useful, mean, smallest))

    def calibrate(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Tensor:
        """The smallest act that this batch keeps: above it, L0 here is k but for that one."""
        n_keep = cast(TopKConfig, config).k * len(pre_acts.x)
        smallest = top_of_batch(pre_acts, n_keep, expected=float(threshold)).smallest
        return smallest.to(threshold.dtype)
