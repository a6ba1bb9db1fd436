"""Selections against their definitions, written densely, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.codes import Codes
from sae.kernels.selection import PreActs, above_threshold, top_k_of_rows, top_of_batch


def scores_as_pre_acts(scores: Tensor) -> PreActs:
    """Pre-activations that are exactly these scores: an identity encoder."""
    return PreActs(scores, torch.eye(scores.shape[1], dtype=scores.dtype), scores.new_zeros(()))


def pre_acts_of(scores: Tensor) -> PreActs:
    return scores_as_pre_acts(scores)._replace(b=scores.new_zeros(scores.shape[1]))


def top_k_by_definition(scores: Tensor, k: int) -> Tensor:
    """Dense acts: by (value descending, feature_id ascending), positive ones only."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores).scatter(1, order, scores.gather(1, order)).relu()


def top_of_batch_by_definition(scores: Tensor, n_keep: int) -> Tensor:
    """Dense acts: by (value descending, row ascending, feature_id ascending)."""
    flat = scores.reshape(1, -1)
    return top_k_by_definition(flat, min(n_keep, flat.shape[1])).view_as(scores)


def check_form(codes: Codes, n_rows: int) -> None:
    """CSR form: features ascend within a row, all acts are positive."""
    assert codes.n_rows == n_rows
    assert codes.offsets[-1] == codes.nnz == codes.feature_ids.numel()
    assert (codes.acts > 0).all()
    key = codes.rows() * 10_000 + codes.feature_ids
    assert (key.diff() > 0).all()


def score_grids() -> st.SearchStrategy[Tensor]:
    """Small integers, so that ties and zeros are common."""
    return st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6)).map(
        lambda shape: torch.randint(
            -2, 4, shape[:2], generator=torch.Generator().manual_seed(shape[2])
        ).float()
    )


@settings(deadline=None)
@given(score_grids(), st.integers(1, 9))
def test_top_k_equals_its_definition_and_l0_is_at_most_k(scores: Tensor, k: int) -> None:
    k = min(k, scores.shape[1])
    codes = top_k_of_rows(pre_acts_of(scores), k)
    check_form(codes, len(scores))
    assert torch.equal(codes.to_dense(scores.shape[1]), top_k_by_definition(scores, k))
    assert codes.n_active().max() <= k


@settings(deadline=None)
@given(score_grids(), st.integers(1, 30), st.sampled_from([0.0, 0.5, 2.0, 3.0, 100.0]))
def test_top_of_batch_equals_its_definition(scores: Tensor, n_keep: int, expected: float) -> None:
    codes, smallest = top_of_batch(pre_acts_of(scores), n_keep, expected)
    check_form(codes, len(scores))
    assert torch.equal(codes.to_dense(scores.shape[1]), top_of_batch_by_definition(scores, n_keep))
    assert codes.nnz == min(n_keep, int((scores > 0).sum()))
    assert smallest == (codes.acts.min() if codes.nnz else 0)


@pytest.mark.parametrize("expected", [0.0, 1e-6, 1.0, 1e6])
def test_top_of_batch_keeps_just_enough_over_many_tiles(expected: float) -> None:
    torch.manual_seed(0)
    pre_acts = PreActs(torch.randn(1300, 16), torch.randn(200, 16), torch.zeros(200))
    codes, _ = top_of_batch(pre_acts, 7 * 1300, expected)
    scores = torch.cat([tile.clone() for _, tile in pre_acts.tiles()])
    check_form(codes, 1300)
    assert codes.nnz == 7 * 1300
    assert torch.equal(codes.to_dense(200), top_of_batch_by_definition(scores, 7 * 1300))


def test_top_k_equals_dense_selection_over_many_tiles() -> None:
    torch.manual_seed(0)
    pre_acts = PreActs(torch.randn(1300, 16), torch.randn(200, 16), torch.randn(200))
    codes = top_k_of_rows(pre_acts, 7)
    dense = pre_acts.x.double() @ pre_acts.W.double().T + pre_acts.b.double()
    expected = top_k_by_definition(dense, 7)
    check_form(codes, 1300)
    assert torch.equal(codes.to_dense(200) > 0, expected > 0)
    torch.testing.assert_close(codes.to_dense(200).double(), expected, rtol=1e-5, atol=1e-5)


def test_threshold_selects_what_lies_above_it() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.5]])
    codes = above_threshold(pre_acts_of(scores), torch.tensor(2.0))
    assert codes.to_dense(3).tolist() == [[0, 0, 3], [0, 0, 2.5]]
    each = above_threshold(pre_acts_of(scores), torch.tensor([0.0, 1.0, 10.0]))
    assert each.to_dense(3).tolist() == [[1, 2, 0], [0, 0, 0]]


def test_no_rows_make_no_codes() -> None:
    pre_acts = pre_acts_of(torch.empty(0, 4))
    for codes in (
        top_k_of_rows(pre_acts, 2),
        top_of_batch(pre_acts, 2, 0.0).codes,
        above_threshold(pre_acts, torch.tensor(0.0)),
    ):
        assert codes.n_rows == codes.nnz == 0
        assert codes.to_dense(4).shape == (0, 4)


@settings(deadline=None)
@given(score_grids())
def test_codes_and_dense_acts_are_the_same_thing(scores: Tensor) -> None:
    codes = Codes.from_dense(scores.relu())
    check_form(codes, len(scores))
    assert torch.equal(codes.to_dense(scores.shape[1]), scores.relu())
    twice = Codes.concatenate([codes, codes])
    assert torch.equal(twice.to_dense(scores.shape[1]), scores.relu().repeat(2, 1))
