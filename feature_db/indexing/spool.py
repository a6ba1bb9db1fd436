"""The entries of one part of a text, on disk until its features are counted.

In: the codes of chunk after chunk. Out: the entries of some features after others, each beside what
is known of its row, and the features of every row. Disk: 8 bytes an entry (10 with more than 65,536
features); memory: what one slice of features has.
"""

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sorting import N_COLUMNS, Float32, Int32, Int64, UInt16, join_run, sort_run

# Of one run, so that a row's number within it has 16 bits.
_RUN_ROWS = 1 << 16
# Of one slice, unless one feature has more: 32 bytes each.
_SLICE_ENTRIES = 1 << 20


class Entries(NamedTuple):
    """Entries of features first <= feature < first + len(offsets) - 1, rows ascending in each.

    offsets: int64 [n_features + 1]. rows: int32, from the part's first. acts: float32, above 0.
    records: int32 [nnz, N_COLUMNS], what is known of each entry's row.
    """

    first: int
    offsets: Int64
    rows: Int32
    acts: Float32
    records: Int32

    @property
    def stop(self) -> int:
        return self.first + len(self.offsets) - 1

    def of_entry(self) -> Int64:
        """The feature of each entry, from 0 for the first: int64 [nnz]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


class RowFeatures(NamedTuple):
    """The features of every row, row after row: offsets int64 [n_rows + 1], features [nnz]."""

    offsets: Int64
    features: UInt16 | Int32


class RunRows(NamedTuple):
    """The rows first_row <= row < first_row + n_rows on which some features are active.

    offsets: int64 [n_features + 1], less the first one places in rows, which are from first_row.
    """

    first_row: int
    n_rows: int
    offsets: Int64
    rows: UInt16


class _Run(NamedTuple):
    """Entries that were sorted together. begin: their place in the files."""

    first_row: int
    n_rows: int
    begin: int
    n_entries: int


class EntrySpool:
    """folder: an empty one, for these files alone."""

    def __init__(self, folder: Path, d_sae: int) -> None:
        self._folder, self._d_sae = folder, d_sae
        self._narrow: Any = np.uint16 if d_sae <= 1 << 16 else np.int32
        self._row_counts: list[Int64] = []
        self._runs: list[_Run] = []
        self.n_active: Int64 = np.zeros(d_sae, np.int64)
        """Entries of each feature so far: int64 [d_sae]."""

    def add(self, row_counts: Int64, features: Int64, acts: Float32, first_row: int) -> None:
        """Append a chunk. first_row: of it in the part.

        row_counts: entries of each of its rows. features, acts: by row; in a row a feature stands
            once at most.
        """
        self._row_counts.append(row_counts)
        edges = np.concatenate(([0], np.cumsum(row_counts)))
        for first in range(0, len(row_counts), _RUN_ROWS):
            stop = min(first + _RUN_ROWS, len(row_counts))
            inside = slice(edges[first], edges[stop])
            run = row_counts[first:stop], features[inside], acts[inside]
            self._add_run(*run, first_row + first)

    def slices(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The features first <= feature < stop in ranges (first, stop) whose entries are few enough
        to be held in memory."""
        ends = np.cumsum(self.n_active)
        while first < stop:
            begin = int(ends[first - 1]) if first else 0
            fits = int(np.searchsorted(ends, begin + _SLICE_ENTRIES, side="right"))
            cut = min(max(fits, first + 1), stop)
            yield first, cut
            first = cut

    def of_features(self, first: int, stop: int, table: Int32) -> Entries:
        """The entries of the features first <= feature < stop. table: int32 [n_rows, N_COLUMNS]."""
        joined = np.concatenate(([0], np.cumsum(self.n_active[first:stop])))
        n, place = int(joined[-1]), joined[:-1].copy()
        rows, acts = np.empty(n, np.int32), np.empty(n, np.float32)
        records = np.empty((n, N_COLUMNS), np.int32)
        with self._open("acts") as file:
            for run, found in zip(self._runs, self.runs_of(first, stop), strict=True):
                begin = run.begin + int(found.offsets[0])
                run_acts = _read(file, np.float32, begin, begin + len(found.rows))
                near = _near(table, found)
                join_run(
                    found.offsets, found.rows, run_acts, run.first_row, near,
                    place, rows, acts, records,
                )  # fmt: skip
        return Entries(first, joined, rows, acts, records)

    def runs_of(self, first: int, stop: int) -> Iterator[RunRows]:
        """The rows of the features first <= feature < stop, some rows of the text after others."""
        with self._open("offsets") as of_offsets, self._open("rows") as of_rows:
            for number, run in enumerate(self._runs):
                at = number * (self._d_sae + 1) + first
                offsets = _read(of_offsets, np.int64, at, at + stop - first + 1)
                here = run.begin + int(offsets[0]), run.begin + int(offsets[-1])
                yield RunRows(run.first_row, run.n_rows, offsets, _read(of_rows, np.uint16, *here))

    def by_row(self) -> RowFeatures:
        """The features of all rows, in their order."""
        counts = np.concatenate([np.zeros(1, np.int64), *self._row_counts])
        offsets = np.cumsum(counts)
        if not offsets[-1]:
            return RowFeatures(offsets, np.empty(0, self._narrow))
        with self._open("features") as file:
            return RowFeatures(offsets, _read(file, self._narrow, 0, int(offsets[-1])))

    def _add_run(self, row_counts: Int64, features: Int64, acts: Float32, first_row: int) -> None:
        n = len(features)
        offsets = np.empty(self._d_sae + 1, np.int64)
        rows, sorted_acts = np.empty(n, np.uint16), np.empty(n, np.float32)
        sort_run(row_counts, features, acts, offsets, rows, sorted_acts)
        self._append("features", features.astype(self._narrow))
        self._append("rows", rows)
        self._append("acts", sorted_acts)
        self._append("offsets", offsets)
        begin = self._runs[-1].begin + self._runs[-1].n_entries if self._runs else 0
        self._runs.append(_Run(first_row, len(row_counts), begin, n))
        self.n_active += np.diff(offsets)

    def _append(self, name: str, values: NDArray[np.generic]) -> None:
        with (self._folder / name).open("ab") as file:
            file.write(values.data)

    def _open(self, name: str) -> BufferedReader:
        return (self._folder / name).open("rb")


def _near(table: Int32, run: RunRows) -> Int32:
    """A run's rows of a table: copied, and thereby in the cache, if many entries look there."""
    rows = table[run.first_row : run.first_row + run.n_rows]
    return rows.copy() if len(run.rows) > run.n_rows // 8 else rows


def _read(file: BufferedReader, dtype: Any, first: int, stop: int) -> Any:
    """The numbers first <= place < stop of a file."""
    values = np.empty(stop - first, dtype)
    file.seek(first * values.itemsize)
    file.readinto(values.data)
    return values
