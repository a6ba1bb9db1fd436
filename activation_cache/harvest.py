"""Tokens -> activations on disk.

    saebase harvest --model gpt2 --dataset corpus.jsonl --hookpoints layers.6.resid_post --out acts

In: a `LanguageModel` and a text source. Out: an `ActivationCache`: `manifest.json`, then shards of
whole token blocks, each committed by its record. Interrupted at any moment and called again, it
goes on after the last committed shard and ends with the same bytes as if it had never stopped.
"""

import contextlib
import datetime
import importlib.metadata
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .cache import ActivationCache
from .documents import Corpus, open_corpus
from .durable import LOCK, PARTIAL_SUFFIX
from .errors import CacheError, CacheMismatch, DiskFull
from .fingerprinting import (
    bytes_per_token,
    fingerprint_of,
    require_same_places,
    require_same_settings,
    require_same_text,
)
from .formats import row_bytes
from .harvest_config import HarvestConfig, HarvestProgress
from .kept_memory import kept_memory
from .language_model import LanguageModel
from .manifest import (
    MANIFEST,
    MANIFEST_COPY,
    SHARDS,
    Fingerprint,
    Manifest,
    ShardRecord,
    read_records,
    sweep,
)
from .packing import PackedBlock, Position
from .parts import PARTS
from .production import Producer, ShardPlan
from .quantization import added_fvu
from .repair import make_again, restore_manifests
from .shards import stored_calibrations
from .store import Store, open_store
from .target import Target, choose_target

log = logging.getLogger(__name__)


def harvest(
    lm: LanguageModel | Callable[[], LanguageModel],
    data: Any,
    *,
    hookpoints: str | Sequence[str],
    out: str | Path,
    config: HarvestConfig | None = None,
    extend: bool = False,
    repair: bool = False,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[HarvestProgress], None] | None = None,
    **options: Any,
) -> ActivationCache:
    """Store the activations at `hookpoints` over `data` in the folder `out`.

    lm: the model, or a function that loads it once everything that can be checked without it is.
    data: what `open_corpus` takes. out: a folder, or a URL that fsspec knows (`s3://bucket/acts`).
    config: a `HarvestConfig`; or give its fields as keywords. A folder that already holds the cache
        is opened at once; with a larger n_tokens it goes on in the same text. Shards keep the size
        they were begun with.
    extend: add `data` to what is there, as a further text; its n_tokens counts by itself.
    repair: look at every byte first, and make damaged shards again from their text.
    rank, world_size: of several processes, this one takes the documents with number
        rank (mod world_size), and its share of n_tokens; the cache is all of theirs.
    Returns: the cache. Raises: ModelError, HookpointError, CorpusError (no text), DiskFull (no room
        for all of it) before anything is written; CacheMismatch if `out` was made from something
        else; CacheBusy; DiskFull (what was committed stays).
    """
    config = HarvestConfig.of(config, options)
    hookpoints = named_hookpoints(hookpoints)
    if not 0 <= rank < world_size:
        raise CacheError(f"rank={rank} of world_size={world_size}: expected 0 <= rank < world_size")
    root = open_store(out)
    require_ours(root)
    if repair:
        restore_manifests([root, *(root.child(f"{PARTS}/{name}") for name in root.names(PARTS))])
    corpus = corpus_of(data, config)
    target = choose_target(root, corpus, config, extend=extend, rank=rank, world_size=world_size)
    if target.manifest is not None:
        made = target.manifest.fingerprint
        require_same_text(made, corpus, config, target.store.root)
        require_same_places(made, hookpoints, target.store.root)
    for where, other in target.siblings:
        require_same_settings(other, corpus, config, where)
        require_same_places(other, hookpoints, where)
    lm = lm if isinstance(lm, LanguageModel) else lm()
    fingerprint = fingerprint_of(lm, corpus, hookpoints, config, rank=rank, world_size=world_size)
    target.require_joinable(fingerprint)
    producer = Producer(lm, corpus, fingerprint, first_document=target.first_document)
    work = _Work(producer, target, -(-config.n_tokens // world_size), on_progress)
    with kept_memory(lm.device):
        if repair:
            work.mend()
        if not work.is_done():
            work.run(config.shard_bytes)
    return ActivationCache.open(root)


class _Work:
    """One part of a cache, and what it takes to finish it."""

    def __init__(
        self,
        producer: Producer,
        target: Target,
        n_wanted: int,
        on_progress: Callable[[HarvestProgress], None] | None,
    ):
        self.producer, self.store = producer, target.store
        self.fingerprint, self.first_document = producer.fingerprint, target.first_document
        self.n_wanted, self.on_progress = n_wanted, on_progress

    def is_done(self) -> bool:
        """Whether the part is there, whole. Raises: CacheMismatch if it is another one."""
        if not self.store.has(MANIFEST):
            return False
        manifest = Manifest.read(self.store)
        if not manifest.is_complete:
            return False
        self._require_same(manifest, read_records(self.store, manifest))
        return manifest.n_tokens_wanted >= self.n_wanted or manifest.is_exhausted

    def mend(self) -> None:
        """Make damaged shards again."""
        if self.store.has(MANIFEST):
            with self.store.begin():
                mended = make_again(self.store, self.producer)
            level = logging.WARNING if mended.made_again else logging.INFO
            log.log(level, "%s: %s", self.store.root, mended)

    def run(self, shard_bytes: int) -> None:
        """Harvest from the last committed shard on, and mark the part complete."""
        with self.store.begin():
            manifest, records = self._standing(shard_bytes)
            if manifest.is_complete and manifest.n_tokens_wanted >= self.n_wanted:
                return  # by another process, meanwhile
            n_done = sum(record.n_rows for record in records)
            start = Position(*records[-1].end) if records else self.producer.start
            with contextlib.closing(self.producer.blocks(start)) as blocks:
                first = next(blocks, None) if n_done < self.n_wanted else None
                if not first and not records:
                    raise self.producer.corpus.nothing_left(self.fingerprint.min_doc_tokens)
                _require_space(self.store, self.fingerprint, self.n_wanted - n_done)
                manifest = manifest.model_copy(
                    update={"n_tokens_wanted": self.n_wanted, "is_complete": False}
                )
                self.producer.calibrations = stored_calibrations(self.store, records)
                manifest.write(self.store)
                sweep(self.store, {record.shard: record for record in records})
                if first:
                    self._write(manifest, records, itertools.chain([first], blocks), start)
            self._complete(manifest, records)

    def _write(
        self,
        manifest: Manifest,
        records: list[ShardRecord],
        blocks: Iterator[PackedBlock],
        start: Position,
    ) -> None:
        """Write shard after shard; each is added to `records` when it is committed."""
        n_done = sum(record.n_rows for record in records)
        self.producer.write_shards(
            self.store,
            planned_shards(manifest, self.fingerprint, len(records), n_done),
            blocks,
            start,
            on_pass=_Reporter(n_done, self.n_wanted, self.on_progress),
            on_commit=records.append,
        )

    def _complete(self, manifest: Manifest, records: list[ShardRecord]) -> None:
        fvu = {h: added_fvu(r.quantization[h] for r in records) for h in records[0].quantization}
        manifest.model_copy(
            update={
                "is_complete": True,
                "is_exhausted": sum(record.n_rows for record in records) < self.n_wanted,
                "n_shards": len(records),
                "quantization_fvu": {h: value for h, value in fvu.items() if value is not None},
            }
        ).write(self.store)

    def _standing(self, shard_bytes: int) -> tuple[Manifest, list[ShardRecord]]:
        """The manifest to work under and what is committed. Without a shard there is nothing to
        fit to: a first call that failed does not bind the next one."""
        if self.store.has(MANIFEST):
            manifest = Manifest.read(self.store)
            if records := read_records(self.store, manifest):
                self._require_same(manifest, records)
                self.producer.fingerprint = manifest.fingerprint  # hookpoints in its order
                return manifest, records
        return self._new_manifest(shard_bytes), []

    def _require_same(self, manifest: Manifest, records: list[ShardRecord]) -> None:
        manifest.fingerprint.require_equal(self.fingerprint, self.store.root)
        n_done, ctx_len = sum(record.n_rows for record in records), self.fingerprint.ctx_len
        if n_done >= self.n_wanted + ctx_len:
            raise CacheMismatch(
                f"{self.store.root} holds {n_done:,} tokens, more than n_tokens={self.n_wanted}: "
                "use as many or more, or harvest into another folder"
            )

    def _new_manifest(self, shard_bytes: int) -> Manifest:
        return Manifest(
            saebase_version=importlib.metadata.version("saebase"),
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            fingerprint=self.fingerprint,
            shard_rows=shard_rows(self.fingerprint, shard_bytes),
            n_tokens_wanted=self.n_wanted,
            is_complete=False,
            is_exhausted=False,
            first_document=self.first_document,
        )


def require_ours(store: Store) -> None:
    """Raises: CacheError if the place is a file, or holds something else than a cache."""
    names = set(store.names())
    manifests = {MANIFEST, MANIFEST_COPY}
    ours = {LOCK, SHARDS, PARTS, *manifests, *(name + PARTIAL_SUFFIX for name in manifests)}
    if not names & manifests and not names <= ours:
        raise CacheError(f"{store.root} holds other files and no cache: choose an empty folder")


def shard_rows(fingerprint: Fingerprint, shard_bytes: int) -> int:
    """Rows of a full shard: whole forward passes, about `shard_bytes` in the widest file."""
    widest = row_bytes(max(fingerprint.hookpoints.values()), fingerprint.storage_dtype)
    pass_rows = fingerprint.batch_blocks * fingerprint.ctx_len
    return max(shard_bytes // widest // pass_rows, 1) * pass_rows


def planned_shards(
    manifest: Manifest, fingerprint: Fingerprint, shard: int, n_done: int
) -> Iterator[ShardPlan]:
    """The shards from number `shard` on, until the wanted rows are there, in whole blocks."""
    ctx_len = fingerprint.ctx_len
    while n_done < manifest.n_tokens_wanted:
        left = -(-(manifest.n_tokens_wanted - n_done) // ctx_len) * ctx_len
        n_rows = min(manifest.shard_rows, left)
        yield ShardPlan(shard, n_rows)
        shard, n_done = shard + 1, n_done + n_rows


def corpus_of(data: Any, config: HarvestConfig) -> Corpus:
    """The text, read as the settings say. Raises: CorpusError."""
    return open_corpus(
        data,
        text_column=config.text_column,
        only=config.only or None,
        drop_duplicates=config.drop_duplicates,
    )


def named_hookpoints(hookpoints: str | Sequence[str]) -> list[str]:
    """One or several hookpoints as a list. Raises: CacheError if there is none."""
    names = [hookpoints] if isinstance(hookpoints, str) else list(hookpoints)
    if not names:
        raise CacheError("no hookpoint given: name at least one, such as layers.6.resid_post")
    return names


def _require_space(store: Store, fingerprint: Fingerprint, n_rows: int) -> None:
    needed, free = n_rows * bytes_per_token(fingerprint), store.free_bytes()
    if free is not None and needed > free:
        raise DiskFull(
            f"disk full: the cache needs {needed / 1e9:,.2f} GB more and {store.root} has "
            f"{free / 1e9:,.2f} GB free. Free some space, or lower n_tokens"
        )


class _Reporter:
    """Counts rows and tells how fast they come."""

    def __init__(
        self, n_done: int, wanted: int, on_progress: Callable[[HarvestProgress], None] | None
    ):
        self._n, self._first, self._wanted = n_done, n_done, wanted
        self._tell, self._start = on_progress, time.perf_counter()

    def __call__(self, n_rows: int) -> None:
        self._n += n_rows
        if self._tell:
            speed = (self._n - self._first) / (time.perf_counter() - self._start)
            self._tell(HarvestProgress(self._n, self._wanted, speed))
