"""Triton: the encoder product on tensor cores, of which only promising scores reach memory.

x [batch, d] and W [d_sae, d] are rounded to float16, row by row after division by a power of two
(float16 costs what bfloat16 does, and rounds eight times finer; the power of two keeps it in
range). A score s = x . W_i + b_i and its estimate s', added up in float32, differ by at most

    (|x - low(x)| + d 2^-22 |x|) |W_i|  +  |low(x)| |W_i - low(W_i)|  +  2^-22 |s'|

by Cauchy and Schwarz, with the norms measured and not bounded. d 2^-22 is for sums: a tensor core
adds 16 products to an accumulator, each aligned to the largest and cut to 23 fraction bits or more
(Fasi et al. 2021, PeerJ CS 7:e330), so its error is at most 17/16 d 2^-23 |x| |W_i|; what is left
of the term covers the float32 score itself, whose sums are blocked. On a GPU the tests of the
kernels hold scores to this bound.

What may be above a threshold, s' plus its error, is appended to the row's list. Atomic counters
hand out the places, so a list's order is open: it is sorted before use, and all that depends on
the order is gone. A list that overflows only says so.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Features whose scores are compared by their maximum alone when thresholds are guessed.
MAX_GROUP = 32


@triton.jit
def _program_tile(n_row_tiles, n_feature_tiles, GROUP: tl.constexpr):
    """This program's tile of rows and of features: GROUP row tiles share features while those lie
    in L2."""
    pid = tl.program_id(0)
    in_group = GROUP * n_feature_tiles
    first = (pid // in_group) * GROUP
    height = min(n_row_tiles - first, GROUP)
    return first + (pid % in_group) % height, (pid % in_group) // height


@triton.jit
def _product(
    x_ptr, W_ptr, rows, features, d,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """low(x) . low(W) of rows and features, added up in float32: [BM, BN]."""
    depth = tl.arange(0, BK)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * d + depth[None, :]
    W_ptrs = W_ptr + features.to(tl.int64)[None, :] * d + depth[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, d, BK):
        if EVEN:
            x, W = tl.load(x_ptrs), tl.load(W_ptrs)
        else:
            is_in = depth < d - start
            x = tl.load(x_ptrs, mask=is_in[None, :], other=0.0)
            W = tl.load(W_ptrs, mask=is_in[:, None], other=0.0)
        acc = tl.dot(x, W, acc)
        x_ptrs += BK
        W_ptrs += BK
    return acc


@triton.jit
def _estimates(products, x_scale_ptr, W_scale_ptr, bias_ptr, rows, features):
    """Scores, from products of rows that were divided by their scale."""
    scale = tl.load(x_scale_ptr + rows)[:, None] * tl.load(W_scale_ptr + features)[None, :]
    return products * scale + tl.load(bias_ptr + features)[None, :]


@triton.jit
def _half(tile, BM: tl.constexpr, BN: tl.constexpr, SIDE: tl.constexpr):
    """The left (0) or the right (1) half of a tile [BM, BN]."""
    left, right = tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))
    return right if SIDE else left


@triton.jit
def round_rows(
    rows_ptr, low_ptr, scale_ptr, norm_ptr, rest_ptr, n_rows, d,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's float16 twin, the power of two that it was divided by, its norm, and the norm of what
    rounding lost."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_row = rows < n_rows
    at = rows.to(tl.int64)[:, None] * d + columns[None, :]
    is_in = is_row[:, None] & (columns < d)[None, :]
    values = tl.load(rows_ptr + at, mask=is_in, other=0.0)
    largest = tl.max(tl.abs(values), axis=1)
    scale = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(scale > 0, scale, 1.0)
    low = (values / scale[:, None]).to(tl.float16)
    rest = values - low.to(tl.float32) * scale[:, None]
    tl.store(low_ptr + at, low, mask=is_in)
    tl.store(scale_ptr + rows, scale, mask=is_row)
    tl.store(norm_ptr + rows, tl.sqrt(tl.sum(values * values, axis=1)), mask=is_row)
    tl.store(rest_ptr + rows, tl.sqrt(tl.sum(rest * rest, axis=1)), mask=is_row)


@triton.jit
def group_maxima(
    x_ptr, W_ptr, x_scale_ptr, W_scale_ptr, bias_ptr, maxima_ptr, n_rows, n_sampled, n_groups, d,
    STRIDE: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Every STRIDE-th feature's score, SIZE of them told by their maximum.

    maxima: [batch, n_groups]. The last n_sampled % SIZE of the sample fill no group: left out.
    """
    row_tile, tile = _program_tile(tl.cdiv(n_rows, BM), tl.cdiv(n_sampled, BN), GROUP)
    rows, sampled = row_tile * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    features = (sampled % n_sampled) * STRIDE
    products = _product(x_ptr, W_ptr, rows % n_rows, features, d, BM, BN, BK, EVEN)
    scores = _estimates(products, x_scale_ptr, W_scale_ptr, bias_ptr, rows % n_rows, features)
    maxima = tl.max(tl.reshape(scores, (BM, BN // SIZE, SIZE)), axis=2)
    groups = tile * (BN // SIZE) + tl.arange(0, BN // SIZE)
    is_in = (rows < n_rows)[:, None] & (groups < n_groups)[None, :]
    tl.store(maxima_ptr + rows.to(tl.int64)[:, None] * n_groups + groups[None, :], maxima, is_in)


@triton.jit
def append_above(
    x_ptr, W_ptr, x_scale_ptr, W_scale_ptr, bias_ptr,
    x_norm_ptr, x_rest_ptr, W_norm_ptr, W_rest_ptr,
    row_limits_ptr, feature_limits_ptr, counts_ptr, ids_ptr, uppers_ptr,
    n_rows, n_features, d, capacity, depth_error,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """All features whose score may be above the sum of their row's and their own limit.

    counts: [batch] int32, zeroed before; more than capacity where a list isn't whole. ids, uppers:
    [batch, capacity], a feature's id and the largest that its score can be.
    """
    row_tile, tile = _program_tile(tl.cdiv(n_rows, BM), tl.cdiv(n_features, BN), GROUP)
    rows, features = row_tile * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    products = _product(x_ptr, W_ptr, rows % n_rows, features % n_features, d, BM, BN, BK, EVEN)
    # An eighth at a time: all of the tile's places and bounds at once don't fit in registers.
    for i in tl.static_range(8):
        half = _half(products, BM, BN, i // 4)
        quarter = _half(half, BM, BN // 2, i // 2 % 2)
        _append(
            _half(quarter, BM, BN // 4, i % 2), rows, tile * BN + i * (BN // 8),
            x_scale_ptr, W_scale_ptr, bias_ptr, x_norm_ptr, x_rest_ptr, W_norm_ptr, W_rest_ptr,
            row_limits_ptr, feature_limits_ptr, counts_ptr, ids_ptr, uppers_ptr,
            n_rows, n_features, capacity, depth_error, BN // 8,
        )  # fmt: skip


@triton.jit
def _append(
    products, rows, first_feature,
    x_scale_ptr, W_scale_ptr, bias_ptr, x_norm_ptr, x_rest_ptr, W_norm_ptr, W_rest_ptr,
    row_limits_ptr, feature_limits_ptr, counts_ptr, ids_ptr, uppers_ptr,
    n_rows, n_features, capacity, depth_error, N: tl.constexpr,
):  # fmt: skip
    """append_above, of products that are made: [rows, N]."""
    features = first_feature + tl.arange(0, N)
    is_in = (rows < n_rows)[:, None] & (features < n_features)[None, :]
    rows, features = rows % n_rows, features % n_features
    estimates = _estimates(products, x_scale_ptr, W_scale_ptr, bias_ptr, rows, features)
    of_norm, of_rest = row_errors(x_norm_ptr, x_rest_ptr, rows, depth_error)
    errors = of_norm[:, None] * tl.load(W_norm_ptr + features)[None, :]
    errors += of_rest[:, None] * tl.load(W_rest_ptr + features)[None, :]
    uppers = estimates + (errors + tl.abs(estimates) * 2.0**-22)
    row_limits = tl.load(row_limits_ptr + rows)
    limits = row_limits[:, None] + tl.load(feature_limits_ptr + features)[None, :]
    # Lists that have overflowed take no more: dense scores would cost an atomic each.
    has_room = tl.load(counts_ptr + rows, volatile=True) <= capacity
    is_hit = (uppers > limits) & is_in & has_room[:, None]
    counters = counts_ptr + rows[:, None] + tl.zeros_like(is_hit).to(tl.int32)
    one = tl.full(is_hit.shape, 1, tl.int32)
    places = tl.atomic_add(counters, one, mask=is_hit, sem="relaxed")
    is_kept = is_hit & (places < capacity)
    at = rows[:, None] * capacity + places  # fits in int32: see triton_selection
    tl.store(ids_ptr + at, features[None, :] + tl.zeros_like(places), mask=is_kept)
    tl.store(uppers_ptr + at, uppers, mask=is_kept)


@triton.jit
def row_errors(x_norm_ptr, x_rest_ptr, rows, depth_error):
    """What a feature's |W_i| and |W_i - low(W_i)| are multiplied by in the error of its estimate.

    depth_error: d 2^-22. The factor covers the rounding of these very norms.
    """
    norm, rest = tl.load(x_norm_ptr + rows), tl.load(x_rest_ptr + rows)
    return (rest + depth_error * norm) * (1 + 2.0**-10), (norm + rest) * (1 + 2.0**-10)
