"""Codes by row -> entries by feature: the counting sorts that an index stands on.

All kernels here and beside are compiled by numba when first called, kept on disk, and run without
Python's lock. An *entry* is a non-zero act: (feature, row, act).
"""

from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

_Function = TypeVar("_Function")


def compiled(function: _Function) -> _Function:
    """numba.njit, kept on disk, typed as the function that it is given."""
    return cast(_Function, cast(Any, numba.njit)(cache=True, nogil=True)(function))


@compiled
def sorted_by_feature(
    features: Int32, rows: Int32, acts: Float32, n_features: int
) -> tuple[Int64, Int32, Float32]:
    """Entries in the order of rows, put in the order of features; rows stay ascending in each.

    features, rows, acts: [nnz].
    Returns: offsets int64 [n_features + 1], rows and acts in the new order.
    """
    offsets = np.zeros(n_features + 1, np.int64)
    for feature in features:
        offsets[feature + 1] += 1
    for feature in range(n_features):
        offsets[feature + 1] += offsets[feature]
    place = offsets[:-1].copy()
    new_rows, new_acts = np.empty_like(rows), np.empty_like(acts)
    for i in range(len(features)):
        at = place[features[i]]
        new_rows[at], new_acts[at] = rows[i], acts[i]
        place[features[i]] = at + 1
    return offsets, new_rows, new_acts


@compiled
def joined_runs(offsets: Int64, rows: Int32, acts: Float32) -> tuple[Int64, Int32, Float32]:
    """Entries of several chunks, each by feature, as one list by feature, chunk after chunk.

    offsets: int64 [n_chunks, n_features + 1], places in rows and acts, which hold one chunk's
        entries after another's.
    Returns: offsets int64 [n_features + 1], rows, acts.
    """
    n_chunks, n_features = offsets.shape[0], offsets.shape[1] - 1
    joined = np.zeros(n_features + 1, np.int64)
    new_rows, new_acts = np.empty_like(rows), np.empty_like(acts)
    at = 0
    for feature in range(n_features):
        for chunk in range(n_chunks):
            for i in range(offsets[chunk, feature], offsets[chunk, feature + 1]):
                new_rows[at], new_acts[at] = rows[i], acts[i]
                at += 1
        joined[feature + 1] = at
    return joined, new_rows, new_acts


@compiled
def columns_of(table: Int32, rows: Int32) -> Int32:
    """Some rows of a table [n_rows, n_columns], by column: int32 [n_columns, len(rows)]."""
    columns = np.empty((table.shape[1], len(rows)), np.int32)
    for i in range(len(rows)):
        row = np.uint32(rows[i])
        for column in range(table.shape[1]):
            columns[column, i] = table[row, column]
    return columns
