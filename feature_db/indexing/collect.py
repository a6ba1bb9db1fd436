"""The one pass over a text: chunks in, the part of every SAE at that hookpoint out."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae.atomic_files import fsync

from ..config import IndexConfig
from ..inputs import IndexedSAE
from .counting import Counting, write_counts
from .directions import NearestFeatures, fastest_on
from .part_files import PartWriter
from .parts import PartRange, PartRecord, PartsFolder
from .sorting import Float32, Int64
from .spool import EntrySpool
from .statistics import N_POSITION_BINS, Scales, position_bins
from .text_rows import PartRows, RowRecords, rows_of

if TYPE_CHECKING:
    from activation_cache import ActivationCache, Chunk
    from sae import SAE


class RowCounts(NamedTuple):
    """Of the rows that were indexed, how many are on each token, and stand before and behind each;
    how many at each position. int64 [vocab], [vocab], [vocab], [N_POSITION_BINS]."""

    tokens: Int64
    previous: Int64
    following: Int64
    positions: Int64

    @classmethod
    def of(cls, rows: PartRows, kept: Int64, vocab_size: int) -> "RowCounts":
        """kept: which of the rows were indexed."""
        columns = (rows.token_ids, rows.previous, rows.following)
        counts = (np.bincount(c[kept][c[kept] >= 0], minlength=vocab_size) for c in columns)
        tokens, previous, following = counts
        bins = position_bins(rows.positions[kept])
        return cls(tokens, previous, following, np.bincount(bins, minlength=N_POSITION_BINS))

    @classmethod
    def load(cls, folder: Path) -> "RowCounts":
        """What `save` wrote."""
        with np.load(folder / "rows.npz", allow_pickle=False) as file:
            return cls(*(file[name] for name in cls._fields))

    def save(self, folder: Path) -> None:
        """Write rows.npz."""
        np.savez(folder / "rows.npz", **self._asdict())

    def __add__(self, other: "RowCounts") -> "RowCounts":  # type: ignore[override]
        return RowCounts(*(a + b for a, b in zip(self, other, strict=True)))


class SAEPart:
    """One SAE's share of a part that is being counted."""

    def __init__(self, indexed: IndexedSAE, folder: Path) -> None:
        self.indexed, self.folder = indexed, folder
        (folder / "spool").mkdir()
        self.spool = EntrySpool(folder / "spool", indexed.sae.d_sae)
        self._kept: list[Int64] = []
        self._n_rows = 0

    def add(self, chunk: "Chunk") -> None:
        """Encode a chunk and keep its entries."""
        rows = indexable_rows(chunk, self.indexed.sae)
        with _fastest_kernels(self.indexed.sae):
            counts, features, acts = codes_by_row(chunk, self.indexed.sae, rows)
        self.spool.add(counts, features, acts, self._n_rows)
        self._kept.append(rows + self._n_rows)
        self._n_rows += len(chunk.token_ids)

    def write(self, counting: Counting) -> PartRecord:
        """Count the entries; `source` is left to the caller."""
        kept = np.concatenate(self._kept)
        RowCounts.of(counting.rows, kept, counting.vocab_size).save(self.folder)
        with PartWriter(self.folder) as writer:
            write_counts(counting, self.spool, writer)
        shutil.rmtree(self.folder / "spool")
        fsync(self.folder / "rows.npz")
        return PartRecord("", len(kept), self._n_rows - len(kept))


class Collector:
    """Makes parts. vocab_size: of the model. on_rows: told how many more rows were read."""

    def __init__(
        self,
        cache: "ActivationCache",
        parts: PartsFolder,
        config: IndexConfig,
        vocab_size: int,
        nearest: NearestFeatures,
        on_rows: Callable[[int], None],
    ) -> None:
        self._cache, self._parts, self._config = cache, parts, config
        self._vocab_size, self._on_rows = vocab_size, on_rows
        self._nearest = nearest

    def make(
        self, part: PartRange, source: str, hookpoint: str, saes: Sequence[IndexedSAE]
    ) -> None:
        """Count one part for SAEs of one hookpoint. source: hash of its rows."""
        with self._parts.making(part, [each.weights_hash for each in saes]) as folders:
            counted = [SAEPart(*each) for each in zip(saes, folders, strict=True)]
            rows = self._read(part, hookpoint, counted)
            rows.save(self._parts.folder / part.name)
            records = rows.records()
            for each in counted:
                record = each.write(self._counting(rows, records, each.indexed, hookpoint))
                self._parts.commit(each.folder, record._replace(source=source))

    def _read(self, part: PartRange, hookpoint: str, counted: Sequence[SAEPart]) -> PartRows:
        config, rows = self._config, list[PartRows]()
        for chunk in self._cache.chunks(hookpoint, rows=config.chunk_rows, shards=part.shards):
            rows.append(rows_of(chunk, config.tokens_before, config.tokens_after))
            for each in counted:
                each.add(chunk)
            self._on_rows(len(chunk.token_ids))
        return PartRows.joined(rows)

    def _counting(
        self, rows: PartRows, records: RowRecords, indexed: IndexedSAE, hookpoint: str
    ) -> Counting:
        limit = min(self._cache.max_norm(hookpoint), indexed.sae.max_norm)
        return Counting(
            rows,
            records,
            indexed.sae.d_sae,
            self._vocab_size,
            Scales.of(limit),
            self._nearest.of(indexed.weights_hash, indexed.sae.W_dec).ids,
            self._config,
        )


@contextmanager
def _fastest_kernels(sae: "SAE") -> Iterator[None]:
    own = sae.kernels
    sae.kernels = fastest_on(sae.W_enc.device, own)
    try:
        yield
    finally:
        sae.kernels = own


def indexable_rows(chunk: "Chunk", sae: "SAE") -> Int64:
    """Rows that are indexed: no BOS, no row of massive norm, none that the SAE calls foreign."""
    kept = (chunk.positions >= 0) & ~chunk.is_massive & sae.in_domain(chunk.acts).cpu()
    return kept.nonzero().squeeze(1).numpy()


@torch.no_grad()
def codes_by_row(chunk: "Chunk", sae: "SAE", rows: Int64) -> tuple[Int64, Int64, Float32]:
    """How many features are active on each row of the chunk; the features and acts, row by row."""
    counts = np.zeros(len(chunk.token_ids), np.int64)
    if not len(rows):
        return counts, np.empty(0, np.int64), np.empty(0, np.float32)
    x = chunk.acts[torch.from_numpy(rows)].to(sae.W_enc.device, sae.W_enc.dtype)
    codes = sae.encode_sparse(x)
    acts, features = codes.acts.float().cpu().numpy(), codes.feature_ids.cpu().numpy()
    counts[rows] = np.diff(codes.offsets.cpu().numpy())
    if not (acts > 0).all():
        kept = acts > 0
        entry_rows = np.repeat(np.arange(len(counts)), counts)
        counts = np.bincount(entry_rows[kept], minlength=len(counts))
        acts, features = acts[kept], features[kept]
    return counts, features, acts
