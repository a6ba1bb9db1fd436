"""Nominating in bfloat16 changes how fast a choice is made, never the choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import sae.kernels.nomination
from sae import BatchTopKConfig, ConfigError, TensorSource, TopKConfig, TrainConfig, train
from sae.codes import Codes
from sae.kernels.nomination import (
    estimate,
    nominated_above_threshold,
    nominated_top_k_of_rows,
)
from sae.kernels.selection import PreActs, top_k_of_rows, top_of_batch
from sae.schedule import resolve

if TYPE_CHECKING:
    from tests.sae.conftest import Planted

BATCH, D_MODEL, D_SAE, K = 700, 24, 200, 5


def make(spread: float = 1.0, seed: int = 0) -> PreActs:
    """Pre-activations whose scores lie close together when spread is small."""
    torch.manual_seed(seed)
    x = torch.randn(BATCH, D_MODEL) * torch.rand(BATCH, 1) * 3 + 1
    common = torch.randn(D_MODEL)
    W = common + spread * torch.randn(D_SAE, D_MODEL)
    return PreActs(x, W, 0.3 * spread * torch.randn(D_SAE))


def same_choice(a: Codes, b: Codes) -> bool:
    return torch.equal(a.offsets, b.offsets) and torch.equal(a.feature_ids, b.feature_ids)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.003])
def test_error_bound_holds(spread: float) -> None:
    pre_acts = make(spread)
    exact = pre_acts.x.double() @ pre_acts.W.double().T + pre_acts.b.double()
    estimates = estimate(pre_acts)
    for start, low in estimates.pre_acts.tiles():
        error = (exact[start : start + len(low)] - low.double()).abs()
        bound = 2.0**-7 * low.double().abs() + estimates.slack[start : start + len(low), None]
        assert (error <= bound).all()
        upper = estimates.upper(low.amin(1), start)
        assert (upper >= exact[start : start + len(low)].amin(1)).all()


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.003])
def test_top_k_is_that_of_float32(spread: float) -> None:
    pre_acts = make(spread)
    expected, found = top_k_of_rows(pre_acts, K), nominated_top_k_of_rows(pre_acts, K)
    assert same_choice(expected, found)
    torch.testing.assert_close(found.acts, expected.acts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.003])
@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0, 1.02, 3.0])
def test_top_of_batch_is_that_of_float32(spread: float, guess: float) -> None:
    pre_acts = make(spread)
    expected = top_of_batch(pre_acts, K * BATCH, 0.0)
    found = top_of_batch(
        pre_acts, K * BATCH, guess * float(expected.smallest), nominated_above_threshold
    )
    assert same_choice(expected.codes, found.codes)
    assert float(found.smallest) == pytest.approx(float(expected.smallest), rel=1e-5)


def test_doubtful_rows_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second look the choice is wrong, so the test before can fail."""
    pre_acts, looks = make(0.003), []

    def trust(estimates: object, cutoff: Tensor, start: int) -> Tensor:
        looks.append(start)
        return torch.full((len(cutoff),), -1.0)

    monkeypatch.setattr(sae.kernels.nomination.Estimates, "upper", trust)
    assert not same_choice(top_k_of_rows(pre_acts, K), nominated_top_k_of_rows(pre_acts, K))
    assert looks


def test_few_features_need_no_nomination() -> None:
    pre_acts = make()
    few = PreActs(pre_acts.x, pre_acts.W[:20], pre_acts.b[:20])
    assert same_choice(top_k_of_rows(few, K), nominated_top_k_of_rows(few, K))


@pytest.mark.parametrize("config", [TopKConfig(d_sae=256, k=4), BatchTopKConfig(d_sae=256, k=4)])
def test_training_reaches_the_same_loss(
    planted: Planted, short: TrainConfig, config: TopKConfig, tmp_path: Path
) -> None:
    low = short.model_copy(update={"nominate_in": "bfloat16"})
    exact = train(planted.source, "layer", config, short, out=tmp_path / "a").metrics
    found = train(planted.source, "layer", config, low, out=tmp_path / "b").metrics
    assert exact is not None
    assert found is not None
    assert found.fvu == pytest.approx(exact.fvu, rel=1e-3)


def test_nominating_elsewhere_than_on_the_cpu_is_refused() -> None:
    config = TrainConfig(nominate_in="bfloat16", device="cuda", batch_size=10)
    with pytest.raises(ConfigError, match="is not for kernels"):
        resolve(config, TopKConfig(d_sae=4, k=1), TensorSource(torch.randn(50, 4)), "layer")
