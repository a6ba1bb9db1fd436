"""Streams of `datasets`: any rank may stop anywhere, and nothing is lost or repeated.

What stands behind `hub_datasets` was measured with `datasets` 5.2; these tests fail where another
release behaves otherwise.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_cache import Corpus, open_corpus
from activation_cache.hub_datasets import has_own_files

SIZES = [3, 5, 1, 4]


def _rows_of_files(sizes: list[list[Any]]) -> Iterator[dict[str, str]]:
    for first, size in sizes:
        yield from ({"text": f"text {i}"} for i in range(first, first + size))


def _generated(sizes: list[int]) -> Any:
    """A stream of so many files, of so many rows each."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    files = [list(pair) for pair in zip(firsts, sizes, strict=True)]
    return datasets.IterableDataset.from_generator(_rows_of_files, gen_kwargs={"sizes": files})


def _numbers(corpus: Corpus, rank: int, world_size: int, start: int = 0) -> list[tuple[int, str]]:
    return [(n, d.text) for n, d in corpus.numbered(start, rank=rank, world_size=world_size)]


def _check_every_resume(corpus: Corpus, world_size: int) -> None:
    """Every document comes once over all ranks, under numbers of its own, from any start on."""
    texts = sorted(d.text for d in corpus.documents())
    ranks = [_numbers(corpus, rank, world_size) for rank in range(world_size)]
    assert sorted(text for rank in ranks for _, text in rank) == texts
    for rank, own in enumerate(ranks):
        assert [n for n, _ in own] == list(range(rank, rank + len(own) * world_size, world_size))
        for start in range(world_size * (len(own) + 1) + 1):
            left = [pair for pair in own if pair[0] >= start]
            assert _numbers(corpus, rank, world_size, start) == left


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_ranks_of_a_stream_partition_it_and_resume_anywhere(
    sizes: list[int], world_size: int, is_table: bool
) -> None:
    stream = _generated(sizes)
    if is_table and sum(sizes) >= len(sizes):
        table = datasets.Dataset.from_list([{"text": f"text {i}"} for i in range(sum(sizes))])
        stream = table.to_iterable_dataset(num_shards=len(sizes))
    assert has_own_files(stream, world_size) == (world_size > 1 and len(sizes) % world_size == 0)
    _check_every_resume(open_corpus(stream), world_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of four files, which only `datasets` can read."""
    folder = tmp_path_factory.mktemp("folder")
    for i, size in enumerate(SIZES):
        rows = [{"text": f"text {sum(SIZES[:i]) + row}", "n": row % 2} for row in range(size)]
        (folder / f"{i}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_dataset_folder_is_split_as_datasets_splits_it(folder: Path, world_size: int) -> None:
    corpus = open_corpus(folder)
    _check_every_resume(corpus, world_size)
    stream = datasets.load_dataset(str(folder), split="train", streaming=True)
    for rank in range(world_size):
        own = [row["text"] for row in split_dataset_by_node(stream, rank, world_size)]
        assert [text for _, text in _numbers(corpus, rank, world_size)] == own


def test_filters_of_a_stream_do_not_move_its_numbers(folder: Path) -> None:
    whole = open_corpus(folder)
    odd = open_corpus(folder, only={"n": "1"}, drop_duplicates=True)
    for world_size in (2, 3):
        for rank in range(world_size):
            own = _numbers(whole, rank, world_size)
            for start in range(0, sum(SIZES), 4):
                left = [(n, t) for n, t in own if n >= start and t in _odd_texts()]
                assert _numbers(odd, rank, world_size, start) == left


def _odd_texts() -> set[str]:
    return {
        f"text {sum(SIZES[:i]) + row}" for i, size in enumerate(SIZES) for row in range(1, size, 2)
    }


def _rows_with_texts(files: list[str]) -> Iterator[dict[str, str]]:
    for texts in files:
        yield from ({"text": text} for text in texts)


def test_ranks_with_own_files_drop_their_own_duplicates_only() -> None:
    files = {"files": ["aab", "b", "ac", "b"]}
    stream = datasets.IterableDataset.from_generator(_rows_with_texts, gen_kwargs=files)
    corpus = open_corpus(stream, drop_duplicates=True)
    assert _numbers(corpus, 0, 1) == [(0, "a"), (2, "b"), (5, "c")]
    assert [_numbers(corpus, rank, 2) for rank in range(2)] == [
        [(0, "a"), (4, "b"), (8, "c")],
        [(1, "b")],
    ]
    by_rows = [_numbers(corpus, rank, 3) for rank in range(3)]  # every rank reads everything
    assert by_rows == [[(0, "a")], [], [(2, "b"), (5, "c")]]


STREAMS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "filter": (lambda s: s.filter(lambda row: row["text"] != "text 4"), True),
    "map": (lambda s: s.map(lambda row: {"text": row["text"] + "!"}), True),
    "shuffle": (lambda s: s.shuffle(seed=3, buffer_size=4), True),
    "concatenate": (lambda s: datasets.concatenate_datasets([s, _generated([2, 0, 3, 1])]), True),
    "take": (lambda s: s.take(7), False),
    "skip": (lambda s: s.skip(2), False),
    "repeat": (lambda s: s.repeat(2), False),
    "interleave": (lambda s: datasets.interleave_datasets([s, _generated([2, 2, 2, 1])]), False),
    "batched map": (lambda s: s.map(lambda b: {"text": b["text"][:1]}, batched=True), False),
    "map by place": (
        lambda s: s.map(lambda row, i: {"text": f"{row['text']} at {i}"}, with_indices=True),
        False,
    ),
}


@pytest.mark.parametrize("kind", list(STREAMS))
def test_what_users_make_of_streams_is_split_exactly(kind: str) -> None:
    change, may_split_files = STREAMS[kind]
    stream = change(_generated(SIZES))
    for world_size in (1, 2, 3, 4):
        is_split = may_split_files and world_size > 1 and stream.num_shards % world_size == 0
        assert has_own_files(stream, world_size) == is_split
        _check_every_resume(open_corpus(stream), world_size)


def test_streams_that_stand_elsewhere_are_counted_row_by_row() -> None:
    """`.skip` would lose the epoch, the loaded state, or the split."""
    epoch = _generated(SIZES).shuffle(seed=3, buffer_size=4)
    epoch.set_epoch(2)
    loaded = _generated(SIZES)
    next(rows := iter(loaded))
    loaded.load_state_dict(loaded.state_dict())
    del rows
    split = split_dataset_by_node(_generated(SIZES), 1, 3)
    for stream in (epoch, loaded, split):
        assert not has_own_files(stream, 2)
        for world_size in (1, 2, 3):
            _check_every_resume(open_corpus(stream), world_size)
    assert [n for n, _ in open_corpus(loaded).numbered()] == list(range(sum(SIZES) - 1))


def test_readings_of_one_stream_do_not_disturb_each_other(folder: Path) -> None:
    corpus = open_corpus(folder)
    readings = [corpus.numbered(start) for start in (0, 4, 7)]
    taken: list[list[int]] = [[], [], []]
    for _ in range(sum(SIZES)):
        for numbers, reading in zip(taken, readings, strict=True):
            numbers += [n for n, _ in [next(reading, (None, None))] if n is not None]
    assert taken == [list(range(start, sum(SIZES))) for start in (0, 4, 7)]


def test_tables_are_shared_by_rows() -> None:
    table = datasets.Dataset.from_list([{"text": f"text {i}"} for i in range(11)])
    for rows in (table, table.shuffle(seed=1), table.select([7, 3, 3, 5])):
        for world_size in (1, 2, 3):
            _check_every_resume(open_corpus(rows), world_size)
            assert _numbers(open_corpus(rows), 0, world_size)[1][1] == rows[world_size]["text"]


def test_revision_of_a_stream_tells_the_seed_of_its_order() -> None:
    stream = _generated(SIZES)
    assert open_corpus(stream).revision == open_corpus(stream.take(2)).revision == "unknown"
    revision = {
        str(seed): open_corpus(stream.shuffle(seed=seed, buffer_size=4)).revision for seed in (1, 2)
    }
    assert revision["1"] == open_corpus(_generated(SIZES).shuffle(seed=1, buffer_size=4)).revision
    assert revision["1"] != revision["2"]
    assert open_corpus(stream.shuffle()).revision != open_corpus(stream.shuffle()).revision
    epoch = stream.shuffle(seed=1, buffer_size=4)
    epoch.set_epoch(1)
    assert open_corpus(epoch).revision != revision["1"]
