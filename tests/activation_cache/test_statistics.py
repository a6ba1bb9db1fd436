"""What a cache is said to hold: compared with numpy on all rows, and with planted truth."""

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from activation_cache import ActivationCache, CacheError, Chunk, LanguageModel, cache_statistics
from activation_cache import statistics as module
from activation_cache.norm_counts import NormCounts, group_of_place, places_of_group
from activation_cache.statistics import HookpointStatistics, storage_rounding

HOOKPOINT = "layers.1.resid_post"
CLOSE = 2**-10


class PlantedCache:
    """Stands for an `ActivationCache` of blocks of eight rows, width 16, whose rows are known.

    Ordinary rows have norm 1 to 2 and mean 0, but for channel 3 with mean 0.75. Each block begins
    with a row of -300 in channel 5 and 100 in channel 11, on token 7; row 20 is as massive, on
    token 9. Row 33 holds an infinity, row 34 no number.
    """

    hookpoints = ("layers.0.resid_post",)
    n_documents, n_shards = 4, 1
    bytes_by_stream: ClassVar = {"layers.0.resid_post": 1}

    def __init__(self, folder: Path, n_blocks: int = 40, keep_first: bool = True):
        generator = torch.Generator().manual_seed(0)
        self.path, self.n_tokens = folder, 8 * n_blocks
        self.quantization_fvu = {self.hookpoints[0]: 1e-4}
        rows = torch.randn(self.n_tokens, 16, generator=generator)
        lengths = 1 + torch.rand(self.n_tokens, 1, generator=generator)
        self.rows = lengths * torch.nn.functional.normalize(rows, dim=1)
        self.rows[:, 3] += 0.75
        self.massive = sorted([*range(0, self.n_tokens, 8), 20]) if keep_first else [20]
        self.rows[self.massive] = 0
        self.rows[self.massive, 5], self.rows[self.massive, 11] = -300.0, 100.0
        self.bad = [33, 34]
        self.rows[33, 0], self.rows[34, 0] = torch.inf, torch.nan
        self.token_ids = torch.full((self.n_tokens,), 1)
        self.token_ids[::8], self.token_ids[20] = 7, 9
        self.keep_first = keep_first
        fingerprint = SimpleNamespace(
            storage_dtype="int8", model_dtype="float32", ctx_len=8, keep_first_position=keep_first
        )
        self.manifest = SimpleNamespace(fingerprint=fingerprint, n_shards=0)

    def d_model(self, hookpoint: str) -> int:
        return 16

    def max_norm(self, hookpoint: str) -> float:
        return 15.0

    def chunks(self, hookpoint: str, *, rows: int) -> Iterator[Chunk]:
        for first in range(0, self.n_tokens, rows):
            acts = self.rows[first : first + rows]
            places = torch.arange(first, first + len(acts))
            left_out = ~(acts.norm(dim=1) <= 15.0)
            if not self.keep_first:
                left_out |= places % 8 == 0
            offsets = torch.arange(0, len(acts) + 1, 8)
            ids = self.token_ids[first : first + rows]
            yield Chunk(acts, ids, places // 100, places % 100, offsets, left_out, first)


def planted(cache: PlantedCache, **options: Any) -> HookpointStatistics:
    (found,) = cache_statistics(cache, **options).hookpoints
    return found


def places_of_rows(cache: ActivationCache) -> np.ndarray:
    lengths = [int(n) for c in cache.chunks(HOOKPOINT) for n in c.block_offsets.diff()]
    return np.concatenate([np.arange(n) for n in lengths])


def all_rows(cache: ActivationCache, hookpoint: str) -> np.ndarray:
    return torch.cat([c.acts for c in cache.chunks(hookpoint)]).double().numpy()


# -- against numpy on all rows -------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [64_000_000, 8_192])
def test_norms_and_moments_are_those_of_all_rows(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    found = cache_statistics(tiny_cache, n_rows=None)
    assert [h.hookpoint for h in found.hookpoints] == list(tiny_cache.hookpoints)
    for h in found.hookpoints:
        rows = all_rows(tiny_cache, h.hookpoint)
        norms = np.linalg.norm(rows, axis=1)
        assert (h.n_rows, h.n_ordinary, h.n_non_finite) == (len(rows), len(rows), 0)
        for share, norm in h.norm_quantiles.items():
            expected = np.quantile(norms, share, method="inverted_cdf")
            assert norm == pytest.approx(expected, rel=CLOSE), share
        assert h.median_norm == h.norm_quantiles[0.5]
        assert h.norm_quantiles[1.0] == pytest.approx(norms.max(), rel=1e-6)
        assert h.mean_squared_norm == pytest.approx((norms**2).mean(), rel=1e-5)
        mean = np.linalg.norm(rows.mean(0)) / np.sqrt((norms**2).mean())
        assert h.mean_row == pytest.approx(mean, rel=1e-4)
        for values, shown in (
            (rows.var(0), h.largest_variance),
            (np.abs(rows).mean(0), h.largest_mean_abs),
        ):
            assert [c.channel for c in shown] == np.argsort(-values)[:8].tolist()
            np.testing.assert_allclose([c.value for c in shown], np.sort(values)[::-1][:8], 1e-5)
            over = [c.over_median for c in shown]
            np.testing.assert_allclose(over, np.sort(values)[::-1][:8] / np.median(values), 1e-5)


def test_norms_by_place_are_those_of_the_rows_there(tiny_cache: ActivationCache) -> None:
    h = cache_statistics(tiny_cache, hookpoints=[HOOKPOINT]).hookpoints[0]
    norms = np.linalg.norm(all_rows(tiny_cache, HOOKPOINT), axis=1)
    places = places_of_rows(tiny_cache)
    spans = [(p.first_place, p.last_place) for p in h.norms_by_place]
    assert spans == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 15)]
    for p in h.norms_by_place:
        here = norms[(places >= p.first_place) & (places <= p.last_place)]
        assert p.n_rows == len(here)
        for share, norm in ((0.05, p.low), (0.5, p.median), (0.95, p.high)):
            expected = np.quantile(here, share, method="inverted_cdf")
            assert norm == pytest.approx(expected, rel=CLOSE)


def test_the_histogram_holds_every_row(tiny_cache: ActivationCache) -> None:
    h = cache_statistics(tiny_cache, hookpoints=[HOOKPOINT]).hookpoints[0]
    norms = np.linalg.norm(all_rows(tiny_cache, HOOKPOINT), axis=1)
    expected, _ = np.histogram(norms.astype(np.float32), np.array(h.norm_histogram.edges))
    assert list(h.norm_histogram.counts) == expected.tolist()
    assert sum(h.norm_histogram.counts) == tiny_cache.n_tokens


def test_only_the_first_rows_are_read(tiny_cache: ActivationCache) -> None:
    found = cache_statistics(tiny_cache, hookpoints=[HOOKPOINT], n_rows=53)
    norms = np.linalg.norm(all_rows(tiny_cache, HOOKPOINT), axis=1)[:53]
    h = found.hookpoints[0]
    assert (found.n_rows_read, h.n_rows) == (53, 53)
    assert found.n_tokens == tiny_cache.n_tokens
    assert h.mean_squared_norm == pytest.approx((norms**2).mean(), rel=1e-5)
    assert [p.n_rows for p in h.norms_by_place] == [4, 4, 4, 4, 13, 24]


def test_tokens_and_disk_are_those_of_the_whole_cache(tiny_cache: ActivationCache) -> None:
    found = cache_statistics(tiny_cache)
    lengths = [len(document.token_ids) for document in tiny_cache.documents()]
    assert found.n_documents == len(lengths)
    assert found.median_document_tokens == statistics.median(lengths)
    assert sum(found.disk.by_stream.values()) == found.disk.n_bytes == tiny_cache.n_bytes
    assert set(found.disk.by_stream) == {"tokens", *tiny_cache.hookpoints}
    assert found.disk.n_shards == tiny_cache.manifest.n_shards > 1
    files = (tiny_cache.path / "shards").glob(f"*.{HOOKPOINT}.safetensors")
    assert found.disk.by_stream[HOOKPOINT] == sum(file.stat().st_size for file in files)
    assert found.disk.bytes_per_token == tiny_cache.n_bytes / tiny_cache.n_tokens


def test_a_document_that_is_cut_does_not_count(tiny_cache: ActivationCache) -> None:
    first, second, *_ = (len(document.token_ids) for document in tiny_cache.documents())
    found = cache_statistics(tiny_cache, n_rows=first + second - 1)
    assert found.median_document_tokens == first
    assert np.isnan(cache_statistics(tiny_cache, n_rows=first - 1).median_document_tokens)


def test_progress_ends_at_all_rows_of_all_hookpoints(tiny_cache: ActivationCache) -> None:
    told: list[Any] = []
    cache_statistics(tiny_cache, on_progress=told.append)
    assert [p.n_rows for p in told] == sorted(p.n_rows for p in told)
    assert told[-1].n_rows == told[-1].n_rows_wanted == 2 * tiny_cache.n_tokens
    assert {p.hookpoint for p in told} == set(tiny_cache.hookpoints)


def test_what_can_not_be_read_is_told_at_once(tiny_cache: ActivationCache) -> None:
    with pytest.raises(CacheError, match=r"layers\.9"):
        cache_statistics(tiny_cache, hookpoints=[HOOKPOINT, "layers.9"])
    with pytest.raises(CacheError, match="n_rows=0"):
        cache_statistics(tiny_cache, n_rows=0)


# -- planted massive rows ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [64_000_000, 2_048])
def test_planted_massive_rows_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    cache = PlantedCache(tmp_path)
    h = planted(cache)
    massive = h.massive
    assert (massive.n_rows, massive.limit) == (41, 15.0)
    assert massive.share == 41 / 320
    assert massive.at_first_place == 40 / 41
    assert [c.channel for c in massive.channels] == [5, 11]
    assert [c.share for c in massive.channels] == pytest.approx([0.9, 0.1])
    assert [c.mean for c in massive.channels] == [-300.0, 100.0]
    assert [c.same_sign for c in massive.channels] == [1.0, 1.0]
    assert [(t.token_id, t.n_rows) for t in massive.tokens] == [(7, 40), (9, 1)]
    assert massive.n_distinct_tokens == 2


def test_massive_and_non_finite_rows_are_apart_from_the_others(tmp_path: Path) -> None:
    cache = PlantedCache(tmp_path)
    h = planted(cache)
    kept = np.delete(cache.rows.double().numpy(), cache.massive + cache.bad, axis=0)
    assert (h.n_rows, h.n_non_finite, h.n_ordinary) == (320, 2, len(kept))
    assert h.mean_squared_norm == pytest.approx((kept**2).sum(1).mean(), rel=1e-5)
    assert h.largest_mean_abs[0].channel == 3
    assert h.largest_mean_abs[0].value == pytest.approx(np.abs(kept[:, 3]).mean(), rel=1e-5)
    finite = np.delete(cache.rows.numpy(), cache.bad, axis=0)
    norms = np.linalg.norm(finite, axis=1)
    assert h.norm_quantiles[0.99] == pytest.approx(np.hypot(300, 100), rel=CLOSE)
    assert sum(h.norm_histogram.counts) == len(norms)
    assert h.norms_by_place[0].median == pytest.approx(np.hypot(300, 100), rel=CLOSE)


def test_mean_and_variance_survive_a_large_offset(tmp_path: Path) -> None:
    cache = PlantedCache(tmp_path)
    ordinary = np.setdiff1d(np.arange(320), cache.massive + cache.bad)
    cache.rows[ordinary, 8] = 10.0 + 0.001 * torch.randn(len(ordinary))
    kept = cache.rows[ordinary].double().numpy()
    for chunk_bytes in (64_000_000, 2_048):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
            patch.setattr("activation_cache.row_totals._N_CHANNELS", 16)
            variance = {c.channel: c.value for c in planted(cache).largest_variance}
        assert variance[8] == pytest.approx(kept[:, 8].var(), rel=1e-3)


def test_first_rows_that_the_cache_leaves_out_are_not_called_massive(tmp_path: Path) -> None:
    h = planted(PlantedCache(tmp_path, keep_first=False))
    assert h.massive.n_rows == 1
    assert h.massive.at_first_place == 0
    assert h.n_ordinary == 320 - 40 - 1 - 2


def test_a_cache_without_massive_rows_says_so(tiny_cache: ActivationCache) -> None:
    massive = cache_statistics(tiny_cache).hookpoints[0].massive
    assert (massive.n_rows, massive.channels, massive.tokens) == (0, (), ())
    assert np.isnan(massive.at_first_place)


def test_massive_channels_of_an_edited_model_are_found(
    tiny_model: Callable[[str], Any],
    tiny_tokenizer: Any,
    tiny_corpus: list[str],
    tmp_path: Path,
) -> None:
    from activation_cache import harvest

    model = tiny_model("llama")
    with torch.no_grad():  # the embedding of BOS is massive, and so is the stream where it stands
        model.get_input_embeddings().weight[1, 7] = -2000.0
    lm = LanguageModel(model, tiny_tokenizer, name="edited")
    options = {"hookpoints": [HOOKPOINT], "ctx_len": 16, "n_tokens": 600, "prepend_bos": True}
    cache = harvest(lm, tiny_corpus, out=tmp_path / "acts", storage_dtype="float16", **options)
    found = cache_statistics(cache)
    massive = found.hookpoints[0].massive
    assert massive.n_rows == cache.n_massive(HOOKPOINT, split="all") > 30
    assert massive.at_first_place == 1
    assert [(t.token_id, t.n_rows) for t in massive.tokens] == [(1, massive.n_rows)]
    (channel,) = massive.channels
    assert channel.channel == 7
    assert channel.mean == pytest.approx(-2000, rel=0.01)
    assert channel.share > 0.99
    lengths = [len(document.token_ids) for document in cache.documents()]
    assert found.median_document_tokens == statistics.median(lengths)
    assert found.rounding == 2**-11


# -- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "storage", "rounding"),
    [
        ("float32", "float32", 0.0),
        ("bfloat16", "float32", 0.0),
        ("bfloat16", "bfloat16", 0.0),
        ("float32", "bfloat16", 2**-8),
        ("float16", "bfloat16", 2**-8),
        ("float32", "float16", 2**-11),
        ("float32", "int8", None),
    ],
)
def test_rounding_is_the_largest_relative_error(
    model: str, storage: str, rounding: float | None
) -> None:
    fingerprint: Any = SimpleNamespace(model_dtype=model, storage_dtype=storage)
    assert storage_rounding(fingerprint) == rounding
    if rounding:
        values = 1 + torch.rand(100_000)
        error = (values.to(getattr(torch, storage)).float() - values).abs() / values
        assert 0.9 * rounding < float(error.max()) <= rounding


def test_the_quantization_error_of_the_cache_is_passed_on(tmp_path: Path) -> None:
    found = cache_statistics(PlantedCache(tmp_path))
    assert found.rounding is None
    assert found.hookpoints[0].quantization_fvu == 1e-4


# -- counting norms ------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 2**100, width=32), min_size=1, max_size=200),
    st.floats(0.0078125, 1, width=32),
)
def test_quantiles_are_right_to_a_two_thousandth(norms: list[float], share: float) -> None:
    counts = NormCounts(32)
    array = np.array(norms, dtype=np.float32)
    for part in np.array_split(array, 3):
        counts.add_(part, np.zeros(len(part), dtype=np.int64))
    (found,) = counts.quantiles((share,))
    expected = float(np.quantile(array, share, method="inverted_cdf"))
    assert found == pytest.approx(expected, rel=2**-11, abs=2e-38)
    assert counts.quantiles((1.0,)) == [float(array.max())]


def test_groups_of_places_follow_one_another() -> None:
    places = np.arange(1000)
    groups = group_of_place(places)
    assert (np.diff(groups) >= 0).all()
    for group, members in itertools.groupby(places, key=lambda place: groups[place]):
        first, last = places_of_group(int(group))
        inside = list(members)
        assert (inside[0], inside[-1]) == (first, min(last, 999))


def test_no_row_has_no_quantile() -> None:
    assert np.isnan(NormCounts(4).quantiles((0.5,))).all()
    assert NormCounts(4).histogram().counts == ()
