"""Triton: sums over codes. No atomics, so the order of every sum is fixed; no sum in less than
float32.

Columns go in blocks, and blocks change slowest: all programs that run at a time gather from one
block of columns, which then lies in L2 (a block's width is chosen so), and device memory is read
about once however often a row is used. Sums over columns leave a part for each block, added up
after.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _entries(start, end, first, BLOCK: tl.constexpr):
    """Places of BLOCK entries of a bag from its first on, and which of them there are."""
    places = start + first + tl.arange(0, BLOCK)
    return places, places < end


@triton.jit
def _gathered(table_ptr, ids, is_in, columns, is_column, d):
    """Rows ids of a table, these columns: [entries, columns]."""
    at = ids.to(tl.int64)[:, None] * d + columns[None, :]
    return tl.load(table_ptr + at, mask=is_in[:, None] & is_column[None, :], other=0.0)


@triton.jit
def dot_entries(
    rows_ptr, table_ptr, ids_ptr, offsets_ptr, parts_ptr, n_rows, nnz, d,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """rows[row] . table[id] of each entry, over one block of columns: parts [n_blocks, nnz]."""
    pid = tl.program_id(0).to(tl.int64)
    block, row = pid // n_rows, pid % n_rows
    start, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < d
    values = tl.load(rows_ptr + row * d + columns, mask=is_column, other=0.0)
    for first in range(0, (end - start).to(tl.int32), ENTRIES):
        places, is_in = _entries(start, end, first, ENTRIES)
        ids = tl.load(ids_ptr + places, mask=is_in, other=0)
        table = _gathered(table_ptr, ids, is_in, columns, is_column, d)
        dots = tl.sum(table * values[None, :], axis=1)
        tl.store(parts_ptr + block * nnz + places, dots, mask=is_in)


@triton.jit
def decode_rows(
    acts_ptr, ids_ptr, offsets_ptr, table_ptr, target_ptr, out_ptr, squares_ptr, parts_ptr,
    n_rows, nnz, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    """out = a row's sum of act * table[id], over one block of columns; with COMPARE:

    out = target minus that, squares [n_blocks, n_rows] its sum of squares, and parts
    [n_blocks, nnz] its product with each entry's row of the table, which the first loop has just
    brought into L1.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, row = pid // n_rows, pid % n_rows
    start, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    n = (end - start).to(tl.int32)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < d
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, n, ENTRIES):
        places, is_in = _entries(start, end, first, ENTRIES)
        ids = tl.load(ids_ptr + places, mask=is_in, other=0)
        acts = tl.load(acts_ptr + places, mask=is_in, other=0.0)
        table = _gathered(table_ptr, ids, is_in, columns, is_column, d)
        total += tl.sum(table * acts[:, None], axis=0)
    if COMPARE:
        total = tl.load(target_ptr + row * d + columns, mask=is_column, other=0.0) - total
        tl.store(squares_ptr + block * n_rows + row, tl.sum(total * total, axis=0))
        for first in range(0, n, ENTRIES):
            places, is_in = _entries(start, end, first, ENTRIES)
            ids = tl.load(ids_ptr + places, mask=is_in, other=0)
            table = _gathered(table_ptr, ids, is_in, columns, is_column, d)
            dots = tl.sum(table * total[None, :], axis=1)
            tl.store(parts_ptr + block * nnz + places, dots, mask=is_in)
    tl.store(out_ptr + row * d + columns, total, mask=is_column)


@triton.jit
def sum_features(
    order_ptr, rows_ptr, offsets_ptr, weights_ptr, inputs_ptr, sums_ptr, of_weights_ptr,
    n_features, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A feature's sum of weight * inputs[row], over one block of columns, in the order of rows.

    order, rows: [nnz], entries feature by feature (see embedding_bags.FeatureOrder). of_weights:
    [n_features], the sum of weights.
    """
    pid = tl.program_id(0).to(tl.int64)
    block, feature = pid // n_features, pid % n_features
    start, end = tl.load(offsets_ptr + feature), tl.load(offsets_ptr + feature + 1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < d
    total = tl.zeros((COLUMNS,), tl.float32)
    of_weights = tl.zeros((ENTRIES,), tl.float32)
    for first in range(0, (end - start).to(tl.int32), ENTRIES):
        places, is_in = _entries(start, end, first, ENTRIES)
        entries = tl.load(order_ptr + places, mask=is_in, other=0)
        rows = tl.load(rows_ptr + places, mask=is_in, other=0)
        weights = tl.load(weights_ptr + entries, mask=is_in, other=0.0)
        inputs = _gathered(inputs_ptr, rows, is_in, columns, is_column, d)
        total += tl.sum(inputs * weights[:, None], axis=0)
        of_weights += weights
    sums = total.to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + feature * d + columns, sums, mask=is_column)
    if block == 0:
        tl.store(of_weights_ptr + feature, tl.sum(of_weights, axis=0))
