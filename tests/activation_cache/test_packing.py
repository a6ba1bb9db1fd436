"""Packing loses nothing and repeats nothing, wherever it begins."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache import CorpusError, Document
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
    min_doc_tokens=st.sampled_from([None, 1, 4, 12]),
)
_gaps = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def _numbered(lengths: list[int], gaps: list[int]) -> list[tuple[int, Document]]:
    """Documents whose numbers ascend by `gaps`, over and over."""
    letters = itertools.count(33)  # every token of the corpus is another one
    numbers = itertools.accumulate(itertools.cycle(gaps), initial=0)
    return [
        (number, Document("".join(chr(next(letters)) for _ in range(n)), f"doc{number}"))
        for number, n in zip(numbers, lengths, strict=False)
    ]


def _expected(numbered: list[tuple[int, Document]], packing: Packing) -> list[tuple[int, int, int]]:
    """(token, document, position) of everything that must come out, BOS rows left out."""
    rows = []
    for doc_id, document in numbered:
        ids = [ord(c) for c in document.text]
        ids = ids[: packing.max_doc_tokens] if len(ids) >= (packing.min_doc_tokens or 0) else []
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


@settings(deadline=None)
@given(_lengths, _gaps, _packings)
def test_blocks_hold_every_token_once_in_order(
    lengths: list[int], gaps: list[int], packing: Packing
) -> None:
    numbered = _numbered(lengths, gaps)
    blocks = list(pack(numbered, _Letters(), packing))
    assert _rows(blocks) == _expected(numbered, packing)
    assert all(len(b.token_ids) == packing.ctx_len for b in blocks[:-1])
    assert all(0 < len(b.token_ids) <= packing.ctx_len for b in blocks[-1:])


@settings(deadline=None)
@given(_lengths, _gaps, _packings)
def test_packing_from_any_end_yields_the_same_further_blocks(
    lengths: list[int], gaps: list[int], packing: Packing
) -> None:
    numbered = _numbered(lengths, gaps)
    blocks = list(pack(numbered, _Letters(), packing))
    for i, block in enumerate([None, *blocks]):
        start = block.end if block else START
        left = [pair for pair in numbered if pair[0] >= start.document]
        again = list(pack(left, _Letters(), packing, start))
        assert len(again) == len(blocks) - i
        assert all(map(_same, again, blocks[i:]))


@settings(deadline=None)
@given(_lengths, _gaps, _packings)
def test_bos_opens_every_block_and_belongs_to_the_row_after_it(
    lengths: list[int], gaps: list[int], packing: Packing
) -> None:
    for block in pack(_numbered(lengths, gaps), _Letters(), packing):
        is_bos = block.positions == BOS_POSITION
        assert is_bos.sum() == (packing.bos_id is not None)
        if packing.bos_id is not None:
            assert is_bos[0]
            assert block.token_ids[0] == BOS
            assert block.doc_ids[0] == block.doc_ids[1]


@settings(deadline=None)
@given(_lengths, _gaps, _packings)
def test_sources_are_told_where_documents_start(
    lengths: list[int], gaps: list[int], packing: Packing
) -> None:
    for block in pack(_numbered(lengths, gaps), _Letters(), packing):
        starting = block.doc_ids[block.positions == 0].tolist()
        assert block.sources == {doc: f"doc{doc}" for doc in starting}


def test_too_short_documents_are_measured_before_they_are_cut_and_separated() -> None:
    numbered = [(0, Document("ab", "0")), (4, Document("abc", "4")), (9, Document("", "9"))]
    packing = Packing(8, separator_id=SEPARATOR, max_doc_tokens=1, min_doc_tokens=3)
    (block,) = pack(numbered, _Letters(), packing)
    assert block.token_ids.tolist() == [ord("a"), SEPARATOR]
    assert (block.doc_ids.tolist(), block.end, block.sources) == ([4, 4], (5, 0), {4: "4"})


def test_first_block_of_long_documents_needs_few_of_them() -> None:
    """The model begins as soon as there is text for it, not when 64 books are tokenized."""
    drawn = []

    def books() -> Iterator[tuple[int, Document]]:
        for number in range(20):
            drawn.append(number)
            yield number, Document("a" * 40_000, str(number))

    blocks = pack(books(), _Letters(), Packing(256))
    next(blocks)
    assert len(drawn) <= 4  # two at a time, and the next two while these are used
    assert sum(len(block.token_ids) for block in blocks) == 20 * 40_000 - 256


def test_text_that_can_not_be_read_is_told_behind_what_came_before() -> None:
    def broken() -> Iterator[tuple[int, Document]]:
        for number in range(3):
            yield number, Document("a" * 70_000, str(number))
        raise CorpusError("row 3 is no text")

    blocks = pack(broken(), _Letters(), Packing(70_000))
    assert [next(blocks).end.document for _ in range(3)] == [1, 2, 3]
    with pytest.raises(CorpusError, match="row 3 is no text"):
        next(blocks)
