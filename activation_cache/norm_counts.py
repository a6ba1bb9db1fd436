"""Norms of rows, counted: quantiles in fixed memory, whatever the number of rows.

In: float32 norms and the place of each row in its packed block. Out: quantiles, by groups of
places: 0, 1, 2, 3, then from one power of two to the next. A norm is known by its leading bits, so
that a quantile is right to 2^-11 of itself.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DROPPED_BITS = 13
"""Of a float32: 8 bits of exponent and 10 of mantissa stay. Bits of positive floats are ordered."""
_N_BINS = 1 << (31 - DROPPED_BITS)
_SHOWN_PER_BIN = 1 << 7
"""Bins of the histogram that is shown are eighths of an octave, in equal steps."""


@dataclass(frozen=True)
class NormHistogram:
    """edges: [n_bins + 1], norms, about eight bins an octave; counts: [n_bins], rows. Each bin
    holds its lower edge; the first and the last have rows."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def group_of_place(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the group that each place is in: 0, 1, 2, 3, then 4 to 7, 8 to 15, ..."""
    exponents = np.frexp(places.astype(np.float64))[1].astype(np.int64)
    return np.where(places < 4, places, exponents + 1)


def places_of_group(group: int) -> tuple[int, int]:
    """First and last place of a group."""
    return (group, group) if group < 4 else (1 << (group - 2), (1 << (group - 1)) - 1)


class NormCounts:
    """How many rows have which norm, group by group. n_places: rows of the longest block."""

    def __init__(self, n_places: int):
        n_groups = int(group_of_place(np.array([n_places - 1]))[0]) + 1
        self._counts = np.zeros((n_groups, _N_BINS), dtype=np.int64)
        self._max = 0.0

    def add_(self, norms: NDArray[np.float32], places: NDArray[np.int64]) -> None:
        """norms: [rows], finite, 0 or more. places: [rows], below `n_places`."""
        if not len(norms):
            return
        bins = (norms.view(np.uint32) >> DROPPED_BITS).astype(np.int64)
        keys, counts = np.unique(group_of_place(places) * _N_BINS + bins, return_counts=True)
        self._counts.reshape(-1)[keys] += counts
        self._max = max(self._max, float(norms.max()))

    @property
    def n_groups(self) -> int:
        return len(self._counts)

    def n_rows(self, group: int) -> int:
        return int(self._counts[group].sum())

    def quantiles(self, shares: tuple[float, ...], group: int | None = None) -> list[float]:
        """The least norms that these shares of the rows don't exceed; 1 gives the exact maximum of
        all rows. group: one alone, None for all. Not a number where there is no row."""
        counts = self._counts.sum(axis=0) if group is None else self._counts[group]
        below = counts.cumsum()
        if not below[-1]:
            return [float("nan")] * len(shares)
        wanted = np.maximum(np.ceil(np.array(shares) * below[-1]), 1)
        norms: list[float] = _middles(np.searchsorted(below, wanted)).tolist()
        if group is None:
            norms = [self._max if share == 1 else n for share, n in zip(shares, norms, strict=True)]
        return norms

    def histogram(self) -> NormHistogram:
        """All rows. Empty where there is none."""
        counts = self._counts.sum(axis=0).reshape(-1, _SHOWN_PER_BIN).sum(axis=1)
        used = counts.nonzero()[0]
        if not len(used):
            return NormHistogram((), ())
        first, last = int(used[0]), int(used[-1]) + 1
        edges = _floats(np.arange(first, last + 1) * _SHOWN_PER_BIN, 0)
        return NormHistogram(tuple(edges.tolist()), tuple(counts[first:last].tolist()))


def _middles(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(bins == 0, 0.0, _floats(bins, 1 << (DROPPED_BITS - 1)))


def _floats(bins: NDArray[np.int64], rest: int) -> NDArray[np.float64]:
    bits = (bins << DROPPED_BITS) + rest
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)
