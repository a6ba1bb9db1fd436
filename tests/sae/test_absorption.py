"""Absorption: row by row against the published procedure, and on SAEs in which it is planted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae import SAE, EvalConfig, Origin, TensorSource, TopKConfig, evaluate
from sae.codes import Codes
from sae.evaluating.absorption import absorption_of_rows, main_features, measure_absorption, rows_of
from sae.evaluating.labelled import LabelledRows, balanced_examples

WIDTH, N_WORDS = 24, 6


def published(acts: Tensor, cosines: Tensor, whole: float, main: list[int]) -> tuple[bool, float]:
    """One row, by the steps that SAEBench's documentation gives: (full, fraction)."""
    given = acts * cosines
    from_main = float(given[main].sum())
    candidates = [
        float(given[i])
        for i in range(len(acts))
        if i not in main and cosines[i] >= 0.1 and given[i] > 0
    ]
    absorbing = sum(sorted(candidates, reverse=True)[:3])
    if from_main >= whole or absorbing / whole < 0.4:
        fraction = 0.0
    elif from_main <= 0:
        fraction = 1.0
    else:
        absorbed = min(absorbing, whole - from_main)
        fraction = absorbed / (absorbed + from_main)
    top = int(given.argmax())
    full = (
        not bool(acts[main].any())
        and float(cosines[top]) >= 0.025
        and whole >= 0
        and float(given[top]) / whole >= 0.4
    )
    return full, fraction


def test_rows_equal_the_published_procedure() -> None:
    torch.manual_seed(0)
    n, d_sae = 800, 12
    acts = torch.relu(torch.randn(n, d_sae) - 0.8)
    cosines = torch.randn(d_sae) * 0.5
    whole = 2 * torch.rand(n) + 0.01
    main = [2, 7]
    found = absorption_of_rows(Codes.from_dense(acts), cosines, cosines, whole, torch.tensor(main))
    expected = [published(acts[i].double(), cosines, float(whole[i]), main) for i in range(n)]
    assert found.is_full.tolist() == [full for full, _ in expected]
    torch.testing.assert_close(found.fraction, torch.tensor([f for _, f in expected]).double())
    assert 20 < int(found.is_full.sum()) < n - 20  # the test has both kinds
    assert int(((found.fraction > 0) & (found.fraction < 1)).sum()) > 20


def test_longer_decoder_rows_count_by_what_they_contribute() -> None:
    codes = Codes.from_dense(torch.tensor([[0.0, 1.0]]))
    cosines = torch.tensor([0.9, 0.5])
    main, whole = torch.tensor([0]), torch.tensor([1.0])
    assert not absorption_of_rows(codes, cosines, 0.5 * cosines, whole, main).is_full
    assert absorption_of_rows(codes, cosines, 2 * cosines, whole, main).is_full


def directions() -> Tensor:
    """Row 0: the broad property. Rows 1 to 6: words that have it; 7 to 12: words that don't."""
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[: 1 + 2 * N_WORDS]


def words(n: int = 6000) -> tuple[Tensor, Tensor, Tensor]:
    """x, whether each row has the property, and its word (0 to 11; the first six have it)."""
    torch.manual_seed(0)
    word = torch.randint(2 * N_WORDS, (n,))
    has_it = word < N_WORDS
    x = 2.0 * functional.one_hot(word + 1, 1 + 2 * N_WORDS).float() @ directions()
    x += 2.0 * has_it[:, None] * directions()[0] + 0.02 * torch.randn(n, WIDTH)
    return x, has_it, word


def sae_that_absorbs(n_absorbed: int) -> SAE:
    """A feature for each direction; for the first n_absorbed words, the word's own feature has the
    property in its decoder, and the property's feature is silent."""
    d = directions()
    sae = SAE(TopKConfig(d_sae=len(d), k=len(d)), WIDTH, Origin(hookpoint="mid"))
    encoder, decoder = d.clone(), d.clone()
    for word in range(1, 1 + n_absorbed):
        encoder[0] -= 2 * d[word]
        decoder[word] += d[0]
    sae.W_enc_rows.copy_(encoder)
    sae.W_dec.copy_(decoder)
    sae.b_enc.fill_(-0.3)
    return sae


def labelled(x: Tensor, has_it: Tensor) -> LabelledRows:
    is_test = torch.arange(len(x)) % 2 == 0
    return LabelledRows.of(x, [("property", has_it)], is_test, broad=True)


@pytest.mark.parametrize("n_absorbed", [0, 1, 2])
def test_planted_absorption_is_measured_as_it_was_planted(n_absorbed: int) -> None:
    x, has_it, word = words()
    found = measure_absorption(
        sae_that_absorbs(n_absorbed), labelled(x, has_it), EvalConfig(n_probe_examples=2000)
    )
    assert found is not None
    label = found.labels[0]
    if n_absorbed < 2:  # two words' features together gain more F1 than step 1 asks for
        assert label.main_feature_ids[0] == 0
    is_test = torch.arange(len(x)) % 2 == 0
    absorbed = [w for w in range(n_absorbed) if 1 + w not in label.main_feature_ids]
    share = float(torch.isin(word[has_it & is_test], torch.tensor(absorbed)).double().mean())
    assert found.full == pytest.approx(share, abs=0.01)
    assert found.fraction == pytest.approx(share, abs=0.02)


def test_a_word_that_is_too_rare_for_a_feature_of_its_own_is_absorption() -> None:
    x, has_it, word = words()
    kept = (word != 0) | (torch.arange(len(x)) % 20 == 0)  # word 0 is one in a hundred positives
    found = measure_absorption(
        sae_that_absorbs(1), labelled(x[kept], has_it[kept]), EvalConfig(n_probe_examples=2000)
    )
    assert found is not None
    assert found.labels[0].main_feature_ids == (0,)
    is_test = torch.arange(int(kept.sum())) % 2 == 0
    share = float((word[kept][has_it[kept] & is_test] == 0).double().mean())
    assert 0.005 < share < 0.02
    assert found.full == pytest.approx(share, abs=1e-6)


def test_main_features_are_as_many_as_gain() -> None:
    x, has_it, _ = words()
    rows = labelled(x, has_it)
    examples = balanced_examples(rows.labels[0], 1000, seed=0)
    assert examples is not None
    codes = sae_that_absorbs(0).encode_sparse(x)
    assert main_features(codes, examples, has_it, 1 + 2 * N_WORDS).tolist() == [0]
    silent = codes.to_dense(1 + 2 * N_WORDS)
    silent[:, 0] = 0  # without it, the six words' features are the label
    found = main_features(Codes.from_dense(silent), examples, has_it, 1 + 2 * N_WORDS)
    assert sorted(found.tolist()) == [1, 2, 3, 4, 5, 6]


def test_a_property_that_is_not_in_x_is_not_measured() -> None:
    x, _, _ = words()
    coin = torch.rand(len(x)) < 0.3
    unseen = labelled(x, coin)
    found = measure_absorption(sae_that_absorbs(1), unseen, EvalConfig())
    assert found is None
    narrow = LabelledRows(x, (unseen.labels[0]._replace(is_broad=False),))
    assert measure_absorption(sae_that_absorbs(1), narrow, EvalConfig()) is None


def test_rows_of_codes_are_those_rows() -> None:
    dense = torch.relu(torch.randn(30, 9))
    rows = torch.tensor([4, 28, 4, 0])
    assert torch.equal(rows_of(Codes.from_dense(dense), rows).to_dense(9), dense[rows])


def test_an_evaluation_reports_absorption() -> None:
    x, has_it, _ = words()
    report = evaluate(sae_that_absorbs(1), TensorSource(x, x), labelled=labelled(x, has_it))
    assert report.absorption is not None
    assert report.absorption.full > 0.1
    assert any(line.startswith("absorption of 1 broad labels") for line in report.lines())
    assert "absorption.labels.property.full" in {each.name for each in report.figures()}
