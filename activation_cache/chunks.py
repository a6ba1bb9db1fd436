"""What a cache yields in order: chunks of rows, blocks of tokens, documents."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


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
