"""What is in a cache: rows, norms, the channels and tokens of its massive rows, rounding, disk.

In: an `ActivationCache`. Out: `CacheStatistics`, plain numbers for tables, drawings and JSON. Each
hookpoint is read once, in order and in bounded memory. `saebase cache stats` prints it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cache import ActivationCache
from .chunks import Chunk
from .errors import CacheError
from .manifest import Fingerprint
from .norm_counts import NormCounts, NormHistogram, places_of_group
from .packing import BOS_POSITION
from .row_totals import ChannelValue, MassiveRows, MassiveTotals, OrdinaryTotals, largest
from .shards import TOKENS

N_ROWS_READ = 262_144
"""Rows that are read at each hookpoint unless more are asked for."""
QUANTILES = (0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 1.0)
_CHUNK_BYTES = 64_000_000


@dataclass(frozen=True)
class PlaceNorms:
    """Norms of the rows at some places of their packed blocks.

    first_place, last_place: from 0, both included. median, low, high: norms that 50%, 5% and 95% of
    these rows don't exceed.
    """

    first_place: int
    last_place: int
    n_rows: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class HookpointStatistics:
    """What the rows of one hookpoint are like. Norms are L2 norms of rows as they are stored.

    n_rows: rows read. n_non_finite: rows whose norm is infinite or no number, left out of all else.
    n_ordinary: finite rows that training uses; the rest are massive, or first positions where the
    cache leaves those out.
    norm_quantiles: share -> norm that this share of the finite rows does not exceed, right to 2^-11
    of itself; 1.0 is the exact maximum. norms_by_place: in order, places without a row left out.
    mean_squared_norm, mean_row: of ordinary rows; mean_row is the norm of their mean over the root
    of their mean squared norm, 0 to 1. largest_mean_abs, largest_variance: the channels of ordinary
    rows with the largest mean absolute value and variance, at most 8.
    quantization_fvu: fraction of variance that storing in int8 lost; None in other formats.
    """

    hookpoint: str
    d_model: int
    n_rows: int
    n_non_finite: int
    n_ordinary: int
    median_norm: float
    norm_quantiles: dict[float, float]
    norms_by_place: tuple[PlaceNorms, ...]
    norm_histogram: NormHistogram
    massive: MassiveRows
    mean_squared_norm: float
    mean_row: float
    largest_mean_abs: tuple[ChannelValue, ...]
    largest_variance: tuple[ChannelValue, ...]
    quantization_fvu: float | None


@dataclass(frozen=True)
class DiskUse:
    """Bytes of the shards. by_stream: "tokens" and each hookpoint -> bytes, adding up to n_bytes.
    bytes_per_token: n_bytes over the rows of the cache, all hookpoints together."""

    n_shards: int
    n_bytes: int
    by_stream: dict[str, int]
    bytes_per_token: float


@dataclass(frozen=True)
class CacheStatistics:
    """What is in a cache.

    n_tokens, n_documents: in the whole cache. n_rows_read: rows that were read of each hookpoint,
    the first of the cache. median_document_tokens: tokens of a document as far as it is cached,
    its separator included and BOS not, over the documents that end within the rows read.
    storage_dtype, model_dtype: of the cache. rounding: by how much of itself storing may have
    changed a value: 0.0 where the model computes in no finer format, None in int8 (see
    `quantization_fvu`).
    """

    n_tokens: int
    n_documents: int
    n_rows_read: int
    median_document_tokens: float
    storage_dtype: str
    model_dtype: str
    rounding: float | None
    disk: DiskUse
    hookpoints: tuple[HookpointStatistics, ...]


@dataclass(frozen=True)
class StatisticsProgress:
    """Where the pass stands: rows read and to be read, of all hookpoints together."""

    hookpoint: str
    n_rows: int
    n_rows_wanted: int


OnProgress = Callable[[StatisticsProgress], None]


def cache_statistics(
    cache: ActivationCache,
    *,
    hookpoints: Sequence[str] | None = None,
    n_rows: int | None = N_ROWS_READ,
    on_progress: OnProgress | None = None,
) -> CacheStatistics:
    """Read the cache once and say what is in it.

    hookpoints: those to read, None for all. n_rows: rows to read of each, the first of the cache
        (a cache is read in order, and its text is in the order of the corpus); None for all.
    Memory: a chunk of 64 MB and its copies, and 2 MB for each group of places.
    Raises: CacheError (no such hookpoint, n_rows below 1); while reading, CacheCorrupt.
    """
    if n_rows is not None and n_rows < 1:
        raise CacheError(f"n_rows={n_rows}: expected 1 or more, or None for all")
    names = tuple(hookpoints or cache.hookpoints)
    for hookpoint in names:
        cache.d_model(hookpoint)
    wanted = min(n_rows or cache.n_tokens, cache.n_tokens)
    found, lengths, fingerprint = [], _DocumentLengths(), cache.manifest.fingerprint
    for number, hookpoint in enumerate(names):
        read = _HookpointPass(cache, hookpoint)
        for chunk in _first_chunks(cache, hookpoint, wanted):
            read.add_(chunk)
            if number == 0:
                lengths.add_(chunk)
            if on_progress:
                done = number * wanted + read.n_rows
                on_progress(StatisticsProgress(hookpoint, done, len(names) * wanted))
        found.append(read.result())
    return CacheStatistics(
        n_tokens=cache.n_tokens,
        n_documents=cache.n_documents,
        n_rows_read=wanted,
        median_document_tokens=lengths.median(is_cut=wanted < cache.n_tokens),
        storage_dtype=fingerprint.storage_dtype,
        model_dtype=fingerprint.model_dtype,
        rounding=storage_rounding(fingerprint),
        disk=disk_use(cache),
        hookpoints=tuple(found),
    )


def storage_rounding(fingerprint: Fingerprint) -> float | None:
    """Largest relative error of a stored value, 0.0 for none; None where storage is no float.

    Half a unit in the last place: 2^-8 for bfloat16, 2^-11 for float16 (between 6.1e-5 and 65,504).
    """
    stored = getattr(torch, fingerprint.storage_dtype, None)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        return None
    if fingerprint.storage_dtype in (fingerprint.model_dtype, "float32"):
        return 0.0
    return torch.finfo(stored).eps / 2


def disk_use(cache: ActivationCache) -> DiskUse:
    """What the shards take on disk, from their commit records."""
    by_stream = {TOKENS: 0, **cache.bytes_by_stream}
    n_bytes = sum(by_stream.values())
    return DiskUse(cache.n_shards, n_bytes, by_stream, n_bytes / cache.n_tokens)


def _first_chunks(cache: ActivationCache, hookpoint: str, n_rows: int) -> Iterator[Chunk]:
    """The first `n_rows` rows, in chunks of at most about 64 MB; blocks may end early."""
    rows = max(_CHUNK_BYTES // (4 * cache.d_model(hookpoint)), 1)
    left = n_rows
    for chunk in cache.chunks(hookpoint, rows=min(rows, n_rows)):
        yield chunk if len(chunk.acts) <= left else _cut(chunk, left)
        left -= len(chunk.acts)
        if left <= 0:
            return


def _cut(chunk: Chunk, n_rows: int) -> Chunk:
    return Chunk(
        acts=chunk.acts[:n_rows],
        token_ids=chunk.token_ids[:n_rows],
        doc_ids=chunk.doc_ids[:n_rows],
        positions=chunk.positions[:n_rows],
        block_offsets=chunk.block_offsets.clamp(max=n_rows).unique(),
        is_massive=chunk.is_massive[:n_rows],
        first_row=chunk.first_row,
    )


class _HookpointPass:
    """Takes chunks, and gives what they were like."""

    def __init__(self, cache: ActivationCache, hookpoint: str):
        fingerprint = cache.manifest.fingerprint
        self._hookpoint, self._width = hookpoint, cache.d_model(hookpoint)
        self._keeps_first = fingerprint.keep_first_position
        self._n_places = fingerprint.ctx_len
        self._quantization_fvu = cache.quantization_fvu.get(hookpoint)
        self._norms = NormCounts(self._n_places)
        self._ordinary = OrdinaryTotals(self._width)
        self._massive = MassiveTotals(self._width, cache.max_norm(hookpoint))
        self.n_rows = self._n_non_finite = 0

    def add_(self, chunk: Chunk) -> None:
        norms = torch.linalg.vector_norm(chunk.acts, dim=1)
        is_finite = norms.isfinite()
        places = _places(chunk.block_offsets)
        self.n_rows += len(norms)
        self._n_non_finite += int((~is_finite).sum())
        self._norms.add_(norms[is_finite].numpy(), places[is_finite].numpy())
        self._ordinary.add_(chunk.acts[is_finite & ~chunk.is_massive])
        is_massive = is_finite & chunk.is_massive
        if not self._keeps_first:  # first rows are marked too, whatever their norm
            is_massive &= norms > self._massive.limit
        self._massive.add_(chunk.acts[is_massive], chunk.token_ids[is_massive], places[is_massive])

    def result(self) -> HookpointStatistics:
        norms = self._norms.quantiles(QUANTILES)
        quantiles = dict(zip(QUANTILES, norms, strict=True))
        ordinary = self._ordinary
        return HookpointStatistics(
            hookpoint=self._hookpoint,
            d_model=self._width,
            n_rows=self.n_rows,
            n_non_finite=self._n_non_finite,
            n_ordinary=ordinary.n_rows,
            median_norm=quantiles[0.5],
            norm_quantiles=quantiles,
            norms_by_place=self._norms_by_place(),
            norm_histogram=self._norms.histogram(),
            massive=self._massive.result(self.n_rows),
            mean_squared_norm=ordinary.mean_squared_norm,
            mean_row=ordinary.mean_row,
            largest_mean_abs=largest(ordinary.mean_abs),
            largest_variance=largest(ordinary.variance),
            quantization_fvu=self._quantization_fvu,
        )

    def _norms_by_place(self) -> tuple[PlaceNorms, ...]:
        found = []
        for group in range(self._norms.n_groups):
            n_rows = self._norms.n_rows(group)
            low, median, high = self._norms.quantiles((0.05, 0.5, 0.95), group)
            first, last = places_of_group(group)
            last = min(last, self._n_places - 1)
            if n_rows:
                found.append(PlaceNorms(first, last, n_rows, median, low, high))
        return tuple(found)


class _DocumentLengths:
    """Rows of each document, BOS rows left out."""

    def __init__(self) -> None:
        self._lengths: Counter[int] = Counter()

    def add_(self, chunk: Chunk) -> None:
        doc_ids = chunk.doc_ids[chunk.positions != BOS_POSITION]
        found, counts = doc_ids.unique(return_counts=True)
        self._lengths.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def median(self, *, is_cut: bool) -> float:
        """is_cut: whether more of the last document may follow."""
        in_order = [self._lengths[doc_id] for doc_id in sorted(self._lengths)]
        whole = in_order[:-1] if is_cut else in_order
        return float(np.median(whole)) if whole else float("nan")


def _places(block_offsets: Tensor) -> Tensor:
    """int64 [rows]: place of each row in its block."""
    starts = block_offsets[:-1].repeat_interleave(block_offsets.diff())
    return torch.arange(len(starts)) - starts
