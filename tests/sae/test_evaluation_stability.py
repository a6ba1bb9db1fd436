"""One-to-one matching of features, and what it says of SAEs whose likeness is planted."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sae import SAE, Origin, SourceError, TensorSource, TopKConfig, evaluate
from sae.evaluating import stability
from sae.evaluating.matching import match_directions, nearest_directions


def sae_with(directions: Tensor) -> SAE:
    sae = SAE(TopKConfig(d_sae=len(directions), k=4), directions.shape[1], Origin(hookpoint="mid"))
    sae.W_dec.copy_(directions)
    sae.W_enc_rows.copy_(directions)
    return sae


def greedy(cosines: Tensor) -> list[int]:
    """The plain greedy matching: the largest entry, its row and column struck out, and so on."""
    left, partner = cosines.clone(), [-1] * len(cosines)
    for _ in range(min(cosines.shape)):
        i, j = divmod(int(left.argmax()), left.shape[1])
        partner[i] = j
        left[i], left[:, j] = -9, -9
    return partner


@pytest.mark.parametrize(("n", "m"), [(40, 40), (60, 25), (25, 60), (1, 3)])
def test_matching_is_greedy_and_one_to_one(n: int, m: int) -> None:
    torch.manual_seed(n)
    a, b = torch.randn(n, 5), torch.randn(m, 5)
    found = match_directions(a, b)
    cosines = torch.cosine_similarity(a[:, None], b[None], dim=2)
    assert found.partner.tolist() == greedy(cosines)
    has_one = found.partner >= 0
    assert int(has_one.sum()) == min(n, m)
    assert len(found.partner[has_one].unique()) == min(n, m)
    expected = cosines[has_one.nonzero().squeeze(1), found.partner[has_one]]
    torch.testing.assert_close(found.cosine[has_one], expected)
    assert not found.cosine[~has_one].any()


def test_matching_is_within_its_bound_of_the_best_one() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        a, b = torch.rand(6, 4), torch.rand(6, 4)  # all cosines positive, as the bound asks
        cosines = torch.cosine_similarity(a[:, None], b[None], dim=2)
        best = max(
            float(cosines[range(6), list(order)].sum())
            for order in itertools.permutations(range(6))
        )
        assert best / 2 <= float(match_directions(a, b).cosine.sum()) <= best + 1e-5


def test_matching_with_equal_directions_ends_and_stays_one_to_one() -> None:
    a = torch.eye(4).repeat(5, 1)
    found = match_directions(a, a.flip(0))
    assert sorted(found.partner.tolist()) == list(range(20))
    torch.testing.assert_close(found.cosine, torch.ones(20))


def test_matching_in_tiles_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    a, b = torch.randn(50, 6), torch.randn(40, 6)
    whole = match_directions(a, b)
    monkeypatch.setattr("sae.evaluating.matching.TILE_ENTRIES", 100)
    assert torch.equal(match_directions(a, b).partner, whole.partner)


def test_a_hub_is_the_partner_of_one_and_the_nearest_of_many() -> None:
    torch.manual_seed(0)
    hub = torch.zeros(1, 20)
    hub[0, 0] = 1
    near = torch.nn.functional.normalize(hub + 0.1 * torch.randn(8, 20), dim=1)
    others = torch.eye(20)[:8]
    assert nearest_directions(near, others).row.tolist() == [0] * 8
    assert int((match_directions(near, others).cosine > 0.7).sum()) == 1


def test_shuffled_features_are_the_same_features() -> None:
    torch.manual_seed(0)
    directions = torch.randn(50, 12)
    found = stability(sae_with(directions), [sae_with(3 * directions[torch.randperm(50)])])
    assert found.matched_fraction == 1
    assert found.matched_cosine == pytest.approx(1, abs=1e-6)
    assert found.max_cosine == pytest.approx(1, abs=1e-6)


def test_opposite_features_are_not_the_same() -> None:
    found = stability(sae_with(torch.eye(6)), [sae_with(-torch.eye(6))])
    assert found.matched_fraction == 0
    assert found.max_cosine == 0


def test_the_shared_half_is_found_and_means_are_over_all_others() -> None:
    directions = torch.eye(16)
    half = torch.cat([directions[:4], directions[8:12]])
    own = sae_with(directions[:8])
    assert stability(own, [sae_with(half)]).matched_fraction == 0.5
    both = stability(own, [sae_with(half), sae_with(directions[:8])])
    assert (both.n_others, both.n_features) == (2, 8)
    assert both.matched_fraction == 0.75
    assert both.matched_cosine == pytest.approx(0.75)


def test_copies_of_one_feature_do_not_count_as_many() -> None:
    own = sae_with(torch.eye(8)[:1].repeat(4, 1))
    found = stability(own, [sae_with(torch.eye(8)[:4])])
    assert found.matched_fraction == 0.25
    assert found.max_cosine == 1


def test_dead_features_are_left_out_of_an_evaluation() -> None:
    x = torch.rand(300, 8)
    x[:, 4:] = 0
    directions = torch.eye(8)
    other = directions.clone()
    other[4:] = -other[4:]
    report = evaluate(sae_with(directions), TensorSource(x, x), other_seeds=[sae_with(other)])
    assert report.stability is not None
    assert (report.n_dead, report.stability.n_features) == (4, 4)
    assert report.stability.matched_fraction == 1
    assert "beside 1 of other seeds: 100.0% of 4" in "\n".join(report.lines())
    assert "stability.matched_cosine" in {each.name for each in report.figures()}


def test_an_sae_of_another_width_is_refused() -> None:
    with pytest.raises(SourceError, match="decoder is 5 wide, this one's 6"):
        stability(sae_with(torch.eye(6)), [sae_with(torch.eye(5))])
    with pytest.raises(SourceError, match="no other SAE was given"):
        stability(sae_with(torch.eye(6)), [])
