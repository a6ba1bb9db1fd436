"""Triton: lists of candidates -> the chosen ones. Rows by themselves, a program for ROWS of them.

The kth largest of a row is found by bisection over float32s' bits, read as ordered integers: 32
counts in place of a sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sae.kernels.triton_product import row_errors


@triton.jit
def _ordered(values):
    """float32 -> int32 that compares the same way."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(keys, is_in, k, ROWS: tl.constexpr):
    """Each row's kth largest of int32 keys [ROWS, n] where is_in, as int64; -2^31 if there are
    fewer."""
    low = tl.full((ROWS,), -(2**31), tl.int64)  # k keys are at least this
    high = tl.full((ROWS,), 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        is_above = is_in & (keys.to(tl.int64) >= middle[:, None])
        is_enough = tl.sum(is_above.to(tl.int32), axis=1) >= k
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit
def narrow_lists(
    counts_ptr, ids_ptr, uppers_ptr, x_norm_ptr, x_rest_ptr, W_norm_ptr, W_rest_ptr,
    kept_ptr, n_kept_ptr, n_rows, n_features, capacity, k, depth_error,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Drop what can't be of a row's k largest positive scores (k 0: nothing).

    counts: [batch], at most WIDTH. kept: [batch, WIDTH] int32, n_features where one was dropped.
    n_kept: [batch] int32.
    """
    rows, lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_row = rows < n_rows
    counts = tl.load(counts_ptr + rows, mask=is_row, other=0)
    is_in = lanes[None, :] < counts[:, None]
    at = rows.to(tl.int64)[:, None] * capacity + lanes[None, :]
    ids = tl.load(ids_ptr + at, mask=is_in, other=0)
    if k > 0:
        uppers = tl.load(uppers_ptr + at, mask=is_in, other=0.0)
        of_norm, of_rest = row_errors(x_norm_ptr, x_rest_ptr, rows % n_rows, depth_error)
        errors = of_norm[:, None] * tl.load(W_norm_ptr + ids, mask=is_in, other=0.0)
        errors += of_rest[:, None] * tl.load(W_rest_ptr + ids, mask=is_in, other=0.0)
        # Twice the error below the upper bound, and a little more for its own rounding.
        lowers = uppers - errors * 2.01 - tl.abs(uppers) * 2.0**-20
        kth = _kth_largest(_ordered(lowers), is_in, k, ROWS)
        is_in = is_in & (_ordered(uppers).to(tl.int64) >= kth[:, None]) & (uppers > 0)
    kept_at = rows.to(tl.int64)[:, None] * WIDTH + lanes[None, :]
    tl.store(kept_ptr + kept_at, tl.where(is_in, ids, n_features), mask=is_row[:, None])
    tl.store(n_kept_ptr + rows, tl.sum(is_in.to(tl.int32), axis=1), mask=is_row)


@triton.jit
def pack_lists(lists_ptr, offsets_ptr, ids_ptr, n_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Each row's first ids of lists [batch, WIDTH] to where offsets [batch + 1] say, as int64."""
    rows, lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    starts, is_in = _segments(offsets_ptr, rows, lanes, n_rows)
    at = rows.to(tl.int64)[:, None] * WIDTH + lanes[None, :]
    ids = tl.load(lists_ptr + at, mask=is_in, other=0)
    tl.store(ids_ptr + starts[:, None] + lanes[None, :], ids.to(tl.int64), mask=is_in)


@triton.jit
def choose_largest(
    scores_ptr, offsets_ptr, limits_ptr, is_chosen_ptr, is_certain_ptr, n_rows, k,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mark the k largest positive scores of each row; of equal ones, the first.

    is_certain: whether nothing outside the list can belong to them: k lie above the row's limit,
    or the limit is 0.
    """
    rows, lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    is_row = rows < n_rows
    starts, is_in = _segments(offsets_ptr, rows, lanes, n_rows)
    at = starts[:, None] + lanes[None, :]
    scores = tl.load(scores_ptr + at, mask=is_in, other=0.0)
    limits = tl.load(limits_ptr + rows, mask=is_row, other=0.0)
    n_above = tl.sum((is_in & (scores > limits[:, None])).to(tl.int32), axis=1)
    is_certain = (limits <= 0) | (n_above >= k)
    tl.store(is_certain_ptr + rows, is_certain.to(tl.int8), mask=is_row)
    keys = _ordered(scores)
    kth = _kth_largest(keys, is_in, k, ROWS)[:, None]
    is_above, is_tied = is_in & (keys.to(tl.int64) > kth), is_in & (keys.to(tl.int64) == kth)
    n_missing = k - tl.sum(is_above.to(tl.int32), axis=1)
    is_first = is_tied & (tl.cumsum(is_tied.to(tl.int32), axis=1) <= n_missing[:, None])
    is_chosen = (is_above | is_first) & (scores > 0)
    tl.store(is_chosen_ptr + at, is_chosen.to(tl.int8), mask=is_in)


@triton.jit
def _segments(offsets_ptr, rows, lanes, n_rows):
    """Where rows' segments start, and which lanes each has."""
    is_row = rows < n_rows
    starts = tl.load(offsets_ptr + rows, mask=is_row, other=0)
    ends = tl.load(offsets_ptr + rows + 1, mask=is_row, other=0)
    return starts, lanes[None, :] < (ends - starts)[:, None]
