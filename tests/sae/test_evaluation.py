"""Evaluation: every figure against its plain definition, baselines on data of known structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sae import (
    SAE,
    BatchTopKConfig,
    EvalConfig,
    Origin,
    Report,
    SourceError,
    TensorSource,
    TopKConfig,
    baseline_of,
    evaluate,
    fvu,
)
from sae.evaluating.fitted import fit_pca
from sae.initialisation import initial_sae

VOCAB, D_MODEL, SEQ = 30, 8, 12


class Block(NamedTuple):
    token_ids: Tensor
    in_split: Tensor


class TinyModel:
    """Embedding, hookpoint "mid", unembedding of what came before too: attention of a kind."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.embed = torch.randn(VOCAB, D_MODEL, generator=generator)
        self.unembed = torch.randn(D_MODEL, VOCAB, generator=generator)
        self.edits: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def stream(self, token_ids: Tensor) -> Tensor:
        x = self.embed[token_ids]
        x[:, 0] *= 1000  # an attention sink
        return x

    def logits(self, token_ids: Tensor, *, grad: bool = False) -> Tensor:
        x = self.stream(token_ids)
        if "mid" in self.edits:
            x = self.edits["mid"](x)
        return self.read_out(x)

    def read_out(self, x: Tensor) -> Tensor:
        y = torch.cat([x[:, :1] / 1000, x[:, 1:]], dim=1)
        return (y.cumsum(1) - 0.5 * y) @ self.unembed / 3

    @contextmanager
    def edit(self, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        self.edits = edits
        yield
        self.edits = {}


class TokenSource(TensorSource):
    """The tiny model's activations and tokens, as a cache would hold them."""

    def __init__(self, lm: TinyModel, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(2)
        self.blocks = []
        rows = []
        for i, length in enumerate(lengths):
            token_ids = torch.randint(VOCAB, (length,), generator=generator)
            in_split = torch.arange(length) >= (3 if i % 2 else 0)
            self.blocks.append(Block(token_ids, in_split))
            rows.append(lm.stream(token_ids[None])[0])
        self.x = torch.cat(rows)
        super().__init__(self.x, self.x, max_norm=100.0)

    def token_blocks(self, *, split: str = "heldout") -> Iterator[Block]:
        return iter(self.blocks)

    def provenance(self, hookpoint: str) -> dict[str, Any]:
        return {"model": "tiny"}


@pytest.fixture
def lm() -> TinyModel:
    return TinyModel()


@pytest.fixture
def source(lm: TinyModel) -> TokenSource:
    return TokenSource(lm, [SEQ] * 9 + [SEQ - 2] * 3)


@pytest.fixture
def sae(source: TokenSource) -> SAE:
    origin = Origin(hookpoint="mid", max_norm=100.0, provenance={"model": "tiny"})
    return initial_sae(
        TopKConfig(d_sae=40, k=4), source.x[source.x.norm(dim=1) < 100].mean(0), 0, origin
    )


def test_figures_equal_their_definitions(sae: SAE, source: TokenSource) -> None:
    report = evaluate(sae, source, config=EvalConfig(batch_size=7))
    x = source.x[source.x.norm(dim=1) <= 100].double()
    acts = sae.encode(x).double()
    x_hat = acts @ sae.W_dec.double() + sae.b_dec.double()
    error, deviation = (x - x_hat).square().sum(1), (x - x.mean(0)).square().sum(1)
    found = report.reconstruction
    assert (report.n_rows, report.n_massive, report.max_norm) == (len(x), 12, 100.0)
    assert found.fvu == pytest.approx(float(error.sum() / deviation.sum()), rel=1e-5)
    assert found.fvu == pytest.approx(float(fvu(x, x_hat)), rel=1e-5)
    assert found.fvu_token_median == pytest.approx(
        float((error / deviation).quantile(0.5)), rel=1e-5
    )
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-5)
    assert found.l0 == pytest.approx(float((acts > 0).sum(1).double().mean()), rel=1e-9)
    density = (acts > 0).double().mean(0)
    assert report.n_dead == int((density == 0).sum())
    assert report.n_dense == int((density > 0.1).sum())


def test_untrained_sae_equals_its_untrained_baseline(sae: SAE, source: TokenSource) -> None:
    report = evaluate(sae, source)
    untrained = report.baselines[0]
    assert untrained.name == "untrained"
    assert untrained.reconstruction.fvu == pytest.approx(report.fvu, rel=1e-4)


def test_untrained_baseline_of_batch_topk_has_the_same_l0(source: TokenSource) -> None:
    sae = initial_sae(
        BatchTopKConfig(d_sae=40, k=4), torch.zeros(D_MODEL), 0, Origin(hookpoint="m")
    )
    report = evaluate(sae, source)
    assert report.baselines[0].reconstruction.l0 == pytest.approx(4, rel=0.05)


def test_pca_of_full_rank_data_leaves_nothing_and_of_less_the_rest() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 5)).Q.T
    x = torch.randn(2000, 5) * torch.tensor([5.0, 4, 3, 2, 1]) @ basis + 7
    assert float(fvu(x, fit_pca(x, 5)(x))) < 1e-9
    centred = (x - x.mean(0)).double()
    squares = torch.linalg.svdvals(centred).square()
    expected = float(squares[2:].sum() / squares.sum())
    assert float(fvu(x, fit_pca(x, 2)(x))) == pytest.approx(expected, rel=1e-4)
    assert fit_pca(x, 99).components.shape == (16, 16)


def test_pca_baseline_has_the_rank_of_the_saes_l0(sae: SAE, source: TokenSource) -> None:
    pca = evaluate(sae, source).baselines[1]
    assert pca.name == "pca"
    assert pca.reconstruction.l0 == 4


def clean_and_replaced(
    lm: TinyModel, source: TokenSource, replace: Callable[[Tensor], Tensor]
) -> tuple[float, float, float, int]:
    """Cross-entropy clean and replaced, and KL, block by block in float64."""
    sums, n_tokens = [0.0, 0.0, 0.0], 0
    for block in source.blocks:
        x = lm.stream(block.token_ids[None])
        edited = torch.where(x.norm(dim=-1, keepdim=True) > 100, x, replace(x))
        logs = [lm.read_out(y).double().log_softmax(-1)[0, :-1] for y in (x, edited)]
        counts, targets = block.in_split[1:], block.token_ids[1:]
        for i, log in enumerate(logs):
            sums[i] += float(functional.nll_loss(log[counts], targets[counts], reduction="sum"))
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(1)
        sums[2] += float(kl[counts].sum())
        n_tokens += int(counts.sum())
    return sums[0] / n_tokens, sums[1] / n_tokens, sums[2] / n_tokens, n_tokens


def test_cross_entropies_equal_their_definitions(
    sae: SAE, source: TokenSource, lm: TinyModel
) -> None:
    report = evaluate(sae, source, lm, EvalConfig(lm_batch_size=4))
    ce = report.cross_entropy
    assert ce is not None
    clean, spliced, kl, n_tokens = clean_and_replaced(lm, source, sae)
    _, zero, _, _ = clean_and_replaced(lm, source, torch.zeros_like)
    mean = source.x[source.x.norm(dim=1) <= 100].mean(0)
    _, mean_ablated, _, _ = clean_and_replaced(lm, source, mean.expand_as)
    assert ce.n_tokens == n_tokens
    assert ce.clean == pytest.approx(clean, rel=1e-5)
    assert ce.spliced == pytest.approx(spliced, rel=1e-5)
    assert ce.zero_ablated == pytest.approx(zero, rel=1e-5)
    assert ce.mean_ablated == pytest.approx(mean_ablated, rel=1e-5)
    assert ce.kl == pytest.approx(kl, rel=1e-4)
    assert ce.recovered == pytest.approx((zero - spliced) / (zero - clean), rel=1e-4)
    assert ce.recovered_from_mean == pytest.approx(
        (mean_ablated - spliced) / (mean_ablated - clean), rel=1e-4
    )
    assert report.ce_recovered == ce.recovered
    assert all(each.spliced is not None for each in report.baselines)


def test_baseline_of_a_trained_sae_has_the_losses_of_that_sae(
    sae: SAE, source: TokenSource, lm: TinyModel
) -> None:
    row = baseline_of(sae, source, "frozen_decoder", "the same SAE", lm=lm)
    report = evaluate(sae, source, lm)
    assert report.cross_entropy is not None
    assert row.reconstruction == report.reconstruction
    assert row.spliced == pytest.approx(report.cross_entropy.spliced, rel=1e-6)
    assert row.recovered == pytest.approx(report.cross_entropy.recovered, rel=1e-6)
    assert row.kl == pytest.approx(report.cross_entropy.kl, rel=1e-6)


def test_perfect_reconstruction_recovers_all(source: TokenSource, lm: TinyModel) -> None:
    sae = SAE(TopKConfig(d_sae=16, k=16), D_MODEL, Origin(hookpoint="mid", max_norm=100.0))
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    sae.W_enc_rows.copy_(both)
    sae.W_dec.copy_(both)
    report = evaluate(sae, source, lm)
    ce = report.cross_entropy
    assert ce is not None
    assert report.fvu == pytest.approx(0, abs=1e-12)
    assert ce.recovered == pytest.approx(1, abs=1e-6)
    assert ce.kl == pytest.approx(0, abs=1e-6)


def test_only_as_many_tokens_are_run_as_asked(sae: SAE, source: TokenSource, lm: TinyModel) -> None:
    config = EvalConfig(n_lm_tokens=5, lm_batch_size=1)
    ce = evaluate(sae, source, lm, config).cross_entropy
    assert ce is not None
    assert ce.n_tokens == SEQ - 1


def test_report_is_written_and_read_back(
    sae: SAE, source: TokenSource, lm: TinyModel, tmp_path: Path
) -> None:
    report = evaluate(sae, source, lm)
    assert Report.read(report.write(tmp_path / "report.json")) == report


def test_report_shows_the_baselines_beside_the_sae(
    sae: SAE, source: TokenSource, lm: TinyModel
) -> None:
    lines = evaluate(sae, source, lm).lines()
    assert [line.split()[0] for line in lines[1:4]] == ["SAE", "untrained", "pca"]
    assert "12 of massive norm left out (above 100)" in "\n".join(lines)
    assert "zero-ablated" in lines[-1]
    without = evaluate(sae, source).lines()
    assert without[1].split()[-1] == "-"


def test_fvu_is_one_for_the_mean_and_refuses_what_it_is_not_defined_for() -> None:
    x = torch.randn(100, 4)
    assert float(fvu(x, x)) == 0
    assert float(fvu(x, x.mean(0).expand_as(x))) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"x has shape \[100, 4\], x_hat \[1, 4\]"):
        fvu(x, x[:1])
    with pytest.raises(ValueError, match="no variance over its 5 rows"):
        fvu(torch.ones(5, 2), torch.zeros(5, 2))


def test_source_that_does_not_fit_is_refused(sae: SAE, source: TokenSource) -> None:
    with pytest.raises(SourceError, match=r"trained at mid, not layers\.9; leave hookpoint out"):
        evaluate(sae, source, hookpoint="layers.9")
    narrow = TensorSource(torch.randn(50, 5), torch.randn(50, 5))
    told = r"holds d_model=5 at mid \(unknown model\); this SAE expects"
    with pytest.raises(SourceError, match=told):
        evaluate(sae, narrow)
    other = SAE(sae.config, D_MODEL, Origin(hookpoint="mid", provenance={"model": "gpt2"}))
    with pytest.raises(SourceError, match="harvested from tiny; this SAE was trained on gpt2"):
        evaluate(other, source)
    nameless = SAE(sae.config, D_MODEL)
    with pytest.raises(SourceError, match="doesn't say where it was trained; give hookpoint"):
        evaluate(nameless, source)
    no_rows = TensorSource(source.x)
    with pytest.raises(SourceError, match="no heldout rows to evaluate on"):
        evaluate(sae, no_rows)


def test_model_without_tokens_is_refused(sae: SAE, source: TokenSource, lm: TinyModel) -> None:
    plain = TensorSource(source.x, source.x, max_norm=100.0)
    with pytest.raises(SourceError, match="no heldout tokens to run a model on"):
        evaluate(sae, plain, lm)


def test_no_limit_on_norms_is_reported_as_none(sae: SAE, source: TokenSource) -> None:
    plain = TensorSource(source.x, source.x, max_norm=math.inf)
    report = evaluate(sae, plain)
    assert report.max_norm is None
    assert report.n_massive == 0
