"""What a feature's acts are: counts, sums, maxima, histograms, positions and documents.

Sums are of integers, acts in units of `1 / scale`: the same whatever order they are taken in, so
that parts of a text may be counted apart and added in any order.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sorting import (
    DOCUMENT,
    POSITION,
    POSITION_BIN,
    Float32,
    Float64,
    Int32,
    Int64,
    compiled,
)

# Four bins an octave: the exponent and first two mantissa bits of a float32 are the bin's number,
# with no rounding at the edges.
_BIN_SHIFT = 21
_BINS_AN_OCTAVE = 4
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -24, 24
_FIRST_BIN = (_LOWEST_EXPONENT + 127) * _BINS_AN_OCTAVE
N_BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) * _BINS_AN_OCTAVE

# Positions 0, 1, 2-3, 4-7, ...: the last bin is open.
N_POSITION_BINS = 20

# An act is at most a few times the largest norm of a row; this leaves 2^33 of such norms to a sum.
_ACT_BITS = 30
_SQUARE_BITS = 36


class Scales(NamedTuple):
    """Units of the integer sums: of an act's, 1 / act; of its square's, 1 / square."""

    act: float
    square: float

    @classmethod
    def of(cls, max_norm: float) -> "Scales":
        """For rows of at most this norm; of any norm where it is inf."""
        exponent = math.frexp(max_norm)[1] if math.isfinite(max_norm) else 16
        return cls(2.0 ** (_ACT_BITS - exponent), 2.0 ** (_SQUARE_BITS - 2 * exponent))


class FeatureTotals(NamedTuple):
    """Of each of some features; all [n_features] but the last two.

    n_active; act_sum, square_sum: int64, see `Scales`. max_act: float32. position_sum: int64.
    n_documents: documents it is active in. first_document, last_document: its first and last, as
    they were given, -1 if there is none. histogram: int64 [n_features, N_BINS]; positions:
    [n_features, N_POSITION_BINS].
    """

    n_active: Int64
    act_sum: Int64
    square_sum: Int64
    max_act: Float32
    position_sum: Int64
    n_documents: Int64
    first_document: Int64
    last_document: Int64
    histogram: Int64
    positions: Int64


@compiled
def fixed_acts(acts: Float32, scale: float) -> Int64:
    """Acts in units of `1 / scale`."""
    fixed = np.empty(len(acts), np.int64)
    for i in range(len(acts)):
        fixed[i] = np.int64(np.rint(np.float64(acts[i]) * scale))
    return fixed


def feature_totals(
    offsets: Int64,
    acts: Float32,
    fixed: Int64,
    records: Int32,
    scales: Scales,
) -> FeatureTotals:
    """offsets, acts: entries by feature. fixed: see `fixed_acts`. records: int32 [nnz, N_COLUMNS],
    of the row of each entry."""
    n_features = len(offsets) - 1
    counts = np.zeros((6, n_features), np.int64)
    max_act = np.zeros(n_features, np.float32)
    histogram = np.zeros((n_features, N_BINS), np.int64)
    by_position = np.zeros((n_features, N_POSITION_BINS), np.int64)
    bits = acts.view(np.uint32)
    _add_totals(
        offsets, acts, bits, fixed, records,
        scales.square, counts, max_act, histogram, by_position,
    )  # fmt: skip
    return FeatureTotals(
        np.diff(offsets), counts[0], counts[1], max_act, counts[2], counts[3], counts[4],
        counts[5], histogram, by_position,
    )  # fmt: skip


@compiled
def _add_totals(
    offsets: Int64,
    acts: Float32,
    bits: NDArray[np.uint32],
    fixed: Int64,
    records: Int32,
    square_scale: float,
    counts: Int64,
    max_act: Float32,
    histogram: Int64,
    by_position: Int64,
) -> None:
    for feature in range(len(offsets) - 1):
        act_sum, square_sum = np.int64(0), np.int64(0)
        position_sum, n_documents = np.int64(0), 0
        document, highest = np.int32(-1), np.float32(0)
        for i in range(offsets[feature], offsets[feature + 1]):
            act = np.float64(acts[i])
            act_sum += fixed[i]
            square_sum += np.int64(np.rint(act * act * square_scale))
            highest = max(highest, acts[i])
            histogram[feature, _bin_of(bits[i])] += 1
            position_sum += records[i, POSITION]
            by_position[feature, np.uint32(records[i, POSITION_BIN])] += 1
            n_documents += records[i, DOCUMENT] != document
            document = records[i, DOCUMENT]
        counts[0, feature], counts[1, feature] = act_sum, square_sum
        counts[2, feature], counts[3, feature] = position_sum, n_documents
        counts[4, feature] = records[offsets[feature], DOCUMENT] if n_documents else -1
        counts[5, feature], max_act[feature] = document, highest


@compiled
def _bin_of(bits: int) -> int:
    return min(max((bits >> _BIN_SHIFT) - _FIRST_BIN, 0), N_BINS - 1)


@compiled
def position_bin(position: int) -> int:
    """The bin of a position: 0, 1, 2-3, 4-7, ..."""
    number = 0
    while position > 0 and number < N_POSITION_BINS - 1:
        position >>= 1
        number += 1
    return number


@compiled
def position_bins(positions: Int32) -> NDArray[np.int8]:
    """The bin of each position: int8, same length."""
    bins = np.empty(len(positions), np.int8)
    for row in range(len(positions)):
        bins[row] = position_bin(positions[row])
    return bins


def bin_edges() -> tuple[Float64, Float64]:
    """lo and hi of every bin, float64 [N_BINS]: lo <= act < hi; the first lo is 0, the last inf."""
    octaves = 2.0 ** np.arange(_LOWEST_EXPONENT, _HIGHEST_EXPONENT)
    steps = 1 + np.arange(_BINS_AN_OCTAVE) / _BINS_AN_OCTAVE
    lo = np.outer(octaves, steps).ravel()
    hi = np.append(lo[1:], np.inf)
    lo[0] = 0
    return lo, hi


def position_edges() -> tuple[Int64, Int64]:
    """First position of every bin, and the one after its last; of the open bin, -1."""
    lo = np.concatenate(([0], 1 << np.arange(N_POSITION_BINS - 1)))
    return lo, np.append(lo[1:], -1)


def quantiles_in(histogram: Int64, features: Int64, acts: Float32) -> Float64:
    """Share of a feature's acts that are weaker than an act, from its histogram.

    histogram: int64 [n_features, N_BINS]. features, acts: [n], whose acts are asked for.
    Acts of one bin are taken to lie evenly in it.
    """
    lo, hi = bin_edges()
    bins = np.searchsorted(lo, acts, side="right") - 1
    below = np.cumsum(histogram, axis=1) - histogram
    width = np.where(np.isfinite(hi), hi, 2 * lo) - lo
    part = np.clip((acts - lo[bins]) / width[bins], 0, 1)
    counted = below[features, bins] + part * histogram[features, bins]
    shares: Float64 = counted / np.maximum(histogram.sum(axis=1), 1)[features]
    return shares
