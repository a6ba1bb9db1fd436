"""A cache, read back: shuffled for training, in order for the index.

In: a folder or URL that `harvest` wrote. Out: `ActivationCache`. Every block of 1,024 rows is
verified against its checksum as it is loaded. `windows` and `shuffle` mix them in bounded memory,
`row_selection` says which rows are used.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from .chunks import CachedDocument, Chunk, DocumentActs, TokenBlock
from .errors import CacheError
from .in_order import CHUNK_BYTES, InOrder
from .loading import resolve_device
from .manifest import MANIFEST, MANIFEST_COPY, Manifest
from .parts import Part, is_complete, joint_hash, read_parts, text_provenance
from .quantization import added_fvu
from .read_ahead import copied_ahead, read_ahead
from .row_selection import RowSelection, Split
from .shard_reader import ShardReader
from .shards import TOKENS, verify_shard
from .shuffle import Epoch, shuffled_batches
from .store import LocalStore, Store, open_store
from .windows import Wanted, WindowLoader


class ActivationCache:
    """A cache of activations. Make one with `harvest`, open it with `ActivationCache.open`.

    massive_norm: rows whose L2 norm is above this many times the median are left out of batches
        and marked in chunks, as are rows with a norm that is no number; None keeps the massive.
    heldout_fraction: share of the documents that training never sees, chosen by a hash of the
        document's number, so that a document stays on its side however the cache grows.
    window_bytes: memory for one window of shuffling (two are held at a time); the order of the
        rows depends on it.
    max_norms: hookpoint -> the norm above which a row is massive, instead of one from the median.
    """

    def __init__(
        self,
        store: Store,
        parts: list[Part],
        *,
        massive_norm: float | None = 10.0,
        heldout_fraction: float = 0.1,
        window_bytes: int = 256_000_000,
        max_norms: Mapping[str, float] | None = None,
    ):
        self._store, self.parts = store, parts
        self._massive_norm, self._heldout_fraction = massive_norm, heldout_fraction
        self._window_bytes = window_bytes
        self._shards = ShardReader.of(parts)
        self._selection = RowSelection(
            self._shards,
            massive_norm=massive_norm,
            heldout_fraction=heldout_fraction,
            keep_first_position=self.manifest.fingerprint.keep_first_position,
            max_norms=max_norms,
        )
        self._in_order = InOrder(self._shards, self._selection)

    @classmethod
    def open(
        cls,
        folder: str | Path | Store,
        *,
        massive_norm: float | None = 10.0,
        heldout_fraction: float = 0.1,
        window_bytes: int = 256_000_000,
    ) -> "ActivationCache":
        """Open a cache for reading: a folder, or a URL. Raises: CacheError, CacheCorrupt."""
        store = open_store(folder)
        return cls(
            store,
            read_parts(store),
            massive_norm=massive_norm,
            heldout_fraction=heldout_fraction,
            window_bytes=window_bytes,
        )

    # -- what it is ------------------------------------------------------------------------------

    def with_max_norms(self, max_norms: Mapping[str, float]) -> "ActivationCache":
        """The same cache with norms above which rows are massive, instead of those that its first
        rows say, which a cache that grows may change."""
        return ActivationCache(
            self._store,
            self.parts,
            massive_norm=self._massive_norm,
            heldout_fraction=self._heldout_fraction,
            window_bytes=self._window_bytes,
            max_norms=max_norms,
        )

    @property
    def path(self) -> Path | str:
        """Its folder, or its URL."""
        return self._store.folder if isinstance(self._store, LocalStore) else self._store.root

    @property
    def manifest(self) -> Manifest:
        """What it was made from; of the first part, where a cache has several."""
        return self.parts[0].manifest

    @property
    def hookpoints(self) -> tuple[str, ...]:
        return tuple(self.manifest.fingerprint.hookpoints)

    @property
    def n_tokens(self) -> int:
        """Rows in the cache, BOS and massive ones included."""
        return self._shards.n_rows

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def shard_edges(self) -> list[int]:
        """First row of every shard, and the end of the last: [n_shards + 1], ascending."""
        return [int(row) for row in self._shards.first_rows]

    @property
    def sources(self) -> Mapping[int, str]:
        """Document's number -> its source."""
        return self._shards.sources

    def rows_hash(self, hookpoint: str, shards: range) -> str:
        """A hash of some shards' rows and tokens, from their records."""
        digest = xxhash.xxh3_128()
        for shard in shards:
            files = self._shards.shards[shard].record.files
            for name in (TOKENS, hookpoint):
                digest.update("".join([*files[name].block_hashes, files[name].rest_hash]).encode())
        return digest.hexdigest()

    @property
    def n_documents(self) -> int:
        """Documents that have at least one row."""
        return len(self._shards.sources)

    @property
    def is_complete(self) -> bool:
        """Whether every harvest that writes to it has come to its end."""
        return is_complete(self.parts)

    @property
    def is_exhausted(self) -> bool:
        """Whether a text ended before the wanted number of tokens."""
        return any(part.manifest.is_exhausted for part in self.parts)

    @property
    def fingerprint_hash(self) -> str:
        return joint_hash(self.parts)

    @property
    def n_bytes(self) -> int:
        """Disk that the shards take."""
        return sum(self.bytes_by_stream.values())

    @property
    def bytes_by_stream(self) -> dict[str, int]:
        """Disk by hookpoint, and by "tokens"."""
        sizes: dict[str, int] = {}
        for shard in self._shards.shards:
            for stream, file in shard.record.files.items():
                sizes[stream] = sizes.get(stream, 0) + file.n_bytes
        return sizes

    @property
    def quantization_fvu(self) -> dict[str, float | None]:
        """Hookpoint -> FVU that storing in int8 added, over all rows that are not kept exactly; no
        entry where rows are stored as floats. See `quantization.added_fvu`."""
        records = [shard.record for shard in self._shards.shards]
        return {
            hookpoint: added_fvu(r.quantization[hookpoint] for r in records)
            for hookpoint in records[0].quantization
        }

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
        return {
            **text_provenance([part.manifest.fingerprint for part in self.parts]),
            "hookpoint": hookpoint,
            "cache_fingerprint": self.fingerprint_hash,
            "n_tokens_cached": self.n_tokens,
            "massive_norm": self._massive_norm,
            "heldout_fraction": self._heldout_fraction,
        }

    def verify(self) -> int:
        """Read every byte and compare it with its checksum. Returns: bytes verified.

        Raises: CacheCorrupt that names the first damaged file.
        """
        for part in self.parts:
            for name in (MANIFEST, MANIFEST_COPY):
                if name == MANIFEST or part.store.has(name):  # older caches have no copy
                    Manifest.read(part.store, name)
        for shard in self._shards.shards:
            verify_shard(shard.store, shard.record, self.hookpoints)
        return self.n_bytes

    # -- which rows are used ---------------------------------------------------------------------

    def max_norm(self, hookpoint: str) -> float:
        """The norm above which a row is massive: `massive_norm` times the median of the norms.

        The median is that of the first 2^20 rows of the cache; inf where nothing is left out.
        """
        self.d_model(hookpoint)
        return self._selection.max_norm(hookpoint)

    def n_rows(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows that `batches` yields in one epoch."""
        self.d_model(hookpoint)
        return int(self._selection.counts((hookpoint,), split).sum())

    def n_massive(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows of `split` that are left out for their norm."""
        self.d_model(hookpoint)
        return self._selection.n_massive(hookpoint, split)

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
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """Shuffled rows, [batch, width].

        epochs: passes over the rows, None for no end. Batches run on across epochs; the very last
            one may be shorter, and no row is dropped.
        start_batch: where to begin, reached without reading what lies before.
        rank, world_size: of each global batch, this rank's share (rows rank::world_size). All ranks
            get equally many batches; a share of a very short last batch may have no row.
        device, dtype: of the batches. To a GPU rows travel as they are stored, one batch ahead.
        Raises: CacheError (no such rows, or arguments out of range); while reading, CacheCorrupt
            (a block does not match its checksum).
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
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[dict[str, Tensor]]:
        """Like `batches`, at several hookpoints: row i is the same token at each.

        A row of massive norm at one of the hookpoints is left out at all of them.
        """
        if batch_size < 1 or start_batch < 0 or seed < 0 or not 0 <= rank < world_size:
            raise CacheError(
                f"batch_size={batch_size}, start_batch={start_batch}, seed={seed}, rank={rank} of "
                f"{world_size}: expected batch_size from 1, the others from 0, rank < world_size"
            )
        if not hookpoints:
            raise CacheError(
                f"no hookpoint given: cache {self.path} holds {', '.join(self.hookpoints)}"
            )
        for hookpoint in hookpoints:
            self.d_model(hookpoint)
        to = resolve_device(str(device))
        wanted = Wanted(tuple(hookpoints), split, to, dtype)
        loader = WindowLoader(self._shards, self._selection, wanted, self._window_bytes)
        blocks = loader.blocks()
        n_rows = int(blocks.counts.sum())
        if not n_rows:
            raise CacheError(
                f"cache {self.path} has no rows in split {split!r} at {', '.join(hookpoints)}: "
                "harvest more documents, or change heldout_fraction"
            )
        numbers = itertools.count() if epochs is None else range(epochs)
        batches = shuffled_batches(
            (Epoch(number, n_rows, lambda: blocks) for number in numbers),
            batch_size,
            seed=seed,
            start_batch=start_batch,
            rank=rank,
            world_size=world_size,
        )
        return copied_ahead(batches, to)

    def aligned_sample(
        self, hookpoints: Sequence[str], batch_size: int, *, seed: int = 0, near_row: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Train rows to measure on: one epoch of `aligned_batches`. near_row: for streams, which
        keep no more than what lies near it."""
        del near_row
        return self.aligned_batches(hookpoints, batch_size, seed=seed)

    def wants_checkpoint(self, n_rows_read: int, hookpoints: Sequence[str]) -> bool:
        """False: nothing is dropped as it is read."""
        del n_rows_read, hookpoints
        return False

    def release(self, n_rows_read: int, hookpoints: Sequence[str]) -> None:
        """Nothing: all rows stay."""

    # -- in order --------------------------------------------------------------------------------

    def chunks(
        self,
        hookpoint: str,
        *,
        rows: int | None = None,
        split: Split = "all",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        shards: range | None = None,
    ) -> Iterator[Chunk]:
        """The cache in order, some whole blocks at a time (at least `rows` rows, but the last).

        rows: left out, as many as take 16 MB in float32. The next chunk is read while one is used.
        Rows outside of `split` are marked as massive ones are: present, and not to be used.
        shards: some of them alone, by number.
        """
        row_bytes = 4 * self.d_model(hookpoint)
        rows = rows or max(CHUNK_BYTES // row_bytes, 1)
        return read_ahead(
            self._in_order.chunks(
                hookpoint, rows, split, resolve_device(str(device)), dtype, shards
            )
        )

    def document_acts(self, hookpoint: str, *, split: Split = "all") -> Iterator[DocumentActs]:
        """Document after document with its activations in the order of the text.

        BOS rows are left out; a document whose end is not cached yields what there is of it.
        """
        parts: list[Chunk] = []
        for chunk in self.chunks(hookpoint, split=split):
            for piece in chunk.by_document():
                if parts and parts[0].doc_ids[0] != piece.doc_ids[0]:
                    yield DocumentActs.joined(parts, self._shards.sources)
                    parts = []
                parts.append(piece)
        if parts:
            yield DocumentActs.joined(parts, self._shards.sources)

    def token_blocks(self, *, split: Split = "heldout") -> Iterator[TokenBlock]:
        """The packed blocks that hold at least one token of `split`, in order."""
        return self._in_order.token_blocks(split)

    def documents(self) -> Iterator[CachedDocument]:
        """The documents in order, each as far as it is cached, BOS rows left out."""
        return self._in_order.documents()
