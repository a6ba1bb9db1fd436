"""The index's numbers computed the plain way: every act in one dense array, loops in Python."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from activation_cache import ActivationCache
from sae import SAE


class Dense(NamedTuple):
    """acts: [rows, d_sae], 0 on rows left out. kept: rows indexed. The rest: by row."""

    acts: NDArray[np.float32]
    kept: NDArray[np.bool_]
    token_ids: NDArray[np.int64]
    doc_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    block_of: NDArray[np.int64]

    def window(self, row: int, before: int, after: int) -> range:
        """Rows of the context around `row`: its own block and document, no BOS."""
        first = last = row
        while first > 0 and row - first < before and self._joined(first - 1, row):
            first -= 1
        while last < len(self.kept) - 1 and last - row < after and self._joined(last + 1, row):
            last += 1
        return range(first, last + 1)

    def _joined(self, other: int, row: int) -> bool:
        same_block = self.block_of[other] == self.block_of[row]
        same_document = self.doc_ids[other] == self.doc_ids[row]
        return bool(same_block and same_document and self.positions[other] >= 0)


def dense_index(sae: SAE, cache: ActivationCache, hookpoint: str) -> Dense:
    chunks = list(cache.chunks(hookpoint, rows=10**9))
    x = torch.cat([chunk.acts for chunk in chunks])
    columns = [
        torch.cat([getattr(chunk, name) for chunk in chunks]).numpy()
        for name in ("token_ids", "doc_ids", "positions", "is_massive")
    ]
    token_ids, doc_ids, positions, is_massive = columns
    kept = (positions >= 0) & ~is_massive & sae.in_domain(x).numpy()
    acts = sae.encode(x).numpy() * kept[:, None]
    lengths = np.concatenate([np.diff(chunk.block_offsets.numpy()) for chunk in chunks])
    block_of = np.repeat(np.arange(len(lengths)), lengths)
    return Dense(acts, kept, token_ids, doc_ids, positions, block_of)


def top_rows(dense: Dense, feature: int, n: int, max_per_document: int) -> list[int]:
    """The n strongest rows of a feature, at most some of each document; ties: earlier first.

    Of 2 n such rows those whose text (8 tokens before, 3 after) another one has are left out.
    """
    acts = dense.acts[:, feature]
    chosen: list[int] = []
    for row in sorted(np.flatnonzero(acts).tolist(), key=lambda r: (-acts[r], r)):
        n_same = sum(dense.doc_ids[other] == dense.doc_ids[row] for other in chosen)
        if n_same < max_per_document and len(chosen) < 2 * n:
            chosen.append(row)
    texts = [tuple(dense.token_ids[dense.window(row, 6, 3)]) for row in chosen]
    peaks = [row - dense.window(row, 6, 3)[0] for row in chosen]
    seen = list(zip(texts, peaks, strict=True))
    return [row for i, row in enumerate(chosen) if seen[i] not in seen[:i]][:n]
