"""SAEs of every wiring and option: saved, folded into raw units, and held to what they promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae import (
    SAE,
    BatchTopKConfig,
    ConfigError,
    GatedConfig,
    JumpReLUConfig,
    PairedTensors,
    SAEConfig,
    TopKConfig,
    TrainConfig,
    Wiring,
    crosscoder,
    train,
    transcoder,
)
from sae.autoencoder import Origin
from sae.initialisation import input_statistics
from sae.reading import batch_of, widths
from sae.training_state import TrainingState
from sae.wiring import wiring_of
from tests.sae.conftest import plant

WIRINGS = {
    "plain": wiring_of("a"),
    "transcoder": transcoder("a", "b"),
    "skip transcoder": transcoder("a", "b", skip=True),
    "several inputs": Wiring(reads=("a", "b"), writes=("c",)),
    "crosscoder": crosscoder("a", "b", "c"),
}
by_wiring = pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_sae=60, k=4),
    "batch_topk": BatchTopKConfig(d_sae=60, k=4),
    "gated": GatedConfig(d_sae=60),
    "jumprelu": JumpReLUConfig(d_sae=60),
}


@pytest.fixture(scope="module")
def source() -> PairedTensors:
    """Three places, of unlike widths, scales and means."""
    x = plant(n_rows=3000, d_model=32, n_features=40, n_active=3).x
    return PairedTensors({"a": x, "b": 40 * x[:, :20].abs() - 3, "c": x[:, 10:] / 9 + 5})


def side_by_side(source: PairedTensors, wiring: Wiring) -> tuple[Tensor, Tensor]:
    acts = next(source.aligned_batches(wiring.hookpoints, 500, seed=7))
    batch = batch_of(acts, wiring)
    return batch.x, batch.y


@by_wiring
def test_save_and_load_is_bitwise(
    source: PairedTensors, wiring: Wiring, short: TrainConfig, tmp_path: Path
) -> None:
    sae = train(source, wiring, CONFIGS["batch_topk"], short, out=tmp_path).sae
    loaded, (x, y) = SAE.load(tmp_path), side_by_side(source, wiring)
    expected = sae.state_dict()
    assert all(torch.equal(expected[name], each) for name, each in loaded.state_dict().items())
    assert (loaded.wiring, loaded.origin) == (wiring, sae.origin)
    assert torch.equal(loaded(x), sae(x))
    assert sae(x).shape == y.shape


def in_training_units(state: TrainingState, scaled: Tensor) -> Tensor:
    """Reconstruction of scaled rows with the weights as they are trained."""
    sae, learnt = state.sae, state.learnt
    if "log_threshold" in learnt:
        sae.threshold.copy_(learnt["log_threshold"].exp())
    if "r_mag" not in learnt:
        return sae(scaled)
    products = (scaled - sae.b_dec if sae.is_tied else scaled) @ sae.W_enc
    acts = (learnt["r_mag"].exp() * products + learnt["b_mag"]).relu()
    return sae.decode(acts * (products + sae.b_enc > 0)) + sae.skip(scaled)


@by_wiring
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("center", [False, True])
def test_folded_sae_does_on_raw_activations_what_training_did_on_scaled_ones(
    source: PairedTensors, wiring: Wiring, name: str, center: bool
) -> None:
    config = TrainConfig(n_steps=10, batch_size=500, lr=3e-3, device="cpu", k_aux=8, warmup_steps=0)
    acts = next(source.aligned_batches(wiring.hookpoints, 500, seed=7))
    batch = batch_of(acts, wiring)
    out = widths(source, wiring.writes)
    statistics = input_statistics(batch, widths(source, wiring.reads), out, center=center)
    origin = Origin(wiring=wiring)
    state = TrainingState.start(CONFIGS[name], config, statistics, origin=origin, widths=out)
    for _ in range(10):
        assert state.advance(batch) is not None
    sae, scaled = state.finished_sae(origin), state.normalisation.inputs(batch.x)
    y_scaled = in_training_units(state, scaled)
    expected = y_scaled / state.normalisation.out_scale + state.normalisation.out_center
    found = sae(batch.x)
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.median()) < 1e-5
    assert float((error > 1e-4).float().mean()) < 0.01  # of rows, by an act at its threshold
    decoder = sae.W_dec if sae.has_one_output else sae.W_dec * state.normalisation.out_scale
    torch.testing.assert_close(decoder.norm(dim=1), torch.ones(60), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wiring", [WIRINGS["plain"], WIRINGS["crosscoder"]], ids=["plain", "cross"]
)
@pytest.mark.parametrize("name", ["batch_topk", "jumprelu"])
def test_aligned_features_keep_inner_product_1_in_raw_units(
    source: PairedTensors, wiring: Wiring, name: str, short: TrainConfig, tmp_path: Path
) -> None:
    config = short.model_copy(update={"aligned": True})
    sae = train(source, wiring, CONFIGS[name], config, out=tmp_path).sae
    inner = (sae.W_enc_rows * sae.W_dec).sum(1)
    torch.testing.assert_close(inner, torch.ones(60), rtol=0, atol=1e-5)


def test_aligning_different_places_is_an_error(
    source: PairedTensors, short: TrainConfig, tmp_path: Path
) -> None:
    config = short.model_copy(update={"aligned": True})
    with pytest.raises(ConfigError, match="a -> b has them at different places; leave it out"):
        train(source, WIRINGS["transcoder"], CONFIGS["topk"], config, out=tmp_path)


def test_wirings_that_make_no_sense_are_errors() -> None:
    with pytest.raises(ConfigError, match="one place to another; both are 'a'"):
        transcoder("a", "a")
    with pytest.raises(ConfigError, match=r"needs two places or more, each once; got \('a',\)"):
        crosscoder("a")
    with pytest.raises(ConfigError, match="each once"):
        crosscoder("a", "b", "a")


def test_frozen_decoder_stays_at_its_start(
    source: PairedTensors, short: TrainConfig, tmp_path: Path
) -> None:
    frozen = short.model_copy(update={"freeze_decoder": True})
    runs = [
        train(source, "a", CONFIGS["topk"], config, out=tmp_path / name).sae
        for name, config in {
            "long": frozen,
            "short": frozen.model_copy(update={"n_steps": 3}),
            "free": short,
        }.items()
    ]
    assert torch.equal(runs[0].W_dec, runs[1].W_dec)
    assert not torch.equal(runs[0].W_enc_rows, runs[1].W_enc_rows)
    assert not torch.equal(runs[0].W_dec, runs[2].W_dec)


def test_orthogonality_penalty_lowers_the_largest_cosines(
    source: PairedTensors, short: TrainConfig, tmp_path: Path
) -> None:
    def largest(coefficient: float) -> float:
        config = short.model_copy(update={"orthogonality_coefficient": coefficient, "n_steps": 200})
        sae = train(source, "a", CONFIGS["topk"], config, out=tmp_path / str(coefficient)).sae
        cosines = sae.W_dec @ sae.W_dec.T - 2 * torch.eye(60)
        return float(cosines.abs().fill_diagonal_(0).amax(1).mean())

    assert largest(3.0) < 0.8 * largest(0.0)
    assert math.isfinite(largest(3.0))


def test_centering_makes_training_blind_to_a_far_mean(short: TrainConfig, tmp_path: Path) -> None:
    x = plant(n_rows=3000, d_model=32, n_features=40, n_active=3).x
    far = x + 1000
    config = short.model_copy(update={"center": True})
    near, moved = (
        train(PairedTensors({"a": rows}), "a", CONFIGS["topk"], config, out=tmp_path / name).sae
        for name, rows in {"near": x, "far": far}.items()
    )
    torch.testing.assert_close(near.encode(x[:200]), moved.encode(far[:200]), rtol=0.1, atol=0.05)
