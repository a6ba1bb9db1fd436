"""Triton: sums over codes. No atomics, so the order of every sum is fixed; no sum in less than
float32.

A program has ROWS bags (rows of the batch, or features) and a block of columns. Blocks change
slowest: all programs that run at a time gather from one block of columns, which then lies in L2
(a block's width is chosen so), and device memory is read about once however often a row is used.
Sums over columns leave a part for each block, added up after.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bags(offsets_ptr, n_bags, ROWS: tl.constexpr):
    """This program's block of columns, its bags, which there are, where they start and end."""
    pid = tl.program_id(0)
    n_programs = tl.cdiv(n_bags, ROWS)
    bags = (pid % n_programs) * ROWS + tl.arange(0, ROWS)
    is_bag = bags < n_bags
    starts = tl.load(offsets_ptr + bags, mask=is_bag, other=0)
    ends = tl.load(offsets_ptr + bags + 1, mask=is_bag, other=0)
    return pid // n_programs, bags.to(tl.int64), is_bag, starts, ends


@triton.jit
def _entries(starts, ends, first, ENTRIES: tl.constexpr):
    """Places of ENTRIES entries of each bag from its first on, and which there are."""
    places = starts[:, None] + first + tl.arange(0, ENTRIES)[None, :]
    return places, places < ends[:, None]


@triton.jit
def _gathered(table_ptr, ids, is_in, columns, d):
    """Rows ids [ROWS, ENTRIES] of a table, these columns: [ROWS, ENTRIES, columns]."""
    at = ids.to(tl.int64)[:, :, None] * d + columns[None, None, :]
    is_in = is_in[:, :, None] & (columns < d)[None, None, :]
    return tl.load(table_ptr + at, mask=is_in, other=0.0)


@triton.jit
def dot_entries(
    rows_ptr, table_ptr, ids_ptr, offsets_ptr, parts_ptr, n_rows, nnz, d,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """rows[row] . table[id] of each entry, over one block of columns: parts [n_blocks, nnz]."""
    block, rows, is_row, starts, ends = _bags(offsets_ptr, n_rows, ROWS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    is_cell = is_row[:, None] & (columns < d)[None, :]
    values = tl.load(rows_ptr + rows[:, None] * d + columns[None, :], mask=is_cell, other=0.0)
    for first in range(0, tl.max(ends - starts, axis=0).to(tl.int32), ENTRIES):
        places, is_in = _entries(starts, ends, first, ENTRIES)
        ids = tl.load(ids_ptr + places, mask=is_in, other=0)
        table = _gathered(table_ptr, ids, is_in, columns, d)
        dots = tl.sum(table * values[:, None, :], axis=2)
        tl.store(parts_ptr + block.to(tl.int64) * nnz + places, dots, mask=is_in)


@triton.jit
def decode_rows(
    acts_ptr, ids_ptr, offsets_ptr, table_ptr, target_ptr, out_ptr, squares_ptr, parts_ptr,
    n_rows, nnz, d,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    """out = a row's sum of act * table[id], over one block of columns; with COMPARE:

    out = target minus that, squares [n_blocks, n_rows] its sum of squares, and parts
    [n_blocks, nnz] its product with each entry's row of the table, which the first loop has just
    brought into L1.
    """
    block, rows, is_row, starts, ends = _bags(offsets_ptr, n_rows, ROWS)
    most = tl.max(ends - starts, axis=0).to(tl.int32)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    is_cell = is_row[:, None] & (columns < d)[None, :]
    at = rows[:, None] * d + columns[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, most, ENTRIES):
        places, is_in = _entries(starts, ends, first, ENTRIES)
        ids = tl.load(ids_ptr + places, mask=is_in, other=0)
        acts = tl.load(acts_ptr + places, mask=is_in, other=0.0)
        table = _gathered(table_ptr, ids, is_in, columns, d)
        total += tl.sum(table * acts[:, :, None], axis=1)
    if COMPARE:
        total = tl.load(target_ptr + at, mask=is_cell, other=0.0) - total
        squares_at = block.to(tl.int64) * n_rows + rows
        tl.store(squares_ptr + squares_at, tl.sum(total * total, axis=1), mask=is_row)
        for first in range(0, most, ENTRIES):
            places, is_in = _entries(starts, ends, first, ENTRIES)
            ids = tl.load(ids_ptr + places, mask=is_in, other=0)
            table = _gathered(table_ptr, ids, is_in, columns, d)
            dots = tl.sum(table * total[:, None, :], axis=2)
            tl.store(parts_ptr + block.to(tl.int64) * nnz + places, dots, mask=is_in)
    tl.store(out_ptr + at, total, mask=is_cell)


@triton.jit
def sum_features(
    order_ptr, rows_ptr, offsets_ptr, weights_ptr, inputs_ptr, sums_ptr, of_weights_ptr,
    n_features, d, ROWS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A feature's sum of weight * inputs[row], over one block of columns, in the order of rows.

    order, rows: [nnz], entries feature by feature (see embedding_bags.FeatureOrder). of_weights:
    [n_features], the sum of weights.
    """
    block, features, is_feature, starts, ends = _bags(offsets_ptr, n_features, ROWS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_weights = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tl.max(ends - starts, axis=0).to(tl.int32), ENTRIES):
        places, is_in = _entries(starts, ends, first, ENTRIES)
        entries = tl.load(order_ptr + places, mask=is_in, other=0)
        rows = tl.load(rows_ptr + places, mask=is_in, other=0)
        weights = tl.load(weights_ptr + entries, mask=is_in, other=0.0)
        inputs = _gathered(inputs_ptr, rows, is_in, columns, d)
        total += tl.sum(inputs * weights[:, :, None], axis=1)
        of_weights += tl.sum(weights, axis=1)
    at = features[:, None] * d + columns[None, :]
    is_cell = is_feature[:, None] & (columns < d)[None, :]
    tl.store(sums_ptr + at, total.to(sums_ptr.dtype.element_ty), mask=is_cell)
    if block == 0:
        tl.store(of_weights_ptr + features, of_weights, mask=is_feature)
