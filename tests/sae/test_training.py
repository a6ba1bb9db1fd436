"""Training: it finds planted truth, keeps its promises about weights, and says what went wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae import (
    SAE,
    BatchTopKConfig,
    ConfigError,
    Metrics,
    NonFiniteError,
    SourceError,
    TensorSource,
    TopKConfig,
    TrainConfig,
    fvu,
    train,
)
from sae.initialisation import geometric_median, input_statistics
from sae.reading import Batch
from sae.schedule import learning_rate, resolve

if TYPE_CHECKING:
    from tests.sae.conftest import Planted

CONFIGS = [TopKConfig(d_sae=96, k=4), BatchTopKConfig(d_sae=96, k=4)]
by_architecture = pytest.mark.parametrize("config", CONFIGS, ids=["topk", "batch_topk"])


class WithNaN(TensorSource):
    """A source some of whose batches hold a NaN."""

    def __init__(self, x: Tensor, bad: set[int]) -> None:
        super().__init__(x)
        self._bad = bad

    def batches(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        first = kwargs.get("start_batch", 0)
        for i, batch in enumerate(super().batches(*args, **kwargs), start=first):
            if i in self._bad and kwargs.get("epochs", 1) is None:
                batch = batch.clone()
                batch[3, 5] = math.nan if i % 2 else math.inf
            yield batch


@by_architecture
def test_saved_sae_works_on_raw_activations(
    planted: Planted, config: TopKConfig, short: TrainConfig, tmp_path: Path
) -> None:
    lines: list[Metrics] = []
    raw = train(planted.source, "l", config, short, out=tmp_path / "a", on_metrics=lines.append)
    big = TensorSource(planted.x[:-2000] * 64)
    scaled = train(big, "l", config, short, out=tmp_path / "b").sae
    held_out = planted.x[-2000:]
    error = float(fvu(held_out, raw.sae(held_out)))
    assert lines[-1].fvu == pytest.approx(error, rel=0.2)
    assert error == pytest.approx(float(fvu(held_out * 64, scaled(held_out * 64))), rel=1e-3)
    torch.testing.assert_close(
        raw.sae.encode(held_out) * 64, scaled.encode(held_out * 64), rtol=1e-2, atol=1.0
    )


def test_batch_topk_threshold_gives_k_features_a_row(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    sae = train(planted.source, "layer", CONFIGS[1], short, out=tmp_path).sae
    codes = sae.encode_sparse(planted.x[-2000:])
    assert sae.threshold > 0
    assert codes.acts.min() > sae.threshold
    assert codes.nnz / 2000 == pytest.approx(4, rel=0.05)


@by_architecture
def test_calibration_measures_act_and_density_as_used_at_inference(
    planted: Planted, config: TopKConfig, short: TrainConfig, tmp_path: Path
) -> None:
    source = TensorSource(planted.x[:4096])
    sae = train(source, "layer", config, short, out=tmp_path).sae
    acts = sae.encode(planted.x[:4096])
    torch.testing.assert_close(sae.max_act, acts.amax(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.density, (acts > 0).float().mean(0), rtol=0, atol=2 / 4096)


def test_metrics_are_logged_and_handed_over(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    lines: list[Metrics] = []
    run = train(planted.source, "layer", CONFIGS[0], short, out=tmp_path, on_metrics=lines.append)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == [each.to_dict() for each in lines]
    assert [each.step for each in lines] == list(range(5, 41, 5))
    assert run.metrics == lines[-1]
    assert run.steps == 40
    assert lines[-1].n_tokens == 40 * 256 == run.sae.origin.n_tokens_trained
    assert lines[-1].fvu < lines[0].fvu
    assert all(each.l0 <= 4 for each in lines)


def test_dead_features_are_counted_in_tokens(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    many = TopKConfig(d_sae=512, k=1)
    lines: list[Metrics] = []
    train(planted.source, "layer", many, short, out=tmp_path, on_metrics=lines.append)
    assert all(each.dead_fraction == 0 and each.aux_loss == 0 for each in lines if each.step < 8)
    assert lines[1].dead_fraction > 0
    assert lines[-1].aux_loss > 0


def test_batches_with_nan_are_skipped_and_counted(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    lines: list[Metrics] = []
    source = WithNaN(planted.x, bad={3, 4, 17})
    run = train(source, "layer", CONFIGS[1], short, out=tmp_path, on_metrics=lines.append)
    assert lines[-1].n_skipped == 3
    assert lines[-1].n_tokens == 37 * 256
    assert all(each.isfinite().all() for each in run.sae.state_dict().values())


def test_too_many_nan_batches_in_a_row_stop_training(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    source = WithNaN(planted.x, bad=set(range(20, 100)))
    with pytest.raises(NonFiniteError, match="10 batches in a row, up to step 30, held NaN or Inf"):
        train(source, "layer", CONFIGS[0], short, out=tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_massive_rows_are_left_out_and_out_of_domain(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    x = planted.x[:5000].clone()
    x[::100] *= 1000
    limit = 10 * float(x.norm(dim=1).median())
    source = TensorSource(x, max_norm=limit)
    assert source.n_massive("layer") == 50
    assert source.n_rows("layer") == 4950
    sae = train(source, "layer", CONFIGS[0], short, out=tmp_path).sae
    assert sae.max_norm == SAE.load(tmp_path).max_norm == limit
    assert sae.in_domain(x).sum() == 4950
    assert sae.in_domain(x.view(50, 100, -1)).shape == (50, 100)


def test_k_above_d_sae_is_an_error() -> None:
    with pytest.raises(ConfigError, match="k=65 is more than d_sae=64 features; lower k or raise"):
        TopKConfig(d_sae=64, k=65)


def test_fewer_rows_than_a_batch_is_an_error(short: TrainConfig, tmp_path: Path) -> None:
    source = TensorSource(torch.randn(100, 8))
    with pytest.raises(SourceError, match="100 train rows, fewer than batch_size=256; harvest"):
        train(source, "layer", TopKConfig(d_sae=16, k=2), short, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_vary_are_an_error(short: TrainConfig, tmp_path: Path) -> None:
    source = TensorSource(torch.ones(1000, 8))
    with pytest.raises(SourceError, match=r"1000 rows .* variance 0; there is nothing to learn"):
        train(source, "layer", TopKConfig(d_sae=16, k=2), short, out=tmp_path)


def test_settings_are_resolved_from_the_data() -> None:
    source = TensorSource(torch.randn(1000, 8))
    config = resolve(TrainConfig(batch_size=100), TopKConfig(d_sae=4096, k=2), source, "layer")
    assert (config.n_steps, config.warmup_steps, config.k_aux) == (10, 0, 4)
    assert config.lr == pytest.approx(4e-4)
    longer = TrainConfig(batch_size=100, n_tokens=2550)
    assert resolve(longer, TopKConfig(d_sae=16, k=2), source, "layer").n_steps == 26


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(n_steps=100, lr=1.0, warmup_steps=9, decay_fraction=0.2)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[99] == pytest.approx(0.05)
    assert learning_rate(config.model_copy(update={"decay_fraction": 0.0}), 99) == 1.0


def test_input_statistics_are_those_of_the_rows() -> None:
    torch.manual_seed(0)
    x = 5 * torch.randn(1000, 8) + 3
    scaled, b_dec, variance = input_statistics(Batch(x, x), (8,), (8,))
    rows = scaled.inputs(x)
    assert float(rows.square().sum(1).mean()) == pytest.approx(8, rel=1e-5)
    torch.testing.assert_close(b_dec, rows.mean(0))
    assert variance == pytest.approx(float(rows.var(0, correction=0).sum()), rel=1e-5)


def test_geometric_median_ignores_a_far_row() -> None:
    x = torch.tensor([[0.0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [1e6, 1e6]]).double()
    assert geometric_median(x).norm() < 0.6
