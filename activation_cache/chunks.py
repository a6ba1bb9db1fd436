"""What a cache yields in order: chunks of rows, blocks of tokens, documents."""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .packing import BOS_POSITION


class TokenBlock(NamedTuple):
    """One packed block: token_ids int64 [seq], in_split bool [seq], first_row: its place."""

    token_ids: Tensor
    in_split: Tensor
    first_row: int


class Chunk(NamedTuple):
    """Consecutive whole blocks of a cache, in order.

    acts: float32 [rows, width]. token_ids, doc_ids: int64 [rows]. positions: int32 [rows], place in
    the document, -1 for BOS. block_offsets: int64 [n_blocks + 1], first row of each block within
    the chunk. is_massive: bool [rows], rows that training and FVU leave out. first_row: place of
    the chunk in the cache.
    """

    acts: Tensor
    token_ids: Tensor
    doc_ids: Tensor
    positions: Tensor
    block_offsets: Tensor
    is_massive: Tensor
    first_row: int

    def by_document(self) -> Iterator["Chunk"]:
        """Pieces of one document each, in order, BOS rows left out."""
        is_text = self.positions != BOS_POSITION
        acts, docs = self.acts[is_text.to(self.acts.device)], self.doc_ids[is_text]
        borders = [0, *((docs[1:] != docs[:-1]).nonzero()[:, 0] + 1).tolist(), len(docs)]
        for first, last in itertools.pairwise(borders):
            if last > first:
                yield self._replace(
                    acts=acts[first:last],
                    token_ids=self.token_ids[is_text][first:last],
                    doc_ids=docs[first:last],
                    positions=self.positions[is_text][first:last],
                    is_massive=self.is_massive[is_text][first:last],
                )


class DocumentActs(NamedTuple):
    """A document as far as it is cached. acts: float32 [n, width] in the order of the text;
    token_ids: int64 [n]; positions: int32 [n], ascending; is_massive: bool [n], rows that training
    and FVU leave out."""

    doc_id: int
    source: str
    acts: Tensor
    token_ids: Tensor
    positions: Tensor
    is_massive: Tensor

    @classmethod
    def joined(cls, pieces: list[Chunk], sources: Mapping[int, str]) -> "DocumentActs":
        """The pieces of one document as one."""
        doc_id = int(pieces[0].doc_ids[0])
        columns = (
            torch.cat([getattr(piece, name) for piece in pieces])
            for name in ("acts", "token_ids", "positions", "is_massive")
        )
        return cls(doc_id, sources[doc_id], *columns)


class CachedDocument(NamedTuple):
    """A document as far as it is cached: number, source, token ids (separator included)."""

    doc_id: int
    source: str
    token_ids: list[int]


def runs_of_blocks(offsets: NDArray[np.int64], rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of blocks that hold at least `rows` rows each (the last may hold fewer)."""
    begin = 0
    while begin < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[begin] + rows, side="left"))
        end = min(max(end, begin + 1), len(offsets) - 1)
        yield begin, end
        begin = end
