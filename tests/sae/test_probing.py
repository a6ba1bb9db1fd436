"""Probes against known solutions, and labels that are planted in one feature or in none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae import SAE, EvalConfig, Origin, SourceError, TensorSource, TopKConfig, evaluate
from sae.codes import Codes
from sae.evaluating.labelled import Label, LabelledRows, balanced_examples, columns
from sae.evaluating.logistic import auroc, fit_logistic, score_of
from sae.evaluating.probing import probe, separation_of_coordinates, separation_of_features


def test_logistic_regression_on_one_binary_input_is_the_log_odds_ratio() -> None:
    # Of 100 rows with x = 1, 80 are positive; of 100 with x = 0, 30.
    x = torch.tensor([1.0] * 100 + [0.0] * 100)[:, None]
    is_positive = torch.tensor([True] * 80 + [False] * 20 + [True] * 30 + [False] * 70)
    fit = fit_logistic(x, is_positive, strength=1e9)
    assert float(fit.bias) == pytest.approx(math.log(30 / 70), abs=1e-5)
    assert float(fit.weight[0]) == pytest.approx(math.log(80 / 20) - math.log(30 / 70), abs=1e-5)


def test_logistic_regression_is_at_the_minimum_of_the_loss_it_names() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 4).double() * torch.tensor([1.0, 10, 0.1, 3]) + 5
    is_positive = torch.rand(300) < torch.sigmoid(x[:, 0] - 5 + 0.1 * (x[:, 1] - 5))
    strength = 0.3
    fit = fit_logistic(x, is_positive, strength)

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        standard = weight * x.std(0, correction=0)
        scores = x @ weight + bias
        fitted = functional.binary_cross_entropy_with_logits(
            scores, is_positive.double(), reduction="sum"
        )
        return fitted + standard.square().sum() / (2 * strength)

    weight, bias = fit.weight.requires_grad_(), fit.bias.requires_grad_()
    gradients = torch.autograd.grad(loss(weight, bias), [weight, bias])
    assert all(float(g.abs().max()) < 1e-2 for g in gradients)
    weight, bias = weight.detach(), bias.detach()
    best = float(loss(weight, bias))
    for i in range(4):  # and no step away from it is better
        step = torch.zeros(4).double()
        step[i] = 0.01 / float(x[:, i].std())
        assert float(loss(weight + step, bias)) > best
        assert float(loss(weight - step, bias)) > best


def test_penalty_shrinks_weights_but_not_the_bias() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3)
    is_positive = torch.rand(400) < 0.8
    strict = fit_logistic(x, is_positive, strength=1e-9)
    assert float(strict.weight.abs().max()) < 1e-5
    share = float(is_positive.double().mean())
    assert float(strict.bias) == pytest.approx(math.log(share / (1 - share)), abs=1e-3)


def test_a_constant_column_does_no_harm() -> None:
    x = torch.cat([torch.randn(50, 1), torch.full((50, 1), 7.0)], dim=1)
    fit = fit_logistic(x, x[:, 0] > 0)
    assert float(fit.weight[1]) == 0
    assert fit.weight.isfinite().all()


def test_scores_equal_their_definitions() -> None:
    scores = torch.tensor([2.0, 1.0, -1.0, 1.0, -2.0, -3.0])
    truth = torch.tensor([True, True, True, False, False, False])
    found = score_of(scores, truth)
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    pairs = [(p, n) for p in scores[truth] for n in scores[~truth]]
    expected = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert found.auroc == pytest.approx(expected)
    assert auroc(-scores, truth) == pytest.approx(1 - expected)


def test_separation_equals_its_formula_for_sparse_and_dense() -> None:
    torch.manual_seed(0)
    dense = torch.relu(torch.randn(60, 7) - 0.5)
    dense[:, 6] = 0
    is_positive = torch.rand(60) < 0.5
    rows = torch.arange(5, 55)
    kept, said = dense[rows].double(), is_positive[rows]
    positive, negative = kept[said], kept[~said]
    spread = ((positive.var(0, correction=0) + negative.var(0, correction=0)) / 2).sqrt()
    expected = torch.where(spread > 0, (positive.mean(0) - negative.mean(0)) / spread, 0)
    sparse = separation_of_features(Codes.from_dense(dense), rows, is_positive, 7)
    torch.testing.assert_close(sparse, expected)
    torch.testing.assert_close(separation_of_coordinates(dense, rows, is_positive), expected)


def test_columns_are_those_of_the_dense_acts() -> None:
    dense = torch.relu(torch.randn(30, 9))
    ids = torch.tensor([7, 0, 3])
    assert torch.equal(columns(Codes.from_dense(dense), ids, 9), dense[:, ids])


def test_examples_are_balanced_and_keep_to_their_side() -> None:
    n = 1000
    is_positive = torch.arange(n) % 10 == 0
    is_test = torch.arange(n) >= 600
    label = Label("tenth", is_positive, ~is_test, is_test)
    found = balanced_examples(label, 25, seed=0)
    assert found is not None
    for rows, side in ((found.train, ~is_test), (found.test, is_test)):
        assert side[rows].all()
        assert len(rows.unique()) == 50
        assert int(is_positive[rows].sum()) == 25
    assert balanced_examples(label._replace(is_positive=torch.arange(n) < 19), 25, 0) is None


def planted_sae(width: int) -> SAE:
    """Features along all axes and against them, all that are positive active: acts are x's own."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    sae = SAE(TopKConfig(d_sae=2 * width, k=2 * width), width, Origin(hookpoint="mid"))
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator())).Q
    sae.W_dec.copy_(both @ rotation)
    sae.W_enc_rows.copy_(both @ rotation)
    return sae


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def planted_rows(sae: SAE, n: int = 4000) -> tuple[Tensor, Tensor]:
    """Rows with noise along every direction, and feature 3 active in half of them."""
    torch.manual_seed(0)
    has_it = torch.rand(n) < 0.5
    noise = torch.randn(n, sae.d_model)
    noise -= (noise @ sae.W_dec[3])[:, None] * sae.W_dec[3]
    return noise + (has_it * (1 + torch.rand(n)))[:, None] * sae.W_dec[3], has_it


def test_a_label_that_is_one_feature_is_told_by_that_feature_alone() -> None:
    sae = planted_sae(12)
    x, has_it = planted_rows(sae)
    rows = LabelledRows.of(x, [("planted", has_it)], torch.arange(len(x)) % 2 == 0)
    found = probe(sae, rows, EvalConfig())
    assert found is not None
    label = found.labels[0]
    assert label.feature_ids[0] == 3
    assert label.features["1"].accuracy > 0.99
    assert label.features["1"].auroc > 0.99
    assert label.x.accuracy > 0.97
    # The direction is spread over the coordinates of x: no few of them tell as much.
    assert label.coordinates["1"].accuracy < 0.85
    assert label.coordinates["5"].accuracy < 0.97
    assert 1800 <= label.n_train <= 2000


def test_a_label_that_is_no_property_is_told_by_nothing() -> None:
    sae = planted_sae(12)
    x, _ = planted_rows(sae)
    coin = torch.rand(len(x)) < 0.5
    rows = LabelledRows.of(x, [("coin", coin)], torch.arange(len(x)) % 2 == 0)
    found = probe(sae, rows, EvalConfig())
    assert found is not None
    for score in (found.x, *found.features.values(), *found.coordinates.values()):
        assert abs(score.accuracy - 0.5) < 0.06
        assert abs(score.auroc - 0.5) < 0.06


def test_what_is_true_of_train_rows_alone_does_not_count() -> None:
    sae = planted_sae(12)
    x, has_it = planted_rows(sae)
    is_test = torch.arange(len(x)) >= len(x) // 2
    swapped = has_it ^ is_test  # the opposite in test rows
    found = probe(sae, LabelledRows.of(x, [("swapped", swapped)], is_test), EvalConfig())
    assert found is not None
    assert found.features["1"].accuracy < 0.01


def test_two_features_are_needed_where_a_label_is_either_of_two() -> None:
    sae = planted_sae(12)
    torch.manual_seed(1)
    n = 4000
    which = torch.randint(4, (n,))
    x = 0.05 * torch.randn(n, 12)
    x += (which == 0)[:, None] * sae.W_dec[1] + (which == 1)[:, None] * sae.W_dec[2]
    rows = LabelledRows.of(x, [("either", which < 2)], torch.arange(n) % 2 == 0)
    found = probe(sae, rows, EvalConfig())
    assert found is not None
    assert set(found.labels[0].feature_ids[:2]) == {1, 2}
    assert found.features["1"].accuracy < 0.85
    assert found.features["2"].accuracy > 0.98


def test_an_evaluation_probes_the_untrained_sae_too() -> None:
    sae = planted_sae(12)
    x, has_it = planted_rows(sae)
    labelled = LabelledRows.of(
        x, [("planted", has_it), ("rare", torch.arange(len(x)) < 3)], torch.arange(len(x)) % 2 == 0
    )
    report = evaluate(sae, TensorSource(x, x), labelled=labelled)
    assert report.probing is not None
    assert report.probing.n_labels == 1
    untrained = report.baselines[0].probing
    assert untrained is not None
    assert untrained.x == report.probing.x
    assert untrained.features["1"].accuracy < report.probing.features["1"].accuracy
    figures = {each.name: each for each in report.figures()}
    assert figures["probing.features.1.accuracy"].value == report.probing.features["1"].accuracy
    definition = figures["probing.features.1.accuracy"].definition
    assert "k features" in definition
    assert "told right" in definition
    assert "probing.labels.planted.features.5.auroc" in figures
    assert any("features, k = 1" in line for line in report.lines())


def test_labels_that_do_not_fit_the_rows_are_refused() -> None:
    x = torch.randn(50, 4)
    with pytest.raises(SourceError, match=r"label 'short' is torch.bool \[49\]; expected one bool"):
        LabelledRows.of(x, [("short", torch.zeros(49, dtype=torch.bool))], torch.arange(50) > 9)
    with pytest.raises(SourceError, match=r"label 'ints' is torch.int64 \[50\]"):
        LabelledRows.of(x, [("ints", torch.arange(50))], torch.arange(50) > 9)
