"""A stream's journal: what each pool of rows was, so that any of them can be made again.

A stream is a sequence of pools, each of a fixed number of shards. A pool's rows are mixed with one
another; pools follow the text. The journal keeps, when the rows are long gone, where each pool's
text begins and how many of its rows were used: so batch n is found again after any interruption.
"""

from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, ConfigDict

from .errors import CacheCorrupt, CacheMismatch
from .manifest import Fingerprint, read_record, write_record
from .store import Store

STREAM = "stream.json"
POOLS = "pools"


class StreamPlan(BaseModel):
    """`stream.json`: what a stream is made of. The rows and their order depend on all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: Fingerprint
    shard_rows: int
    shards_per_pool: int
    window_bytes: int
    massive_norm: float | None
    heldout_fraction: float

    def require_equal(self, other: "StreamPlan", where: str) -> None:
        """Raises: CacheMismatch that names the first setting in which `other` differs."""
        self.fingerprint.require_equal(other.fingerprint, where)
        for field in type(self).model_fields:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise CacheMismatch(
                    f"{where} was begun with {field}={mine}, now it is {theirs}: give the same "
                    "--max-disk and settings, or stream into another folder"
                )


class PoolRecord(BaseModel):
    """One finished pool. start, end: (document, token) where its text begins and ends. n_kept:
    hookpoint -> train rows. max_norms, first_documents: of the first pool, for all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool: int
    start: tuple[int, int]
    end: tuple[int, int]
    n_rows: int
    n_kept: dict[str, int]
    max_norms: dict[str, float] = {}
    first_documents: list[int] = []


class Journal:
    """The records of the pools that were finished so far, in a store."""

    def __init__(self, store: Store):
        self._store = store
        names = [name for name in store.names(POOLS) if name.endswith(".json")]
        self.records = [read_record(PoolRecord, store, f"{POOLS}/{name}") for name in names]
        for expected, record in enumerate(self.records):
            if record.pool != expected:
                raise CacheCorrupt(
                    f"{store.path(f'{POOLS}/{expected:06d}.json')} is missing: the stream can't be "
                    "gone on with; begin another one in a new folder"
                )

    def __len__(self) -> int:
        return len(self.records)

    def add(self, record: PoolRecord) -> None:
        """Write the record of the next pool."""
        write_record(self._store, f"{POOLS}/{record.pool:06d}.json", record)
        self.records.append(record)

    def n_kept(self, hookpoint: str) -> list[int]:
        """Train rows of each pool."""
        return [record.n_kept[hookpoint] for record in self.records]

    def pool_of(self, row: int, hookpoint: str) -> int:
        """The pool that holds a row of the stream; the next unfinished one if none does yet."""
        ends = np.cumsum(self.n_kept(hookpoint))
        return int(np.searchsorted(ends, row, side="right"))


def joint(hookpoints: Iterable[str]) -> str:
    """What rows are counted under that are kept at several hookpoints."""
    return " + ".join(hookpoints)
