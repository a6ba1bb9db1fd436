"""Documents -> packed blocks of tokens, in order, with nothing lost at any border.

In: numbered documents and a tokenizer. Out: `PackedBlock`s of exactly `ctx_len` rows (the last may
be shorter). Documents stand one after another, each closed by the separator token; a document that
does not fit goes on in the next block. `Position` says where the next block starts, so that packing
from there yields the very same blocks as packing from the beginning. Numbers ascend and may have
gaps, where documents are left out or belong to other ranks.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .read_ahead import read_ahead
from .rows import Document

BOS_POSITION = -1
"""Position of a BOS row: it belongs to no place in a document."""
_DOCUMENTS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 16


class Position(NamedTuple):
    """The first token that no block holds yet: number of its document, and its place in it.

    At place 0 the document is the first one there is with this number or a higher one.
    """

    document: int = 0
    token: int = 0


START = Position()


class PackedBlock(NamedTuple):
    """One packed block.

    token_ids: int64 [rows]. doc_ids: int64 [rows], the document's number in the corpus; a BOS row
    takes that of the row after it. positions: int32 [rows], place in the document, -1 for BOS.
    end: where the next block starts. sources: doc_id -> source, of documents that start here.
    """

    token_ids: NDArray[np.int64]
    doc_ids: NDArray[np.int64]
    positions: NDArray[np.int32]
    end: Position
    sources: dict[int, str]


class Packing(NamedTuple):
    """How documents become blocks.

    ctx_len: rows of a block, BOS included. bos_id: set before every block, or None.
    separator_id: set after every document, or None. max_doc_tokens: more of a document is left out.
    min_doc_tokens: a document with fewer is left out whole; its own tokens count, before
    `max_doc_tokens` cuts them and without the separator.
    """

    ctx_len: int
    bos_id: int | None = None
    separator_id: int | None = None
    max_doc_tokens: int | None = None
    min_doc_tokens: int | None = None


def pack(
    numbered: Iterable[tuple[int, Document]],
    tokenizer: Any,
    packing: Packing,
    start: Position = START,
) -> Generator[PackedBlock]:
    """Yield blocks. numbered: the documents with number `start.document` or higher, ascending.

    A thread reads ahead until the generator ends or is closed.
    """
    room = packing.ctx_len - (packing.bos_id is not None)
    rows = _Rows([], [], [], {})
    with contextlib.closing(_tokenized(numbered, tokenizer, packing)) as documents:
        for doc_id, source, tokens in documents:
            skipped = start.token if doc_id == start.document else 0
            if skipped == 0 and tokens:
                rows.sources[doc_id] = source
            place = skipped
            while place < len(tokens):
                taken = tokens[place : place + room - len(rows.token_ids)]
                rows.token_ids.extend(taken)
                rows.doc_ids.extend([doc_id] * len(taken))
                rows.positions.extend(range(place, place + len(taken)))
                place += len(taken)
                if len(rows.token_ids) == room:
                    end = Position(doc_id, place) if place < len(tokens) else Position(doc_id + 1)
                    yield _block(rows, packing, end)
                    rows = _Rows([], [], [], {})
    if rows.token_ids:
        yield _block(rows, packing, Position(rows.doc_ids[-1] + 1))


class _Rows(NamedTuple):
    token_ids: list[int]
    doc_ids: list[int]
    positions: list[int]
    sources: dict[int, str]


def _block(rows: _Rows, packing: Packing, end: Position) -> PackedBlock:
    ids, docs, positions = rows.token_ids, rows.doc_ids, rows.positions
    if packing.bos_id is not None:
        ids, docs = [packing.bos_id, *ids], [docs[0], *docs]
        positions = [BOS_POSITION, *positions]
    return PackedBlock(
        np.array(ids, dtype=np.int64),
        np.array(docs, dtype=np.int64),
        np.array(positions, dtype=np.int32),
        end,
        rows.sources,
    )


def _tokenized(
    numbered: Iterable[tuple[int, Document]], tokenizer: Any, packing: Packing
) -> Generator[tuple[int, str, list[int]]]:
    """(doc_id, source, tokens with the separator) of each document; one that is empty or too short
    has no tokens. On a thread, so that a model on a GPU does not wait for its text."""

    def tokenized(group: list[tuple[int, Document]]) -> list[tuple[int, str, list[int]]]:
        ids = tokenizer(
            [document.text for _, document in group], add_special_tokens=False, verbose=False
        ).input_ids
        return [
            (doc_id, document.source, _kept(tokens, packing))
            for (doc_id, document), tokens in zip(group, ids, strict=True)
        ]

    with contextlib.closing(read_ahead(map(tokenized, _groups(numbered)))) as groups:
        yield from itertools.chain.from_iterable(groups)


def _groups(numbered: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Documents that are tokenized together: little text, or the first pass of the model waits."""
    group: list[tuple[int, Document]] = []
    n_characters = 0
    for each in numbered:
        group.append(each)
        n_characters += len(each[1].text)
        if len(group) == _DOCUMENTS_AT_ONCE or n_characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, n_characters = [], 0
    if group:
        yield group


def _kept(tokens: list[int], packing: Packing) -> list[int]:
    kept = [] if len(tokens) < (packing.min_doc_tokens or 0) else tokens[: packing.max_doc_tokens]
    return [*kept, packing.separator_id] if kept and packing.separator_id is not None else kept
