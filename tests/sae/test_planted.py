"""Every architecture finds planted directions, at the L0 that it aims at; so do the wirings."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae import SAE, TrainConfig, evaluate, fvu, train
from sae.architectures import (
    BatchTopKConfig,
    GatedConfig,
    HierarchicalTopKConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
)
from sae.config import SAEConfig
from sae.sources import PairedTensors
from sae.wiring import crosscoder, transcoder
from tests.sae.conftest import Planted, plant

# Truth has 2 active features a row, of 40. At most so much FVU, and at least so much recovered,
# from what three seeds gave. L1 shrinks acts, and pays for it in FVU.
CONFIGS: dict[str, tuple[SAEConfig, float, float]] = {
    "topk": (TopKConfig(d_sae=80, k=3), 0.08, 0.95),
    "batch_topk": (BatchTopKConfig(d_sae=80, k=3), 0.03, 0.85),
    # A prefix that is too small for the truth must hold mixtures of it.
    "matryoshka": (MatryoshkaConfig(d_sae=80, k=3, prefixes=(60, 80)), 0.035, 0.8),
    "hierarchical_topk": (HierarchicalTopKConfig(d_sae=80, k=3), 0.09, 0.95),
    "jumprelu_l0": (JumpReLUConfig(d_sae=80, target_l0=2), 0.05, 0.9),
    "jumprelu_tanh": (JumpReLUConfig(d_sae=80, target_l0=2, recipe="tanh"), 0.12, 0.7),
    "gated": (GatedConfig(d_sae=80, target_l0=2), 0.06, 0.95),
    "relu": (ReLUConfig(d_sae=80, target_l0=2), 0.6, 0.6),
}
LONG = TrainConfig(
    n_steps=500,
    batch_size=512,
    lr=5e-3,
    dead_after_tokens=20_000,
    calibration_rows=16_384,
    device="cpu",
)


def recovered(directions: Tensor, sae: SAE) -> float:
    """Fraction of directions that a decoder row has a cosine above 0.95 with."""
    cosines = torch.nn.functional.normalize(directions, dim=1) @ _unit_rows(sae).T
    return float((cosines.amax(dim=1) > 0.95).float().mean())


def _unit_rows(sae: SAE) -> Tensor:
    return torch.nn.functional.normalize(sae.W_dec, dim=1)


def test_trained_sae_is_twice_as_good_as_its_baselines(planted: Planted, tmp_path: Path) -> None:
    sae = train(planted.source, "layer", CONFIGS["batch_topk"][0], LONG, out=tmp_path).sae
    report = evaluate(sae, planted.source)
    assert report.fvu < 0.5 * min(each.reconstruction.fvu for each in report.baselines)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_recovers_planted_directions(planted: Planted, name: str, tmp_path: Path) -> None:
    config, most, least = CONFIGS[name]
    sae = train(planted.source, "layer", config, LONG, out=tmp_path).sae
    held_out = planted.x[-2000:]
    assert recovered(planted.directions, sae) >= least
    assert float(fvu(held_out, sae(held_out))) < most
    l0 = sae.encode_sparse(held_out).nnz / len(held_out)
    if name == "topk":  # which has fewer than k where fewer are positive
        assert l0 <= 3
    else:
        assert l0 == pytest.approx(config.expected_l0, rel=0.06)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant(n_rows=22_000, d_model=32, n_features=40, n_active=2)


class TwoPlaces(NamedTuple):
    """A source of "a" [32] and "b" [28], and the planted directions there."""

    source: PairedTensors
    at_a: Tensor
    at_b: Tensor


@pytest.fixture(scope="session")
def two_places() -> TwoPlaces:
    """What is planted at "a", seen through a matrix at "b"."""
    planted = plant(n_rows=20_000, d_model=32, n_features=24, n_active=2)
    torch.manual_seed(1)
    through = torch.randn(32, 28) / 4
    acts = {"a": planted.x, "b": (planted.x - 1) @ through - 2}
    return TwoPlaces(PairedTensors(acts), planted.directions, planted.directions @ through)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder_recovers_what_a_place_becomes_at_another(
    two_places: TwoPlaces, skip: bool, tmp_path: Path
) -> None:
    source, _, directions = two_places
    wiring = transcoder("a", "b", skip=skip)
    sae = train(source, wiring, TopKConfig(d_sae=48, k=3), LONG, out=tmp_path).sae
    rows = next(source.aligned_batches(["a", "b"], 2000, seed=1))
    error = float(fvu(rows["b"], sae(rows["a"])))
    if skip:  # the truth is linear: nothing is left to be sparse about
        assert error < 5e-3
    else:
        assert error < 0.2
        assert recovered(directions, sae) >= 0.95


@pytest.mark.parametrize("name", ["batch_topk", "relu"])
def test_crosscoder_recovers_features_of_both_places(
    two_places: TwoPlaces, name: str, tmp_path: Path
) -> None:
    source, here, there = two_places
    config = {
        "batch_topk": BatchTopKConfig(d_sae=48, k=3),
        "relu": ReLUConfig(d_sae=48, coefficient=1.0),
    }[name]
    sae = train(source, crosscoder("a", "b"), config, LONG, out=tmp_path).sae
    rows = next(source.aligned_batches(["a", "b"], 2000, seed=1))
    x = torch.cat([rows["a"], rows["b"]], dim=1)
    assert float(fvu(x, sae(x))) < 0.2
    assert recovered(torch.cat([here, there], dim=1), sae) >= 0.7
