"""Damaged shards made again from their text.

In: a part of a cache and what produces it. Every byte is read; a shard whose record or files are
missing or don't match their checksums is harvested again from where its text begins, as its record
says, or else its neighbours'. On the machine and with the libraries that made it, it comes out with
the same bytes.
"""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .errors import MEND, CacheCorrupt, CacheError, CorpusError
from .manifest import (
    MANIFEST,
    MANIFEST_COPY,
    Manifest,
    ShardRecord,
    read_json,
    record_names,
    sweep,
)
from .packing import Position
from .production import Producer, ShardPlan
from .shards import stored_calibrations, verify_shard
from .store import Store

log = logging.getLogger(__name__)


class Repaired(NamedTuple):
    """n_checked: shards that were looked at. made_again: numbers of those that were damaged.
    differ: of these, the ones whose bytes are not those of their record."""

    n_checked: int
    made_again: list[int]
    differ: list[int]

    def __str__(self) -> str:
        if not self.made_again:
            return f"{self.n_checked} shards are intact"
        text = f"of {self.n_checked} shards {len(self.made_again)} made again: {self.made_again}"
        if self.differ:
            text += (
                f"; {self.differ} came out with other bytes than before: the machine or its "
                "libraries are not those of the first harvest"
            )
        return text


def make_again(store: Store, producer: Producer) -> Repaired:
    """Check all shards of a part and make again what is damaged. For the holder of the lock.

    Shards that are missing at the end are left to the harvest that goes on.
    Raises: CacheMismatch if the part is not what the producer makes.
    """
    manifest, records = Manifest.read(store), _readable_records(store)
    manifest.fingerprint.require_equal(producer.fingerprint, store.root)
    producer.fingerprint = manifest.fingerprint  # hookpoints in its order
    hookpoints = manifest.fingerprint.hookpoints
    n_shards = max((int(Path(name).stem) for name in record_names(store)), default=-1) + 1
    intact = {n: r for n, r in records.items() if _is_intact(store, r, hookpoints)}
    damaged = [n for n in range(n_shards) if n not in intact]
    producer.calibrations = stored_calibrations(store, list(records.values()))
    sweep(store, records)
    differ = []
    for shard in damaged:
        old, start = records.get(shard), _start_of(shard, records, producer)
        n_rows = _rows_of(shard, records, manifest, producer)
        plan = iter([ShardPlan(shard, n_rows)] if n_rows else [])
        made: list[ShardRecord] = []
        with contextlib.closing(producer.blocks(start)) as blocks:
            producer.write_shards(store, plan, blocks, start, on_commit=made.append)
        if not made and max(records, default=-1) < shard:
            break  # it was the last one, and the text that is left lies in the one before
        if not made or made[0].end != _end_of(shard, records, made[0]):
            raise CorpusError(
                f"shard {shard} of {store.root} can't be made again: {producer.corpus.name} is not "
                "the text that it was made from. Give the same one"
            )
        records[shard] = made[0]
        if old and made[0].files != old.files:
            differ.append(shard)
    if len(records) < manifest.n_shards:
        manifest.model_copy(update={"is_complete": False, "n_shards": 0}).write(store)
    return Repaired(n_shards, damaged, differ)


def restore_manifests(stores: list[Store]) -> None:
    """Make manifests and their copies the same again, where one of them is missing or damaged.

    Raises: CacheCorrupt if both are; CacheBusy.
    """
    for store in stores:
        if (store.has(MANIFEST) or store.has(MANIFEST_COPY)) and not _are_whole(store):
            with store.begin():
                _readable_manifest(store).write(store)


def _are_whole(store: Store) -> bool:
    try:
        return Manifest.read(store) == Manifest.read(store, MANIFEST_COPY)
    except CacheError:
        return False


def _readable_manifest(store: Store) -> Manifest:
    for name in (MANIFEST, MANIFEST_COPY):
        try:
            return Manifest.read(store, name)
        except CacheCorrupt as error:
            log.warning("%s", error)
        except CacheError:
            if store.has(name):  # a newer format
                raise
    raise CacheCorrupt(
        f"{store.path(MANIFEST)} and its copy are both damaged or missing, so nothing tells what "
        "the shards were made from: restore one of them, or harvest into another folder"
    )


def _readable_records(store: Store) -> dict[int, ShardRecord]:
    """The commit records that are as they were written."""
    records = {}
    for name in record_names(store):
        try:
            record = ShardRecord.parse(store, name, read_json(store, name))
        except CacheCorrupt:
            continue
        records[record.shard] = record
    return records


def _is_intact(store: Store, record: ShardRecord, hookpoints: Iterable[str]) -> bool:
    try:
        verify_shard(store, record, hookpoints)
    except CacheCorrupt as error:
        log.warning("%s", str(error).removesuffix(f". {MEND}"))
        return False
    return True


def _start_of(shard: int, records: dict[int, ShardRecord], producer: Producer) -> Position:
    """Where a shard's text begins: as its record says, or where the shard before it ends."""
    if shard in records:
        return Position(*records[shard].start)
    return Position(*records[shard - 1].end) if shard else producer.start


def _end_of(shard: int, records: dict[int, ShardRecord], made: ShardRecord) -> tuple[int, int]:
    """Where a shard's text must end: as its record says, or where the next one begins."""
    if shard in records:
        return records[shard].end
    return records[shard + 1].start if shard + 1 in records else made.end


def _rows_of(
    shard: int, records: dict[int, ShardRecord], manifest: Manifest, producer: Producer
) -> int:
    """Rows of a shard: as its record says, or as many as fit in before the next one that is known.
    Of several that are missing one after another, each gets at least a block."""
    if shard in records:
        return records[shard].n_rows
    ctx_len = manifest.fingerprint.ctx_len
    known = min((number for number in records if number > shard), default=None)
    if known is None:
        n_done = sum(records[number].n_rows for number in range(shard))
        n_left = -(-(manifest.n_tokens_wanted - n_done) // ctx_len) * ctx_len
        return max(min(manifest.shard_rows, n_left), 0)
    n_left, end = 0, Position(*records[known].start)
    with contextlib.closing(producer.blocks(_start_of(shard, records, producer))) as blocks:
        for block in blocks:
            n_left += len(block.token_ids)
            if block.end >= end:
                break
    return min(manifest.shard_rows, n_left - (known - shard - 1) * ctx_len)
