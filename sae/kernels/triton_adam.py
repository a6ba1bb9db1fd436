"""Triton: what follows the gradients, one pass over each: projection, and Adam in two sizes.

Whole rows lie in registers where a row's norm or mean is asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def remove_along(gradient_ptr, rows_ptr, d, BLOCK: tl.constexpr):
    """Take from a row of the gradient its part along the same row of rows, of norm 1."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_in = columns < d
    at = row * d + columns
    gradient = tl.load(gradient_ptr + at, mask=is_in, other=0.0).to(tl.float32)
    direction = tl.load(rows_ptr + at, mask=is_in, other=0.0)
    gradient -= tl.sum(gradient * direction, axis=0) * direction
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def adam(
    weight_ptr, gradient_ptr, mean_ptr, square_ptr, n, d,
    step_size, rate1, rate2, root_correction, grad_scale, eps,
    BLOCK: tl.constexpr, UNIT_ROWS: tl.constexpr,
):  # fmt: skip
    """Adam on a row of d (UNIT_ROWS: which then has norm 1), or on BLOCK of n numbers (d = BLOCK).

    step_size: lr / (1 - beta1^t). rate1, rate2: 1 - beta1, 1 - beta2, which float32 would lose
    digits of. root_correction: sqrt(1 - beta2^t).
    """
    columns = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * d + columns
    is_in = (columns < d) & (at < n)
    gradient = tl.load(gradient_ptr + at, mask=is_in, other=0.0).to(tl.float32) * grad_scale
    mean = tl.load(mean_ptr + at, mask=is_in, other=0.0)
    square = tl.load(square_ptr + at, mask=is_in, other=0.0)
    weight = tl.load(weight_ptr + at, mask=is_in, other=0.0)
    mean += (gradient - mean) * rate1
    square += (gradient * gradient - square) * rate2
    weight -= step_size * mean / (tl.sqrt(square) / root_correction + eps)
    if UNIT_ROWS:
        weight /= tl.sqrt(tl.sum(weight * weight, axis=0))
    tl.store(mean_ptr + at, mean, mask=is_in)
    tl.store(square_ptr + at, square, mask=is_in)
    tl.store(weight_ptr + at, weight, mask=is_in)


@triton.jit
def adam_lean(
    weight_ptr, gradient_ptr, mean_ptr, square_ptr, d,
    step_size, rate1, rate2, root_correction, grad_scale, eps,
    BLOCK: tl.constexpr, UNIT_ROWS: tl.constexpr,
):  # fmt: skip
    """Adam on a row, with its mean in bfloat16 and one second moment: square [n_rows]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_in = columns < d
    at = row * d + columns
    gradient = tl.load(gradient_ptr + at, mask=is_in, other=0.0).to(tl.float32) * grad_scale
    mean = tl.load(mean_ptr + at, mask=is_in, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=is_in, other=0.0)
    of_row = tl.sum(gradient * gradient, axis=0) / d
    square = tl.load(square_ptr + row)
    square += (of_row - square) * rate2
    mean += (gradient - mean) * rate1
    weight -= step_size * mean / (tl.sqrt(square) / root_correction + eps)
    if UNIT_ROWS:
        weight /= tl.sqrt(tl.sum(weight * weight, axis=0))
    tl.store(mean_ptr + at, mean.to(tl.bfloat16), mask=is_in)
    tl.store(square_ptr + row, square)
    tl.store(weight_ptr + at, weight, mask=is_in)
