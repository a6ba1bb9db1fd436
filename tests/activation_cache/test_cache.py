"""Reading back: the files, the shuffle, the split, the rows of massive norm, the order."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from activation_cache import ActivationCache, CacheError, LanguageModel, harvest
from activation_cache.shuffle import Blocks, Epoch, shuffled_batches
from activation_cache.split import is_held_out

HOOKPOINT = "layers.1.resid_post"


def _all_rows(cache: ActivationCache, hookpoint: str = HOOKPOINT) -> Tensor:
    return torch.cat([chunk.acts for chunk in cache.chunks(hookpoint)])


def _sorted_rows(rows: Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


# -- files ---------------------------------------------------------------------------------------


def test_shard_files_are_plain_safetensors(tiny_cache: ActivationCache) -> None:
    n_rows = 0
    for record_path in sorted((tiny_cache.path / "shards").glob("*.json")):
        record = json.loads(record_path.read_text())
        n = record["n_rows"]
        with safe_open(record_path.with_suffix(".tokens.safetensors"), "pt") as file:
            offsets = file.get_tensor("block_offsets")
            assert set(file.keys()) == {"token_ids", "doc_ids", "positions", "block_offsets"}
            dtypes = [file.get_tensor(k).dtype for k in ("token_ids", "doc_ids", "positions")]
            assert dtypes == [torch.int32, torch.int64, torch.int32]
            assert [file.get_tensor(k).shape for k in ("token_ids", "doc_ids")] == [(n,), (n,)]
            assert offsets[0] == 0
            assert offsets[-1] == n
            assert (offsets.diff() <= 16).all()
        for hookpoint in tiny_cache.hookpoints:
            path = record_path.with_suffix(f".{hookpoint}.safetensors")
            with safe_open(path, "pt") as file:
                acts = file.get_tensor("acts")
                assert acts.shape == (n, 32)
                assert acts.dtype == torch.float32
                torch.testing.assert_close(file.get_tensor("norms"), acts.norm(dim=1))
        n_rows += n
    assert n_rows == tiny_cache.n_tokens
    assert tiny_cache.manifest.n_shards == len(list((tiny_cache.path / "shards").glob("*.json")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_storage_dtype_rounds_and_nothing_else(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, dtype: str
) -> None:
    exact, rounded = (
        harvest(
            tiny_lm,
            tiny_corpus,
            hookpoints=[HOOKPOINT],
            out=tmp_path / storage_dtype,
            n_tokens=500,
            ctx_len=16,
            storage_dtype=storage_dtype,
        )
        for storage_dtype in ("float32", dtype)
    )
    assert torch.equal(_all_rows(rounded), _all_rows(exact).to(getattr(torch, dtype)).float())


# -- the shuffle ---------------------------------------------------------------------------------


class _Numbers:
    """A window of rows in memory."""

    def __init__(self, rows: torch.Tensor):
        self._rows = rows

    def take(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": self._rows[places]}

    def release(self) -> None:
        self._rows = torch.empty(0, 1)  # whoever still reads them fails


def _numbered(counts: list[int], per_window: int) -> Blocks:
    """Blocks whose rows are the numbers 0, 1, 2, ..."""
    starts = np.cumsum([0, *counts])

    def load(chosen: Any) -> _Numbers:
        ranges = [torch.arange(int(starts[b]), int(starts[b + 1])) for b in chosen]
        return _Numbers(torch.cat(ranges)[:, None])

    return Blocks(np.array(counts, dtype=np.int64), load, per_window)


def _batches(
    blocks: Blocks, batch_size: int, *, epochs: int | None, **options: Any
) -> Iterator[torch.Tensor]:
    numbers = itertools.count() if epochs is None else range(epochs)
    made = (Epoch(number, int(blocks.counts.sum()), lambda: blocks) for number in numbers)
    return (batch["x"] for batch in shuffled_batches(made, batch_size, **options))


_counts = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any)


@given(_counts, st.integers(1, 15), st.integers(1, 9), st.integers(0, 3), st.integers(1, 3))
def test_every_row_comes_once_an_epoch(
    counts: list[int], per_window: int, batch_size: int, seed: int, epochs: int
) -> None:
    n = sum(counts)
    blocks = _numbered(counts, per_window)
    batches = list(_batches(blocks, batch_size, seed=seed, start_batch=0, epochs=epochs))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    rows = torch.cat(batches)[:, 0].tolist()
    assert len(rows) == n * epochs
    for epoch in range(epochs):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(_counts, st.integers(1, 15), st.integers(1, 9), st.integers(0, 3), st.data())
def test_start_batch_seeks_exactly(
    counts: list[int], per_window: int, batch_size: int, seed: int, data: st.DataObject
) -> None:
    blocks = _numbered(counts, per_window)
    options: dict[str, Any] = {"seed": seed, "epochs": 3}
    whole = [b.tolist() for b in _batches(blocks, batch_size, start_batch=0, **options)]
    start = data.draw(st.integers(0, len(whole) + 2))
    rest = _batches(blocks, batch_size, start_batch=start, **options)
    assert [b.tolist() for b in rest] == whole[start:]


@given(_counts, st.integers(1, 15), st.integers(1, 9))
def test_endless_epochs_begin_as_counted_ones(
    counts: list[int], per_window: int, batch_size: int
) -> None:
    blocks = _numbered(counts, per_window)
    counted = list(_batches(blocks, batch_size, seed=1, start_batch=0, epochs=3))
    endless = _batches(blocks, batch_size, seed=1, start_batch=0, epochs=None)
    for a, b in zip(counted[:-1], endless, strict=False):
        assert torch.equal(a, b)


def test_seeking_reads_only_its_window() -> None:
    loaded = []
    blocks = _numbered([4] * 10, 2)
    counting = blocks._replace(load=lambda b: (loaded.append(b), blocks.load(b))[1])
    next(_batches(counting, 4, seed=0, start_batch=5, epochs=1))
    assert 1 <= len(loaded) <= 2  # its own, and the next one ahead
    assert all(len(chosen) == 2 for chosen in loaded)


def test_shuffle_mixes_across_blocks() -> None:
    blocks = _numbered([50] * 40, 8)
    first = next(_batches(blocks, 100, seed=0, start_batch=0, epochs=1))[:, 0]
    assert len({int(row) // 50 for row in first}) == 8
    assert not torch.equal(first, first.sort().values)
    second = next(_batches(blocks, 100, seed=0, start_batch=20, epochs=2))[:, 0]
    assert not torch.equal(first, second)


# -- batches -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 700),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 2),
    window_bytes=st.sampled_from([1, 300_000, 10**9]),
    start_fraction=st.floats(0, 1),
)
def test_batches_of_a_cache(
    tiny_cache: ActivationCache,
    batch_size: int,
    seed: int,
    epochs: int,
    window_bytes: int,
    start_fraction: float,
) -> None:
    cache = ActivationCache.open(tiny_cache.path, window_bytes=window_bytes)
    batches = list(cache.batches(HOOKPOINT, batch_size, seed=seed, epochs=epochs))
    again = list(cache.batches(HOOKPOINT, batch_size, seed=seed, epochs=epochs))
    assert all(map(torch.equal, batches, again))
    rows = torch.cat(batches)
    assert rows.dtype == torch.float32
    assert len(rows) == cache.n_rows(HOOKPOINT) * epochs
    kept = torch.cat([c.acts[~c.is_massive] for c in cache.chunks(HOOKPOINT, split="train")])
    for epoch in range(epochs):
        part = rows[epoch * len(kept) : (epoch + 1) * len(kept)]
        assert _sorted_rows(part) == _sorted_rows(kept)
    start = int(start_fraction * len(batches))
    rest = cache.batches(HOOKPOINT, batch_size, seed=seed, epochs=epochs, start_batch=start)
    for a, b in zip(rest, batches[start:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_ranks_together_give_the_global_batch(
    tiny_cache: ActivationCache, world_size: int, batch_size: int
) -> None:
    ranks = [
        tiny_cache.batches(HOOKPOINT, batch_size, rank=rank, world_size=world_size, epochs=2)
        for rank in range(world_size)
    ]
    whole = tiny_cache.batches(HOOKPOINT, batch_size, epochs=2)
    for batch, *shares in zip(whole, *ranks, strict=True):  # as many for every rank
        joined = torch.empty_like(batch)
        for rank, share in enumerate(shares):
            joined[rank::world_size] = share
        assert torch.equal(joined, batch)


def test_batches_own_their_memory(tiny_cache: ActivationCache) -> None:
    reference = next(tiny_cache.batches(HOOKPOINT, 8)).clone()
    for batch in tiny_cache.batches(HOOKPOINT, 8):
        assert batch.untyped_storage().nbytes() == batch.numel() * 4
        batch.zero_()
    assert torch.equal(next(tiny_cache.batches(HOOKPOINT, 8)), reference)


def test_hookpoints_are_shuffled_alike(tiny_cache: ActivationCache) -> None:
    """The same seed gives the same tokens, as long as the same rows are kept."""
    cache = ActivationCache.open(tiny_cache.path, massive_norm=None)
    rows = [_all_rows(cache, h) for h in cache.hookpoints]
    for a, b in zip(*(cache.batches(h, 50, seed=2) for h in cache.hookpoints), strict=True):
        first = [[(r == x).all(1).nonzero()[0, 0].item() for x in bb]
                 for r, bb in zip(rows, (a[:3], b[:3]), strict=True)]  # fmt: skip
        assert first[0] == first[1]


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"start_batch": -1}, {"seed": -1}, {"rank": 2, "world_size": 2}],
)
def test_arguments_out_of_range(tiny_cache: ActivationCache, arguments: dict[str, int]) -> None:
    with pytest.raises(CacheError, match="expected batch_size from 1, the others from 0"):
        tiny_cache.batches(HOOKPOINT, **{"batch_size": 8, **arguments})  # type: ignore[arg-type]


def test_unknown_hookpoint_split_and_folder(tiny_cache: ActivationCache, tmp_path: Path) -> None:
    with pytest.raises(CacheError) as raised:
        tiny_cache.batches("layers.9.resid_post", 8)
    assert str(raised.value) == (
        f"cache {tiny_cache.path} holds layers.1.resid_post, layers.1.mlp_out, not "
        "'layers.9.resid_post': choose one of them, or harvest again"
    )
    with pytest.raises(CacheError, match="unknown split 'test': expected train, heldout or all"):
        tiny_cache.batches(HOOKPOINT, 8, split="test")  # type: ignore[arg-type]
    with pytest.raises(CacheError, match=r"is no activation cache: it has no manifest\.json"):
        ActivationCache.open(tmp_path)
    with pytest.raises(CacheError, match="is no activation cache: it does not exist"):
        ActivationCache.open(tmp_path / "none")
    with pytest.raises(CacheError, match="heldout_fraction=1: expected 0 or more, below 1"):
        ActivationCache.open(tiny_cache.path, heldout_fraction=1)


# -- massive norms -------------------------------------------------------------------------------


def test_massive_rows_are_left_out_and_counted(tiny_cache: ActivationCache) -> None:
    norms = _all_rows(tiny_cache).norm(dim=1)
    factor = float((norms.sort().values[-30:-28].mean()) / norms.median())
    cache = ActivationCache.open(tiny_cache.path, massive_norm=factor, heldout_fraction=0)
    limit = cache.max_norm(HOOKPOINT)
    assert limit == pytest.approx(factor * float(norms.median()))
    assert cache.n_massive(HOOKPOINT) == int((norms > limit).sum()) == 29
    assert cache.n_rows(HOOKPOINT) == cache.n_tokens - 29
    rows = torch.cat(list(cache.batches(HOOKPOINT, 100)))
    assert len(rows) == cache.n_rows(HOOKPOINT)
    assert rows.norm(dim=1).max() <= limit * 1.0001
    marked = torch.cat([chunk.is_massive for chunk in cache.chunks(HOOKPOINT)])
    assert torch.equal(marked, norms > limit)
    everything = ActivationCache.open(tiny_cache.path, massive_norm=None, heldout_fraction=0)
    assert everything.n_massive(HOOKPOINT) == 0
    assert everything.n_rows(HOOKPOINT) == cache.n_tokens


def test_first_positions_can_be_left_out(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    cache = harvest(
        tiny_lm, tiny_corpus, hookpoints=[HOOKPOINT], out=tmp_path, n_tokens=100_000, ctx_len=16,
        keep_first_position=False, prepend_bos=True,
    )  # fmt: skip
    n_blocks = 0
    for chunk in cache.chunks(HOOKPOINT):
        assert chunk.is_massive[chunk.block_offsets[:-1]].all()
        n_blocks += len(chunk.block_offsets) - 1
    n_left_out = n_blocks + cache.n_massive(HOOKPOINT, split="all")
    assert cache.n_tokens - cache.n_rows(HOOKPOINT, split="all") == n_left_out


def test_rows_that_are_no_numbers_never_train(
    tiny_model: Callable[[str], Any],
    tiny_tokenizer: Any,
    tiny_corpus: list[str],
    tmp_path: Path,
) -> None:
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer, name="broken")
    broken = int(lm.token_batch("Note 1")[0][0, 0])
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[broken] = torch.nan
    cache = harvest(lm, tiny_corpus, hookpoints=["embed"], out=tmp_path, n_tokens=1_000, ctx_len=16)
    n_broken = sum(int((c.token_ids == broken).sum()) for c in cache.chunks("embed"))
    assert cache.n_massive("embed", split="all") == n_broken > 0
    assert torch.cat(list(cache.batches("embed", 32, split="all"))).isfinite().all()


# -- the split -----------------------------------------------------------------------------------


def test_held_out_documents_never_train(tiny_cache: ActivationCache) -> None:
    sides: dict[str, set[int]] = {}
    for split in ("train", "heldout"):
        chunks = list(tiny_cache.chunks(HOOKPOINT, split=split))  # type: ignore[arg-type]
        sides[split] = set(torch.cat([c.doc_ids[~c.is_massive] for c in chunks]).tolist())
        kept = torch.cat([c.acts[~c.is_massive] for c in chunks])
        rows = torch.cat(list(tiny_cache.batches(HOOKPOINT, 64, split=split)))  # type: ignore[arg-type]
        assert _sorted_rows(rows) == _sorted_rows(kept)
    assert sides["train"].isdisjoint(sides["heldout"])
    assert sides["train"] | sides["heldout"] == set(range(tiny_cache.n_documents))
    in_blocks: set[int] = set()
    doc_ids = torch.cat([c.doc_ids for c in tiny_cache.chunks(HOOKPOINT)])
    for block in tiny_cache.token_blocks(split="heldout"):
        rows_of_block = doc_ids[block.first_row : block.first_row + len(block.token_ids)]
        in_blocks |= set(rows_of_block[block.in_split].tolist())
    assert in_blocks == sides["heldout"]


def test_documents_stay_on_their_side_as_a_cache_grows(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    sides: dict[int, bool] = {}
    for n in (2, 3, 5, 8, 20, 40):
        cache = harvest(
            tiny_lm, ["", *tiny_corpus[:n]], hookpoints=["embed"], out=tmp_path / f"{n}",
            n_tokens=100_000, ctx_len=16,
        )  # fmt: skip
        assert cache.n_rows("embed", split="train") > 0
        assert cache.n_rows("embed", split="heldout") > 0
        for chunk in cache.chunks("embed", split="heldout"):
            for doc, out in zip(chunk.doc_ids.tolist(), chunk.is_massive.tolist(), strict=True):
                assert sides.setdefault(doc, out) == out


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.5])
def test_held_out_share_is_about_the_fraction(fraction: float) -> None:
    held_out = is_held_out(np.arange(20_000), fraction, [0, 1])
    assert abs(held_out.mean() - fraction) < 0.01
    assert list(held_out[:2]) == [False, fraction > 0]


def test_single_document_has_no_held_out_side(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    cache = harvest(tiny_lm, ["One note."], hookpoints=["embed"], out=tmp_path, ctx_len=16,
                    n_tokens=100)  # fmt: skip
    assert cache.n_rows("embed") == cache.n_tokens
    with pytest.raises(CacheError, match="has no rows in split 'heldout' at embed: harvest more"):
        cache.batches("embed", 8, split="heldout")


# -- in order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 50, 100_000])
def test_chunks_give_everything_in_order_and_split_no_block(
    tiny_cache: ActivationCache, tiny_lm: LanguageModel, rows: int
) -> None:
    chunks = list(tiny_cache.chunks(HOOKPOINT, rows=rows))
    assert torch.equal(torch.cat([c.acts for c in chunks]), _all_rows(tiny_cache))
    place = 0
    lengths = []
    for chunk in chunks:
        assert chunk.first_row == place
        place += len(chunk.acts)
        assert chunk.block_offsets[0] == 0
        assert chunk.block_offsets[-1] == len(chunk.acts) == len(chunk.token_ids)
        lengths += chunk.block_offsets.diff().tolist()
    assert place == tiny_cache.n_tokens
    assert set(lengths[:-1]) == {16}
    ids = torch.cat([c.token_ids for c in chunks])
    blocks = [b.token_ids for b in tiny_cache.token_blocks(split="all")]
    assert torch.equal(torch.cat(blocks), ids)
    assert [len(b) for b in blocks] == lengths


def test_documents_round_trip(
    tiny_cache: ActivationCache, tiny_lm: LanguageModel, tiny_corpus: list[str]
) -> None:
    documents = list(tiny_cache.documents())
    assert [tiny_lm.tokenizer.decode(d.token_ids) for d in documents] == [
        f"{text}<eos>" for text in tiny_corpus
    ]
    assert [d.doc_id for d in documents] == list(range(tiny_cache.n_documents))


def test_positions_count_through_each_document(tiny_cache: ActivationCache) -> None:
    chunks = list(tiny_cache.chunks(HOOKPOINT, rows=64))
    docs = torch.cat([c.doc_ids for c in chunks]).tolist()
    positions = torch.cat([c.positions for c in chunks]).tolist()
    for _, rows in itertools.groupby(zip(docs, positions, strict=True), key=lambda row: row[0]):
        assert [p for _, p in rows] == list(range(docs.count(_)))


def test_provenance_names_what_the_rows_come_from(
    tiny_cache: ActivationCache, tiny_lm: LanguageModel
) -> None:
    provenance = tiny_cache.provenance(HOOKPOINT)
    assert provenance["model"] == "tiny-llama"
    assert provenance["model_revision"] == tiny_lm.revision
    assert provenance["hookpoint"] == HOOKPOINT
    assert provenance["cache_fingerprint"] == tiny_cache.fingerprint_hash
    json.dumps(provenance)
