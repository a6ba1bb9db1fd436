"""The same results on a GPU. `make test-gpu`, or `benchmarks/gpu.sh` on a lent machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_cache import ActivationStream, LanguageModel, harvest
from interp import Add, stream_edit
from sae import BatchTopKConfig, TensorSource, TopKConfig, TrainConfig, train
from sae.config import SAEConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("config", [BatchTopKConfig(d_sae=256, k=8), TopKConfig(d_sae=256, k=8)])
def test_training_on_cuda_follows_training_on_the_cpu(config: SAEConfig, tmp_path: Path) -> None:
    x = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0)) @ torch.randn(64, 64)
    fvu = {}
    for device in ("cpu", "cuda"):
        settings = TrainConfig(n_steps=100, batch_size=1024, lr=1e-3, device=device)
        run = train(TensorSource(x), "x", config, settings, out=tmp_path / device)
        assert run.metrics is not None
        fvu[device] = run.metrics.fvu
    assert fvu["cuda"] == pytest.approx(fvu["cpu"], rel=1e-3)


def test_codes_and_steering_are_the_same_on_cuda(tmp_path: Path) -> None:
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    settings = TrainConfig(n_steps=20, batch_size=512, device="cpu")
    sae = train(TensorSource(x), "x", BatchTopKConfig(d_sae=64, k=4), settings, out=tmp_path).sae
    acts = sae.encode(x[:64])
    feature = int(acts.sum(0).argmax())
    edited = stream_edit(sae, {feature: Add(1.0)})(x[:64])
    sae = sae.to("cuda")
    torch.testing.assert_close(sae.encode(x[:64].cuda()).cpu(), acts, atol=1e-3, rtol=1e-3)
    on_cuda = stream_edit(sae, {feature: Add(1.0)})(x[:64].cuda()).cpu()
    torch.testing.assert_close(on_cuda, edited, atol=1e-4, rtol=1e-4)


def test_capture_on_cuda_equals_capture_on_the_cpu(
    tiny_model: Callable[[str], Any], tiny_tokenizer: Any
) -> None:
    place = "layers.1.resid_post"
    on_cpu, on_cuda = (
        LanguageModel(tiny_model("llama").to(device), tiny_tokenizer, name="tiny")
        .capture("The river crosses the bridge", [place])
        .acts[place]
        .cpu()
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_cuda, on_cpu, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("storage_dtype", ["float32", "bfloat16", "int8"])
def test_batches_on_cuda_are_those_on_the_cpu(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, storage_dtype: str
) -> None:
    place = "layers.1.resid_post"
    options: dict[str, Any] = {"hookpoints": [place], "ctx_len": 16, "storage_dtype": storage_dtype}
    cache = harvest(tiny_lm, tiny_corpus, out=tmp_path / "acts", n_tokens=3_000, **options)
    on_cpu = list(cache.batches(place, 256, epochs=2))
    on_cuda = list(cache.batches(place, 256, epochs=2, device="cuda"))
    assert [len(x) for x in on_cuda] == [len(x) for x in on_cpu]
    for a, b in zip(on_cuda, on_cpu, strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)


def test_cache_of_a_model_on_cuda_verifies_and_streams(
    tiny_model: Callable[[str], Any], tiny_tokenizer: Any, tiny_corpus: list[str], tmp_path: Path
) -> None:
    """What is copied while the model runs on arrives whole, and in order."""
    place = "layers.1.resid_post"
    options: dict[str, Any] = {"hookpoints": [place], "ctx_len": 16, "storage_dtype": "float32"}
    rows = []
    for device in ("cpu", "cuda"):
        lm = LanguageModel(tiny_model("llama").to(device), tiny_tokenizer, name="tiny")
        cache = harvest(
            lm, tiny_corpus, out=tmp_path / device, n_tokens=3_000, shard_bytes=20_000, **options
        )
        cache.verify()
        rows.append(torch.cat([chunk.acts for chunk in cache.chunks(place)]))
    torch.testing.assert_close(rows[1], rows[0], atol=1e-4, rtol=1e-4)
    folder = tmp_path / "stream"
    with ActivationStream.open(
        lm, tiny_corpus, folder=folder, buffer_bytes=200_000, **options
    ) as stream:
        x = next(stream.batches(place, 64, device="cuda"))
    assert x.is_cuda
    assert x.shape == (64, 32)
