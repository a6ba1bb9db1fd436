"""Text -> activations -> training, without a cache: the model runs ahead, training consumes.

    saebase train --model gpt2 --dataset corpus.jsonl --hookpoints layers.6.resid_post \\
        --max-disk 20GB --d-sae 16384 --k 64 --n-tokens 500000000 --out runs/l6

In: a model, a text, a folder and a budget of disk. Out: `ActivationStream`, which the trainer reads
as it reads a cache. Two pools of shards fill the budget: one is consumed, shuffled as a whole,
while the next is made. A pool goes when the trainer has a durable checkpoint past it. With a budget
of zero, pools live in memory. Killed at any moment, both go on to the same batches.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .durable import LOCK
from .errors import CacheError, CacheMismatch
from .fingerprinting import bytes_per_token, fingerprint_of
from .harvest import corpus_of, named_hookpoints, shard_rows
from .harvest_config import HarvestConfig
from .language_model import LanguageModel
from .loading import resolve_device
from .manifest import SHARDS, Fingerprint, read_record, sweep, write_record
from .memory_store import MemoryStore
from .parts import text_provenance
from .pool_producer import PoolProducer, selection_of, shard_bytes_of
from .pools import POOLS, STREAM, Journal, PoolRecord, StreamPlan, joint
from .production import Producer
from .read_ahead import copied_ahead
from .row_selection import Split
from .shuffle import Blocks, Epoch, shuffled_batches
from .store import LocalStore, Store
from .windows import Wanted, WindowLoader

MIN_BATCHES_PER_POOL = 2


class ActivationStream:
    """Activations that are made as they are consumed. Open one with `ActivationStream.open`; a
    context, or call `close`.

    It has no length: rows come as long as they are asked for, and the text begins anew when it is
    over. Only rows of the train split come; the split is that of a cache of the same text.
    """

    def __init__(
        self, store: Store, shards: Store, producer: Producer, plan: StreamPlan, max_bytes: int
    ):
        self._plan, self._is_in_memory = plan, isinstance(shards, MemoryStore)
        self.path = store.root
        self._stack = ExitStack()
        self._stack.enter_context(store.begin())
        try:
            self._require_same_plan(store)
            self._journal = Journal(store)
            self._pools = PoolProducer(producer, shards, self._journal, plan, max_bytes)
        except BaseException:
            self._stack.close()
            raise
        self._loaders: dict[tuple[int, Wanted], WindowLoader] = {}

    @classmethod
    def open(
        cls,
        lm: LanguageModel | Callable[[], LanguageModel],
        data: Any,
        *,
        hookpoints: str | Sequence[str],
        folder: str | Path,
        max_disk_bytes: int = 0,
        buffer_bytes: int = 512_000_000,
        config: HarvestConfig | None = None,
        massive_norm: float | None = 10.0,
        heldout_fraction: float = 0.1,
        **options: Any,
    ) -> "ActivationStream":
        """A stream of the activations at `hookpoints` over `data`.

        lm, data, config, options: as for `harvest`; n_tokens plays no part.
        folder: for the journal, and for shards. One process at a time may stream into it.
        max_disk_bytes: shards never take more; half of it is one pool, whose rows are shuffled as a
            whole. 0: shards are kept in memory.
        buffer_bytes: memory, with a budget of 0: for two pools and two windows of shuffling.
        Raises: CacheError (a budget smaller than two shards), and what `harvest` raises.
        """
        config = HarvestConfig.of(config, options)
        names = named_hookpoints(hookpoints)
        _require_budget(max_disk_bytes, config)
        corpus = corpus_of(data, config)
        store = LocalStore(Path(folder))
        lm = lm if isinstance(lm, LanguageModel) else lm()
        fingerprint = fingerprint_of(lm, corpus, names, config)
        plan, max_bytes = _planned(
            fingerprint, config, max_disk_bytes, buffer_bytes, massive_norm, heldout_fraction
        )
        shards = store if max_disk_bytes else MemoryStore()
        return cls(store, shards, Producer(lm, corpus, fingerprint), plan, max_bytes)

    def __enter__(self) -> "ActivationStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the model's thread and let the folder go. What is on disk stays, to go on with."""
        self._pools.stop()
        self._stack.close()

    def clear(self) -> None:
        """Remove all shards: training is over. The journal stays."""
        self._pools.stop()
        self._pools.release(len(self._journal) + 2)

    # -- what the trainer asks -------------------------------------------------------------------

    @property
    def hookpoints(self) -> tuple[str, ...]:
        return tuple(self._plan.fingerprint.hookpoints)

    def d_model(self, hookpoint: str) -> int:
        """Width of a row. Raises: CacheError if the stream lacks the hookpoint."""
        widths = self._plan.fingerprint.hookpoints
        if hookpoint not in widths:
            raise CacheError(f"the stream has {', '.join(widths)}, not {hookpoint!r}")
        return widths[hookpoint]

    def n_rows(self, hookpoint: str, *, split: Split = "train") -> None:
        """None: a stream has no length."""
        self.d_model(hookpoint)
        self._require_train(split)

    def max_norm(self, hookpoint: str) -> float:
        """The norm above which a row is massive: `massive_norm` times the median of the first pool,
        which is made when this is asked first."""
        self.d_model(hookpoint)
        if self._plan.massive_norm is None:
            return float("inf")
        return self._first_pool().max_norms[hookpoint]

    def provenance(self, hookpoint: str) -> dict[str, Any]:
        """What rows at `hookpoint` are made from, for the config of what is made from them."""
        self.d_model(hookpoint)
        f = self._plan.fingerprint
        return {
            **text_provenance([f]),
            "hookpoint": hookpoint,
            "cache_fingerprint": f.hash,
            "rows_per_pool": self._plan.shard_rows * self._plan.shards_per_pool,
            "massive_norm": self._plan.massive_norm,
            "heldout_fraction": self._plan.heldout_fraction,
        }

    def batches(
        self,
        hookpoint: str,
        batch_size: int,
        *,
        seed: int = 0,
        split: Split = "train",
        start_batch: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """Shuffled train rows without end, [batch, width]; as `ActivationCache.batches`.

        epochs: None; a stream has none.
        """
        aligned = self.aligned_batches(
            [hookpoint],
            batch_size,
            seed=seed,
            split=split,
            start_batch=start_batch,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
            device=device,
            dtype=dtype,
        )
        return (batch[hookpoint] for batch in aligned)

    def aligned_batches(
        self,
        hookpoints: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        split: Split = "train",
        start_batch: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[dict[str, Tensor]]:
        """Like `batches`, at one or at all hookpoints: row i is the same token at each."""
        self._require_train(split)
        if epochs is not None:
            raise CacheError(f"epochs={epochs}: a stream has no epochs; give None")
        rows_per_pool = self._plan.shard_rows * self._plan.shards_per_pool
        if batch_size * MIN_BATCHES_PER_POOL > rows_per_pool:
            raise CacheError(
                f"batch_size={batch_size}: the budget makes pools of {rows_per_pool:,} rows, and "
                f"one must hold {MIN_BATCHES_PER_POOL} batches. Give more --max-disk"
            )
        to = resolve_device(str(device))
        wanted, is_over = Wanted(self._key(hookpoints), "train", to, dtype), threading.Event()
        batches = shuffled_batches(
            self._epochs(wanted, start_batch * batch_size, is_over),
            batch_size,
            seed=seed,
            start_batch=start_batch,
            rank=rank,
            world_size=world_size,
        )
        return self._until_closed(copied_ahead(batches, to), is_over)

    def aligned_sample(
        self, hookpoints: Sequence[str], batch_size: int, *, seed: int = 0, near_row: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Rows to measure on, in batches: those of the pool that holds row `near_row` of the
        stream, in its shuffled order."""
        wanted = Wanted(self._key(hookpoints), "train", torch.device("cpu"), torch.float32)
        pool = self._journal.pool_of(near_row, joint(self._key(hookpoints)))
        epoch = self._epoch(pool, wanted)
        return shuffled_batches(iter([epoch]), batch_size, seed=seed)

    def wants_checkpoint(self, n_rows_read: int, hookpoints: Sequence[str]) -> bool:
        """Whether room would come free by a checkpoint after so many rows."""
        if self._is_in_memory or n_rows_read == 0:
            return False
        pool = self._journal.pool_of(n_rows_read - 1, joint(self._key(hookpoints)))
        return self._pools.holds_before(pool)

    def release(self, n_rows_read: int, hookpoints: Sequence[str]) -> None:
        """A durable checkpoint stands after so many rows: what lies before is not needed again."""
        if n_rows_read:
            pool = self._journal.pool_of(n_rows_read - 1, joint(self._key(hookpoints)))
            self._pools.release(pool)

    # -- inside ----------------------------------------------------------------------------------

    def _require_same_plan(self, store: Store) -> None:
        if store.has(STREAM) and store.names(POOLS):  # without a pool there is nothing to fit to
            read_record(StreamPlan, store, STREAM).require_equal(self._plan, store.root)
            return
        if not set(store.names()) <= {LOCK, SHARDS, STREAM, POOLS}:
            raise CacheError(f"{store.root} holds other files and no stream: choose another folder")
        sweep(store, {})
        write_record(store, STREAM, self._plan)

    def _first_pool(self) -> PoolRecord:
        if not len(self._journal):
            self._pools.shards_of(0)
        return self._journal.records[0]

    def _until_closed(
        self, batches: Iterator[dict[str, Tensor]], is_over: threading.Event
    ) -> Iterator[dict[str, Tensor]]:
        """The batches; a reader that ends does not wait for a pool that nobody will use."""
        try:
            for batch in batches:  # noqa: UP028 - `yield from` would close what is inside first
                yield batch
        finally:
            is_over.set()
            self._pools.wake()

    def _epochs(self, wanted: Wanted, start_row: int, is_over: threading.Event) -> Iterator[Epoch]:
        """The pools. What lies before `start_row` is not needed: a checkpoint stands there."""
        n_rows = 0
        for pool in itertools.count():
            epoch = self._epoch(pool, wanted, is_over)
            n_rows += epoch.n_rows
            if n_rows <= start_row:
                self._pools.release(pool + 1)
            yield epoch

    def _epoch(self, pool: int, wanted: Wanted, is_over: threading.Event | None = None) -> Epoch:
        if pool >= len(self._journal):
            self._pools.shards_of(pool, is_over)
        n_rows = self._journal.records[pool].n_kept[joint(wanted.hookpoints)]
        return Epoch(pool, n_rows, lambda: self._blocks(pool, wanted, is_over))

    def _blocks(self, pool: int, wanted: Wanted, is_over: threading.Event | None) -> Blocks:
        """A pool's rows; the two that were opened last stay open."""
        key = (pool, wanted)
        if key not in self._loaders:
            first = self._first_pool()
            shards = self._pools.shards_of(pool, is_over)
            selection = selection_of(shards, self._plan, first.max_norms, first.first_documents)
            loader = WindowLoader(shards, selection, wanted, self._plan.window_bytes)
            while len(self._loaders) >= 2:
                del self._loaders[next(iter(self._loaders))]
            self._loaders[key] = loader
            if self._is_in_memory:
                self._pools.release(pool)
        return self._loaders[key].blocks()

    def _key(self, hookpoints: Sequence[str]) -> tuple[str, ...]:
        for hookpoint in hookpoints:
            self.d_model(hookpoint)
        if len(hookpoints) > 1 and set(hookpoints) != set(self.hookpoints):
            raise CacheError(
                f"the stream counts rows at one hookpoint or at all of {', '.join(self.hookpoints)}"
            )
        return self.hookpoints if len(hookpoints) > 1 else tuple(hookpoints)

    @staticmethod
    def _require_train(split: Split) -> None:
        if split != "train":
            raise CacheError(
                f"a stream has no {split} rows: harvest a small cache of the same text to evaluate"
            )


def _require_budget(max_disk_bytes: int, config: HarvestConfig) -> None:
    """What can be told before the model is loaded."""
    if 0 < max_disk_bytes < 2 * config.shard_bytes:
        raise CacheError(
            f"max_disk={max_disk_bytes:,} bytes is less than two shards of "
            f"{config.shard_bytes:,}: raise it, lower harvest.shard_bytes, or give 0 to keep rows "
            "in memory"
        )


def _planned(
    fingerprint: Fingerprint,
    config: HarvestConfig,
    max_disk_bytes: int,
    buffer_bytes: int,
    massive_norm: float | None,
    heldout_fraction: float,
) -> tuple[StreamPlan, int]:
    """The plan, and the bytes that shards may take."""
    n_rows = shard_rows(fingerprint, config.shard_bytes)
    if max_disk_bytes:
        per_pool = max_disk_bytes // 2 // shard_bytes_of(fingerprint, n_rows)
        window_bytes = buffer_bytes // 2
        if per_pool < 1:
            raise CacheMismatch(
                f"max_disk={max_disk_bytes:,} bytes is less than two shards of "
                f"{shard_bytes_of(fingerprint, n_rows):,} with {len(fingerprint.hookpoints)} "
                "hookpoints: raise it, or lower harvest.shard_bytes"
            )
    else:
        pass_rows = fingerprint.batch_blocks * fingerprint.ctx_len
        wanted = buffer_bytes // 4 // bytes_per_token(fingerprint)
        n_rows, per_pool = max(wanted // pass_rows, 1) * pass_rows, 1
        window_bytes = n_rows * bytes_per_token(fingerprint) * 2  # a pool is one window
    plan = StreamPlan(
        fingerprint=fingerprint,
        shard_rows=n_rows,
        shards_per_pool=per_pool,
        window_bytes=window_bytes,
        massive_norm=massive_norm,
        heldout_fraction=heldout_fraction,
    )
    max_bytes = max_disk_bytes or 2 * per_pool * shard_bytes_of(fingerprint, n_rows)
    return plan, max_bytes
