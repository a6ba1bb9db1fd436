"""Training rows without a cache: the disk budget, the order, resuming, both kinds of budget."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_cache import (
    ActivationCache,
    ActivationStream,
    CacheBusy,
    CacheError,
    CacheMismatch,
    CorpusError,
    LanguageModel,
    harvest,
)

HOOKPOINT = "layers.1.resid_post"
SMALL: dict[str, Any] = {
    "hookpoints": [HOOKPOINT],
    "ctx_len": 16,
    "batch_blocks": 4,
    "shard_bytes": 16_384,
    "storage_dtype": "float32",
}
BUDGET = 100_000
"""Room for two pools of two shards of 64 rows: 128 floats a row, and files' heads."""


def _open(lm: LanguageModel, texts: list[str], folder: Path, **options: Any) -> ActivationStream:
    options = {"buffer_bytes": 200_000, **SMALL, **options}
    return ActivationStream.open(lm, texts, folder=folder, **options)


def _first(
    stream: ActivationStream, n: int, *, start: int = 0, batch_size: int = 40, **options: Any
) -> list[torch.Tensor]:
    batches = stream.batches(HOOKPOINT, batch_size, seed=3, start_batch=start, **options)
    return list(itertools.islice(batches, n))


def _rows(batches: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([batch[HOOKPOINT] for batch in batches])


def _read_as_trainer(
    stream: ActivationStream, n: int, *, start: int = 0, batch_size: int = 40, slow_s: float = 0
) -> Iterator[torch.Tensor]:
    """Reads, and says that a durable checkpoint stands whenever room would come of it."""
    batches = stream.batches(HOOKPOINT, batch_size, seed=3, start_batch=start)
    for step, x in enumerate(itertools.islice(batches, n), start + 1):
        yield x
        time.sleep(slow_s)
        if stream.wants_checkpoint(step * batch_size, [HOOKPOINT]):
            stream.release(step * batch_size, [HOOKPOINT])


def _shard_bytes_on_disk(folder: Path) -> int:
    sizes = []
    for file in (folder / "shards").glob("*.safetensors*"):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes)


@pytest.mark.parametrize("budget", [0, BUDGET])
def test_rows_are_those_of_a_cache(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, budget: int
) -> None:
    """Up to the end of the text: each train row of a cache of it as often, in another order."""
    harvest(tiny_lm, tiny_corpus, out=tmp_path / "acts", n_tokens=10**6, **SMALL)
    cache = ActivationCache.open(tmp_path / "acts", massive_norm=None)
    cached = torch.cat(list(cache.batches(HOOKPOINT, 64)))
    options: dict[str, Any] = {"max_disk_bytes": budget, "massive_norm": None}
    with _open(tiny_lm, tiny_corpus, tmp_path / "s", **options) as stream:
        rows = torch.cat(list(_read_as_trainer(stream, len(cached) * 3 // 4 // 40)))
    extra = Counter(map(tuple, rows.tolist()))
    extra.subtract(Counter(map(tuple, cached.tolist())))
    assert max(extra.values()) <= 0
    in_order = torch.cat([chunk.acts for chunk in cache.chunks(HOOKPOINT)])
    assert not any(torch.equal(a, b) for a, b in zip(rows[:20], in_order[:20], strict=True))


@pytest.mark.parametrize("budget", [0, BUDGET])
def test_stream_begins_anywhere_with_the_same_batches(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, budget: int
) -> None:
    options = {"max_disk_bytes": budget}
    with _open(tiny_lm, tiny_corpus, tmp_path / "a", **options) as stream:
        whole = list(_read_as_trainer(stream, 60))
    for start in (0, 1, 7, 30, 52):
        with _open(tiny_lm, tiny_corpus, tmp_path / "a", **options) as stream:
            again = list(_read_as_trainer(stream, 5, start=start))
        for a, b in zip(again, whole[start:], strict=False):
            assert torch.equal(a, b)
    with _open(tiny_lm, tiny_corpus, tmp_path / "fresh", **options) as stream:
        assert torch.equal(_first(stream, 1, start=20)[0], whole[20])


def test_disk_stays_inside_the_budget_under_a_slow_reader(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    folder, sizes, is_over = tmp_path / "s", list[int](), threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            sizes.append(_shard_bytes_on_disk(folder))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with _open(tiny_lm, tiny_corpus, folder, max_disk_bytes=BUDGET) as stream:
        n_rows = sum(map(len, _read_as_trainer(stream, 60, slow_s=0.01)))
        stream.clear()
        assert _shard_bytes_on_disk(folder) == 0
    is_over.set()
    watcher.join()
    assert n_rows == 60 * 40
    assert BUDGET / 2 < max(sizes) <= BUDGET


def test_text_begins_anew_when_it_is_over(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with _open(tiny_lm, tiny_corpus[:6], tmp_path / "s") as stream:
        rows = torch.cat(_first(stream, 50))
    assert len({tuple(row) for row in rows.tolist()}) < len(rows)


def test_ranks_share_each_batch(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with _open(tiny_lm, tiny_corpus, tmp_path / "s") as stream:
        whole = _first(stream, 12)
    parts = []
    for rank in range(3):
        with _open(tiny_lm, tiny_corpus, tmp_path / "s") as stream:
            parts.append(_first(stream, 12, rank=rank, world_size=3))
    for i, x in enumerate(whole):
        for rank in range(3):
            assert torch.equal(parts[rank][i], x[rank::3])


def test_sample_is_of_the_pool_near_a_row(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with _open(tiny_lm, tiny_corpus, tmp_path / "s", max_disk_bytes=BUDGET) as stream:
        first = _rows(stream.aligned_sample([HOOKPOINT], 40, seed=3))
        batches = list(_read_as_trainer(stream, 30))
        assert torch.equal(first[:40], batches[0])
        last = _rows(stream.aligned_sample([HOOKPOINT], 40, seed=3, near_row=30 * 40 - 1))
        assert tuple(batches[-1][-1].tolist()) in {tuple(row) for row in last.tolist()}


def test_pool_that_is_gone_is_made_again(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with _open(tiny_lm, tiny_corpus, tmp_path / "s", max_disk_bytes=BUDGET) as stream:
        whole = list(_read_as_trainer(stream, 40))
        assert stream.wants_checkpoint(40 * 40, [HOOKPOINT]) is False
        again = list(_read_as_trainer(stream, 40))
        for a, b in zip(again, whole, strict=True):
            assert torch.equal(a, b)


def test_budget_smaller_than_two_shards_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    def load() -> LanguageModel:
        raise AssertionError

    with pytest.raises(CacheError, match=r"max_disk=1,000 bytes is less than two shards of 16,384"):
        ActivationStream.open(load, ["a"], folder=tmp_path / "s", max_disk_bytes=1000, **SMALL)
    assert not (tmp_path / "s").exists()


def test_batches_that_a_pool_does_not_hold_twice_are_refused(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with (
        _open(tiny_lm, tiny_corpus, tmp_path / "s", max_disk_bytes=BUDGET) as stream,
        pytest.raises(CacheError, match="batch_size=4096"),
    ):
        _first(stream, 1, batch_size=4096)


def test_other_settings_or_text_are_refused(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    with _open(tiny_lm, tiny_corpus, tmp_path / "s") as stream:
        _first(stream, 1, batch_size=16)
        with pytest.raises(CacheBusy):
            _open(tiny_lm, tiny_corpus, tmp_path / "s")
    with pytest.raises(CacheMismatch, match="data_revision"):
        _open(tiny_lm, tiny_corpus[:9], tmp_path / "s")
    with pytest.raises(CacheMismatch, match="shard_rows"):
        _open(tiny_lm, tiny_corpus, tmp_path / "s", max_disk_bytes=BUDGET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(CacheError, match="holds other files"):
        _open(tiny_lm, tiny_corpus, tmp_path / "mine")
    with pytest.raises(CacheError, match="no activation cache"):
        ActivationCache.open(tmp_path / "s")


def test_error_of_the_model_thread_reaches_the_reader(
    tiny_lm: LanguageModel, tmp_path: Path
) -> None:
    with (
        _open(tiny_lm, ["", ""], tmp_path / "s") as stream,
        pytest.raises(CorpusError, match="is empty"),
    ):
        _first(stream, 1)


def test_no_thread_is_left(tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with _open(tiny_lm, tiny_corpus, tmp_path / "s", max_disk_bytes=BUDGET) as stream:
        _first(stream, 1)
    assert set(threading.enumerate()) <= before
