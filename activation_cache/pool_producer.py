"""A thread that runs the model ahead of training, one pool of shards after another.

In: what produces shards, a store for them and a bound on its bytes. Out: pools, finished in order.
The thread waits while the next shard would not fit; `release` makes room. A pool that is needed
again, after a kill, is made again from where its text begins.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterator

import torch

from .errors import CacheMismatch
from .formats import reserved_bytes
from .manifest import Fingerprint, ShardRecord, record_name, record_names, shard_name, sweep
from .packing import PackedBlock, Position
from .pools import Journal, PoolRecord, StreamPlan, joint
from .production import Producer, ShardPlan
from .row_selection import RowSelection, median_norm
from .shard_reader import ShardReader, StoredShard
from .shards import stored_calibrations
from .store import Store
from .tensor_file import PREFIX_BYTES


class PoolProducer:
    """shards: where they are kept, at most `max_bytes` of them (as `shard_bytes` counts)."""

    def __init__(
        self, producer: Producer, shards: Store, journal: Journal, plan: StreamPlan, max_bytes: int
    ):
        self._producer, self._store, self._journal = producer, shards, journal
        self._plan, self._max_bytes = plan, max_bytes
        self._changed = threading.Condition()
        self._records = self._committed()
        self._n_begun = 0  # shards that have room but no record yet
        self._thread: threading.Thread | None = None
        self._working_on = 0
        self._error: BaseException | None = None
        self._is_stopped = False
        self._blocks = _no_blocks()
        self._blocks_at: Position | None = None

    # -- for the reader --------------------------------------------------------------------------

    def shards_of(self, pool: int, is_over: threading.Event | None = None) -> ShardReader:
        """The shards of a pool, when it is finished. Raises: what ended the thread.

        is_over: set when nobody waits any more (see `wake`).
        """
        while True:
            with self._changed:
                if is_over is not None and is_over.is_set():
                    raise _Stopped
                if self._is_finished(pool):
                    return self._reader(pool)
                if self._error is not None:
                    error, self._error, self._thread = self._error, None, None
                    raise error
            self._work_towards(pool)
            with self._changed:
                if not self._is_finished(pool) and not (is_over and is_over.is_set()):
                    self._changed.wait(0.5)

    def wake(self) -> None:
        """Have whoever waits look again."""
        with self._changed:
            self._changed.notify_all()

    def release(self, pool: int) -> None:
        """Remove the pools before `pool`."""
        with self._changed:
            self._keep(lambda shard: shard >= pool * self._plan.shards_per_pool)
            self._changed.notify_all()

    def holds_before(self, pool: int) -> bool:
        """Whether a pool before `pool` still takes room."""
        with self._changed:
            return any(shard < pool * self._plan.shards_per_pool for shard in self._records)

    def stop(self) -> None:
        """End the thread; the shard that is being made is abandoned."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._is_stopped = None, False

    # -- the thread ------------------------------------------------------------------------------

    def _work_towards(self, pool: int) -> None:
        """Start the thread, or start it elsewhere."""
        if self._thread is not None and self._working_on > pool:
            self.stop()
        if self._thread is None:
            # pools too far ahead of one that is wanted again have its room
            self._keep(lambda shard: shard < (pool + 2) * self._plan.shards_per_pool)
            self._working_on = pool
            self._thread = threading.Thread(target=self._run, args=(pool,), daemon=True)
            self._thread.start()

    def _run(self, first_pool: int) -> None:
        try:
            with _own_cuda_stream(self._producer.lm.device):
                for pool in itertools.count(first_pool):
                    self._working_on = pool
                    if not self._is_finished(pool):
                        self._make(pool)
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised where the reader waits
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._blocks.close()  # with the threads that read and tokenize ahead
            self._blocks_at = None

    def _make(self, pool: int) -> None:
        """Write what a pool lacks, and enter it into the journal."""
        n = self._plan.shards_per_pool
        missing = [s for s in range(pool * n, (pool + 1) * n) if s not in self._records]
        for gap in _runs(missing):
            before = self._records.get(gap[0] - 1) if gap[0] % n else None
            start = Position(*before.end) if before else self._start_of(pool)
            self._producer.write_shards(
                self._store,
                self._when_there_is_room(gap),
                self._blocks_from(start),
                start,
                on_pass=self._on_pass,
                on_commit=self._add,
            )
            self._blocks_at = Position(*self._records[gap[-1]].end)
        record = self._record_of(pool)
        with self._changed:
            if pool == len(self._journal):
                self._journal.add(record)
            elif record != self._journal.records[pool]:
                raise CacheMismatch(
                    f"pool {pool} of the stream came out with other rows than before: the machine "
                    "or its libraries have changed. Begin the run again in a new folder"
                )
            self._changed.notify_all()

    def _start_of(self, pool: int) -> Position:
        if pool < len(self._journal):
            return Position(*self._journal.records[pool].start)
        return Position(*self._journal.records[pool - 1].end) if pool else self._producer.start

    def _when_there_is_room(self, shards: list[int]) -> Iterator[ShardPlan]:
        self._n_begun = 0
        for shard in shards:
            with self._changed:
                # The shard before may still be on its way to the disk.
                while self._used_bytes() + shard_bytes(self._plan) > self._max_bytes:
                    self._raise_if_stopped()
                    self._changed.wait(0.5)
                self._n_begun += 1
            yield ShardPlan(shard, self._plan.shard_rows)

    def _blocks_from(self, start: Position) -> Iterator[PackedBlock]:
        """Blocks from `start` on, without end: the text begins anew when it is over."""
        if self._blocks_at != start:
            self._blocks.close()
            self._blocks = _endless(self._producer, start)
        return self._blocks

    def _on_pass(self, _: int) -> None:
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._is_stopped:
            raise _Stopped

    def _add(self, record: ShardRecord) -> None:
        with self._changed:
            self._records[record.shard] = record
            self._n_begun -= 1
            self._changed.notify_all()

    # -- what there is ---------------------------------------------------------------------------

    def _committed(self) -> dict[int, ShardRecord]:
        """The shards that an earlier run left; what it left half-written is removed."""
        numbers = [int(name.rpartition("/")[2][:-5]) for name in record_names(self._store)]
        records = {shard: ShardRecord.read(self._store, shard) for shard in numbers}
        sweep(self._store, records)
        if records:
            self._producer.calibrations = stored_calibrations(self._store, list(records.values()))
        return records

    def _is_finished(self, pool: int) -> bool:
        n = self._plan.shards_per_pool
        is_there = all(shard in self._records for shard in range(pool * n, (pool + 1) * n))
        return is_there and pool < len(self._journal)

    def _reader(self, pool: int) -> ShardReader:
        n = self._plan.shards_per_pool
        records = [self._records[shard] for shard in range(pool * n, (pool + 1) * n)]
        return ShardReader([StoredShard(self._store, record) for record in records])

    def _record_of(self, pool: int) -> PoolRecord:
        """What the journal says of a pool whose shards are there."""
        shards = self._reader(pool)
        names = list(self._plan.fingerprint.hookpoints)
        first = self._journal.records[0] if len(self._journal) else None
        max_norms = first.max_norms if first else _max_norms(shards, self._plan)
        documents = first.first_documents if first else sorted(shards.sources)[:2]
        selection = selection_of(shards, self._plan, max_norms, documents)
        n_kept = {h: int(selection.counts((h,), "train").sum()) for h in names}
        n_kept[joint(names)] = int(selection.counts(tuple(names), "train").sum())
        return PoolRecord(
            pool=pool,
            start=shards.shards[0].record.start,
            end=shards.shards[-1].record.end,
            n_rows=shards.n_rows,
            n_kept=n_kept,
            max_norms=max_norms if pool == 0 else {},
            first_documents=documents if pool == 0 else [],
        )

    def _used_bytes(self) -> int:
        files = (file for record in self._records.values() for file in record.files.values())
        return sum(file.n_bytes for file in files) + self._n_begun * shard_bytes(self._plan)

    def _keep(self, is_wanted: Callable[[int], bool]) -> None:
        """Remove the other shards; their records first: then a shard does not exist."""
        for shard in [number for number in self._records if not is_wanted(number)]:
            record = self._records.pop(shard)
            self._store.remove(record_name(shard))
            for stream in record.files:
                self._store.remove(shard_name(shard, stream))


class _Stopped(Exception):
    """Ends the thread."""


def selection_of(
    shards: ShardReader, plan: StreamPlan, max_norms: dict[str, float], documents: list[int]
) -> RowSelection:
    """Which rows of a pool are used."""
    return RowSelection(
        shards,
        massive_norm=plan.massive_norm,
        heldout_fraction=plan.heldout_fraction,
        keep_first_position=plan.fingerprint.keep_first_position,
        max_norms=max_norms,
        first_documents=documents,
    )


def shard_bytes(plan: StreamPlan) -> int:
    """Disk that one shard may take, all its files together."""
    return shard_bytes_of(plan.fingerprint, plan.shard_rows)


def shard_bytes_of(fingerprint: Fingerprint, n_rows: int) -> int:
    """Disk that a shard of so many rows may take."""
    widths = fingerprint.hookpoints.values()
    rows = sum(reserved_bytes(width, fingerprint.storage_dtype, n_rows) for width in widths)
    return rows + n_rows * 24 + (len(fingerprint.hookpoints) + 1) * (PREFIX_BYTES + 8)


def _max_norms(shards: ShardReader, plan: StreamPlan) -> dict[str, float]:
    if plan.massive_norm is None:
        return {}
    names = plan.fingerprint.hookpoints
    return {name: plan.massive_norm * median_norm(shards, name) for name in names}


def _no_blocks() -> Generator[PackedBlock]:
    yield from ()


def _endless(producer: Producer, start: Position) -> Generator[PackedBlock]:
    yield from producer.blocks(start)
    while True:
        first = None
        for first in producer.blocks(producer.start):
            yield first
        if first is None:
            raise producer.corpus.nothing_left(producer.fingerprint.min_doc_tokens)


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    """Ascending numbers as runs without gaps."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        yield [number for _, number in run]


@contextlib.contextmanager
def _own_cuda_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, a stream of this thread's own, so that training does not wait for it."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
