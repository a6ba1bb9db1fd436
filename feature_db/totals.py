"""Running totals of every feature: counts, sums, maxima, histograms and the tokens it fires on.

In: the sorted entries of each chunk, in order. Out: arrays by feature. Sums are float64 and
rounded to float32 at the end, so that where chunks are cut doesn't show.
"""

import numpy as np
from numpy.typing import NDArray

from .codes import ChunkRows, FeatureEntries, Float32, Int64

Float64 = NDArray[np.float64]

# Two bins an octave, [2**e, 1.5 * 2**e) and [1.5 * 2**e, 2 * 2**e): the exponent and first
# mantissa bit of a float32 are the bin's number, with no rounding at the edges.
_BIN_SHIFT = 22
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -24, 24
_FIRST_BIN = (_LOWEST_EXPONENT + 127) << 1
N_BINS = (_HIGHEST_EXPONENT - _LOWEST_EXPONENT) * 2


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
