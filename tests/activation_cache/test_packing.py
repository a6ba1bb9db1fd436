"""Packing loses nothing and repeats nothing, wherever it begins."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from activation_cache import Document
from activation_cache.packing import BOS_POSITION, START, PackedBlock, Packing, pack

BOS, SEPARATOR = 1000, 1001


class _Letters:
    """A tokenizer of one token a character."""

    def __call__(self, texts: list[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=[[ord(c) for c in text] for text in texts])


_lengths = st.lists(st.integers(0, 23), max_size=90)
_packings = st.builds(
    Packing,
    ctx_len=st.integers(2, 9),
    bos_id=st.sampled_from([None, BOS]),
    separator_id=st.sampled_from([None, SEPARATOR]),
    max_doc_tokens=st.sampled_from([None, 1, 5, 17]),
)


def _documents(lengths: list[int]) -> list[Document]:
    letters = itertools.count(33)  # every token of the corpus is another one
    return [
        Document("".join(chr(next(letters)) for _ in range(n)), f"doc{i}")
        for i, n in enumerate(lengths)
    ]


def _expected(documents: list[Document], packing: Packing) -> list[tuple[int, int, int]]:
    """(token, document, position) of everything that must come out, BOS rows left out."""
    rows = []
    for doc_id, document in enumerate(documents):
        ids = [ord(c) for c in document.text][: packing.max_doc_tokens]
        ids += [SEPARATOR] if ids and packing.separator_id else []
        rows += [(token, doc_id, position) for position, token in enumerate(ids)]
    return rows


def _rows(blocks: list[PackedBlock]) -> list[tuple[int, int, int]]:
    rows = [
        (int(t), int(d), int(p))
        for b in blocks
        for t, d, p in zip(b.token_ids, b.doc_ids, b.positions, strict=True)
    ]
    return [row for row in rows if row[2] != BOS_POSITION]


def _same(a: PackedBlock, b: PackedBlock) -> bool:
    return (
        all(np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        and a.end == b.end
        and a.sources == b.sources
    )


@given(_lengths, _packings)
def test_blocks_hold_every_token_once_in_order(lengths: list[int], packing: Packing) -> None:
    documents = _documents(lengths)
    blocks = list(pack(documents, _Letters(), packing))
    assert _rows(blocks) == _expected(documents, packing)
    assert all(len(b.token_ids) == packing.ctx_len for b in blocks[:-1])
    assert all(0 < len(b.token_ids) <= packing.ctx_len for b in blocks[-1:])


@given(_lengths, _packings)
def test_packing_from_any_end_yields_the_same_further_blocks(
    lengths: list[int], packing: Packing
) -> None:
    documents = _documents(lengths)
    blocks = list(pack(documents, _Letters(), packing))
    for i, block in enumerate([None, *blocks]):
        start = block.end if block else START
        again = list(pack(documents[start.document :], _Letters(), packing, start))
        assert len(again) == len(blocks) - i
        assert all(map(_same, again, blocks[i:]))


@given(_lengths, _packings)
def test_bos_opens_every_block_and_belongs_to_the_row_after_it(
    lengths: list[int], packing: Packing
) -> None:
    for block in pack(_documents(lengths), _Letters(), packing):
        is_bos = block.positions == BOS_POSITION
        assert is_bos.sum() == (packing.bos_id is not None)
        if packing.bos_id is not None:
            assert is_bos[0]
            assert block.token_ids[0] == BOS
            assert block.doc_ids[0] == block.doc_ids[1]


@given(_lengths, _packings)
def test_sources_are_told_where_documents_start(lengths: list[int], packing: Packing) -> None:
    for block in pack(_documents(lengths), _Letters(), packing):
        starting = block.doc_ids[block.positions == 0].tolist()
        assert block.sources == {doc: f"doc{doc}" for doc in starting}
