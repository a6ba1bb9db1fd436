"""Which rows of a cache are used: in a split by document, not of massive norm.

In: shards and the reader's settings. Out: for each shard a mask, for each block a count.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import CacheError
from .manifest import BLOCK_ROWS
from .shard_reader import ShardReader
from .split import is_held_out

Split = Literal["train", "heldout", "all"]
Places = tuple[str, ...]
_MEDIAN_ROWS = 1 << 20


class RowSelection:
    """massive_norm, heldout_fraction: see `ActivationCache`. keep_first_position: see
    `HarvestConfig`. max_norms, first_documents: instead of what the shards themselves say.
    """

    def __init__(
        self,
        shards: ShardReader,
        *,
        massive_norm: float | None,
        heldout_fraction: float,
        keep_first_position: bool,
        max_norms: Mapping[str, float] | None = None,
        first_documents: Sequence[int] | None = None,
    ):
        if not 0 <= heldout_fraction < 1:
            raise CacheError(f"heldout_fraction={heldout_fraction}: expected 0 or more, below 1")
        self._shards, self._massive_norm = shards, massive_norm
        self._heldout_fraction, self._keep_first = heldout_fraction, keep_first_position
        self._max_norms, self._documents = max_norms or {}, first_documents
        self.max_norm = lru_cache(maxsize=None)(self._find_max_norm)
        self.bits = lru_cache(maxsize=None)(self._pack)
        self.counts = lru_cache(maxsize=None)(self._count)

    def kept(self, shard: int, hookpoints: Places, split: Split) -> Tensor:
        """bool [rows]: in `split`, of massive norm at no place, and no left-out first position."""
        kept = self.in_split(shard, split)
        for hookpoint in hookpoints:
            norms = self._shards.small(shard, hookpoint)["norms"]
            kept = kept & (norms <= self.max_norm(hookpoint))
        if not self._keep_first:
            kept[self._shards.tokens(shard)["block_offsets"][:-1]] = False
        return kept

    def kept_in_block(self, shard: int, block: int, n: int, key: tuple[Places, Split]) -> Tensor:
        """int64: which of the n rows of a block are kept."""
        bits = self.bits(shard, *key)[block * BLOCK_ROWS // 8 :][: BLOCK_ROWS // 8]
        return torch.from_numpy(np.unpackbits(bits, count=n).nonzero()[0])

    def kept_between(self, shard: int, first: int, last: int, key: tuple[Places, Split]) -> Tensor:
        """bool: which of a shard's rows first..last-1 are kept."""
        begin = first // 8
        bits = np.unpackbits(self.bits(shard, *key)[begin : -(-last // 8)])
        return torch.from_numpy(bits[first - 8 * begin : last - 8 * begin].astype(bool))

    def n_massive(self, hookpoint: str, split: Split) -> int:
        """Rows of `split` that are left out for their norm."""
        limit, n = self.max_norm(hookpoint), 0
        for shard in range(len(self._shards)):
            norms = self._shards.small(shard, hookpoint)["norms"]
            n += int((~(norms <= limit) & self.in_split(shard, split)).sum())
        return n

    def in_split(self, shard: int, split: Split) -> Tensor:
        """bool [rows]."""
        if split not in ("train", "heldout", "all"):
            raise CacheError(f"unknown split {split!r}: expected train, heldout or all")
        doc_ids = self._shards.tokens(shard)["doc_ids"]
        if split == "all":
            return torch.ones_like(doc_ids, dtype=torch.bool)
        held_out = torch.from_numpy(
            is_held_out(doc_ids.numpy(), self._heldout_fraction, self.first_documents)
        )
        return held_out if split == "heldout" else ~held_out

    @cached_property
    def first_documents(self) -> list[int]:
        """The first two documents that have text."""
        return list(self._documents or sorted(self._shards.sources)[:2])

    def _find_max_norm(self, hookpoint: str) -> float:
        if self._massive_norm is None:
            return math.inf
        if hookpoint in self._max_norms:
            return self._max_norms[hookpoint]
        return self._massive_norm * median_norm(self._shards, hookpoint)

    def _pack(self, shard: int, hookpoints: Places, split: Split) -> NDArray[np.uint8]:
        """`kept` at a bit a row, so that it stays in memory for a cache of any size."""
        return np.packbits(self.kept(shard, hookpoints, split).numpy())

    def _count(self, hookpoints: Places, split: Split) -> NDArray[np.int64]:
        """Rows that are kept in each block of the cache."""
        counts = []
        for shard, stored in enumerate(self._shards.shards):
            kept = np.unpackbits(self.bits(shard, hookpoints, split), count=stored.record.n_rows)
            starts = np.arange(0, len(kept), BLOCK_ROWS)
            counts.append(np.add.reduceat(kept.astype(np.int64), starts))
        return np.concatenate(counts)


def median_norm(shards: ShardReader, hookpoint: str) -> float:
    """Median L2 norm of the first 2^20 rows."""
    norms: list[Tensor] = []
    for shard in range(len(shards)):
        norms.append(shards.small(shard, hookpoint)["norms"])
        if sum(map(len, norms)) >= _MEDIAN_ROWS:
            break
    return float(torch.cat(norms)[:_MEDIAN_ROWS].nanmedian())
