"""Sums over codes against their definitions, as bags and as dense products."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import embedding_bags
from sae.kernels.embedding_bags import dot_by_entry, sort_by_feature, sum_by_feature, sum_by_row

N_ROWS, D_SAE, D = 300, 40, 12


class Sums(NamedTuple):
    by_row: Tensor
    dots: Tensor
    by_feature: Tensor


def sums(codes: Codes, weights: Tensor, rows: Tensor, table: Tensor) -> Sums:
    features = sort_by_feature(codes, D_SAE)
    return Sums(
        sum_by_row(codes, table),
        dot_by_entry(codes, rows, table),
        sum_by_feature(weights, features, rows),
    )


@pytest.fixture(params=[0.0, 0.05, 0.3, 0.6, 1.0])
def acts(request: pytest.FixtureRequest) -> Tensor:
    """[N_ROWS, D_SAE] of which that part is active."""
    torch.manual_seed(0)
    shape = (N_ROWS, D_SAE)
    return (torch.rand(shape) < request.param) * (torch.rand(shape) + 0.1).double()


@pytest.mark.parametrize("tile_bytes", [1, 7 * 8 * D_SAE, 2**20])
@pytest.mark.parametrize("dense_from", [0.0, 2.0], ids=["dense", "bags"])
def test_sums_equal_their_definitions(
    acts: Tensor, tile_bytes: int, dense_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_bags, "TILE_BYTES", tile_bytes)
    for name in ("DENSE_SUMS", "DENSE_DOTS"):
        monkeypatch.setattr(embedding_bags, name, dense_from)
    rows, table = torch.randn(N_ROWS, D).double(), torch.randn(D_SAE, D).double()
    codes = Codes.from_dense(acts)
    found = sums(codes, codes.acts.square(), rows, table)
    expected = Sums(acts @ table, (rows @ table.T)[acts > 0], acts.square().T @ rows)
    for each, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(each, truth, rtol=1e-12, atol=1e-12)
    again = sums(codes, codes.acts.square(), rows, table)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_dense_decoding_is_differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    codes = Codes.from_dense(torch.rand(20, D_SAE).double())
    table, weights = torch.randn(D_SAE, D).double(), torch.randn(20, D).double()
    grads = []
    for dense_from in (0.0, 2.0):
        monkeypatch.setattr(embedding_bags, "DENSE_SUMS", dense_from)
        leaves = codes.acts.clone().requires_grad_(), table.clone().requires_grad_()
        (sum_by_row(codes._replace(acts=leaves[0]), leaves[1]) * weights).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for dense, bags in zip(*grads, strict=True):
        assert dense is not None
        torch.testing.assert_close(dense, bags, rtol=1e-12, atol=1e-12)
