"""A finished cache, read back: shuffled for training, in order for the index.

In: a folder that `harvest` made. Out: `ActivationCache`. Every block of 1,024 rows is verified
against its checksum as it is loaded. `shuffle` mixes them in bounded memory, `split` says which
documents are held out.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .chunks import CachedDocument, Chunk, TokenBlock, runs_of_blocks
from .errors import CacheCorrupt, CacheError
from .manifest import (
    BLOCK_ROWS,
    Manifest,
    ShardRecord,
    read_records,
    record_file,
    shard_file,
)
from .packing import BOS_POSITION
from .shards import STORAGE_DTYPES, TOKENS, TensorFile
from .shuffle import Blocks, shuffled_batches
from .split import is_held_out

Split = Literal["train", "heldout", "all"]
_MEDIAN_ROWS = 1 << 20


class ActivationCache:
    """A folder of activations. Make one with `harvest`, open it with `ActivationCache.open`.

    massive_norm: rows whose L2 norm is above this many times the median are left out of batches
        and marked in chunks, as are rows with a norm that is no number; None keeps the massive.
    heldout_fraction: share of the documents that training never sees, chosen by a hash of the
        document's number, so that a document stays on its side however the cache grows.
    window_bytes: memory for shuffling; the order of the rows depends on it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        records: list[ShardRecord],
        *,
        massive_norm: float | None = 10.0,
        heldout_fraction: float = 0.1,
        window_bytes: int = 512_000_000,
    ):
        self.path, self.manifest, self._records = folder, manifest, records
        self._massive_norm, self._heldout_fraction = massive_norm, heldout_fraction
        self._window_bytes = window_bytes
        self._first_rows = np.cumsum([0, *(record.n_rows for record in records)])
        self._file = lru_cache(maxsize=1024)(self._open_file)
        self._tokens_of = lru_cache(maxsize=8)(self._load_tokens)
        self._kept_bits = lru_cache(maxsize=None)(self._pack_kept)
        self._kept_counts_of = lru_cache(maxsize=None)(self._count_kept)
        self._max_norm_of = lru_cache(maxsize=None)(self.max_norm)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        massive_norm: float | None = 10.0,
        heldout_fraction: float = 0.1,
        window_bytes: int = 512_000_000,
    ) -> "ActivationCache":
        """Open a cache for reading. Raises: CacheError, CacheCorrupt."""
        path = Path(folder)
        manifest = Manifest.read(path)
        records = read_records(path, manifest)
        if not records:
            raise CacheError(f"{path} holds no finished shard yet: run its harvest again")
        if not 0 <= heldout_fraction < 1:
            raise CacheError(f"heldout_fraction={heldout_fraction}: expected 0 or more, below 1")
        return cls(
            path,
            manifest,
            records,
            massive_norm=massive_norm,
            heldout_fraction=heldout_fraction,
            window_bytes=window_bytes,
        )

    # -- what it is ------------------------------------------------------------------------------

    @property
    def hookpoints(self) -> tuple[str, ...]:
        return tuple(self.manifest.fingerprint.hookpoints)

    @property
    def n_tokens(self) -> int:
        """Rows in the cache, BOS and massive ones included."""
        return int(self._first_rows[-1])

    @property
    def n_documents(self) -> int:
        """Documents that have at least one row."""
        return len(self._sources)

    @property
    def fingerprint_hash(self) -> str:
        return self.manifest.fingerprint.hash

    @property
    def n_bytes(self) -> int:
        """Disk that the shards take."""
        return sum(file.n_bytes for record in self._records for file in record.files.values())

    def d_model(self, hookpoint: str) -> int:
        """Width of a row. Raises: CacheError if the cache lacks the hookpoint."""
        widths = self.manifest.fingerprint.hookpoints
        if hookpoint not in widths:
            raise CacheError(
                f"cache {self.path} holds {', '.join(widths)}, not {hookpoint!r}: "
                "choose one of them, or harvest again"
            )
        return widths[hookpoint]

    def provenance(self, hookpoint: str) -> dict[str, Any]:
        """What rows at `hookpoint` were made from, for the config of what is made from them."""
        self.d_model(hookpoint)
        fingerprint = self.manifest.fingerprint
        return {
            "model": fingerprint.model,
            "model_revision": fingerprint.model_revision,
            "model_dtype": fingerprint.model_dtype,
            "tokenizer": fingerprint.tokenizer,
            "hookpoint": hookpoint,
            "data": fingerprint.data,
            "data_revision": fingerprint.data_revision,
            "ctx_len": fingerprint.ctx_len,
            "cache_fingerprint": fingerprint.hash,
            "n_tokens_cached": self.n_tokens,
            "massive_norm": self._massive_norm,
            "heldout_fraction": self._heldout_fraction,
        }

    def verify(self) -> int:
        """Read every byte and compare it with its checksum. Returns: bytes verified.

        Raises: CacheCorrupt that names the first damaged file.
        """
        for record in self._records:
            expected = {TOKENS, *self.hookpoints}
            if set(record.files) != expected:
                path = record_file(self.path, record.shard)
                raise CacheCorrupt(f"{path} lists {sorted(record.files)}, not {sorted(expected)}")
            for stream in record.files:
                self._file(record.shard, stream).verify()
        return self.n_bytes

    # -- rows of massive norm --------------------------------------------------------------------

    def max_norm(self, hookpoint: str) -> float:
        """The norm above which a row is massive: `massive_norm` times the median of the norms.

        The median is that of the first 2^20 rows of the cache; inf where nothing is left out.
        """
        if self._massive_norm is None:
            return math.inf
        return self._massive_norm * self._median_norm(hookpoint)

    def _median_norm(self, hookpoint: str) -> float:
        self.d_model(hookpoint)
        norms: list[Tensor] = []
        for record in self._records:
            norms.append(self._file(record.shard, hookpoint).small()["norms"])
            if sum(map(len, norms)) >= _MEDIAN_ROWS:
                break
        return float(torch.cat(norms)[:_MEDIAN_ROWS].nanmedian())

    def n_rows(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows that `batches` yields in one epoch."""
        return int(self._kept_counts_of(hookpoint, split).sum())

    def n_massive(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows of `split` that are left out for their norm."""
        limit, n = self.max_norm(hookpoint), 0
        for record in self._records:
            norms = self._file(record.shard, hookpoint).small()["norms"]
            n += int((~(norms <= limit) & self._in_split(record.shard, split)).sum())
        return n

    # -- shuffled batches ------------------------------------------------------------------------

    def batches(
        self,
        hookpoint: str,
        batch_size: int,
        *,
        seed: int = 0,
        split: Split = "train",
        start_batch: int = 0,
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Tensor]:
        """Shuffled rows, float32 [batch, width], on the CPU.

        epochs: passes over the rows, None for no end. Batches run on across epochs; the very last
            one may be shorter, and no row is dropped.
        start_batch: where to begin, reached without reading what lies before.
        rank, world_size: of each global batch, this rank's share (rows rank::world_size). All ranks
            get equally many batches; a share of a very short last batch may have no row.
        Raises: CacheError (no such rows, or arguments out of range); while reading, CacheCorrupt
            (a block does not match its checksum).
        """
        if batch_size < 1 or start_batch < 0 or seed < 0 or not 0 <= rank < world_size:
            raise CacheError(
                f"batch_size={batch_size}, start_batch={start_batch}, seed={seed}, rank={rank} of "
                f"{world_size}: expected batch_size from 1, the others from 0, rank < world_size"
            )
        blocks = self._blocks(hookpoint, split)
        if not blocks.counts.sum():
            raise CacheError(
                f"cache {self.path} has no rows in split {split!r} at {hookpoint}: "
                "harvest more documents, or change heldout_fraction"
            )
        shuffled = shuffled_batches(
            blocks, batch_size, seed=seed, start_batch=start_batch, epochs=epochs
        )
        return (rows[rank::world_size].to(torch.float32, copy=True) for rows in shuffled)

    def _blocks(self, hookpoint: str, split: Split) -> Blocks:
        """The kept rows of `split`, block by block."""
        counts = self._kept_counts_of(hookpoint, split)
        dtype = STORAGE_DTYPES[self.manifest.fingerprint.storage_dtype]
        block_bytes = BLOCK_ROWS * self.d_model(hookpoint) * dtype.itemsize

        def load(number: int) -> Tensor:
            shard = int(np.searchsorted(self._first_blocks, number, side="right")) - 1
            block = number - int(self._first_blocks[shard])
            rows = self._file(shard, hookpoint).blocks(block, block + 1)
            bits = self._kept_bits(shard, hookpoint, split)[block * BLOCK_ROWS // 8 :]
            kept = np.unpackbits(bits[: BLOCK_ROWS // 8], count=len(rows)).astype(bool)
            return rows[torch.from_numpy(kept)]

        return Blocks(counts, load, max(self._window_bytes // block_bytes, 1))

    @cached_property
    def _first_blocks(self) -> NDArray[np.int64]:
        sizes = [-(-record.n_rows // BLOCK_ROWS) for record in self._records]
        return np.cumsum([0, *sizes])

    def _count_kept(self, hookpoint: str, split: Split) -> NDArray[np.int64]:
        """Rows that are kept in each block of the cache."""
        self.d_model(hookpoint)
        counts = []
        for record in self._records:
            kept = self._kept(record.shard, hookpoint, split).numpy()
            starts = np.arange(0, len(kept), BLOCK_ROWS)
            counts.append(np.add.reduceat(kept.astype(np.int64), starts))
        return np.concatenate(counts)

    def _pack_kept(self, shard: int, hookpoint: str, split: Split) -> NDArray[np.uint8]:
        """`_kept` at a bit a row, so that it stays in memory for a cache of any size."""
        return np.packbits(self._kept(shard, hookpoint, split).numpy())

    def _kept(self, shard: int, hookpoint: str, split: Split) -> Tensor:
        """bool [rows]: in `split`, not of massive norm, and no first position that is left out."""
        norms = self._file(shard, hookpoint).small()["norms"]
        kept = self._in_split(shard, split) & (norms <= self._max_norm_of(hookpoint))
        if not self.manifest.fingerprint.keep_first_position:
            kept[self._tokens_of(shard)["block_offsets"][:-1]] = False
        return kept

    # -- split by document -----------------------------------------------------------------------

    def _in_split(self, shard: int, split: Split) -> Tensor:
        if split not in ("train", "heldout", "all"):
            raise CacheError(f"unknown split {split!r}: expected train, heldout or all")
        doc_ids = self._tokens_of(shard)["doc_ids"]
        if split == "all":
            return torch.ones_like(doc_ids, dtype=torch.bool)
        held_out = torch.from_numpy(
            is_held_out(doc_ids.numpy(), self._heldout_fraction, self._first_documents)
        )
        return held_out if split == "heldout" else ~held_out

    @cached_property
    def _first_documents(self) -> list[int]:
        return sorted(self._sources)[:2]

    # -- in order --------------------------------------------------------------------------------

    def chunks(
        self, hookpoint: str, *, rows: int = 32_768, split: Split = "all"
    ) -> Iterator[Chunk]:
        """The cache in order, some whole blocks at a time (at least `rows` rows, but the last).

        Rows outside of `split` are marked as massive ones are: present, and not to be used.
        """
        self.d_model(hookpoint)
        for record in self._records:
            tokens = self._tokens_of(record.shard)
            left_out = ~self._kept(record.shard, hookpoint, split)
            offsets = tokens["block_offsets"]
            for begin, end in runs_of_blocks(offsets.numpy(), rows):
                first, last = int(offsets[begin]), int(offsets[end])
                yield Chunk(
                    acts=self._file(record.shard, hookpoint).rows(first, last).float(),
                    token_ids=tokens["token_ids"][first:last].long(),
                    doc_ids=tokens["doc_ids"][first:last],
                    positions=tokens["positions"][first:last],
                    block_offsets=offsets[begin : end + 1] - first,
                    is_massive=left_out[first:last],
                    first_row=int(self._first_rows[record.shard]) + first,
                )

    def token_blocks(self, *, split: Split = "heldout") -> Iterator[TokenBlock]:
        """The packed blocks that hold at least one token of `split`, in order."""
        for record in self._records:
            tokens = self._tokens_of(record.shard)
            in_split = self._in_split(record.shard, split) & (tokens["positions"] != BOS_POSITION)
            offsets = tokens["block_offsets"].tolist()
            for first, last in itertools.pairwise(offsets):
                if bool(in_split[first:last].any()):
                    yield TokenBlock(
                        tokens["token_ids"][first:last].long(),
                        in_split[first:last],
                        int(self._first_rows[record.shard]) + first,
                    )

    def documents(self) -> Iterator[CachedDocument]:
        """The documents in order, each as far as it is cached, BOS rows left out."""
        doc_id, ids = -1, list[int]()
        for record in self._records:
            tokens = self._tokens_of(record.shard)
            is_text = tokens["positions"] != BOS_POSITION
            docs, token_ids = tokens["doc_ids"][is_text], tokens["token_ids"][is_text]
            borders = [0, *((docs[1:] != docs[:-1]).nonzero()[:, 0] + 1).tolist(), len(docs)]
            for first, last in itertools.pairwise(borders):
                if int(docs[first]) != doc_id:
                    if ids:
                        yield CachedDocument(doc_id, self._sources[doc_id], ids)
                    doc_id, ids = int(docs[first]), []
                ids = ids + token_ids[first:last].tolist()
        if ids:
            yield CachedDocument(doc_id, self._sources[doc_id], ids)

    @cached_property
    def _sources(self) -> dict[int, str]:
        return {doc: source for record in self._records for doc, source in record.sources.items()}

    # -- files -----------------------------------------------------------------------------------

    def _open_file(self, shard: int, stream: str) -> TensorFile:
        record = self._records[shard]
        if stream not in record.files:
            raise CacheCorrupt(f"{record_file(self.path, shard)} has no entry for {stream}")
        return TensorFile(shard_file(self.path, shard, stream), record.files[stream])

    def _load_tokens(self, shard: int) -> dict[str, Tensor]:
        file = self._file(shard, TOKENS)
        return {"token_ids": file.rows(0, file.n_rows), **file.small()}
