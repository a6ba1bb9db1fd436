"""The sparse step against autograd of the same loss, written densely."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae.codes import Codes
from sae.gradients import AuxK, Weights, loss_and_gradients
from sae.kernels.selection import PreActs, top_k_of_rows, top_of_batch

BATCH, D_MODEL, D_SAE, K = 700, 24, 90, 5  # more rows than a tile
VARIANCE = 3.7
DEAD = torch.arange(D_SAE - 20, D_SAE)  # features that never fire by themselves


def make(dtype: torch.dtype) -> tuple[Tensor, Weights]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, D_MODEL, dtype=torch.float64) + 0.5
    weights = Weights(
        torch.randn(D_SAE, D_MODEL, dtype=torch.float64) / D_MODEL**0.5,
        torch.randn(D_SAE, D_MODEL, dtype=torch.float64) / D_MODEL**0.5,
        0.1 * torch.randn(D_SAE, dtype=torch.float64),
        torch.randn(D_MODEL, dtype=torch.float64),
    )
    weights.b_enc[DEAD] = -100.0
    return x.to(dtype), Weights(*(each.to(dtype) for each in weights))


def select(x: Tensor, weights: Weights, by: str) -> Codes:
    pre_acts = PreActs(x - weights.b_dec, weights.W_enc, weights.b_enc)
    if by == "batch":
        return top_of_batch(pre_acts, K * len(x), expected=0.0).codes
    return top_k_of_rows(pre_acts, K)


def dense_losses(
    x: Tensor, weights: Weights, is_active: Tensor, auxk: AuxK | None
) -> tuple[Tensor, Tensor]:
    pre_acts = (x - weights.b_dec) @ weights.W_enc.T + weights.b_enc
    acts = pre_acts.relu() * is_active
    error = x - (acts @ weights.W_dec + weights.b_dec)
    loss = error.square().sum(1).mean() / VARIANCE
    if auxk is None:
        return loss, loss * 0
    dead = pre_acts[:, auxk.dead_ids].relu()
    k = min(auxk.k, len(auxk.dead_ids))
    top = dead.topk(k, dim=1)
    aux_acts = torch.zeros_like(dead).scatter(1, top.indices, top.values)
    left_over = error.detach() - aux_acts @ weights.W_dec[auxk.dead_ids]
    factor = auxk.coefficient * min(1.0, len(auxk.dead_ids) / auxk.k)
    return loss, factor * left_over.square().sum(1).mean() / VARIANCE


def autograd(x: Tensor, weights: Weights, codes: Codes, auxk: AuxK | None) -> tuple[float, Weights]:
    leaves = Weights(*(each.detach().double().requires_grad_() for each in weights))
    losses = dense_losses(x.double(), leaves, codes.to_dense(D_SAE) > 0, auxk)
    total = losses[0] + losses[1]
    total.backward()
    grads = []
    for leaf in leaves:
        assert leaf.grad is not None
        grads.append(leaf.grad)
    return total.item(), Weights(*grads)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("by", ["row", "batch"])
@pytest.mark.parametrize("k_aux", [None, 7, 64], ids=["no auxk", "few of dead", "all dead"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_equal_dense_autograd(
    by: str, k_aux: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    x, weights = make(dtype)
    codes = select(x, weights, by)
    auxk = None
    if k_aux is not None:
        weights.b_enc[DEAD] = 0.05
        auxk = AuxK(DEAD, k_aux, 1 / 32)
    step = loss_and_gradients(x, codes, weights, VARIANCE, auxk)
    loss, expected = autograd(x, weights, codes, auxk)
    assert float(step.loss + step.aux_loss) == pytest.approx(loss, rel=1e-5)
    for name in Weights._fields:
        error = relative_error(getattr(step.gradients, name), getattr(expected, name))
        assert error < tolerance, f"{name}: {error}"


def test_auxk_trains_only_dead_features() -> None:
    x, weights = make(torch.float64)
    codes = select(x, weights, "row")
    weights.b_enc[DEAD] = 0.05
    plain = loss_and_gradients(x, codes, weights, VARIANCE).gradients
    both = loss_and_gradients(x, codes, weights, VARIANCE, AuxK(DEAD, 7, 1 / 32)).gradients
    alive = torch.arange(D_SAE - 20)
    assert torch.equal(plain.W_enc[alive], both.W_enc[alive])
    assert torch.equal(plain.W_dec[alive], both.W_dec[alive])
    assert plain.W_enc[DEAD].abs().max() == 0
    assert both.W_enc[DEAD].norm(dim=1).min() > 0
    assert both.W_dec[DEAD].norm(dim=1).min() > 0


def test_gradients_are_the_same_every_time() -> None:
    x, weights = make(torch.float32)
    codes = select(x, weights, "batch")
    first = loss_and_gradients(x, codes, weights, VARIANCE).gradients
    second = loss_and_gradients(x, codes, weights, VARIANCE).gradients
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_batch_without_active_features_trains_only_b_dec() -> None:
    x, weights = make(torch.float64)
    weights.b_enc.fill_(-100.0)
    codes = select(x, weights, "batch")
    step = loss_and_gradients(x, codes, weights, VARIANCE)
    assert codes.nnz == 0
    assert float(step.gradients.W_enc.abs().max()) == 0
    assert float(step.gradients.b_dec.abs().max()) > 0
    assert step.squared_error.item() == pytest.approx(
        float((x - weights.b_dec).square().sum()), rel=1e-12
    )
