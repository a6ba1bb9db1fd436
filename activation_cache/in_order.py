"""A cache in the order of its text: chunks of rows, blocks of tokens, documents.

In: shards and which of their rows are used. Out: what `ActivationCache` yields in order. Rows are
read on one thread and decoded on the next, and the disk is told in good time of what comes.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from .chunks import CachedDocument, Chunk, TokenBlock, runs_of_blocks
from .packing import BOS_POSITION
from .read_ahead import read_ahead
from .row_selection import RowSelection, Split
from .shard_reader import ShardReader
from .stored_rows import StoredRows

CHUNK_BYTES = 16_000_000
"""Of float32. Larger ones come from the system and go back to it each time, page by page."""
_AHEAD_BYTES = 64_000_000
"""What a disk is told to begin with before it is read."""


class _Piece(NamedTuple):
    """Packed blocks begin..end-1 of a shard, which are its rows first..last-1."""

    shard: int
    begin: int
    end: int
    first: int
    last: int


class InOrder:
    """Reads shards from the first to the last."""

    def __init__(self, shards: ShardReader, selection: RowSelection):
        self._shards, self._selection = shards, selection

    def chunks(
        self,
        hookpoint: str,
        rows: int,
        split: Split,
        device: torch.device,
        dtype: torch.dtype,
        shards: range | None = None,
    ) -> Iterator[Chunk]:
        """See `ActivationCache.chunks`."""
        key, shards = ((hookpoint,), split), shards or range(len(self._shards))
        for piece, stored in read_ahead(self._read_pieces(hookpoint, rows, shards)):
            tokens, inside = self._shards.tokens(piece.shard), slice(piece.first, piece.last)
            offsets = tokens["block_offsets"][piece.begin : piece.end + 1]
            kept = self._selection.kept_between(piece.shard, piece.first, piece.last, key)
            yield Chunk(
                acts=stored.take(slice(None), device, dtype),
                token_ids=tokens["token_ids"][inside].long(),
                doc_ids=tokens["doc_ids"][inside],
                positions=tokens["positions"][inside],
                block_offsets=offsets - piece.first,
                is_massive=~kept,
                first_row=int(self._shards.first_rows[piece.shard]) + piece.first,
            )

    def _pieces(self, rows: int, shards: range) -> Iterator[_Piece]:
        """Some shards in order, cut between packed blocks."""
        for shard in shards:
            offsets = self._shards.tokens(shard)["block_offsets"].numpy()
            for begin, end in runs_of_blocks(offsets, rows):
                yield _Piece(shard, begin, end, int(offsets[begin]), int(offsets[end]))

    def _read_pieces(
        self, hookpoint: str, rows: int, shards: range
    ) -> Iterator[tuple[_Piece, StoredRows]]:
        """Each piece as it is stored; the disk is told in good time of what comes."""
        told = 0  # rows of the cache
        n_ahead = _AHEAD_BYTES // self._shards.file(0, hookpoint).row_bytes
        for piece in self._pieces(rows, shards):
            last = int(self._shards.first_rows[piece.shard]) + piece.last
            if told < last + n_ahead // 2:
                self._expect(hookpoint, max(told, last), last + n_ahead)
                told = last + n_ahead
            yield piece, self._stored(piece.shard, hookpoint, piece.first, piece.last)

    def _expect(self, hookpoint: str, first: int, last: int) -> None:
        """Rows first..last-1 of the cache are read soon."""
        begins = self._shards.first_rows
        shard = int(np.searchsorted(begins, first, side="right")) - 1
        while shard < len(self._shards) and int(begins[shard]) < last:
            begin = int(begins[shard])
            self._shards.file(shard, hookpoint).expect(max(first - begin, 0), last - begin)
            shard += 1

    def _stored(self, shard: int, hookpoint: str, first: int, last: int) -> StoredRows:
        """Rows first..last-1 of a shard."""
        raw, scales = self._shards.file(shard, hookpoint).rows(first, last)
        if scales is None:
            return StoredRows(raw)
        name = self._shards.shards[shard].record.calibrations[hookpoint]
        exact = self._shards.exact(shard, hookpoint).between(first, last)
        calibration = self._shards.calibration(hookpoint, name)
        return StoredRows(raw, scales, [calibration], exact=exact)

    def token_blocks(self, split: Split) -> Iterator[TokenBlock]:
        """See `ActivationCache.token_blocks`."""
        for shard in range(len(self._shards)):
            tokens = self._shards.tokens(shard)
            in_split = self._selection.in_split(shard, split) & (
                tokens["positions"] != BOS_POSITION
            )
            offsets = tokens["block_offsets"].tolist()
            for first, last in itertools.pairwise(offsets):
                if bool(in_split[first:last].any()):
                    yield TokenBlock(
                        tokens["token_ids"][first:last].long(),
                        in_split[first:last],
                        int(self._shards.first_rows[shard]) + first,
                    )

    def documents(self) -> Iterator[CachedDocument]:
        """See `ActivationCache.documents`."""
        doc_id, ids, sources = -1, list[int](), self._shards.sources
        for shard in range(len(self._shards)):
            tokens = self._shards.tokens(shard)
            is_text = tokens["positions"] != BOS_POSITION
            docs, token_ids = tokens["doc_ids"][is_text], tokens["token_ids"][is_text]
            borders = [0, *((docs[1:] != docs[:-1]).nonzero()[:, 0] + 1).tolist(), len(docs)]
            for first, last in itertools.pairwise(borders):
                if int(docs[first]) != doc_id:
                    if ids:
                        yield CachedDocument(doc_id, sources[doc_id], ids)
                    doc_id, ids = int(docs[first]), []
                ids = ids + token_ids[first:last].tolist()
        if ids:
            yield CachedDocument(doc_id, sources[doc_id], ids)
