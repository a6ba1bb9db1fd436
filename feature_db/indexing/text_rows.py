"""The tokens of a text, row by row: token, document, position, and how far contexts reach.

In: chunks. Out: `PartRows` of one part, kept as files beside what was counted on it, and
`TextRows`, all parts as one text, from which contexts take their tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae.atomic_files import commit

from .best_rows import Spans
from .sorting import RECORD, Int32, Int64
from .statistics import position_bins

if TYPE_CHECKING:
    from activation_cache import Chunk

_COLUMNS = {"token_ids": np.int32, "doc_ids": np.int64, "positions": np.int32}


class PartRows(NamedTuple):
    """The rows of one part; all [rows]. first_row: of the part in the text.

    previous, following: the tokens beside each one in its block and document, -1 where there is
    none. spans: how far a context around each row reaches.
    """

    first_row: int
    token_ids: Int32
    doc_ids: Int64
    positions: Int32
    previous: Int32
    following: Int32
    spans: Spans

    @classmethod
    def joined(cls, chunks: "Sequence[PartRows]") -> "PartRows":
        """Rows of chunks that follow one another."""
        columns: Any = (np.concatenate(c) for c in zip(*(c[1:6] for c in chunks), strict=True))
        before, after = (np.concatenate(c) for c in zip(*(c.spans for c in chunks), strict=True))
        ids, docs, positions, previous, following = columns
        spans = Spans(before, after)
        return cls(chunks[0].first_row, ids, docs, positions, previous, following, spans)

    def records(self) -> "RowRecords":
        """What is looked up of every entry's row, side by side in memory."""
        doc_ids, documents = np.unique(self.doc_ids, return_inverse=True)
        columns: dict[str, Any] = {
            "token": self.token_ids,
            "previous": self.previous,
            "following": self.following,
            "document": documents,
            "position": self.positions,
            "position_bin": position_bins(self.positions),
        }
        table = np.stack([columns[name] for name in RECORD], axis=1)
        return RowRecords(table.astype(np.int32), doc_ids)

    def save(self, folder: Path) -> None:
        """Write what `TextRows` reads, where it isn't there yet."""
        for name, dtype in _COLUMNS.items():
            path = folder / f"{name}.npy"
            if not path.exists():
                aside = folder / f"{name}.aside.npy"
                np.save(aside, getattr(self, name).astype(dtype, copy=False))
                commit(aside, path)


class RowRecords(NamedTuple):
    """table: int32 [rows, N_COLUMNS]; documents as places in doc_ids, int64, ascending."""

    table: Int32
    doc_ids: Int64


def rows_of(chunk: "Chunk", before: int, after: int) -> PartRows:
    """The tokens of a chunk. before, after: tokens of a context, at most.

    A context stays in its block and document, and holds no BOS.
    """
    token_ids = chunk.token_ids.numpy().astype(np.int32)
    doc_ids, positions = chunk.doc_ids.numpy(), chunk.positions.numpy()
    n = len(token_ids)
    is_start = np.zeros(n + 1, dtype=bool)
    is_start[[0, n]] = True
    is_start[chunk.block_offsets.numpy()] = True
    is_start[1:n] |= doc_ids[1:] != doc_ids[:-1]
    is_start[:n] |= positions < 0
    is_start[1:] |= positions < 0
    cuts = np.flatnonzero(is_start)
    lengths = np.diff(cuts)
    row = np.arange(n)
    reach_back = row - np.repeat(cuts[:-1], lengths)
    reach_on = np.repeat(cuts[1:], lengths) - 1 - row
    spans = Spans(
        np.minimum(reach_back, before).astype(np.int32),
        np.minimum(reach_on, after).astype(np.int32),
    )
    previous = np.where(reach_back > 0, np.roll(token_ids, 1), -1).astype(np.int32)
    following = np.where(reach_on > 0, np.roll(token_ids, -1), -1).astype(np.int32)
    return PartRows(int(chunk.first_row), token_ids, doc_ids, positions, previous, following, spans)


class TextRows:
    """The rows of all parts, in files that are read where they are needed."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """folders: of the parts, in the order of the text, from its first row on."""
        parts = [[np.load(folder / f"{name}.npy", "r") for name in _COLUMNS] for folder in folders]
        self._columns = dict(zip(_COLUMNS, zip(*parts, strict=True), strict=True))
        self._firsts = np.cumsum([0, *(len(part[0]) for part in parts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def take(self, column: str, rows: Int64) -> Int64:
        """Column "token_ids", "doc_ids" or "positions" at some rows: int64, same length."""
        taken = np.empty(len(rows), np.int64)
        parts = np.searchsorted(self._firsts, rows, side="right") - 1
        for part in np.unique(parts).tolist():
            here = parts == part
            taken[here] = self._columns[column][part][rows[here] - self._firsts[part]]
        return taken

    def documents(self) -> Iterator[tuple[int, Int64]]:
        """Each document's number and tokens, BOS left out, in the order of the text."""
        doc_id, pieces = -1, list[Int64]()
        for ids, docs, positions in zip(*self._columns.values(), strict=True):
            kept = np.flatnonzero(positions >= 0)
            of_kept = docs[kept]
            for first, last in pairwise([*runs_in(of_kept).tolist(), len(kept)]):
                if int(of_kept[first]) != doc_id:
                    if pieces:
                        yield doc_id, np.concatenate(pieces)
                    doc_id, pieces = int(of_kept[first]), []
                pieces.append(ids[kept[first:last]].astype(np.int64))
        if pieces:
            yield doc_id, np.concatenate(pieces)


def flat_spans(starts: Int64, lengths: Int64) -> Int64:
    """starts[0], starts[0] + 1, ... lengths[0] numbers, then those of starts[1], and so on."""
    firsts = np.cumsum(lengths) - lengths
    spans: Int64 = np.arange(int(lengths.sum())) + np.repeat(starts - firsts, lengths)
    return spans


def runs_in(sorted_values: NDArray[np.integer]) -> Int64:
    """Where each run of equal values begins: int64 [n_runs]."""
    if not len(sorted_values):
        return np.empty(0, np.int64)
    changes = np.flatnonzero(sorted_values[1:] != sorted_values[:-1]) + 1
    return np.concatenate(([0], changes))


def rank_in_run(sorted_values: NDArray[np.integer]) -> Int64:
    """Each entry's number within its run of equal values, from 0: int64, same length."""
    starts = runs_in(sorted_values)
    lengths = np.diff(np.append(starts, len(sorted_values)))
    return np.arange(len(sorted_values)) - np.repeat(starts, lengths)
