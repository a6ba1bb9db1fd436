"""One chunk of activations as sparse codes, sorted the way that an index wants them.

In: a chunk of the cache and an SAE. Out: `FeatureEntries`, the non-zero acts in feature order, and
`ChunkRows`, what is known of each token. Nothing here keeps state.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from activation_cache import Chunk
    from sae import SAE

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class ChunkRows(NamedTuple):
    """The tokens of a chunk.

    first_row: number of the first row in the whole cache.
    token_ids, doc_ids, positions: int64 [rows].
    segment_starts, segment_ends: int64 [rows], chunk-relative: a row's context may span
        segment_starts[row] <= other < segment_ends[row], the same block and document.
    """

    first_row: int
    token_ids: Int64
    doc_ids: Int64
    positions: Int64
    segment_starts: Int64
    segment_ends: Int64


class FeatureEntries(NamedTuple):
    """The non-zero acts of a chunk, by ascending feature and, within a feature, by ascending row.

    features, rows: int64 [nnz]; rows are chunk-relative. acts: float32 [nnz], above 0.
    """

    features: Int64
    rows: Int64
    acts: Float32

    def starts(self) -> Int64:
        """Where each active feature's entries begin: int64 [n_active_features]."""
        return run_starts(self.features)


def chunk_rows(chunk: "Chunk") -> ChunkRows:
    """The tokens of `chunk`, with the span that a context around each of them may have."""
    doc_ids = _int64(chunk.doc_ids)
    positions = _int64(chunk.positions)
    n = len(doc_ids)
    is_start = np.zeros(n + 1, dtype=bool)
    is_start[[0, n]] = True
    is_start[_int64(chunk.block_offsets)] = True
    is_start[1:n] |= doc_ids[1:] != doc_ids[:-1]
    is_bos = positions < 0
    is_start[:n] |= is_bos
    is_start[1:] |= is_bos
    cuts = np.flatnonzero(is_start)
    lengths = np.diff(cuts)
    return ChunkRows(
        int(chunk.first_row),
        _int64(chunk.token_ids),
        doc_ids,
        positions,
        np.repeat(cuts[:-1], lengths),
        np.repeat(cuts[1:], lengths),
    )


def indexable_rows(chunk: "Chunk", sae: "SAE") -> Int64:
    """Rows that are indexed: no BOS, no row of massive norm, none that the SAE calls foreign."""
    kept = (chunk.positions >= 0) & ~chunk.is_massive & sae.in_domain(chunk.acts).cpu()
    return kept.nonzero().squeeze(1).numpy()


@torch.no_grad()
def feature_entries(chunk: "Chunk", sae: "SAE", rows: Int64) -> FeatureEntries:
    """Encode `rows` of the chunk and sort the non-zero acts by feature, then row."""
    if not len(rows):
        return FeatureEntries(rows[:0], rows[:0], np.empty(0, np.float32))
    x = chunk.acts[torch.from_numpy(rows)].to(sae.W_enc.device, sae.W_enc.dtype)
    codes = sae.encode_sparse(x)
    acts = codes.acts.float().cpu().numpy()
    features = codes.feature_ids.cpu().numpy()
    entry_rows = np.repeat(rows, np.diff(codes.offsets.cpu().numpy()))
    if not (acts > 0).all():
        kept = np.flatnonzero(acts > 0)
        acts, features, entry_rows = acts[kept], features[kept], entry_rows[kept]
    order = stable_order(features)
    return FeatureEntries(features[order].astype(np.int64), entry_rows[order], acts[order])


def stable_order(values: NDArray[np.integer]) -> Int64:
    """Stable argsort of non-negative integers, by numpy's radix sort of 16 bits at a time."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    top = int(values.max()) if len(values) else 0
    for shift in range(16, top.bit_length(), 16):
        digit = ((values >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def run_starts(sorted_values: Int64) -> Int64:
    """Where each run of equal values begins: int64 [n_runs]."""
    if not len(sorted_values):
        return np.empty(0, np.int64)
    changes = np.flatnonzero(sorted_values[1:] != sorted_values[:-1]) + 1
    return np.concatenate(([0], changes))


def rank_in_run(sorted_values: Int64) -> Int64:
    """Each entry's number within its run of equal values, from 0: int64, same length."""
    starts = run_starts(sorted_values)
    lengths = np.diff(np.append(starts, len(sorted_values)))
    return np.arange(len(sorted_values)) - np.repeat(starts, lengths)


def _int64(values: torch.Tensor) -> Int64:
    return values.cpu().numpy().astype(np.int64, copy=False)
