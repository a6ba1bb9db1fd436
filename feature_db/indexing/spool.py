"""The entries of one part of a text, on disk until its features are counted.

In: the codes of chunk after chunk. Out: the entries of any range of features, and the features of
every row. Disk: 12 bytes an entry; memory: what is asked for.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sorting import Float32, Int32, Int64, joined_runs, sorted_by_feature


class Entries(NamedTuple):
    """Entries of features first <= feature < first + len(offsets) - 1, rows ascending in each.

    offsets: int64 [n_features + 1]. rows: int32, from the part's first. acts: float32, above 0.
    """

    first: int
    offsets: Int64
    rows: Int32
    acts: Float32

    def of_entry(self) -> Int64:
        """The feature of each entry, from 0 for the first: int64 [nnz]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


class EntrySpool:
    """folder: an empty one, for these files alone."""

    def __init__(self, folder: Path, d_sae: int) -> None:
        self._folder, self._d_sae = folder, d_sae
        self._row_counts: list[Int64] = []
        self._ends = [0]

    def add(self, row_counts: Int64, features: Int64, acts: Float32, first_row: int) -> None:
        """Append a chunk. row_counts: entries of each of its rows. features, acts: by row.

        first_row: of the chunk in the part.
        """
        rows = np.repeat(np.arange(len(row_counts), dtype=np.int32), row_counts) + np.int32(
            first_row
        )
        narrow = features.astype(np.int32)
        offsets, sorted_rows, sorted_acts = sorted_by_feature(narrow, rows, acts, self._d_sae)
        self._append("features", narrow)
        self._append("rows", sorted_rows)
        self._append("acts", sorted_acts)
        self._append("offsets", offsets + self._ends[-1])
        self._row_counts.append(row_counts)
        self._ends.append(self._ends[-1] + len(features))

    def of_features(self, first: int, stop: int) -> Entries:
        """The entries of the features first <= feature < stop."""
        offsets = [self._offsets(chunk, first, stop) for chunk in range(len(self._ends) - 1)]
        if not offsets:
            nothing = np.empty(0, np.int32)
            return Entries(
                first, np.zeros(stop - first + 1, np.int64), nothing, np.empty(0, np.float32)
            )
        begins = np.cumsum([0, *(int(each[-1] - each[0]) for each in offsets)])
        places = [(int(each[0]), int(each[-1])) for each in offsets]
        rows, acts = (
            np.concatenate([self._read(name, dtype, *place) for place in places])
            for name, dtype in (("rows", np.int32), ("acts", np.float32))
        )
        moved = np.stack([e - e[0] + b for e, b in zip(offsets, begins[:-1], strict=True)])
        return Entries(first, *joined_runs(moved, rows, acts))

    def by_row(self) -> tuple[Int64, Int32]:
        """Offsets int64 [rows + 1] and features int32 of all rows, in their order."""
        counts = np.concatenate([np.zeros(1, np.int64), *self._row_counts])
        return np.cumsum(counts), self._read("features", np.int32, 0, self._ends[-1])

    def _offsets(self, chunk: int, first: int, stop: int) -> Int64:
        begin = chunk * (self._d_sae + 1)
        offsets: Int64 = self._read("offsets", np.int64, begin + first, begin + stop + 1)
        return offsets

    def _append(self, name: str, values: NDArray[np.generic]) -> None:
        with (self._folder / name).open("ab") as file:
            values.tofile(file)

    def _read(self, name: str, dtype: type[np.generic], first: int, stop: int) -> Any:
        if stop == first:
            return np.empty(0, dtype)
        size = np.dtype(dtype).itemsize
        return np.fromfile(self._folder / name, dtype, stop - first, offset=first * size)


def buckets(d_sae: int, size: int) -> list[tuple[int, int]]:
    """Ranges of features, `size` each: (first, stop)."""
    return list(pairwise([*range(0, d_sae, size), d_sae]))
