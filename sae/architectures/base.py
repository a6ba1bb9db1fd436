"""What an architecture is: which features are active, and what the loss asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sae.codes import Codes
from sae.config import SAEConfig
from sae.gradients import Levels, Reconstruction, Weights
from sae.kernels import Kernels, PreActs
from sae.kernels.selection import (
    CANDIDATE_MARGIN,
    above_threshold,
    keep_largest,
    top_of_batch,
)
from sae.team import Team

# How far calibration may move thresholds for an L0 that is aimed at.
LARGEST_SCALE = 1.25


class Moment(NamedTuple):
    """Where a training step stands.

    x: [n_rows, d_in], this process's rows, less b_dec where that is what is reconstructed too.
    target: [n_rows, d_out], what codes should add up to. weights: of the SAE. learnt: the
    architecture's own parameters. threshold: the SAE's. coefficient: of the architecture's penalty
    (see sae.sparsity). progress: the fraction of steps done. scale: 1 / (batch V), the batch being
    that of all processes. widths: of the places that are reconstructed, side by side.
    """

    x: Tensor
    target: Tensor
    weights: Weights
    learnt: dict[str, Tensor]
    threshold: Tensor
    coefficient: float
    progress: float
    scale: float
    widths: tuple[int, ...]
    kernels: Kernels
    team: Team

    @property
    def n_rows(self) -> int:
        """Rows of this process."""
        return len(self.x)


class Forward(NamedTuple):
    """What training selects in a batch.

    codes: the entries that a gradient may reach; acts are 0 where a feature isn't active.
    threshold: the SAE's from now on. is_active: [nnz] bool; None if all are. levels: if nested.
    tape: whatever backward needs again.
    """

    codes: Codes
    threshold: Tensor
    is_active: Tensor | None = None
    levels: Levels | None = None
    tape: Any = None


class Push(NamedTuple):
    """What the loss asks of pre-activations, and of what else an architecture's penalty reaches.

    pre_acts: [nnz], the gradient of each entry of the codes. penalty: scalar, its loss. uniform:
    the gradient that every other pre-activation of the batch has, and these have on top. learnt:
    gradients of the architecture's own parameters. W_dec: [d_sae, d_out], the penalty's own.
    b_enc: [d_sae], where it isn't the sum of pre_acts.
    """

    pre_acts: Tensor
    penalty: Tensor
    uniform: float = 0.0
    learnt: dict[str, Tensor] | None = None
    W_dec: Tensor | None = None
    b_enc: Tensor | None = None


class Architecture(ABC):
    """A stateless strategy. What it learns besides the weights every SAE has lies in a dict of
    tensors while it trains, and is folded into weights and threshold at the end."""

    name: ClassVar[str]
    config_class: ClassVar[type[SAEConfig]]
    # Whether inference compares pre-activations with the SAE's threshold.
    selects_by_threshold: ClassVar[bool] = True

    def select(
        self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor, kernels: Kernels
    ) -> Codes:
        """Active features at inference, of each row alone: those above the threshold."""
        del config
        return kernels.above_threshold(pre_acts, threshold)

    @abstractmethod
    def forward(self, pre_acts: PreActs, config: SAEConfig, at: Moment) -> Forward:
        """Active features of a training batch."""

    def backward(self, made: Forward, found: Reconstruction, config: SAEConfig, at: Moment) -> Push:
        """The gradient of pre-activations: that of acts, where nothing is added to the loss."""
        del made, config
        return Push(found.dots * (-2 * at.scale), found.loss.new_zeros(()))

    def start(self, weights: Weights, config: SAEConfig) -> dict[str, Tensor]:
        """The architecture's own parameters before the first step, the weights changed in place."""
        del weights, config
        return {}

    def threshold_shape(self, config: SAEConfig) -> tuple[int, ...]:
        """Shape of the SAE's threshold: () or (d_sae,)."""
        del config
        return ()

    def fold_(  # noqa: B027 (most have nothing to fold)
        self, weights: Weights, threshold: Tensor, learnt: dict[str, Tensor], config: SAEConfig
    ) -> None:
        """Fold what was learnt into weights and threshold, in place: what inference works on."""

    def calibrate(self, pre_acts: PreActs, config: SAEConfig, threshold: Tensor) -> Tensor:
        """The inference threshold that fits this batch best; the same one if there is none."""
        del pre_acts, config
        return threshold


def thresholds_for_l0(pre_acts: PreActs, threshold: Tensor, l0: float) -> Tensor:
    """Features' thresholds [d_sae] times the one factor that makes L0 of these rows l0.

    The factor stays within LARGEST_SCALE: making up for more is training's business. Thresholds
    that are all 0, as before training, become all the same.
    """
    n_keep = max(1, round(l0 * len(pre_acts.x)))
    if not threshold.any():
        smallest = top_of_batch(pre_acts, n_keep, expected=0.0).smallest
        return torch.full_like(threshold, float(smallest))
    codes = above_threshold(pre_acts, threshold / LARGEST_SCALE)
    if codes.nnz <= n_keep:
        return threshold / LARGEST_SCALE
    ratios = codes.acts / threshold[codes.feature_ids]
    largest_left_out = ratios.kthvalue(codes.nnz - n_keep).values
    return threshold * largest_left_out.clamp(max=LARGEST_SCALE)


def top_of_all_batches(pre_acts: PreActs, k: int, expected: float, at: Moment) -> Forward:
    """The k * rows largest over the batches of all processes, and the smallest of them.

    expected: as for top_of_batch, the same for all processes.
    """
    if at.team.is_alone:
        above = at.kernels.above_threshold
        codes, smallest = top_of_batch(pre_acts, k * at.n_rows, expected, above)
        return Forward(codes, smallest)
    n_keep = k * round(at.team.sum(at.n_rows))
    codes = _candidates_of_all(pre_acts, k, n_keep, expected, at)
    everyones = at.team.gather(codes.acts)
    acts = torch.cat(everyones)
    if len(acts) <= n_keep:
        return Forward(codes, acts.min() if len(acts) else acts.new_zeros(()))
    smallest = acts.kthvalue(len(acts) - n_keep + 1).values
    n_tied = n_keep - int((acts > smallest).sum())  # of equal acts, those of the first processes
    n_tied -= sum(int((each == smallest).sum()) for each in everyones[: at.team.rank])
    n_tied = max(0, min(n_tied, int((codes.acts == smallest).sum())))
    return Forward(keep_largest(codes, int((codes.acts > smallest).sum()) + n_tied), smallest)


def _candidates_of_all(
    pre_acts: PreActs, k: int, n_keep: int, expected: float, at: Moment
) -> Codes:
    """This process's part of at least n_keep candidates (or all there are)."""
    if expected > 0:
        codes = at.kernels.above_threshold(
            pre_acts, at.threshold.new_tensor(CANDIDATE_MARGIN * expected)
        )
        if at.team.sum(codes.nnz) >= n_keep:
            return codes
    _, own = top_of_batch(pre_acts, k * at.n_rows, 0.0, at.kernels.above_threshold)
    mean = at.team.sum(float(own)) / at.team.world_size
    codes = at.kernels.above_threshold(pre_acts, at.threshold.new_tensor(0.9 * mean))
    if at.team.sum(codes.nnz) >= n_keep:
        return codes
    return at.kernels.above_threshold(pre_acts, at.threshold.new_zeros(()))
