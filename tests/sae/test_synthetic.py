"""The synthetic world fires as it says, is the same whenever it is made, and scores are true."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sae import (
    SAE,
    BatchTopKConfig,
    ConfigError,
    Origin,
    SourceError,
    TopKConfig,
    TrainConfig,
    evaluate,
    train,
)
from sae.codes import Codes
from sae.initialisation import initial_sae
from sae.synthetic import SyntheticConfig, SyntheticSource, SyntheticTruth, score
from sae.synthetic.scores import acts_at
from sae.synthetic.source import BLOCK_ROWS
from sae.synthetic.truth import rows_of

SMALL = SyntheticConfig(
    n_features=60,
    d_model=96,
    n_parents=8,
    n_children=3,
    l0=4,
    n_rows=40 * BLOCK_ROWS,
    n_heldout_rows=8 * BLOCK_ROWS,
)


def firings(config: SyntheticConfig, n_rows: int) -> Tensor:
    """Whether each feature fires in each row: [n_rows, n_features] bool."""
    codes = SyntheticTruth(config).firing(n_rows, np.random.default_rng(3))
    return codes.to_dense(config.n_features) > 0


def test_every_feature_fires_as_often_as_it_says() -> None:
    n = 60_000
    fires, expected = firings(SMALL, n).double().mean(0), SyntheticTruth(SMALL).frequencies
    spread = (expected * (1 - expected) / n).sqrt()
    assert float(((fires - expected) / spread).abs().max()) < 4.5
    roots = expected[: SMALL.n_roots]
    assert float(roots.sum()) == pytest.approx(4)
    assert float(roots[0] / roots[9]) == pytest.approx(25 / 16)  # Zipf-Mandelbrot, offset 16


def test_children_fire_only_with_their_parent_and_without_their_siblings() -> None:
    fires, truth = firings(SMALL, 30_000), SyntheticTruth(SMALL)
    children = (truth.parents >= 0).nonzero().squeeze(1)
    assert len(children) == 24
    assert not (fires[:, children] & ~fires[:, truth.parents[children]]).any()
    for parent in range(SMALL.n_parents):
        family = (truth.parents == parent).nonzero().squeeze(1)
        assert int(fires[:, family].sum(1).max()) == 1
        with_child = fires[:, family].any(1).sum() / fires[:, parent].sum()
        assert float(with_child) == pytest.approx(0.5, abs=0.05)


def test_roots_fire_together_as_the_copula_says() -> None:
    """The chance that two roots fire together, by integrating over their common causes."""
    settings = {"n_parents": 0, "n_children": 0, "n_features": 12, "copula_rank": 1, "l0": 3}
    config = SMALL.model_copy(update={**settings, "copula_variance": 0.4})
    n, truth = 60_000, SyntheticTruth(config)
    fires = firings(config, n).double()
    u = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double()
    loadings = torch.from_numpy(truth._loadings[:, 0])  # +-sqrt(.4): one cause, two camps
    limit = 2 * math.sqrt(0.4)
    common = (u[:, None] * loadings).clamp(-limit, limit)
    thresholds = torch.from_numpy(truth._thresholds)
    chance = torch.special.ndtr((common - thresholds) / math.sqrt(0.6))
    torch.testing.assert_close(chance.mean(0), truth.frequencies, rtol=0.03, atol=0)
    together, expected = fires.T @ fires / n, chance.T @ chance / len(u)
    apart = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(together[apart], expected[apart], rtol=0.1, atol=1e-3)
    independent = truth.frequencies[:, None] * truth.frequencies
    same = loadings[:, None] * loadings > 0
    assert float((together / independent)[apart & same].min()) > 1.3
    assert float((together / independent)[apart & ~same].max()) < 0.8


def test_without_common_causes_roots_are_independent() -> None:
    settings = {"n_parents": 0, "n_children": 0, "n_features": 10, "copula_variance": 0.0, "l0": 3}
    config = SMALL.model_copy(update=settings)
    fires = firings(config, 100_000).double()
    correlation = torch.corrcoef(fires.T) - torch.eye(10)
    assert float(correlation.abs().max()) < 0.02


def test_rows_are_the_sum_of_what_fires_and_bias_and_noise() -> None:
    source = SyntheticSource(SyntheticTruth(SMALL))
    block = source.block("train", 5)
    dense = block.codes.to_dense(SMALL.n_features)
    expected = dense @ source.truth.directions + source.truth.bias
    torch.testing.assert_close(block.clean, expected)
    noise = block.x - block.clean
    assert float(noise.std()) == pytest.approx(SMALL.noise_std, rel=0.02)
    assert float(block.codes.acts.mean()) == pytest.approx(1, abs=0.02)
    assert float(source.truth.bias.norm()) == pytest.approx(2)
    torch.testing.assert_close(source.truth.directions.norm(dim=1), torch.ones(60))


def test_blocks_are_the_same_whenever_they_are_made_and_differ_from_each_other() -> None:
    one, two = (SyntheticSource(SyntheticTruth(SMALL)) for _ in range(2))
    two.block("train", 3)
    assert torch.equal(one.block("train", 9).x, two.block("train", 9).x)
    assert not torch.equal(one.block("train", 9).x, one.block("train", 8).x)
    assert not torch.equal(one.block("train", 1).x, one.block("heldout", 1).x)
    other = SyntheticSource(SyntheticTruth(SMALL.model_copy(update={"seed": 1})))
    assert not torch.equal(one.block("train", 9).x, other.block("train", 9).x)


@pytest.mark.parametrize("batch_size", [512, 1024, 3000])
def test_a_stream_can_be_entered_at_any_batch(batch_size: int) -> None:
    source = SyntheticSource(SyntheticTruth(SMALL.model_copy(update={"n_rows": 5 * BLOCK_ROWS})))
    whole = list(source.batches("any", batch_size, seed=1, epochs=2))
    assert sum(map(len, whole)) == 2 * 5 * BLOCK_ROWS
    assert all(len(batch) == batch_size for batch in whole[:-1])
    for start in (1, len(whole) - 1):
        entered = source.batches("any", batch_size, seed=1, epochs=2, start_batch=start)
        assert all(torch.equal(a, b) for a, b in zip(entered, whole[start:], strict=True))
    endless = source.batches("any", batch_size, seed=1, epochs=None)
    many = list(itertools.islice(endless, len(whole) - 1))
    assert all(torch.equal(a, b) for a, b in zip(many, whole, strict=False))


def test_an_epoch_has_every_block_once_in_an_order_of_its_own() -> None:
    source = SyntheticSource(SyntheticTruth(SMALL.model_copy(update={"n_rows": 6 * BLOCK_ROWS})))
    firsts = [source.block("train", i).x[0] for i in range(6)]

    def order(seed: int) -> list[int]:
        batches = source.batches("any", BLOCK_ROWS, seed=seed, epochs=2)
        return [next(i for i, f in enumerate(firsts) if torch.equal(f, b[0])) for b in batches]

    found = order(0)
    assert sorted(found[:6]) == sorted(found[6:]) == list(range(6))
    assert found[:6] != found[6:]
    assert order(1) != found


def test_ranks_share_out_each_batch() -> None:
    source = SyntheticSource(SyntheticTruth(SMALL))
    whole = next(iter(source.batches("any", 700, seed=0)))
    parts = [next(iter(source.batches("any", 700, seed=0, rank=r, world_size=3))) for r in range(3)]
    assert all(torch.equal(part, whole[r::3]) for r, part in enumerate(parts))


def test_a_world_of_a_million_million_rows_costs_nothing_to_open() -> None:
    source = SyntheticSource(SyntheticTruth(SMALL.model_copy(update={"n_rows": 10**9})))
    assert source.n_rows("any") >= 10**9
    assert len(source.block("train", 900_000).x) == BLOCK_ROWS


def perfect(truth: SyntheticTruth) -> SAE:
    """Each feature by itself: the encoder is the pseudo-inverse, exact where there is no noise."""
    n, width = truth.directions.shape
    sae = SAE(TopKConfig(d_sae=n, k=n), width, Origin(hookpoint="any"))
    sae.W_dec.copy_(truth.directions)
    sae.W_enc_rows.copy_(torch.linalg.pinv(truth.directions.double()).T)
    sae.b_dec.copy_(truth.bias)
    sae.b_enc.fill_(-1e-4)
    return sae


@pytest.fixture(scope="module")
def exact() -> SyntheticSource:
    """Without noise, all magnitudes 1."""
    config = SMALL.model_copy(update={"noise_std": 0.0, "magnitude_std": 0.0})
    return SyntheticSource(SyntheticTruth(config))


def test_a_perfect_sae_has_perfect_scores(exact: SyntheticSource) -> None:
    found = score(perfect(exact.truth), exact)
    assert (found.n_rows, found.n_dead) == (8 * BLOCK_ROWS, 0)
    assert found.l0 == found.true_l0 == pytest.approx(4 + 0.5 * 4 * found_share(exact), rel=0.05)
    assert found.fvu < 1e-6
    assert found.fvu_noise == found.fvu_truth == pytest.approx(0, abs=1e-9)
    for value in (found.recovery, found.recovery_by_firing, found.matched_cosine):
        assert value == pytest.approx(1, abs=1e-5)
    for value in (found.recovered, found.uniqueness, found.f1, found.f1_of_features):
        assert value == 1
    assert (found.absorbed, found.parent_missed_with_child, found.parent_missed_alone) == (0, 0, 0)
    assert any(line.split() == ["f1", "1.0000"] for line in found.lines())


def found_share(source: SyntheticSource) -> float:
    """The parents' share of all firings of roots."""
    config = source.truth.config
    roots = source.truth.frequencies[: config.n_roots]
    return float(roots[: config.n_parents].sum() / roots.sum())


def test_planted_absorption_is_told_exactly(exact: SyntheticSource) -> None:
    """The children of parents 0 and 1 have taken their parent into their decoder."""
    sae, truth = perfect(exact.truth), exact.truth
    taken = ((truth.parents == 0) | (truth.parents == 1)).nonzero().squeeze(1)
    for child in taken.tolist():
        parent = int(truth.parents[child])
        sae.W_dec[child] += truth.directions[parent]
        sae.W_enc_rows[parent] -= sae.W_enc_rows[child]
    found = score(sae, exact)
    assert found.fvu < 1e-6  # absorbing costs nothing in reconstruction
    children = (truth.parents >= 0).nonzero().squeeze(1)
    counts = torch.zeros(len(truth.parents), dtype=torch.float64)
    for number in range(8):
        ids = exact.block("heldout", number).codes.feature_ids
        counts += torch.bincount(ids, minlength=len(counts))
    share = float(counts[taken].sum() / counts[children].sum())
    assert found.absorbed == pytest.approx(share, abs=1e-9)
    assert found.parent_missed_with_child == pytest.approx(share, abs=1e-9)
    assert found.parent_missed_alone == 0
    assert found.f1 < 1


def test_a_parent_that_is_silent_without_a_stand_in_is_missed_and_not_absorbed(
    exact: SyntheticSource,
) -> None:
    sae = perfect(exact.truth)
    sae.b_enc[0] = -9
    found = score(sae, exact)
    assert found.absorbed == 0
    assert found.parent_missed_with_child is not None
    assert found.parent_missed_alone is not None
    assert 0.05 < found.parent_missed_with_child < 0.3
    assert 0.05 < found.parent_missed_alone < 0.3
    assert found.n_dead == 1


def test_a_parent_without_a_feature_is_not_counted(exact: SyntheticSource) -> None:
    sae = perfect(exact.truth)
    sae.W_dec[:8] = -sae.W_dec[:8]
    found = score(sae, exact)
    assert (found.absorbed, found.parent_missed_alone) == (None, None)
    assert found.recovered == pytest.approx(52 / 60)


def test_scores_of_a_random_sae_equal_their_definitions() -> None:
    source = SyntheticSource(SyntheticTruth(SMALL))
    truth = source.truth
    torch.manual_seed(0)
    sae = SAE(BatchTopKConfig(d_sae=40, k=4), 96, Origin(hookpoint="any"))
    directions = truth.directions[:40] + 0.08 * torch.randn(40, 96)
    sae.W_dec.copy_(directions / directions.norm(dim=1, keepdim=True))
    sae.W_enc_rows.copy_(sae.W_dec)
    sae.b_dec.copy_(truth.bias)
    sae.threshold.fill_(0.5)
    found = score(sae, source, n_rows=2 * BLOCK_ROWS)
    blocks = [source.block("heldout", i) for i in range(2)]
    x, clean = torch.cat([b.x for b in blocks]), torch.cat([b.clean for b in blocks])
    true = torch.cat([b.codes.to_dense(60) for b in blocks])
    acts = sae.encode(x)
    deviation = (x - x.mean(0)).double().square().sum()
    assert found.fvu == pytest.approx(
        float((x - sae.decode(acts)).double().square().sum() / deviation), rel=1e-4
    )
    assert found.fvu_noise == pytest.approx(
        float((x - clean).double().square().sum() / deviation), rel=1e-4
    )
    cosines = truth.directions @ sae.W_dec.T
    assert found.recovery == pytest.approx(float(cosines.amax(1).mean()), rel=1e-5)
    weights = (true > 0).sum(0).double()
    assert found.recovery_by_firing == pytest.approx(
        float((cosines.amax(1) * weights).sum() / weights.sum()), rel=1e-5
    )
    assert found.uniqueness == len(cosines.argmax(0).unique()) / 40
    f1s = []
    for feature in range(40):
        said, meant = acts[:, feature] > 0, true[:, int(cosines[:, feature].argmax())] > 0
        f1s.append(2 * float((said & meant).sum()) / max(1, int(said.sum() + meant.sum())))
    assert found.f1_of_features == pytest.approx(sum(f1s) / 40, rel=1e-6)
    assert 0.3 < found.f1_of_features < 1
    assert found.fvu_noise < found.fvu_truth < found.fvu


def test_the_limited_truth_leaves_out_the_smallest() -> None:
    source = SyntheticSource(SyntheticTruth(SMALL))
    sae = perfect(source.truth)
    sae.b_enc.fill_(-9)
    sae.b_enc[0] = 0  # one feature alone: L0 is below the truth's
    found = score(sae, source, n_rows=BLOCK_ROWS)
    block = source.block("heldout", 0)
    dense = block.codes.to_dense(60)
    n_kept = round(found.l0 * BLOCK_ROWS)
    kept = torch.where(dense >= dense.flatten().topk(n_kept).values[-1], dense, 0)
    x_hat = kept @ source.truth.directions + source.truth.bias
    deviation = (block.x - block.x.mean(0)).double().square().sum()
    expected = float((block.x - x_hat).double().square().sum() / deviation)
    assert found.fvu_truth == pytest.approx(expected, rel=1e-4)


def test_acts_are_looked_up_by_row_and_feature() -> None:
    torch.manual_seed(0)
    dense = torch.relu(torch.randn(20, 6) - 0.5)
    rows, ids = torch.randint(20, (200,)), torch.randint(-1, 6, (200,))
    found = acts_at(Codes.from_dense(dense), rows, ids, 6)
    expected = torch.where(ids >= 0, dense[rows, ids.clamp(min=0)], 0)
    assert torch.equal(found, expected)
    assert not acts_at(Codes.from_dense(torch.zeros(20, 6)), rows, ids, 6).any()


def test_rows_without_a_feature_are_the_bias() -> None:
    codes = Codes.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    assert rows_of(codes, torch.eye(2)).tolist() == [[0, 2], [0, 0]]


def test_an_untrained_sae_of_the_same_seed_does_not_know_the_truth() -> None:
    source = SyntheticSource(SyntheticTruth(SMALL))
    untrained = initial_sae(TopKConfig(d_sae=60, k=5), source.truth.bias, SMALL.seed)
    found = score(untrained, source, n_rows=BLOCK_ROWS)
    assert found.recovery < 0.5
    assert found.recovered == 0


def test_training_recovers_the_truth_and_can_be_evaluated(tmp_path: Path) -> None:
    source = SyntheticSource(SyntheticTruth(SMALL))
    config = TrainConfig(
        n_steps=300, batch_size=1024, lr=3e-3, init_rows=4096, calibration_rows=8192, device="cpu"
    )
    sae = train(source, "any", BatchTopKConfig(d_sae=64, k=5), config, out=tmp_path).sae
    found = score(sae, source)
    assert found.recovery_by_firing > 0.9
    assert found.f1 > 0.5
    assert found.fvu < 0.2
    report = evaluate(sae, source)
    assert report.fvu == pytest.approx(found.fvu, rel=1e-3)


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves -40 features that aren't children"):
        SyntheticConfig(n_features=60, n_parents=20, n_children=5)
    with pytest.raises(ConfigError, match="first fire in half of the rows"):
        SyntheticConfig(n_features=20, n_parents=0, n_children=0, l0=16)
    source = SyntheticSource(SyntheticTruth(SMALL))
    with pytest.raises(SourceError, match="no block 8 in heldout: it has 8 of 1024 rows"):
        source.block("heldout", 8)
    with pytest.raises(SourceError, match="the SAE is for d_model=5, the truth has 96"):
        score(SAE(TopKConfig(d_sae=8, k=1), 5), source)
