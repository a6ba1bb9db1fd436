"""The shards of a cache as one long list: their files, opened when needed, and tokens.

In: parts. Out: `ShardReader`, in which shard i is the i-th of all parts together.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .manifest import BLOCK_ROWS, ShardRecord
from .parts import Part
from .quantization import Calibration
from .shards import TOKENS, calibration_in, open_file
from .store import Store
from .stored_rows import Exact
from .tensor_file import TensorFile


class StoredShard(NamedTuple):
    """A committed shard and the folder that it lies in."""

    store: Store
    record: ShardRecord


class ShardReader:
    """Committed shards, in order."""

    def __init__(self, shards: Sequence[StoredShard]):
        self.shards = list(shards)
        self.first_rows = np.cumsum([0, *(shard.record.n_rows for shard in shards)])
        self.file = lru_cache(maxsize=4096)(self._open)
        self.tokens = lru_cache(maxsize=8)(self._load_tokens)
        self.calibration = lru_cache(maxsize=64)(self._load_calibration)
        self.exact = lru_cache(maxsize=8)(self._load_exact)

    @classmethod
    def of(cls, parts: Sequence[Part]) -> "ShardReader":
        """All shards of all parts."""
        return cls([StoredShard(part.store, record) for part in parts for record in part.records])

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def n_rows(self) -> int:
        return int(self.first_rows[-1])

    @cached_property
    def first_blocks(self) -> NDArray[np.int64]:
        """Number of each shard's first block among the blocks of all, and of all blocks."""
        sizes = [-(-shard.record.n_rows // BLOCK_ROWS) for shard in self.shards]
        return np.cumsum([0, *sizes])

    @cached_property
    def block_rows(self) -> NDArray[np.int64]:
        """Rows of every block."""
        sizes = []
        for shard in self.shards:
            n = shard.record.n_rows
            sizes.append(np.minimum(BLOCK_ROWS, n - np.arange(0, n, BLOCK_ROWS)))
        return np.concatenate(sizes)

    @cached_property
    def sources(self) -> dict[int, str]:
        """doc_id -> source."""
        return {doc: name for shard in self.shards for doc, name in shard.record.sources.items()}

    def small(self, shard: int, hookpoint: str) -> dict[str, Tensor]:
        """norms and what else stands behind the rows; read from disk each time."""
        return self.file(shard, hookpoint).small()

    def place_of_block(self, number: int) -> tuple[int, int]:
        """Shard and block in it, of a block among those of all."""
        shard = int(np.searchsorted(self.first_blocks, number, side="right")) - 1
        return shard, number - int(self.first_blocks[shard])

    def _open(self, shard: int, stream: str) -> TensorFile:
        return open_file(*self.shards[shard], stream)

    def _load_tokens(self, shard: int) -> dict[str, Tensor]:
        file = self.file(shard, TOKENS)
        return {"token_ids": file.rows(0, file.n_rows).rows, **file.small()}

    def _load_exact(self, shard: int, hookpoint: str) -> Exact:
        """The rows of an int8 shard that are stored as they are."""
        small = self.small(shard, hookpoint)
        return Exact(small["exact_at"], small["exact_acts"])

    def _load_calibration(self, hookpoint: str, name: str) -> Calibration:
        """The calibration of that hash, from the first shard that was coded by it."""
        shard = next(
            i
            for i, each in enumerate(self.shards)
            if each.record.calibrations.get(hookpoint) == name
        )
        return calibration_in(self.small(shard, hookpoint))
