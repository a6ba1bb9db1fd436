"""The operations that an SAE and a training step are made of, in plain torch.

A faster tier is a subclass that overrides what it is faster at and falls back for the rest. All
tiers give the same results: selections equal to float32's, sums in a fixed order.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels.embedding_bags import (
    dot_by_entry,
    sort_by_feature,
    sum_by_feature,
    sum_by_row,
    weights_by_feature,
)
from sae.kernels.nomination import nominated_above_threshold, nominated_top_k_of_rows
from sae.kernels.selection import PreActs, above_threshold, top_k_of_rows

# Rows of a matrix that are changed at a time where that needs a copy of them.
CHUNK = 4096


class Reconstructed(NamedTuple):
    """Codes decoded and compared with their target.

    error: [batch, d_out], target minus what the codes add up to. squared_error: scalar, its sum of
    squares. dots: [nnz], error[row] . table[feature_id] of each entry.
    """

    error: Tensor
    squared_error: Tensor
    dots: Tensor


class FeatureSums(NamedTuple):
    """Sums over the rows in which each feature is active.

    of_inputs: [d_sae, d_in], sum of input_weight * inputs[row]. of_errors: [d_sae, d_out], sum of
    error_weight * errors[row]. of_weights: [d_sae], sum of input_weight. n_active: [d_sae] int64.
    """

    of_inputs: Tensor
    of_errors: Tensor
    of_weights: Tensor
    n_active: Tensor


class AdamStep(NamedTuple):
    """One step of Adam: its settings, t counted from 1, and what gradients are multiplied by."""

    lr: float
    beta1: float
    beta2: float
    t: int
    grad_scale: float = 1.0
    eps: float = 1e-8


class Kernels:
    """Plain torch: any device, any dtype.

    nominates_in: precision that candidates for active features are found in; what is selected, and
    its acts, are always float32's. gradients_in: what gradients of matrices are kept in, for a tier
    to write at once; None: the dtype of what they are sums of.
    """

    name: ClassVar[str] = "torch"
    # Part of all features up to which codes are faster than dense matrix products.
    sparse_below: ClassVar[float] = 0.1

    def __init__(self, nominates_in: str = "float32") -> None:
        self.nominates_in = nominates_in
        self.gradients_in: torch.dtype | None = None

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """What these kernels lack to work on a device; None if nothing."""
        del device
        return None

    @classmethod
    def precisions(cls, device: torch.device) -> tuple[str, ...]:
        """What candidates may be found in on a device, the fastest first."""
        if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
            return "bfloat16", "float32"
        # Elsewhere products in bfloat16 are slow on CPUs, and their error bound isn't proven.
        return ("float32", "bfloat16") if device.type == "cpu" else ("float32",)

    def top_k_of_rows(self, pre_acts: PreActs, k: int) -> Codes:
        """The k largest positive pre-activations of each row (fewer where fewer are positive).

        Of equal pre-activations, those of the smallest feature_id.
        """
        choose = nominated_top_k_of_rows if self._in_bfloat16(pre_acts) else top_k_of_rows
        return choose(pre_acts, k)

    def above_threshold(self, pre_acts: PreActs, threshold: Tensor) -> Codes:
        """All pre-activations above a threshold, a scalar or [d_sae], of either sign."""
        choose = nominated_above_threshold if self._in_bfloat16(pre_acts) else above_threshold
        return choose(pre_acts, threshold)

    def sum_by_row(self, codes: Codes, table: Tensor) -> Tensor:
        """Decode: each row's sum of act * table[feature_id]: [batch, d_out]."""
        return sum_by_row(codes, table)

    def dot_by_entry(self, codes: Codes, rows: Tensor, table: Tensor) -> Tensor:
        """rows[row] . table[feature_id] of each entry: [nnz]."""
        return dot_by_entry(codes, rows, table)

    def reconstruct(self, codes: Codes, target: Tensor, table: Tensor) -> Reconstructed:
        """Decode codes with table [d_sae, d_out], and compare with target [batch, d_out]."""
        error = target - self.sum_by_row(codes, table)
        return Reconstructed(error, error.square().sum(), self.dot_by_entry(codes, error, table))

    def sum_by_feature(self, codes: Codes, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
        """Each feature's sum of weight * rows[row]: weights [nnz], rows [batch, d] -> [d_sae, d].

        Always added up in the order of rows.
        """
        return sum_by_feature(weights, sort_by_feature(codes, d_sae), rows)

    def feature_sums(
        self,
        codes: Codes,
        input_weights: Tensor,
        inputs: Tensor,
        error_weights: Tensor,
        errors: Tensor,
        d_sae: int,
    ) -> FeatureSums:
        """What the gradients of both matrices are made of, always added up in the order of rows.

        input_weights, error_weights: [nnz], one for each entry. inputs: [batch, d_in]. errors:
        [batch, d_out].
        """
        features = sort_by_feature(codes, d_sae)
        return FeatureSums(
            sum_by_feature(input_weights, features, inputs),
            sum_by_feature(error_weights, features, errors),
            weights_by_feature(input_weights, features),
            features.n_active(),
        )

    def remove_along_(self, gradient: Tensor, rows: Tensor) -> None:
        """Take from each row of gradient [d_sae, d] its part along the same unit row of rows."""
        if gradient.dtype == rows.dtype:
            along = (gradient * rows).sum(1, keepdim=True)
            gradient.addcmul_(along, rows, value=-1)
            return
        for part, directions in zip(gradient.split(CHUNK), rows.split(CHUNK), strict=True):
            exact = part.to(rows.dtype)
            self.remove_along_(exact, directions)
            part.copy_(exact)

    def adam_(
        self,
        weight: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        step: AdamStep,
        *,
        unit_rows: bool = False,
    ) -> None:
        """Adam on weight, mean and square in place; with unit_rows its rows then have norm 1."""
        torch._fused_adam_(
            [weight],
            [gradient],
            [mean],
            [square],
            [],
            [torch.tensor(float(step.t), device=weight.device)],
            lr=step.lr,
            beta1=step.beta1,
            beta2=step.beta2,
            weight_decay=0.0,
            eps=step.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=_inverse(step.grad_scale, weight) if step.grad_scale != 1 else None,
        )
        if unit_rows:
            weight.div_(weight.norm(dim=1, keepdim=True))

    def adam_lean_(
        self,
        weight: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        step: AdamStep,
        *,
        unit_rows: bool = False,
    ) -> None:
        """Lean Adam on a matrix, in place: mean [n, d] bfloat16, square [n] of a row's mean square.

            mean   += (1 - beta1) (g - mean),   square += (1 - beta2) (mean over d of g^2 - square)
            weight -= lr mean / (1 - beta1^t) / (sqrt(square / (1 - beta2^t)) + eps)

        With unit_rows its rows then have norm 1.
        Source: one second moment for a block of weights: Adam-mini, arXiv 2406.16793.
        """
        root_correction = (1 - step.beta2**step.t) ** 0.5
        step_size = step.lr / (1 - step.beta1**step.t)
        for start in range(0, len(weight), CHUNK):
            part = slice(start, start + CHUNK)
            scaled = gradient[part].to(weight.dtype) * step.grad_scale
            square[part].lerp_(scaled.square().mean(1), 1 - step.beta2)
            exact = mean[part].to(weight.dtype).lerp_(scaled, 1 - step.beta1)
            mean[part] = exact.to(mean.dtype)
            divisors = square[part].sqrt().div_(root_correction).add_(step.eps)
            weight[part].addcdiv_(exact, divisors.unsqueeze(1), value=-step_size)
            if unit_rows:
                weight[part].div_(weight[part].norm(dim=1, keepdim=True))

    def _in_bfloat16(self, pre_acts: PreActs) -> bool:
        # The error bound isn't proven for other devices' products, nor needed for other dtypes.
        x = pre_acts.x
        is_float32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        return self.nominates_in == "bfloat16" and is_float32_on_cpu


def _inverse(scale: float, like: Tensor) -> Tensor:
    """What torch divides gradients by."""
    return torch.tensor(1 / scale, device=like.device)
