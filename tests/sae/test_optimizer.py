"""Adam in two sizes: the lean one trains as well, in half the memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from sae import BatchTopKConfig, TopKConfig, TrainConfig, train
from sae.config import SAEConfig
from sae.kernels import AdamStep, Kernels
from sae.optimizer import Adam

if TYPE_CHECKING:
    from tests.sae.conftest import Planted


def bytes_of(optimizer: Adam) -> int:
    return sum(each.numel() * each.element_size() for each in optimizer.tensors().values())


def test_lean_state_takes_two_bytes_a_weight_and_one_number_a_row() -> None:
    parameters = {"W_dec": torch.randn(100, 64), "b_enc": torch.zeros(100)}
    sizes = [
        bytes_of(Adam(parameters, Kernels(), beta1=0.9, beta2=0.999, is_lean=is_lean))
        for is_lean in (False, True)
    ]
    assert sizes == [8 * (6400 + 100), 2 * 6400 + 4 * 100 + 8 * 100]


@pytest.mark.parametrize("unit_rows", [False, True])
def test_lean_adam_is_its_formula(unit_rows: bool) -> None:
    torch.manual_seed(0)
    weight, mean, square = torch.randn(5000, 7), torch.zeros(5000, 7).bfloat16(), torch.zeros(5000)
    w, m, v = weight.double(), mean.double(), square.double()
    for t in (1, 2, 3):
        gradient = torch.randn(5000, 7).bfloat16()
        step = AdamStep(1e-2, 0.9, 0.999, t, grad_scale=0.5)
        Kernels().adam_lean_(weight, gradient, mean, square, step, unit_rows=unit_rows)
        g = gradient.double() / 2
        v += (g.square().mean(1) - v) * 0.001
        m += (g - m) * 0.1
        w -= 1e-2 / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)).sqrt() + 1e-8).unsqueeze(1)
        if unit_rows:
            w /= w.norm(dim=1, keepdim=True)
        m = mean.double()  # as rounded
    torch.testing.assert_close(weight.double(), w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(square.double(), v, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("config", [TopKConfig(d_sae=96, k=4), BatchTopKConfig(d_sae=96, k=4)])
def test_lean_training_reaches_the_same_fvu(
    planted: Planted, config: SAEConfig, tmp_path: Path
) -> None:
    fvu = {}
    for optimizer in ("adam", "adam_lean"):
        settings = TrainConfig(
            n_steps=500,
            batch_size=512,
            lr=3e-3,
            optimizer=optimizer,
            dead_after_tokens=20_000,
            device="cpu",
        )
        run = train(planted.source, "x", config, settings, out=tmp_path / optimizer)
        assert run.metrics is not None
        fvu[optimizer] = run.metrics.fvu
    assert fvu["adam_lean"] < 1.1 * fvu["adam"] + 0.005


@pytest.mark.parametrize(
    "options", [{}, {"aligned": True}, {"orthogonality_coefficient": 0.1}, {"freeze_decoder": True}]
)
def test_lean_training_takes_every_option(
    planted: Planted, short: TrainConfig, tmp_path: Path, options: dict[str, object]
) -> None:
    settings = short.model_copy(update={"optimizer": "adam_lean", "kernels": "torch", **options})
    run = train(planted.source, "x", BatchTopKConfig(d_sae=96, k=4), settings, out=tmp_path)
    assert run.metrics is not None
    assert run.metrics.fvu < 1
    assert torch.isfinite(run.sae.W_enc).all()


def test_a_lean_run_goes_on_where_it_stopped(
    planted: Planted, short: TrainConfig, tmp_path: Path
) -> None:
    settings = short.model_copy(update={"optimizer": "adam_lean"})
    config = TopKConfig(d_sae=96, k=4)
    whole = train(planted.source, "x", config, settings, out=tmp_path / "whole").sae
    seen = []

    def stop() -> bool:
        seen.append(None)
        return len(seen) == 15

    with pytest.raises(Exception, match="was stopped"):
        train(planted.source, "x", config, settings, out=tmp_path / "cut", should_stop=stop)
    resumed = train(planted.source, "x", config, settings, out=tmp_path / "cut").sae
    assert torch.equal(whole.W_enc, resumed.W_enc)
    assert torch.equal(whole.W_dec, resumed.W_dec)
