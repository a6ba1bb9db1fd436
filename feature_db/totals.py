"""Running totals of every feature: counts, sums, maxima, histograms and the tokens it fires on.

In: the sorted entries of each chunk, in order. Out: arrays by feature, and the sorted
(feature, token) pairs of any range of features. Sums are float64 and rounded to float32 at the
end, so that where chunks are cut doesn't show.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codes import ChunkRows, FeatureEntries, Float32, Int64, run_starts, stable_order

Float64 = NDArray[np.float64]

# Two bins an octave, [2**e, 1.5 * 2**e) and [1.5 * 2**e, 2 * 2**e): the exponent and first
# mantissa bit of a float32 are the bin's number, with no rounding at the edges.
_BIN_SHIFT = 22
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -24, 24
_FIRST_BIN = (_LOWEST_EXPONENT + 127) << 1
N_BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) * 2

# Runs of token pairs that are merged into one when there are this many.
_FAN_IN = 32


def histogram_bins(acts: Float32) -> Int64:
    """The log-spaced bin of each act: int64, 0 <= bin < N_BINS; the outer bins are open."""
    bins = (acts.view(np.uint32) >> _BIN_SHIFT).astype(np.int64) - _FIRST_BIN
    return np.clip(bins, 0, N_BINS - 1)


def bin_edges() -> tuple[Float64, Float64]:
    """lo and hi of every bin, float64 [N_BINS]: lo <= act < hi; the first lo is 0, the last inf."""
    octaves = 2.0 ** np.arange(_LOWEST_EXPONENT, _HIGHEST_EXPONENT + 1)
    edges = np.stack([octaves, 1.5 * octaves], axis=1).ravel()[: N_BINS + 1]
    lo, hi = edges[:-1].copy(), edges[1:].copy()
    lo[0], hi[-1] = 0.0, np.inf
    return lo, hi


class FeatureTotals:
    """Totals a feature over the rows added so far.

    n_active int64, act_sum float64, max_act float32: [d_sae]; histogram int64 [d_sae, N_BINS];
    token_counts int64 [vocab_size], over all indexed rows; n_indexed and n_skipped count rows.
    """

    def __init__(self, d_sae: int, vocab_size: int) -> None:
        self.d_sae = d_sae
        self.n_active = np.zeros(d_sae, np.int64)
        self.act_sum = np.zeros(d_sae, np.float64)
        self.max_act = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, N_BINS), np.int64)
        self.token_counts = np.zeros(vocab_size, np.int64)
        self.n_indexed = 0
        self.n_skipped = 0

    def add(self, entries: FeatureEntries, chunk: ChunkRows, rows: Int64) -> None:
        """Count one chunk. rows: those that were encoded, chunk-relative."""
        self.n_indexed += len(rows)
        self.n_skipped += len(chunk.token_ids) - len(rows)
        self.token_counts += np.bincount(chunk.token_ids[rows], minlength=len(self.token_counts))
        if not len(entries.acts):
            return
        starts = entries.starts()
        active = entries.features[starts]
        self.n_active[active] += np.diff(np.append(starts, len(entries.acts)))
        self.act_sum[active] += np.add.reduceat(entries.acts.astype(np.float64), starts)
        highest = np.maximum.reduceat(entries.acts, starts)
        self.max_act[active] = np.maximum(self.max_act[active], highest)
        cells = entries.features * N_BINS + histogram_bins(entries.acts)
        self.histogram += np.bincount(cells, minlength=self.histogram.size).reshape(
            self.histogram.shape
        )

    @property
    def density(self) -> Float64:
        """Fraction of the indexed rows on which each feature is active: float64 [d_sae]."""
        return self.n_active / max(self.n_indexed, 1)


class TokenPairs(NamedTuple):
    """What features do on tokens, by ascending key, each key once.

    keys: int64, feature * vocab_size + token. counts: int64 rows on which the feature fires on
    the token. act_sums: float64, its acts there.
    """

    keys: Int64
    counts: Int64
    act_sums: Float64


class TokenPairStore:
    """Every (feature, token) pair seen, as sorted runs in files, so that memory stays bounded.

    folder: a temporary folder of the build, to which runs are written.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._vocab_size = vocab_size
        self._n_written = 0
        self._levels: list[list[TokenPairs]] = [[]]

    def add(self, entries: FeatureEntries, chunk: ChunkRows) -> None:
        """Count one chunk's pairs."""
        if len(entries.acts):
            self._append(chunk_pairs(entries, chunk, self._vocab_size), level=0)

    def of_features(self, first: int, stop: int) -> TokenPairs:
        """The pairs of the features first <= feature < stop."""
        runs = [run for level in reversed(self._levels) for run in level]
        return _merged(runs, first * self._vocab_size, stop * self._vocab_size)

    def _append(self, run: TokenPairs, level: int) -> None:
        if level == len(self._levels):
            self._levels.append([])
        self._levels[level].append(self._write(run))
        if len(self._levels[level]) == _FAN_IN:
            runs, self._levels[level] = self._levels[level], []
            highest = max(int(run.keys[-1]) for run in runs)
            self._append(_merged(runs, 0, highest + 1), level + 1)

    def _write(self, run: TokenPairs) -> TokenPairs:
        """The same run, read from files that the system may drop from memory."""
        self._n_written += 1
        mapped = []
        for name, values in zip(run._fields, run, strict=True):
            path = self._folder / f"{self._n_written}.{name}.npy"
            np.save(path, values)
            mapped.append(np.load(path, mmap_mode="r"))
        return TokenPairs(*mapped)


def chunk_pairs(entries: FeatureEntries, chunk: ChunkRows, vocab_size: int) -> TokenPairs:
    """The (feature, token) pairs of one chunk."""
    _, token_rank = np.unique(chunk.token_ids, return_inverse=True)
    order = stable_order(token_rank[entries.rows])
    order = order[stable_order(entries.features[order])]
    keys = entries.features[order] * vocab_size + chunk.token_ids[entries.rows[order]]
    return _summed(keys, np.ones(len(keys), np.int64), entries.acts[order].astype(np.float64))


def _merged(runs: Sequence[TokenPairs], first_key: int, stop_key: int) -> TokenPairs:
    """One run of all pairs with first_key <= key < stop_key, earlier runs summed first."""
    bounds = [np.searchsorted(run.keys, [first_key, stop_key]) for run in runs]
    parts = [[values[lo:hi] for values in run] for run, (lo, hi) in zip(runs, bounds, strict=True)]
    if not parts:
        return TokenPairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    keys, counts, sums = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")  # timsort: sorted runs are merged, not sorted again
    return _summed(keys[order], counts[order], sums[order])


def _summed(sorted_keys: Int64, counts: Int64, act_sums: Float64) -> TokenPairs:
    starts = run_starts(sorted_keys)
    if not len(starts):
        return TokenPairs(sorted_keys, counts, act_sums)
    return TokenPairs(
        sorted_keys[starts], np.add.reduceat(counts, starts), np.add.reduceat(act_sums, starts)
    )
