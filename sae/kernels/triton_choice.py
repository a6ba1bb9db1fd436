"""Triton: lists of candidates -> the chosen ones, a program for each row.

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
def _kth_largest(keys, is_in, k):
    """The kth largest of int32 keys where is_in, as int64; -2^31 if there are fewer."""
    low = tl.full((), -(2**31), tl.int64)  # k keys are at least this
    high = tl.full((), 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        n_above = tl.sum((is_in & (keys.to(tl.int64) >= middle)).to(tl.int32), axis=0)
        low = tl.where(n_above >= k, middle, low)
        high = tl.where(n_above >= k, high, middle - 1)
    return low


@triton.jit
def narrow_lists(
    counts_ptr, ids_ptr, uppers_ptr, x_norm_ptr, x_rest_ptr, W_norm_ptr, W_rest_ptr,
    sorted_ptr, n_kept_ptr, capacity, k, depth_error, n_features, BLOCK: tl.constexpr,
):  # fmt: skip
    """Drop what can't be of the row's k largest positive ones (k 0: nothing), sort by feature_id.

    A list that isn't whole becomes empty. sorted: [batch, BLOCK] int32. n_kept: [batch] int32.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    count = tl.where(count > capacity, 0, count)
    lanes = tl.arange(0, BLOCK)
    is_in = lanes < count
    ids = tl.load(ids_ptr + row * capacity + lanes, mask=is_in, other=0)
    if k > 0:
        uppers = tl.load(uppers_ptr + row * capacity + lanes, mask=is_in, other=0.0)
        of_norm, of_rest = row_errors(x_norm_ptr, x_rest_ptr, row, depth_error)
        errors = of_norm * tl.load(W_norm_ptr + ids) + of_rest * tl.load(W_rest_ptr + ids)
        # Twice the error below the upper bound, and a little more for its own rounding.
        lowers = uppers - errors * 2.01 - tl.abs(uppers) * 2.0**-20
        kth = _kth_largest(_ordered(lowers), is_in, k)
        is_in = is_in & (_ordered(uppers).to(tl.int64) >= kth) & (uppers > 0)
    ids = tl.sort(tl.where(is_in, ids, n_features))
    n_kept = tl.sum(is_in.to(tl.int32), axis=0)
    tl.store(sorted_ptr + row * BLOCK + lanes, ids, mask=lanes < n_kept)
    tl.store(n_kept_ptr + row, n_kept)


@triton.jit
def pack_lists(lists_ptr, offsets_ptr, ids_ptr, WIDTH: tl.constexpr):
    """Each row's first ids of lists [batch, WIDTH] to where offsets [batch + 1] say, as int64."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    lanes = tl.arange(0, WIDTH)
    is_in = lanes < end - start
    ids = tl.load(lists_ptr + row * WIDTH + lanes, mask=is_in, other=0)
    tl.store(ids_ptr + start + lanes, ids.to(tl.int64), mask=is_in)


@triton.jit
def choose_largest(
    scores_ptr, offsets_ptr, limits_ptr, is_chosen_ptr, is_certain_ptr, k, BLOCK: tl.constexpr
):
    """Mark the k largest positive scores of each row; of equal ones, the first.

    is_certain: whether nothing outside the list can belong to them: k lie above the row's limit,
    or the limit is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    lanes = tl.arange(0, BLOCK)
    is_in = lanes < end - start
    scores = tl.load(scores_ptr + start + lanes, mask=is_in, other=0.0)
    limit = tl.load(limits_ptr + row)
    n_above = tl.sum((is_in & (scores > limit)).to(tl.int32), axis=0)
    tl.store(is_certain_ptr + row, ((limit <= 0) | (n_above >= k)).to(tl.int8))
    keys = _ordered(scores).to(tl.int64)
    kth = _kth_largest(_ordered(scores), is_in, k)
    is_above, is_tied = is_in & (keys > kth), is_in & (keys == kth)
    n_missing = k - tl.sum(is_above.to(tl.int32), axis=0)
    is_first = is_tied & (tl.cumsum(is_tied.to(tl.int32), axis=0) <= n_missing)
    is_chosen = (is_above | is_first) & (scores > 0)
    tl.store(is_chosen_ptr + start + lanes, is_chosen.to(tl.int8), mask=is_in)
