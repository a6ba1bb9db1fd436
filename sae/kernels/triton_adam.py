"""Triton: what follows the gradients, one pass over each: projection, and Adam in two sizes.

A program has ROWS whole rows, where a row's norm or mean is asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cells(n_rows, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows, their numbers' places, and which of these there are."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_in = (rows < n_rows)[:, None] & (columns < d)[None, :]
    return rows, rows.to(tl.int64)[:, None] * d + columns[None, :], is_in


@triton.jit
def remove_along(gradient_ptr, directions_ptr, n_rows, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Take from a row of the gradient its part along the same row of directions, of norm 1."""
    _, at, is_in = _cells(n_rows, d, ROWS, BLOCK)
    gradient = tl.load(gradient_ptr + at, mask=is_in, other=0.0).to(tl.float32)
    direction = tl.load(directions_ptr + at, mask=is_in, other=0.0)
    gradient -= tl.sum(gradient * direction, axis=1)[:, None] * direction
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def adam(
    weight_ptr, gradient_ptr, mean_ptr, square_ptr, n_rows, d, n,
    step_size, rate1, rate2, root_correction, grad_scale, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNIT_ROWS: tl.constexpr,
):  # fmt: skip
    """Adam on rows of d (UNIT_ROWS: which then have norm 1); n: numbers in all, the last row may
    be cut short.

    step_size: lr / (1 - beta1^t). rate1, rate2: 1 - beta1, 1 - beta2, which float32 would lose
    digits of. root_correction: sqrt(1 - beta2^t).
    """
    _, at, is_in = _cells(n_rows, d, ROWS, BLOCK)
    is_in = is_in & (at < n)
    gradient = tl.load(gradient_ptr + at, mask=is_in, other=0.0).to(tl.float32) * grad_scale
    mean = tl.load(mean_ptr + at, mask=is_in, other=0.0)
    square = tl.load(square_ptr + at, mask=is_in, other=0.0)
    weight = tl.load(weight_ptr + at, mask=is_in, other=0.0)
    mean += (gradient - mean) * rate1
    square += (gradient * gradient - square) * rate2
    weight -= step_size * mean / (tl.sqrt(square) / root_correction + eps)
    if UNIT_ROWS:
        weight = _unit(weight)
    tl.store(mean_ptr + at, mean, mask=is_in)
    tl.store(square_ptr + at, square, mask=is_in)
    tl.store(weight_ptr + at, weight, mask=is_in)


@triton.jit
def adam_lean(
    weight_ptr, gradient_ptr, mean_ptr, square_ptr, n_rows, d,
    step_size, rate1, rate2, root_correction, grad_scale, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNIT_ROWS: tl.constexpr,
):  # fmt: skip
    """Adam on rows of d, with its mean in bfloat16 and one second moment a row: square [n_rows]."""
    rows, at, is_in = _cells(n_rows, d, ROWS, BLOCK)
    gradient = tl.load(gradient_ptr + at, mask=is_in, other=0.0).to(tl.float32) * grad_scale
    mean = tl.load(mean_ptr + at, mask=is_in, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=is_in, other=0.0)
    square = tl.load(square_ptr + rows, mask=rows < n_rows, other=0.0)
    square += (tl.sum(gradient * gradient, axis=1) / d - square) * rate2
    mean += (gradient - mean) * rate1
    divisors = tl.sqrt(square) / root_correction + eps
    weight -= step_size * mean / divisors[:, None]
    if UNIT_ROWS:
        weight = _unit(weight)
    tl.store(mean_ptr + at, mean.to(tl.bfloat16), mask=is_in)
    tl.store(square_ptr + rows, square, mask=rows < n_rows)
    tl.store(weight_ptr + at, weight, mask=is_in)


@triton.jit
def _unit(rows):
    """Rows divided by their norms; those that are all zero (past the end) stay."""
    squares = tl.sum(rows * rows, axis=1)
    return rows / tl.sqrt(tl.where(squares > 0, squares, 1.0))[:, None]
