"""The CUDA tier: kernels in Triton, which comes with torch for CUDA.

float32 tensors in rows without gaps are its work; the rest goes to plain torch. Candidates are
found in float16 and chosen by float32 scores (see triton_selection); everything else is float32
in a fixed order (see triton_sums). Under Triton's interpreter (TRITON_INTERPRET=1) it also works,
slowly, on a CPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels.base import AdamStep, FeatureSums, Kernels, Reconstructed
from sae.kernels.embedding_bags import sort_by_feature
from sae.kernels.selection import PreActs

# Tensor cores that take float16 and add in float32, and what Triton compiles for.
CAPABILITY = (8, 0)


class TritonKernels(Kernels):
    """Triton: CUDA devices of compute capability 8.0 or more."""

    name: ClassVar[str] = "triton"

    def __init__(self, nominates_in: str = "float16") -> None:
        super().__init__(nominates_in)

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """Triton, or a GPU that it compiles for."""
        if find_spec("triton") is None:
            return "triton isn't installed (it comes with torch for CUDA)"
        if _interprets():
            return None
        if device.type != "cuda" or torch.version.cuda is None:
            return "they need a CUDA device"
        if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
            return f"its compute capability is {found[0]}.{found[1]}, and 8.0 is needed"
        return None

    @classmethod
    def precisions(cls, device: torch.device) -> tuple[str, ...]:
        """float16, which costs what bfloat16 does and rounds finer."""
        del device
        return "float16", "float32"

    def top_k_of_rows(self, pre_acts: PreActs, k: int) -> Codes:
        """As Kernels: candidates from a float16 product, the choice from float32 scores."""
        if not self._nominates(pre_acts):
            return super().top_k_of_rows(pre_acts, k)
        from sae.kernels import triton_selection

        def exactly(some: PreActs) -> Codes:
            return Kernels.top_k_of_rows(self, some, k)

        return triton_selection.top_k_of_rows(pre_acts, k, exactly)

    def above_threshold(self, pre_acts: PreActs, threshold: Tensor) -> Codes:
        """As Kernels: candidates from a float16 product, the choice from float32 scores."""
        if not self._nominates(pre_acts):
            return super().above_threshold(pre_acts, threshold)
        from sae.kernels import triton_selection

        def exactly(some: PreActs) -> Codes:
            return Kernels.above_threshold(self, some, threshold)

        return triton_selection.above_threshold(pre_acts, threshold, exactly)

    def sum_by_row(self, codes: Codes, table: Tensor) -> Tensor:
        """As Kernels."""
        if not _suits(codes.acts, table) or codes.n_rows == 0:
            return super().sum_by_row(codes, table)
        from sae.kernels import triton_launch

        return triton_launch.sum_by_row(codes, table)

    def dot_by_entry(self, codes: Codes, rows: Tensor, table: Tensor) -> Tensor:
        """As Kernels."""
        if not _suits(rows, table) or codes.nnz == 0:
            return super().dot_by_entry(codes, rows, table)
        from sae.kernels import triton_launch

        return triton_launch.dot_by_entry(codes, rows, table)

    def reconstruct(self, codes: Codes, target: Tensor, table: Tensor) -> Reconstructed:
        """As Kernels, in one pass over the entries' rows of the table."""
        if not _suits(codes.acts, target, table) or codes.n_rows == 0:
            return super().reconstruct(codes, target, table)
        from sae.kernels import triton_launch

        return Reconstructed(*triton_launch.reconstruct(codes, target, table))

    def sum_by_feature(self, codes: Codes, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
        """As Kernels."""
        if not _suits(weights, rows):
            return super().sum_by_feature(codes, weights, rows, d_sae)
        from sae.kernels import triton_launch

        features = sort_by_feature(codes, d_sae)
        dtype = self.gradients_in or rows.dtype
        return triton_launch.sum_by_feature(weights, features, rows, dtype)[0]

    def feature_sums(
        self,
        codes: Codes,
        input_weights: Tensor,
        inputs: Tensor,
        error_weights: Tensor,
        errors: Tensor,
        d_sae: int,
    ) -> FeatureSums:
        """As Kernels, and written in gradients_in."""
        if not _suits(input_weights, inputs, error_weights, errors):
            return super().feature_sums(codes, input_weights, inputs, error_weights, errors, d_sae)
        from sae.kernels import triton_launch

        features = sort_by_feature(codes, d_sae)
        dtype = self.gradients_in or inputs.dtype
        sums, of_weights = triton_launch.sum_by_feature(input_weights, features, inputs, dtype)
        of_errors, _ = triton_launch.sum_by_feature(error_weights, features, errors, dtype)
        return FeatureSums(sums, of_errors, of_weights, features.n_active())

    def remove_along_(self, gradient: Tensor, rows: Tensor) -> None:
        """As Kernels, in one pass."""
        if not _suits(rows) or not gradient.is_contiguous():
            super().remove_along_(gradient, rows)
            return
        from sae.kernels import triton_launch

        triton_launch.remove_along_(gradient, rows)

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
        """As Kernels, in one pass, the division by rows' norms included."""
        if not _suits(weight, gradient, mean, square):
            super().adam_(weight, gradient, mean, square, step, unit_rows=unit_rows)
            return
        from sae.kernels import triton_launch

        triton_launch.adam_(weight, gradient, mean, square, step, unit_rows=unit_rows)

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
        """As Kernels, in one pass."""
        if not _suits(weight) or not gradient.is_contiguous():
            super().adam_lean_(weight, gradient, mean, square, step, unit_rows=unit_rows)
            return
        from sae.kernels import triton_launch

        triton_launch.adam_lean_(weight, gradient, mean, square, step, unit_rows=unit_rows)

    def _nominates(self, pre_acts: PreActs) -> bool:
        is_some = len(pre_acts.x) > 0 and len(pre_acts.b) > 0
        return self.nominates_in == "float16" and is_some and _suits(*pre_acts)


def _suits(*tensors: Tensor) -> bool:
    """Whether the kernels can read them: they record nothing for autograd."""
    needs_grad = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    return not needs_grad and all(
        each.dtype == torch.float32 and each.is_contiguous() for each in tensors
    )


def _interprets() -> bool:
    """Whether Triton interprets kernels in place of compiling them."""
    import triton

    return bool(triton.knobs.runtime.interpret)
