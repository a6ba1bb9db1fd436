"""Data whose truth is known, and a run short enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae import TensorSource, TrainConfig


class Planted(NamedTuple):
    """x: [n_rows, d_model], sparse sums of directions [n_features, d_model], off centre."""

    x: Tensor
    directions: Tensor

    @property
    def source(self) -> TensorSource:
        return TensorSource(self.x[:-2000], self.x[-2000:])


def plant(n_rows: int, d_model: int, n_features: int, n_active: float, seed: int = 0) -> Planted:
    # Not the numbers that an SAE of the same seed starts from: it would start at the truth.
    generator = torch.Generator().manual_seed(seed + 10_000)
    directions = torch.randn(n_features, d_model, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    is_active = torch.rand(n_rows, n_features, generator=generator) < n_active / n_features
    strength = torch.rand(n_rows, n_features, generator=generator) + 0.5
    return Planted(7 * (is_active * strength) @ directions + 1, directions)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def planted() -> Planted:
    return plant(n_rows=42_000, d_model=32, n_features=64, n_active=3)


@pytest.fixture
def short() -> TrainConfig:
    """A run of a second."""
    return TrainConfig(
        n_steps=40,
        batch_size=256,
        lr=3e-3,
        init_rows=1024,
        calibration_rows=4096,
        dead_after_tokens=2000,
        checkpoint_every_steps=10,
        log_every_steps=5,
        device="cpu",
    )
