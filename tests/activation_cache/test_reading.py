"""Reading in windows and in order: what comes, in which order, and what is left behind."""

import gc
import itertools
import json
import math
import shutil
import threading
import time
import tracemalloc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activation_cache import ActivationCache, CacheCorrupt, CacheError, LanguageModel, harvest
from activation_cache.durable import written
from activation_cache.read_ahead import in_parallel, read_ahead
from activation_cache.row_selection import RowSelection
from activation_cache.shard_reader import ShardReader
from activation_cache.shuffle import Epoch, shuffled_windows
from activation_cache.tensor_file import HEADER_BYTES, TensorFileWriter
from activation_cache.windows import LoadedWindow, Wanted, WindowLoader

PLACES = ("layers.1.resid_post", "layers.1.mlp_out", "layers.0.mlp_acts")
ONE_WINDOW, THREE_BLOCKS = 10**9, 3 * 1_024 * 32 * 4


def _planted(numbers: Tensor, place: int, width: int) -> Tensor:
    """Rows whose first channel is their number; one in some is of massive norm at one place."""
    rows = torch.zeros(len(numbers), width)
    rows[:, 0] = numbers
    rows[:, 1] = place
    rows[numbers % (17 + place) == place, 2] = 1e7
    return rows


@pytest.fixture(scope="module")
def acts(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Planted rows at three places: two texts, several shards of some blocks of 1,024 rows."""
    out = tmp_path_factory.mktemp("reading") / "acts"
    texts = [" ".join(tiny_corpus[i:] + tiny_corpus[:i]) for i in range(16)]
    n_rows = 0

    def activations(_: Any, blocks: list[Any], hookpoints: list[str]) -> dict[str, Tensor]:
        nonlocal n_rows
        first, n_rows = n_rows, n_rows + sum(len(block.token_ids) for block in blocks)
        numbers = torch.arange(first, n_rows)
        return {h: _planted(numbers, i, tiny_lm.width(h)) for i, h in enumerate(hookpoints)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("activation_cache.production.activations_of", activations)
        for text in (texts[:9], texts[9:]):
            harvest(
                tiny_lm, text, hookpoints=list(PLACES), out=out, extend=True, ctx_len=128,
                batch_blocks=4, shard_bytes=3_000 * 264, storage_dtype="float32", n_tokens=10**6,
            )  # fmt: skip
    cache = ActivationCache.open(out)
    assert cache.n_tokens == n_rows
    assert 10 < len(ShardReader.of(cache.parts).block_rows) < 40
    assert cache.n_shards >= 4
    return out


def _ids(rows: Tensor) -> list[int]:
    return [int(number) for number in rows[:, 0].tolist()]


def _all(cache: ActivationCache, hookpoint: str, name: str = "acts") -> Tensor:
    return torch.cat([getattr(chunk, name) for chunk in cache.chunks(hookpoint)])


def _threads() -> set[str]:
    return {
        t.name
        for t in threading.enumerate()
        if t.name.startswith(("read-ahead", "read_", "cache-writer"))
    }


def _n_handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- several hookpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("window_bytes", [1, 3 * THREE_BLOCKS, ONE_WINDOW])
def test_aligned_rows_are_the_same_tokens(acts: Path, window_bytes: int) -> None:
    cache = ActivationCache.open(acts, window_bytes=window_bytes)
    batches = list(cache.aligned_batches(PLACES, 100, seed=3, split="all"))
    rows = [torch.cat([batch[place] for batch in batches]) for place in PLACES]
    assert [r.shape[1] for r in rows] == [32, 32, 64]
    assert [r[:, 1].unique().tolist() for r in rows] == [[0], [1], [2]]
    ids = [_ids(r) for r in rows]
    assert ids[0] == ids[1] == ids[2]
    massive = {h: _all(cache, h, "is_massive") for h in PLACES}
    assert all(m.any() for m in massive.values())
    assert not torch.equal(massive[PLACES[0]], massive[PLACES[1]])
    kept = ~torch.stack(list(massive.values())).any(0)
    assert sorted(ids[0]) == kept.nonzero()[:, 0].tolist()


def test_one_place_among_several_is_that_place_alone(acts: Path) -> None:
    """Where the same rows are kept and windows hold the same blocks."""
    cache = ActivationCache.open(acts, massive_norm=None)
    alone = list(cache.batches(PLACES[1], 100, seed=3))
    for places in (PLACES[1:2], PLACES[:2], PLACES):
        among = [batch[PLACES[1]] for batch in cache.aligned_batches(places, 100, seed=3)]
        assert len(among) == len(alone)
        assert all(map(torch.equal, among, alone))


def test_no_place_at_all_is_told(acts: Path) -> None:
    cache = ActivationCache.open(acts)
    with pytest.raises(CacheError) as raised:
        cache.aligned_batches([], 8)
    assert "no hookpoint given" in str(raised.value)
    for rows in (None, 5):
        with pytest.raises(CacheError, match=r"not 'layers\.9': choose one of them"):
            cache.chunks("layers.9", rows=rows)


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("window_bytes", [1, THREE_BLOCKS, ONE_WINDOW])
def test_ranks_interleave_to_the_global_order(
    acts: Path, world_size: int, window_bytes: int
) -> None:
    """Across windows and epochs, from any batch on, and with a short last batch."""
    cache = ActivationCache.open(acts, window_bytes=window_bytes)
    n, batch_size = cache.n_rows(PLACES[0]), 701
    assert 2 * n % batch_size
    for start in (0, 3, 2 * n // batch_size):
        options: dict[str, Any] = {"seed": 5, "epochs": 2, "start_batch": start}
        whole = list(cache.batches(PLACES[0], batch_size, **options))
        assert len(whole) == math.ceil(2 * n / batch_size) - start
        shares = [
            cache.batches(PLACES[0], batch_size, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        for batch, *parts in zip(whole, *shares, strict=True):
            joined = torch.empty_like(batch)
            for rank, part in enumerate(parts):
                joined[rank::world_size] = part
            assert torch.equal(joined, batch)


@pytest.mark.parametrize("window_bytes", [1, THREE_BLOCKS, 7 * THREE_BLOCKS // 3, ONE_WINDOW])
@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_every_row_of_a_split_comes_once_an_epoch(
    acts: Path, window_bytes: int, split: Any
) -> None:
    cache = ActivationCache.open(acts, window_bytes=window_bytes)
    chunks = list(cache.chunks(PLACES[0], split=split))
    kept = torch.cat([~c.is_massive for c in chunks]).nonzero()[:, 0].tolist()
    batches = list(cache.batches(PLACES[0], 333, split=split, epochs=2))
    ids = _ids(torch.cat(batches))
    assert sorted(ids[: len(kept)]) == sorted(ids[len(kept) :]) == kept
    assert ids[: len(kept)] != ids[len(kept) :]


def _loader(cache: ActivationCache, window_bytes: int) -> WindowLoader:
    shards = ShardReader.of(cache.parts)
    selection = RowSelection(
        shards, massive_norm=10.0, heldout_fraction=0.1, keep_first_position=True
    )
    wanted = Wanted(PLACES[:1], "train", torch.device("cpu"), torch.float32)
    return WindowLoader(shards, selection, wanted, window_bytes)


def test_cache_that_stays_in_memory_gives_the_rows_that_are_read_again(acts: Path) -> None:
    cache = ActivationCache.open(acts)
    resident, other = _loader(cache, ONE_WINDOW), _loader(cache, ONE_WINDOW)
    n_blocks = len(resident.blocks().counts)
    for seed in range(3):
        chosen = np.random.default_rng(seed).permutation(n_blocks)
        window = resident.load(chosen)
        begins, rows = other._read(chosen)
        again = LoadedWindow(rows, other._kept(chosen, begins), other._wanted)
        places = torch.randperm(int(resident.blocks().counts.sum()))
        for name, taken in window.take(places).items():
            assert torch.equal(taken, again.take(places)[name])


def test_cache_that_fits_is_read_once(acts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = _count_reads(monkeypatch)
    cache = ActivationCache.open(acts, window_bytes=ONE_WINDOW)
    n = sum(len(batch) for batch in cache.batches(PLACES[0], 500, epochs=3))
    assert n == 3 * cache.n_rows(PLACES[0])
    assert len(loads) == 1


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    loads: list[int] = []
    real = WindowLoader._read

    def read(self: WindowLoader, chosen: Any) -> Any:
        loads.append(len(chosen))
        return real(self, chosen)

    monkeypatch.setattr(WindowLoader, "_read", read)
    return loads


def test_seeking_reads_only_what_is_used(acts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = _count_reads(monkeypatch)
    cache = ActivationCache.open(acts, window_bytes=1)
    far = cache.n_rows(PLACES[0]) * 3 // 2 // 100
    batches = cache.batches(PLACES[0], 100, epochs=2, start_batch=far)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(loads) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_that_of_the_rows(acts: Path, dtype: torch.dtype) -> None:
    cache = ActivationCache.open(acts)
    plain = cache.batches(PLACES[0], 300, seed=1)
    for expected, batch in zip(
        plain, cache.batches(PLACES[0], 300, seed=1, dtype=dtype), strict=True
    ):
        assert batch.dtype == dtype
        assert torch.equal(batch, expected.to(dtype))
    for chunk, whole in zip(
        cache.chunks(PLACES[0], dtype=dtype), cache.chunks(PLACES[0]), strict=True
    ):
        assert torch.equal(chunk.acts, whole.acts.to(dtype))


# -- in order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_documents_with_their_acts_are_the_chunks_regrouped(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, prepend_bos: bool, dtype: str
) -> None:
    """Documents that lie across the borders of blocks and shards too."""
    cache = harvest(
        tiny_lm, tiny_corpus, hookpoints=PLACES[0], out=tmp_path, n_tokens=1_000, ctx_len=16,
        batch_blocks=2, shard_bytes=4_500, storage_dtype=dtype, prepend_bos=prepend_bos,
    )  # fmt: skip
    expected: dict[int, list[Any]] = defaultdict(list)
    across: dict[int, set[int]] = defaultdict(set)
    for number, chunk in enumerate(cache.chunks(PLACES[0], rows=1)):
        columns = (chunk.doc_ids, chunk.positions, chunk.token_ids, chunk.is_massive, chunk.acts)
        for doc, position, token, is_massive, row in zip(*columns, strict=True):
            if position >= 0:
                expected[int(doc)].append((int(position), int(token), bool(is_massive), row))
                across[int(doc)].add(number)
    assert max(map(len, across.values())) > 4
    documents = list(cache.document_acts(PLACES[0]))
    assert [d.doc_id for d in documents] == sorted(expected)
    for document, cached in zip(documents, cache.documents(), strict=True):
        rows = expected[document.doc_id]
        assert document.positions.tolist() == [row[0] for row in rows] == list(range(len(rows)))
        assert document.token_ids.tolist() == [row[1] for row in rows] == cached.token_ids
        assert document.is_massive.tolist() == [row[2] for row in rows]
        assert torch.equal(document.acts, torch.stack([row[3] for row in rows]))
        assert document.source == cached.source


def test_chunks_without_a_size_take_16_megabytes(
    acts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ActivationCache.open(acts)
    sizes = [len(chunk.acts) for chunk in cache.chunks(PLACES[0])]
    shards = [record.n_rows for part in cache.parts for record in part.records]
    assert sizes == shards  # a chunk ends where its shard does
    monkeypatch.setattr("activation_cache.cache.CHUNK_BYTES", 4 * 32 * 500)
    chunks = list(cache.chunks(PLACES[0]))
    assert [c.first_row for c in chunks] == [0, *itertools.accumulate(len(c.acts) for c in chunks)][
        :-1
    ]
    assert torch.equal(torch.cat([c.acts for c in chunks]), _all(cache, PLACES[0]))
    assert all(500 <= len(c.acts) < 500 + 128 or len(c.acts) < 500 for c in chunks)
    assert sum(len(c.acts) < 500 for c in chunks) <= cache.n_shards


# -- threads, handles and memory -----------------------------------------------------------------


@pytest.fixture
def damaged(tiny_cache: ActivationCache, tmp_path: Path) -> ActivationCache:
    """A flipped bit in the rows of a shard in the middle."""
    out = Path(shutil.copytree(tiny_cache.path, tmp_path / "damaged"))
    file = out / f"shards/000002.{PLACES[0]}.safetensors"
    data = bytearray(file.read_bytes())
    data[5_000] ^= 1
    file.write_bytes(data)
    return ActivationCache.open(out, window_bytes=1)


@pytest.mark.parametrize("window_bytes", [1, ONE_WINDOW])
def test_damage_is_told_by_the_reader_and_no_thread_is_left(
    damaged: ActivationCache, window_bytes: int
) -> None:
    cache = ActivationCache.open(damaged.path, window_bytes=window_bytes)
    n_open = _n_handles()
    for read in (
        lambda: list(cache.batches(PLACES[0], 64)),
        lambda: list(cache.aligned_batches(PLACES[:2], 64)),
        lambda: list(cache.chunks(PLACES[0])),
        lambda: list(cache.document_acts(PLACES[0])),
    ):
        with pytest.raises(CacheCorrupt, match=r"000002.*block 0 does not match its checksum"):
            read()
        assert not _threads()
        assert _n_handles() == n_open


def test_what_cannot_be_read_is_told_in_a_line(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad sector is an OSError of pread."""

    def preadv(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    cache = ActivationCache.open(tiny_cache.path)
    monkeypatch.setattr("os.preadv", preadv)
    with pytest.raises(CacheCorrupt, match=r"safetensors can't be read: Input/output error"):
        cache.verify()
    with pytest.raises(CacheCorrupt, match=r"safetensors can't be read: Input/output error"):
        list(ActivationCache.open(tiny_cache.path).batches(PLACES[0], 64))
    monkeypatch.setattr(Path, "read_bytes", preadv)
    with pytest.raises(CacheCorrupt, match=r"json can't be read"):
        ActivationCache.open(tiny_cache.path)


@pytest.mark.parametrize("n_used", [0, 1, 7])
def test_reader_that_is_closed_early_ends_its_threads(acts: Path, n_used: int) -> None:
    cache = ActivationCache.open(acts, window_bytes=1)
    n_open = _n_handles()
    readers: list[Callable[[], Iterator[Any]]] = [
        lambda: cache.batches(PLACES[0], 64, epochs=None),
        lambda: cache.aligned_batches(PLACES, 64, epochs=None),
        lambda: cache.chunks(PLACES[0], rows=1),
        lambda: cache.document_acts(PLACES[0]),
    ]
    for make in readers:
        reader = make()
        for _ in itertools.islice(reader, n_used):
            pass
        del reader
        assert not _threads()
        closed = make()
        list(itertools.islice(closed, n_used))
        closed.close()  # type: ignore[attr-defined]
        assert not _threads()
    assert _n_handles() == n_open


def test_at_most_two_windows_are_in_memory(acts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[LoadedWindow] = weakref.WeakSet()
    counts: list[int] = []
    real = LoadedWindow.__init__

    def init(self: LoadedWindow, *arguments: Any) -> None:
        real(self, *arguments)
        alive.add(self)
        counts.append(len(alive))

    monkeypatch.setattr(LoadedWindow, "__init__", init)
    cache = ActivationCache.open(acts, window_bytes=1)
    gc.disable()
    try:
        for _ in cache.batches(PLACES[0], 300, epochs=2):
            pass
        for batches in (cache.batches(PLACES[0], 5_000), cache.batches(PLACES[0], 7)):
            for batch in batches:
                del batch
        assert len(counts) > 40
        assert max(counts) <= 2
        assert not alive
    finally:
        gc.enable()


def test_memory_of_chunks_does_not_grow_with_the_cache(acts: Path) -> None:
    cache = ActivationCache.open(acts)
    for _ in cache.chunks(PLACES[0], rows=128):  # what is kept of every shard is there now
        pass
    tracemalloc.start()
    try:
        for _ in cache.chunks(PLACES[0], rows=128):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # tensors aside, which are two chunks


def test_read_ahead_is_never_more_than_one_item_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    for used, item in enumerate(read_ahead(items())):
        assert item == used
        assert len(made) <= used + 2
    assert made == list(range(20))


def test_error_of_an_item_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise CacheCorrupt("torn")

    seen = []
    with pytest.raises(CacheCorrupt, match="torn"):
        seen.extend(read_ahead(items()))
    reader = read_ahead(items())
    assert [next(reader), next(reader)] == [0, 1]
    with pytest.raises(CacheCorrupt):
        next(reader)
    assert not _threads()


def test_parallel_reads_stop_at_the_first_error() -> None:
    begun: list[int] = []

    def work(i: int) -> None:
        begun.append(i)
        time.sleep(0.001)
        if i == 3:
            raise CacheCorrupt("torn")

    with pytest.raises(CacheCorrupt, match="torn"):
        in_parallel(work, [(i,) for i in range(1_000)], 2)
    assert len(begun) < 500
    assert not _threads()


def test_window_that_holds_no_row_is_not_loaded(acts: Path) -> None:
    cache = ActivationCache.open(acts)
    loader = _loader(cache, 1)
    blocks = loader.blocks()
    blocks.counts[3] = 0
    loaded: list[int] = []

    def load(chosen: Any) -> Any:
        loaded.extend(chosen.tolist())
        return blocks.load(chosen)

    epoch = Epoch(0, int(blocks.counts.sum()), lambda: blocks._replace(load=load))
    for _ in shuffled_windows(iter([epoch]), 0, 0):
        pass
    assert 3 not in loaded


# -- files ---------------------------------------------------------------------------------------


def test_header_of_the_widest_int8_file_has_room(tmp_path: Path) -> None:
    """Offsets of 13 digits: the header has a fixed size, which must be enough."""
    entries = {
        name: {"dtype": "BF16", "shape": [10**9, 65_536], "data_offsets": [10**13, 10**13]}
        for name in (
            "acts", "row_scales", "norms", "center", "channel_scales", "exact_above", "exact_at",
            "exact_acts",
        )
    }  # fmt: skip
    assert len(json.dumps(entries)) <= HEADER_BYTES
    with written(tmp_path / "x") as file:
        writer = TensorFileWriter(file, "acts", (2,), torch.float32)
        writer.append(torch.ones(3, 2))
        writer.finish({"norms": torch.ones(3), "nothing": torch.empty(0, 2)})


def test_more_shards_than_open_headers(acts: Path) -> None:
    """Headers are read again where the list of the last ones has dropped them."""
    cache = ActivationCache.open(acts, window_bytes=1)
    expected = list(cache.batches(PLACES[0], 400))
    cache._shards.file = lru_cache(maxsize=2)(cache._shards._open)  # type: ignore[assignment]
    again = list(cache.batches(PLACES[0], 400))
    assert all(map(torch.equal, expected, again))
    assert len(expected) == len(again)
