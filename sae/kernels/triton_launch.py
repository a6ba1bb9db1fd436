"""Launches of the Triton kernels that sum over codes and that update parameters.

Imported only where triton is.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from sae.codes import Codes
from sae.kernels import triton_adam, triton_sums
from sae.kernels.base import AdamStep
from sae.kernels.embedding_bags import FeatureOrder

# Of the L2 cache, for the block of columns that all programs gather from (an H100 has 50 MB).
L2_BYTES = 24 * 2**20
# Rows, or features, of a program: on a GPU each has its own; interpreted, a program costs so much
# by itself that it has many.
ROWS = 64 if triton.knobs.runtime.interpret else 1
# Entries that a program gathers at a time.
ENTRIES = 16
# Numbers a program of the element-wise Adam updates.
FLAT = 1024


def columns_of_block(n_rows: int, d: int) -> int:
    """Columns a block of a float32 table [n_rows, d]: the most, 64 to 512, that leave it in L2."""
    fits = [width for width in (512, 256, 128, 64) if 4 * width * n_rows <= L2_BYTES]
    widest: int = triton.next_power_of_2(d)
    return min(fits[0] if fits else 256, max(16, widest))


def dot_by_entry(codes: Codes, rows: Tensor, table: Tensor) -> Tensor:
    """rows[row] . table[feature_id] of each entry: [nnz]."""
    d, width = table.shape[1], columns_of_block(*table.shape)
    n_blocks = triton.cdiv(d, width)
    parts = rows.new_empty(n_blocks, codes.nnz)
    with torch.cuda.device_of(rows):
        triton_sums.dot_entries[programs(codes.n_rows, n_blocks)](
            rows, table, codes.feature_ids, codes.offsets, parts, codes.n_rows, codes.nnz, d,
            ROWS=ROWS, ENTRIES=ENTRIES, COLUMNS=width, num_warps=_warps(width),
        )  # fmt: skip
    return parts.sum(0)


def sum_by_row(codes: Codes, table: Tensor) -> Tensor:
    """Each row's sum of act * table[feature_id]: [batch, d]."""
    out = table.new_empty(codes.n_rows, table.shape[1])
    _decode(codes, table, None, out, out, out)
    return out


def reconstruct(codes: Codes, target: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Kernels.reconstruct gives, in its order."""
    n_blocks = triton.cdiv(table.shape[1], columns_of_block(*table.shape))
    error = torch.empty_like(target)
    squares = target.new_empty(n_blocks, codes.n_rows)
    parts = target.new_empty(n_blocks, codes.nnz)
    _decode(codes, table, target, error, squares, parts)
    return error, squares.sum(), parts.sum(0)


def _decode(
    codes: Codes, table: Tensor, target: Tensor | None, out: Tensor, squares: Tensor, parts: Tensor
) -> None:
    d, width = table.shape[1], columns_of_block(*table.shape)
    with torch.cuda.device_of(table):
        triton_sums.decode_rows[programs(codes.n_rows, triton.cdiv(d, width))](
            codes.acts, codes.feature_ids, codes.offsets, table,
            out if target is None else target, out, squares, parts, codes.n_rows, codes.nnz, d,
            ROWS=ROWS, ENTRIES=ENTRIES, COLUMNS=width, COMPARE=target is not None,
            num_warps=_warps(width),
        )  # fmt: skip


def sum_by_feature(
    weights: Tensor, features: FeatureOrder, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each feature's sum of weight * rows[row], [d_sae, d] in dtype, and of weight, [d_sae]."""
    n_features, d = len(features.offsets) - 1, rows.shape[1]
    width = columns_of_block(*rows.shape)
    sums = rows.new_empty(n_features, d, dtype=dtype)
    of_weights = rows.new_empty(n_features)
    with torch.cuda.device_of(rows):
        triton_sums.sum_features[programs(n_features, triton.cdiv(d, width))](
            features.order, features.rows, features.offsets, weights, rows, sums, of_weights,
            n_features, d, ROWS=ROWS, ENTRIES=ENTRIES, COLUMNS=width, num_warps=_warps(width),
        )  # fmt: skip
    return sums, of_weights


def remove_along_(gradient: Tensor, rows: Tensor) -> None:
    """Take from each row of gradient its part along the same unit row of rows."""
    n_rows, d = rows.shape
    block = triton.next_power_of_2(d)
    with torch.cuda.device_of(rows):
        triton_adam.remove_along[programs(n_rows)](
            gradient, rows, n_rows, d, ROWS=ROWS, BLOCK=block, num_warps=_warps(block)
        )


def adam_(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: AdamStep,
    *,
    unit_rows: bool,
) -> None:
    """Adam on weight, mean and square in place; unit_rows: of a matrix, whose rows have norm 1."""
    n = weight.numel()
    d = weight.shape[1] if unit_rows else FLAT
    n_rows, block = triton.cdiv(n, d), triton.next_power_of_2(d)
    with torch.cuda.device_of(weight):
        triton_adam.adam[programs(n_rows)](
            weight, gradient, mean, square, n_rows, d, n, *_settings(step),
            ROWS=ROWS, BLOCK=block, UNIT_ROWS=unit_rows, num_warps=_warps(block),
        )  # fmt: skip


def adam_lean_(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: AdamStep,
    *,
    unit_rows: bool,
) -> None:
    """Lean Adam on a matrix, its mean in bfloat16 and its rows' second moments, in place."""
    n_rows, d = weight.shape
    block = triton.next_power_of_2(d)
    with torch.cuda.device_of(weight):
        triton_adam.adam_lean[programs(n_rows)](
            weight, gradient, mean, square, n_rows, d, *_settings(step),
            ROWS=ROWS, BLOCK=block, UNIT_ROWS=unit_rows, num_warps=_warps(block),
        )  # fmt: skip


def programs(n_rows: int, n_blocks: int = 1) -> tuple[int]:
    """The grid of a kernel that takes ROWS rows and one block of columns at a time."""
    return (n_blocks * triton.cdiv(n_rows, ROWS),)


def _settings(step: AdamStep) -> tuple[float, ...]:
    """step_size, rate1, rate2, root_correction, grad_scale, eps of the kernels."""
    step_size = step.lr / (1 - step.beta1**step.t)
    root_correction = math.sqrt(1 - step.beta2**step.t)
    return (
        step_size, 1 - step.beta1, 1 - step.beta2, root_correction, step.grad_scale, step.eps,
    )  # fmt: skip


def _warps(width: int) -> int:
    """Warps for a block of so many columns: registers for 16 numbers a thread at the most."""
    return max(1, min(16, width // 256))
