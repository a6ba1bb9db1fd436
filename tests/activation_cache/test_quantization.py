"""int8: the formula, its error, rows that are kept exactly, and caches that are stored in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from activation_cache import ActivationCache, CacheMismatch, HarvestProgress, LanguageModel, harvest
from activation_cache.durable import written
from activation_cache.quantization import (
    Calibration,
    ErrorMeter,
    added_fvu,
    calibrate,
    dequantize,
    quantize,
)
from activation_cache.store import LocalStore
from activation_cache.tensor_file import TensorFile, TensorFileWriter

HOOKPOINT = "layers.1.resid_post"
SMALL: dict[str, Any] = {
    "n_tokens": 100_000,
    "ctx_len": 16,
    "batch_blocks": 4,
    "shard_bytes": 8_000,
    "storage_dtype": "int8",
}


def _back(rows: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """What comes back of rows, and their scales."""
    coded = quantize(rows, rows.float().norm(dim=1), calibration)
    return (
        dequantize(coded.codes, coded.row_scales, calibration.center, calibration.channel_scales),
        coded.row_scales,
    )


def _rows(cache: ActivationCache, hookpoint: str) -> Tensor:
    return torch.cat([chunk.acts for chunk in cache.chunks(hookpoint)])


# -- the formula ---------------------------------------------------------------------------------


def test_codes_and_their_meaning_equal_the_formula_in_float64() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 24) * torch.logspace(-2, 2, 24) + 5 * torch.randn(24)
    calibration = calibrate(rows)
    center, scales = calibration.center.double(), calibration.channel_scales.double()
    torch.testing.assert_close(center, rows.double().mean(0), rtol=1e-6, atol=1e-6)
    deviation = rows.double().std(0, correction=0)
    expected = deviation.clamp(min=float(deviation.mean()) / 1000) ** 0.8
    torch.testing.assert_close(scales, expected, rtol=1e-6, atol=0)
    coded = quantize(rows, rows.norm(dim=1), calibration)
    scaled = (rows.double() - center) / scales
    row_scales = scaled.abs().amax(1) / 127
    torch.testing.assert_close(coded.row_scales.double(), row_scales, rtol=1e-5, atol=0)
    exact_codes = scaled / row_scales[:, None]
    assert (coded.codes.double() - exact_codes).abs().max() < 0.5001
    assert coded.codes.abs().amax(1).eq(127).all()  # each row uses the whole range
    meaning = coded.codes.double() * coded.row_scales.double()[:, None] * scales + center
    back = dequantize(coded.codes, coded.row_scales, calibration.center, calibration.channel_scales)
    torch.testing.assert_close(back.double(), meaning, rtol=1e-5, atol=1e-5)


_values = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60)
@given(
    st.integers(1, 6).flatmap(
        lambda width: st.tuples(
            st.lists(st.lists(_values, min_size=width, max_size=width), min_size=1, max_size=9),
            st.lists(st.lists(_values, min_size=width, max_size=width), min_size=1, max_size=9),
        )
    )
)
def test_error_is_at_most_half_a_step(both: tuple[list[list[float]], list[list[float]]]) -> None:
    sample, rows = map(torch.tensor, both)
    calibration = calibrate(sample)
    back, row_scales = _back(rows, calibration)
    is_exact = rows.norm(dim=1) > calibration.max_norm
    assert torch.equal(row_scales == 0, is_exact)
    half = row_scales[:, None].double() * calibration.channel_scales.double() / 2
    size = torch.maximum(rows.abs(), calibration.center.abs()).double()
    slack = 1e-4 * half + 4e-7 * size + 1e-30
    error = (rows.double() - back.double()).abs()
    assert (error <= half + slack)[~is_exact].all()


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("value", [0.0, 3.25, -1e-20, 1e6])
def test_constant_rows_come_back(width: int, value: float) -> None:
    rows = torch.full((7, width), value)
    back, row_scales = _back(rows, calibrate(rows))
    assert (row_scales > 0).all()
    torch.testing.assert_close(back, rows, rtol=1e-6, atol=0)


def test_constant_channel_is_free() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 8)
    rows[:, 3] = 7.5
    back, _ = _back(rows, calibrate(rows))
    assert torch.equal(back[:, 3], rows[:, 3])
    assert (back - rows).abs().max() < 0.05


def test_constant_sample_does_not_break_other_rows() -> None:
    calibration = calibrate(torch.full((9, 4), 2.0))
    rows = torch.tensor([[2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 2.5, 2.0], [-8.0, 4.0, 0.0, 2.0]])
    back, row_scales = _back(rows, calibration)
    assert (row_scales > 0).all()
    torch.testing.assert_close(back, rows, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_cannot_be_coded_are_marked(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 6).to(dtype)
    calibration = calibrate(rows)
    rows[3, 2], rows[5, 0], rows[8, 1], rows[9] = torch.nan, torch.inf, -torch.inf, 1e6
    coded = quantize(rows, rows.float().norm(dim=1), calibration)
    assert (coded.row_scales == 0).nonzero()[:, 0].tolist() == [3, 5, 8, 9]
    assert coded.codes[[3, 5, 8, 9]].eq(0).all()


def test_massive_and_broken_rows_stay_out_of_the_calibration() -> None:
    torch.manual_seed(0)
    rows = torch.randn(300, 6)
    dirty = torch.cat([rows, torch.full((3, 6), 1e4), torch.full((3, 6), torch.nan)])
    clean, found = calibrate(rows), calibrate(dirty)
    torch.testing.assert_close(found.center, clean.center)
    torch.testing.assert_close(found.channel_scales, clean.channel_scales)


def test_added_fvu_of_gaussian_rows_is_small() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4_000, 256) * torch.logspace(-1, 1, 256) + torch.randn(256)
    calibration = calibrate(rows)
    meter = ErrorMeter()
    for part in rows.split(700):
        meter.add(part, quantize(part, part.norm(dim=1), calibration), calibration)
    fvu = added_fvu([meter.sums()])
    back = _back(rows, calibration)[0].double()
    deviation = (rows.double() - rows.double().mean(0)).square().sum()
    expected = float((rows.double() - back).square().sum() / deviation)
    assert fvu == pytest.approx(expected, rel=1e-3)
    assert 1e-6 < expected < 2e-4


# -- caches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(
    tiny_model: Callable[[str], Any], tiny_tokenizer: Any, tiny_corpus: list[str]
) -> LanguageModel:
    """`embed` gives planted rows: channels spread 100 times, a token that is massive, one whose
    norm is 15 times the median, one with NaN and one with infinity."""
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer, name="planted")
    weight = lm.model.get_input_embeddings().weight
    massive, between, nan, inf = (
        int(tiny_tokenizer(text).input_ids[0]) for text in ("Note", " the", " keys", " song")
    )
    with torch.no_grad():
        weight *= torch.logspace(-1, 1, weight.shape[1])
        median = weight.norm(dim=1).median()
        weight[massive] *= 200 * median / weight[massive].norm()
        weight[between] *= 15 * median / weight[between].norm()
        weight[nan, 3], weight[inf, 5] = torch.nan, torch.inf
    return lm


@pytest.fixture(scope="module")
def pair(
    planted: LanguageModel, tiny_corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same text in int8 and in float32: shards of two blocks of 1,024 rows, and a last one."""
    root = tmp_path_factory.mktemp("pair")
    for dtype in ("int8", "float32"):
        options = {**SMALL, "storage_dtype": dtype, "shard_bytes": 64_000}
        cache = harvest(planted, 4 * tiny_corpus, hookpoints="embed", out=root / dtype, **options)
        assert cache.n_shards > 2
    return root / "int8", root / "float32"


def test_rows_kept_exactly_come_back_bitwise(pair: tuple[Path, Path]) -> None:
    for massive_norm in (None, 10.0, 20.0):
        coded, plain = (ActivationCache.open(p, massive_norm=massive_norm) for p in pair)
        rows, expected = _rows(coded, "embed"), _rows(plain, "embed")
        limit = float(_small(coded, 0, "embed")["exact_above"])
        is_exact = ~(expected.norm(dim=1) <= limit)
        assert 100 < int(is_exact.sum()) < len(rows) / 2
        assert torch.equal(rows[is_exact].view(torch.int32), expected[is_exact].view(torch.int32))
        assert expected[is_exact].isnan().any()
        assert expected[is_exact].isinf().any()
        assert not torch.equal(rows[~is_exact], expected[~is_exact])
        torch.testing.assert_close(rows[~is_exact], expected[~is_exact], rtol=0, atol=0.05)
        marked = [torch.cat([c.is_massive for c in x.chunks("embed")]) for x in (coded, plain)]
        assert torch.equal(*marked)


def _small(cache: ActivationCache, shard: int, hookpoint: str) -> dict[str, Tensor]:
    path = Path(cache.path) / "shards" / f"{shard:06d}.{hookpoint}.safetensors"
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("massive_norm", [None, 10.0, 20.0, 8.0])
@pytest.mark.parametrize("window_bytes", [1, 10**9])
def test_batches_equal_decoded_chunks(
    pair: tuple[Path, Path], massive_norm: float | None, window_bytes: int
) -> None:
    """Also where a row is kept exactly and yet is not massive for the reader."""
    cache = ActivationCache.open(pair[0], massive_norm=massive_norm, window_bytes=window_bytes)
    kept = torch.cat([c.acts[~c.is_massive] for c in cache.chunks("embed")])
    rows = torch.cat(list(cache.batches("embed", 37, split="all")))
    assert _bits(rows) == _bits(kept)


def test_exact_rows_are_read_once_for_all_chunks_of_a_shard(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ActivationCache.open(pair[0])
    n_rows = cache.n_tokens // cache.n_shards
    read = []
    small = TensorFile.small
    monkeypatch.setattr(TensorFile, "small", lambda file: read.append(file) or small(file))

    fresh = ActivationCache.open(pair[0])
    n_chunks = len(list(fresh.chunks("embed", rows=n_rows)))
    n_whole = len(read)
    read.clear()
    finer = ActivationCache.open(pair[0])

    assert len(list(finer.chunks("embed", rows=16))) > 2 * n_chunks
    assert len(read) == n_whole


def _bits(rows: Tensor) -> list[list[int]]:
    return sorted(rows.contiguous().view(torch.int32).tolist())


def test_added_fvu_equals_that_of_the_float32_cache(
    pair: tuple[Path, Path],
) -> None:
    coded, plain = (ActivationCache.open(p) for p in pair)
    error = deviation = 0.0
    rows, expected = _rows(coded, "embed").double(), _rows(plain, "embed").double()
    limit = float(_small(coded, 0, "embed")["exact_above"])
    first = 0
    for part in coded.parts:
        for record in part.records:
            inside = slice(first, first + record.n_rows)
            kept = expected[inside].norm(dim=1) <= limit
            x, back = expected[inside][kept], rows[inside][kept]
            error += float((x - back).square().sum())
            deviation += float((x - x.mean(0)).square().sum())
            first += record.n_rows
            assert record.quantization["embed"].n_rows == len(x)
            assert record.quantization["embed"].n_exact == record.n_rows - len(x)
    assert first == len(rows)
    assert coded.quantization_fvu == {"embed": pytest.approx(error / deviation, rel=1e-3)}
    assert error / deviation < 2e-4
    assert coded.manifest.quantization_fvu == coded.quantization_fvu
    stored = json.loads((pair[0] / "manifest.json").read_text())["quantization_fvu"]
    assert stored == coded.quantization_fvu
    assert plain.quantization_fvu == plain.manifest.quantization_fvu == {}


def test_plain_safetensors_decode_by_the_formula(pair: tuple[Path, Path]) -> None:
    cache = ActivationCache.open(pair[0], massive_norm=None)
    decoded = []
    for shard in range(cache.n_shards):
        t = _small(cache, shard, "embed")
        rows = t["acts"].float() * t["row_scales"][:, None] * t["channel_scales"] + t["center"]
        rows[t["exact_at"]] = t["exact_acts"]
        assert (t["row_scales"] == 0).nonzero()[:, 0].tolist() == t["exact_at"].tolist()
        decoded.append(rows)
    torch.testing.assert_close(torch.cat(decoded), _rows(cache, "embed"), equal_nan=True)
    cache.verify()


@pytest.mark.parametrize("n_rows", [1, 3, 1_024, 1_025])
def test_odd_sizes_open_with_plain_safetensors(tmp_path: Path, n_rows: int) -> None:
    """Width 1: what stands behind the rows begins at any byte."""
    codes = torch.arange(n_rows, dtype=torch.int32).remainder(127).to(torch.int8)[:, None]
    scales, at = torch.rand(n_rows), torch.tensor([0], dtype=torch.int64)
    with written(tmp_path / "x.safetensors") as file:
        writer = TensorFileWriter(file, "acts", (1,), torch.int8)
        writer.append(codes, scales)
        record = writer.finish({"exact_at": at, "exact_acts": torch.empty(0, 1)})
    with safe_open(tmp_path / "x.safetensors", "np") as opened:
        assert np.array_equal(opened.get_tensor("acts"), codes.numpy())
        assert np.array_equal(opened.get_tensor("row_scales"), scales.numpy())
        assert opened.get_tensor("exact_at").tolist() == [0]
        assert opened.get_tensor("exact_acts").shape == (0, 1)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("row_scales"), scales)
    read = TensorFile(LocalStore(tmp_path), "x.safetensors", "acts", record)
    read.verify()
    assert torch.equal(read.rows(0, n_rows).rows, codes)
    assert torch.equal(read.small()["exact_at"], at)


def test_int8_takes_half_of_bfloat16(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    sizes = {}
    for dtype in ("int8", "bfloat16"):
        options = {**SMALL, "storage_dtype": dtype, "shard_bytes": 10**6}
        cache = harvest(
            tiny_lm, tiny_corpus, hookpoints="layers.1.mlp_acts", out=tmp_path / dtype, **options
        )
        norms = 4 * cache.n_tokens
        sizes[dtype] = cache.bytes_by_stream["layers.1.mlp_acts"] - norms - 1_032
    assert 0.5 < sizes["int8"] / sizes["bfloat16"] < 0.6  # a scale for each row of width 64


class _StopError(Exception):
    pass


def test_interrupted_int8_harvest_equals_uninterrupted_one(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    texts, options = tiny_corpus[:25], {**SMALL, "hookpoints": [HOOKPOINT, "embed"]}
    harvest(tiny_lm, texts, out=tmp_path / "whole", **options)
    whole = _files(tmp_path / "whole")
    out = tmp_path / "stopped"
    n_stops = 0
    for _ in range(20):
        seen: list[HarvestProgress] = []

        def stop(progress: HarvestProgress, seen: list[HarvestProgress] = seen) -> None:
            seen.append(progress)
            if len(seen) == 8:
                raise _StopError

        try:
            harvest(tiny_lm, texts, out=out, on_progress=stop, **options)
            break
        except _StopError:
            n_stops += 1
    assert n_stops >= 1
    assert _files(out) == whole


def _files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "shards").iterdir())}


def test_two_calibrations_in_one_cache_decode_right(
    planted: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """Two texts, each with its own center and scales, in one window."""
    texts = [tiny_corpus[:20], [text.upper() for text in tiny_corpus[20:]]]
    coded, plain = tmp_path / "int8", tmp_path / "float32"
    for out in (coded, plain):
        options = {**SMALL, "storage_dtype": out.name}
        for text in texts:
            harvest(planted, text, hookpoints="embed", out=out, extend=True, **options)
    for window_bytes in (1, 10**9):
        both = [
            ActivationCache.open(p, massive_norm=20, window_bytes=window_bytes)
            for p in (coded, plain)
        ]
        names = {r.calibrations["embed"] for part in both[0].parts for r in part.records}
        assert len(names) == 2
        chunks = [[(c.acts, c.is_massive) for c in cache.chunks("embed")] for cache in both]
        rows, expected = (torch.cat([a[~m] for a, m in each]) for each in chunks)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0.1)
        batches = torch.cat(list(both[0].batches("embed", 64, split="all")))
        assert _bits(batches) == _bits(rows)


def test_int8_and_floats_do_not_mix(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path
) -> None:
    harvest(tiny_lm, tiny_corpus, hookpoints="embed", out=tmp_path, **SMALL)
    for extend in (False, True):
        texts = tiny_corpus[:5] if extend else tiny_corpus
        with pytest.raises(CacheMismatch, match="storage_dtype=int8, now it is float32: use the"):
            harvest(
                tiny_lm, texts, hookpoints="embed", out=tmp_path, extend=extend,
                **{**SMALL, "storage_dtype": "float32"},
            )  # fmt: skip
