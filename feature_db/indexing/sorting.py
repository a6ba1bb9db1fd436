"""Codes by row -> entries by feature: the counting sorts that an index stands on.

All kernels here and beside are compiled by numba when first called, kept on disk, and run without
Python's lock. An *entry* is a non-zero act: (feature, row, act).
"""

from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

UInt16 = NDArray[np.uint16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# What is looked up of every entry's row. The first three are the tokens before, on and behind it.
RECORD = ("previous", "token", "following", "document", "position", "position_bin")
N_COLUMNS = len(RECORD)
DOCUMENT, POSITION, POSITION_BIN = (RECORD.index(name) for name in RECORD[3:])

_Function = TypeVar("_Function")


def compiled(function: _Function) -> _Function:
    """numba.njit, kept on disk, typed as the function that it is given."""
    return cast(_Function, cast(Any, numba.njit)(cache=True, nogil=True)(function))


@compiled
def sort_run(
    row_counts: Int64,
    features: Int64,
    acts: Float32,
    offsets: Int64,
    rows: UInt16,
    sorted_acts: Float32,
) -> None:
    """Put entries that stand by row in the order of features; rows stay ascending in each.

    row_counts: int64 [n_rows], entries of each row, at most 65,536 rows. features, acts: [nnz].
    Filled: offsets int64 [n_features + 1]; rows (from 0) and sorted_acts, [nnz].
    """
    n_features = len(offsets) - 1
    offsets[:] = 0
    for i in range(len(features)):
        offsets[np.uint32(features[i]) + 1] += 1
    place = np.empty(n_features, np.uint32)
    for feature in range(n_features):
        place[feature] = offsets[feature]
        offsets[feature + 1] += offsets[feature]
    i = 0
    for row in range(len(row_counts)):
        for _ in range(row_counts[row]):
            narrow = np.uint32(features[i])
            at = place[narrow]
            rows[at], sorted_acts[at] = row, acts[i]
            place[narrow] = at + np.uint32(1)
            i += 1


@compiled
def join_run(
    offsets: Int64,
    rows: UInt16,
    acts: Float32,
    first_row: int,
    table: Int32,
    place: Int64,
    joined_rows: Int32,
    joined_acts: Float32,
    records: Int32,
) -> None:
    """Put the entries of one run behind those of the runs before it, feature by feature.

    offsets: int64 [n_features + 1], of the features; rows and acts begin with the first one's.
    first_row: of the run; table: int32 [rows of the run, N_COLUMNS].
    place: int64 [n_features], where each feature's next entry goes: moved on.
    Filled: joined_rows, joined_acts [nnz of all runs]; records [nnz, N_COLUMNS].
    """
    for feature in range(len(offsets) - 1):
        at = np.uint32(place[feature])
        for i in range(offsets[feature] - offsets[0], offsets[feature + 1] - offsets[0]):
            row = rows[np.uint32(i)]
            joined_rows[at], joined_acts[at] = np.int32(row) + first_row, acts[np.uint32(i)]
            for column in range(N_COLUMNS):
                records[at, column] = table[row, column]
            at += np.uint32(1)
        place[feature] = at
