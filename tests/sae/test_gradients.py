"""The sparse step of each architecture against autograd of the same loss, written densely."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import sae.constraints
from sae.architectures import (
    BatchTopKConfig,
    GatedConfig,
    HierarchicalTopKConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
    architecture_of,
)
from sae.architectures.base import Moment
from sae.config import SAEConfig
from sae.constraints import add_orthogonality_, align_, align_gradients_
from sae.gradients import AuxK, Weights
from sae.kernels import Kernels
from sae.step import Step, step_of
from sae.team import Team
from tests.sae import dense

BATCH, D_SAE, K = 700, 90, 5  # more rows than a tile
VARIANCE = 3.7
DEAD = torch.arange(D_SAE - 20, D_SAE)


class Place(NamedTuple):
    """A wiring: widths of what is read, of each place that is reconstructed, and the rest."""

    d_in: int
    widths: tuple[int, ...]
    is_tied: bool = True
    has_skip: bool = False

    @property
    def d_out(self) -> int:
        return sum(self.widths)


PLAIN = Place(24, (24,))
TRANSCODER = Place(24, (18,), is_tied=False)
SKIP = Place(24, (18,), is_tied=False, has_skip=True)
CROSSCODER = Place(36, (24, 12))
PREFIXES, KS = (7, 30, 60, D_SAE), (1, 2, 4, K)
L0_WINDOW, TANH_WINDOW = 0.3, 1.5

CASES: dict[str, tuple[SAEConfig, dense.Loss]] = {
    "topk": (TopKConfig(d_sae=D_SAE, k=K), partial(dense.topk, k=K)),
    "batch_topk": (BatchTopKConfig(d_sae=D_SAE, k=K), partial(dense.batch_topk, k=K)),
    "matryoshka": (
        MatryoshkaConfig(d_sae=D_SAE, k=K, prefixes=PREFIXES),
        partial(dense.matryoshka, k=K, prefixes=PREFIXES),
    ),
    "hierarchical": (
        HierarchicalTopKConfig(d_sae=D_SAE, k=K, ks=KS),
        partial(dense.hierarchical, k=K, ks=KS),
    ),
    "relu": (ReLUConfig(d_sae=D_SAE), dense.relu),
    "gated": (GatedConfig(d_sae=D_SAE), dense.gated),
    "jumprelu_l0": (
        JumpReLUConfig(d_sae=D_SAE, bandwidth=L0_WINDOW, window_fraction=1),
        partial(dense.jumprelu_l0, width=L0_WINDOW),
    ),
    "jumprelu_tanh": (
        JumpReLUConfig(d_sae=D_SAE, recipe="tanh", bandwidth=TANH_WINDOW, window_fraction=1),
        partial(dense.jumprelu_tanh, width=TANH_WINDOW),
    ),
}
COEFFICIENT = 0.07


class Problem(NamedTuple):
    """A batch and weights: unit decoder rows, thresholds within the scores' range."""

    data: dense.Data
    leaves: dense.Leaves


def make(config: SAEConfig, place: Place, dtype: torch.dtype, auxk: AuxK | None = None) -> Problem:
    """Random numbers that are the same whatever the dtype."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, place.d_in, dtype=torch.float64) + 0.5
    y = x if place.is_tied else torch.randn(BATCH, place.d_out, dtype=torch.float64) - 0.3
    W_dec = torch.randn(D_SAE, place.d_out, dtype=torch.float64)
    leaves = {
        "W_enc": torch.randn(D_SAE, place.d_in, dtype=torch.float64) / place.d_in**0.5,
        "W_dec": W_dec / W_dec.norm(dim=1, keepdim=True),
        "b_enc": 0.1 * torch.randn(D_SAE, dtype=torch.float64),
        "b_dec": torch.randn(place.d_out, dtype=torch.float64),
    }
    if auxk is not None:  # dead features that don't fire by themselves
        leaves["b_enc"][DEAD] = -3.0
    if place.has_skip:
        leaves["W_skip"] = torch.randn(place.d_in, place.d_out, dtype=torch.float64) / 5
    architecture = architecture_of(config)
    start = architecture.start(Weights(*(leaves[name] for name in Weights._fields)), config)
    for name, each in start.items():
        middle = torch.full_like(each, -0.5) if name == "log_threshold" else each
        leaves[name] = middle + 0.3 * torch.randn(each.shape, dtype=torch.float64)
    leaves = {name: each.to(dtype) for name, each in leaves.items()}
    x, y = x.to(dtype), y.to(dtype)
    dead = None if auxk is None else (auxk.dead_ids, auxk.k, auxk.coefficient)
    data = dense.Data(x, y, place.is_tied, place.widths, VARIANCE, COEFFICIENT, dead)
    return Problem(data, leaves)


def sparse_step(config: SAEConfig, problem: Problem, auxk: AuxK | None = None) -> Step:
    data, leaves = problem
    weights = Weights(*(leaves[name] for name in Weights._fields))
    W_skip = leaves.get("W_skip")
    target = data.y - weights.b_dec
    architecture = architecture_of(config)
    at = Moment(
        x=target if data.is_tied else data.x,
        target=target if W_skip is None else target - data.x @ W_skip,
        weights=weights,
        learnt={name: leaves[name] for name in architecture.start(weights, config)},
        threshold=data.x.new_zeros(architecture.threshold_shape(config)),
        coefficient=COEFFICIENT,
        progress=1.0,
        scale=1 / (len(data.x) * VARIANCE),
        widths=data.widths,
        kernels=Kernels(),
        team=Team(),
    )
    skip_input = None if W_skip is None else data.x
    return step_of(architecture, config, at, is_tied=data.is_tied, skip_input=skip_input, auxk=auxk)


def autograd(loss: dense.Loss, problem: Problem) -> tuple[dense.Losses, dense.Leaves]:
    """Losses and gradients in float64."""
    data = problem.data._replace(x=problem.data.x.double(), y=problem.data.y.double())
    leaves = {k: each.double().detach().requires_grad_() for k, each in problem.leaves.items()}
    found = dense.losses(loss, data, leaves)
    (found.loss + found.penalty + found.aux_loss).backward()
    return found, {
        k: torch.zeros_like(each) if each.grad is None else each.grad for k, each in leaves.items()
    }


def along_sphere(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """Without the part along each row: all of W_dec's gradient that training uses."""
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(name: str, place: Place, dtype: torch.dtype, tolerance: float, auxk: AuxK | None) -> None:
    config, loss = CASES[name]
    problem = make(config, place, dtype, auxk)
    step = sparse_step(config, problem, auxk)
    expected, grads = autograd(loss, problem)
    assert set(step.gradients) == set(grads)
    W_dec = problem.leaves["W_dec"].double()
    for each, gradient in step.gradients.items():
        found, true = gradient.double(), grads[each]
        if each == "W_dec":
            found, true = along_sphere(found, W_dec), along_sphere(true, W_dec)
        assert relative_error(found, true) < tolerance, each
    for each in ("loss", "penalty", "aux_loss"):
        value = float(getattr(expected, each).detach())
        assert float(getattr(step, each)) == pytest.approx(value, rel=tolerance, abs=1e-12), each
    assert torch.equal(step.n_active, (expected.acts > 0).sum(0))


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k_aux", [None, 7, 64], ids=["no auxk", "few of dead", "all dead"])
@PRECISIONS
def test_gradients_equal_dense_autograd(
    name: str, k_aux: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    auxk = None if k_aux is None else AuxK(DEAD, k_aux, 1 / 32)
    check(name, PLAIN, dtype, tolerance, auxk)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "place", [TRANSCODER, SKIP, CROSSCODER], ids=["transcoder", "skip transcoder", "crosscoder"]
)
@PRECISIONS
def test_gradients_of_wirings_equal_dense_autograd(
    name: str, place: Place, dtype: torch.dtype, tolerance: float
) -> None:
    check(name, place, dtype, tolerance, AuxK(DEAD, 7, 1 / 32))


def test_aligned_gradients_are_those_of_the_parametrisation() -> None:
    config, loss = CASES["batch_topk"]
    data, leaves = make(config, PLAIN, torch.float64)
    align_(Weights(*(leaves[name] for name in Weights._fields)))
    inner = (leaves["W_enc"] * leaves["W_dec"]).sum(1)
    torch.testing.assert_close(inner, torch.ones_like(inner))
    free = {name: each.clone().requires_grad_() for name, each in leaves.items()}
    along = (free["W_enc"] * free["W_dec"]).sum(1, keepdim=True)
    held = {**free, "W_enc": free["W_enc"] + (1 - along) * free["W_dec"]}
    dense.losses(loss, data, held).loss.backward()
    step = sparse_step(config, Problem(data, leaves))
    found = Weights(*(step.gradients[name] for name in Weights._fields))
    align_gradients_(found, Weights(*(leaves[name] for name in Weights._fields)))
    for name in Weights._fields:
        expected = free[name].grad
        assert expected is not None
        assert relative_error(getattr(found, name), expected) < 1e-10, name


@pytest.mark.parametrize("chunk", [4096, 13])
def test_orthogonality_equals_its_finite_differences(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(sae.constraints, "CHUNK", chunk)
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(40, 6, dtype=torch.float64), dim=1)
    gradient, step = torch.zeros_like(W_dec), 1e-6
    loss = add_orthogonality_(gradient, W_dec, 0.3, seed=5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    by_hand = 0.0
    for ids in order.tensor_split(-(-40 // chunk)):
        cosines = W_dec[ids] @ W_dec[ids].T
        by_hand += float((cosines - torch.eye(len(ids))).square().amax(1).sum())
    assert float(loss) == pytest.approx(0.3 * by_hand / 40, rel=1e-12)
    directions = along_sphere(torch.randn(5, 40, 6, dtype=torch.float64)[0], W_dec)
    ends = [
        add_orthogonality_(
            torch.zeros_like(W_dec),
            torch.nn.functional.normalize(W_dec + sign * step * directions, dim=1),
            0.3,
            seed=5,
        )
        for sign in (1, -1)
    ]
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert float((gradient * directions).sum()) == pytest.approx(slope, rel=1e-6)


def test_auxk_trains_only_dead_features() -> None:
    config, _ = CASES["topk"]
    auxk = AuxK(DEAD, 7, 1 / 32)
    problem = make(config, PLAIN, torch.float64, auxk)
    plain, both = (
        sparse_step(config, problem).gradients,
        sparse_step(config, problem, auxk).gradients,
    )
    alive = torch.arange(D_SAE - 20)
    for name in ("W_enc", "W_dec"):
        assert torch.equal(plain[name][alive], both[name][alive])
        assert plain[name][DEAD].norm(dim=1).max() < both[name][DEAD].norm(dim=1).max()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same_every_time(name: str) -> None:
    config, _ = CASES[name]
    problem = make(config, PLAIN, torch.float32)
    first, second = (sparse_step(config, problem).gradients for _ in range(2))
    assert all(torch.equal(first[each], second[each]) for each in first)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_active_features_trains_only_b_dec(name: str) -> None:
    config, _ = CASES[name]
    data, leaves = make(config, PLAIN, torch.float64)
    leaves["b_enc"].fill_(-100.0)
    step = sparse_step(config, Problem(data, leaves))
    assert int(step.n_active.sum()) == 0
    assert float(step.gradients["W_dec"].abs().max()) == 0
    assert float(step.gradients["b_dec"].abs().max()) > 0
    squared_error = float((data.x - leaves["b_dec"]).square().sum())
    assert step.squared_error.item() == pytest.approx(squared_error, rel=1e-12)
