"""Densities, duplicates and quantiles of an evaluation, on dictionaries whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae import (
    SAE,
    Baseline,
    EvalConfig,
    Origin,
    Report,
    TensorSource,
    TopKConfig,
    baseline_of,
    evaluate,
)
from sae.evaluating.dictionary import density_histogram, largest_cosines
from sae.evaluating.reconstruction import quantiles


def sae_of(directions: Tensor, k: int, encoder: Tensor | None = None) -> SAE:
    """An SAE without biases; rows of an encoder of zeros are never active."""
    sae = SAE(TopKConfig(d_sae=len(directions), k=k), directions.shape[1], Origin(hookpoint="mid"))
    sae.W_dec.copy_(directions)
    sae.W_enc_rows.copy_(directions if encoder is None else encoder)
    return sae


def at_angle(cosine: float) -> Tensor:
    """A unit vector in the first two of six dimensions, at this cosine with the first axis."""
    direction = torch.zeros(6)
    direction[:2] = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    return direction


def one_hot_rows(counts: list[int], width: int) -> Tensor:
    """counts[i] rows that lie on axis i."""
    return torch.eye(width).repeat_interleave(
        torch.tensor(counts + [0] * (width - len(counts))), dim=0
    )


def test_duplicates_are_those_above_the_threshold_and_only_among_active_features() -> None:
    axes = torch.eye(6)
    # 0, 1: cosine .95, both active. 2 and its exact copy 4, which is never active. 3: alone.
    directions = torch.stack([axes[0], at_angle(0.95), axes[2], axes[3], axes[2]])
    encoder = torch.stack([axes[0] - 3 * axes[1], axes[1], axes[2], axes[3], 0 * axes[2]])
    x = one_hot_rows([40, 30, 20, 10], 6)
    report = evaluate(sae_of(directions, 1, encoder), TensorSource(x, x))
    found = report.dictionary
    assert found is not None
    assert (report.n_dead, found.n_compared, found.n_duplicates) == (1, 4, 2)
    assert found.max_cosine_mean == pytest.approx((0.95 + 0.95 + 0 + 0) / 4, abs=1e-6)
    assert found.max_cosine_quantiles is not None
    assert found.max_cosine_quantiles["50%"] == pytest.approx(0.95 / 2, abs=1e-6)
    strict = evaluate(
        sae_of(directions, 1, encoder), TensorSource(x, x), config=EvalConfig(duplicate_cosine=0.96)
    )
    assert strict.dictionary is not None
    assert strict.dictionary.n_duplicates == 0


def test_an_opposite_direction_is_no_duplicate() -> None:
    both = torch.cat([torch.eye(3), -torch.eye(3)])
    x = torch.randn(200, 3)
    found = evaluate(sae_of(both, 3), TensorSource(x, x)).dictionary
    assert found is not None
    assert found.n_duplicates == 0
    assert found.max_cosine_mean == pytest.approx(0, abs=1e-6)


def test_a_sample_of_features_is_compared_with_all_of_them() -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, 6), dim=1).repeat(2, 1)
    x = torch.randn(2000, 6)
    config = EvalConfig(n_compared_features=10)
    # k = 64 makes a feature active wherever its pre-activation is positive: all, and their twins.
    found = evaluate(sae_of(directions, 64), TensorSource(x, x), config=config).dictionary
    assert found is not None
    assert (found.n_compared, found.n_duplicates) == (10, 10)


def test_largest_cosines_equal_the_plain_formula_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    directions = torch.randn(50, 7) * torch.rand(50, 1)
    monkeypatch.setattr("sae.evaluating.dictionary.TILE_ENTRIES", 150)  # three rows a tile
    found = largest_cosines(directions, torch.arange(50))
    units = directions / directions.norm(dim=1, keepdim=True)
    expected = (units @ units.T - 3 * torch.eye(50)).amax(1)
    torch.testing.assert_close(found, expected)


def test_density_histogram_counts_features_where_their_density_lies() -> None:
    densities = torch.tensor([1.0, 0.5, 0.2, 0.01, 0.009, 1e-9], dtype=torch.float64)
    found = density_histogram(densities)
    by_edge = dict(zip(found.edges, found.counts, strict=False))
    assert by_edge[-0.5] == 2  # 0.5 and 1
    assert by_edge[-1.0] == 1  # 0.2
    assert by_edge[-2.0] == 1  # exactly 0.01
    assert by_edge[-2.5] == 1  # 0.009
    assert by_edge[-6.0] == 1  # below the lowest edge
    assert sum(found.counts) == len(densities)
    assert len(found.edges) == len(found.counts) + 1


def test_histogram_of_an_evaluation_has_every_feature_that_is_not_dead() -> None:
    x = one_hot_rows([50, 40, 9, 1], 6)
    report = evaluate(sae_of(torch.eye(6), 1), TensorSource(x, x))
    assert report.dictionary is not None
    histogram = report.dictionary.density_histogram
    by_edge = dict(zip(histogram.edges, histogram.counts, strict=False))
    assert report.n_dead == 2
    assert (by_edge[-0.5], by_edge[-1.5], by_edge[-2.0]) == (2, 1, 1)
    assert report.n_dense == 2


def test_decoder_norms_are_of_the_decoder() -> None:
    x = one_hot_rows([10, 10, 10], 3)
    sae = sae_of(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 1)
    found = evaluate(sae, TensorSource(x, x)).dictionary
    assert found is not None
    assert found.decoder_norm_quantiles is not None
    assert found.decoder_norm_quantiles["50%"] == pytest.approx(2)
    assert found.decoder_norm_quantiles["25%"] == pytest.approx(1.5)


def test_quantiles_are_linear_between_neighbours() -> None:
    values = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert quantiles(values, (0.5, 0.0, 1.0)) == {"50%": 2.5, "0%": 1.0, "100%": 4.0}
    torch.manual_seed(0)
    many = torch.randn(1001).double()
    for q in (0.05, 0.95):
        assert quantiles(many, (q,))[f"{100 * q:g}%"] == pytest.approx(float(many.quantile(q)))


def test_token_quantiles_show_the_rows_that_a_global_fvu_hides() -> None:
    x = one_hot_rows([90, 10], 4)
    encoder = torch.eye(4)
    encoder[1] = 0  # one row in ten isn't reconstructed at all
    report = evaluate(sae_of(torch.eye(4), 1, encoder), TensorSource(x, x))
    found = report.reconstruction
    # The mean is (.9, .1): deviations are .02 and 1.62; the error is 1 where it isn't 0.
    assert found.fvu == pytest.approx(10 / (90 * 0.02 + 10 * 1.62))
    assert found.fvu_token_quantiles["75%"] == 0
    assert found.fvu_token_quantiles["95%"] == pytest.approx(1 / 1.62)


def test_a_trained_baseline_stands_in_the_report_with_its_own_figures() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 6)
    source = TensorSource(x, x)
    other = sae_of(torch.eye(6), 2)
    row = baseline_of(other, source, "frozen_decoder", "W_dec stays random")
    report = evaluate(sae_of(torch.eye(6), 3), source, baselines=[row])
    assert [each.name for each in report.baselines] == ["untrained", "pca", "frozen_decoder"]
    assert row.reconstruction == evaluate(other, source).reconstruction
    assert row.reconstruction.fvu > report.fvu
    assert any(line.lstrip().startswith("frozen_decoder") for line in report.lines())


def test_every_figure_is_a_row_with_its_definition() -> None:
    x = one_hot_rows([50, 40, 9, 1], 6)
    report = evaluate(sae_of(torch.eye(6), 1), TensorSource(x, x))
    figures = {each.name: each for each in report.figures()}
    assert len(figures) == len(report.figures())
    assert figures["reconstruction.fvu"].value == report.fvu
    assert "divided once" in figures["reconstruction.fvu"].definition
    assert figures["n_dead"].value == 2
    assert figures["reconstruction.fvu_token_quantiles.95%"].value == pytest.approx(
        report.reconstruction.fvu_token_quantiles["95%"]
    )
    pca = report.baselines[1].reconstruction.fvu
    assert figures["baselines.pca.reconstruction.fvu"].value == pca
    assert figures["dictionary.density_histogram.-0.5..0"].value == 2
    assert all(each.definition for each in figures.values())
    assert "max_norm" not in figures  # undefined here


def test_reports_of_before_can_be_read() -> None:
    x = torch.randn(50, 6)
    report = evaluate(sae_of(torch.eye(6), 1), TensorSource(x, x))
    old = report.model_dump(mode="json")
    del old["dictionary"], old["reconstruction"]["fvu_token_quantiles"]
    assert Report.model_validate(old).lines()
    assert isinstance(report.baselines[0], Baseline)
