"""The compiled kernels against naive formulas in float64, and their choices against dense ones."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae import ConfigError
from sae.codes import Codes
from sae.gradients import AuxK, Weights, add_auxk_
from sae.kernels import AdamStep, CompiledKernels, Kernels, PreActs, kernels_of, library
from sae.kernels.recycling import Recycler
from sae.kernels.selection import above_threshold, top_k_of_rows

CPU = torch.device("cpu")


@pytest.fixture
def kernels() -> CompiledKernels:
    if (reason := CompiledKernels.missing(CPU)) is not None:
        pytest.skip(reason)
    return CompiledKernels("int8")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class Case(NamedTuple):
    """How hard a choice is made. spread: of features around a common one."""

    n_rows: int = 300
    d: int = 24
    d_sae: int = 200
    spread: float = 1.0
    scale: float = 1.0


CASES = {
    "plain": Case(),
    "several blocks of rows": Case(n_rows=700),
    "widths that nothing divides": Case(n_rows=131, d=77, d_sae=1001),
    "close": Case(spread=0.1),
    "very close": Case(spread=0.003),
    "many features": Case(n_rows=70, d=64, d_sae=6000),
    "huge": Case(scale=1e5),
    "beyond the kernels": Case(scale=1e17),
    "tiny": Case(scale=1e-12),
    "denormal": Case(scale=1e-39),
    "one of each": Case(n_rows=1, d=1, d_sae=5),
    "no rows": Case(n_rows=0),
}


def make(case: Case, seed: int = 0) -> PreActs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = draw(case.n_rows, case.d) * torch.rand(case.n_rows, 1, generator=generator) * 3 + 1
    W = draw(case.d) + case.spread * draw(case.d_sae, case.d)
    return PreActs(case.scale * x, W, case.scale * 0.3 * case.spread * draw(case.d_sae))


def assert_same_choice(found: Codes, expected: Codes) -> None:
    assert torch.equal(found.offsets, expected.offsets)
    assert torch.equal(found.feature_ids, expected.feature_ids)
    scale = float(expected.acts.abs().max()) if expected.nnz else 1.0
    torch.testing.assert_close(found.acts, expected.acts, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("k", [1, 5, 32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_top_k_is_that_of_dense_float32(kernels: CompiledKernels, case: Case, k: int) -> None:
    pre_acts, k = make(case), min(k, case.d_sae)
    assert_same_choice(kernels.top_k_of_rows(pre_acts, k), top_k_of_rows(pre_acts, k))


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_above_threshold_is_that_of_dense_float32(
    kernels: CompiledKernels, case: Case, part: float
) -> None:
    pre_acts = make(case)
    scores = (pre_acts.x.double() @ pre_acts.W.double().T + pre_acts.b).flatten()
    threshold = between(scores, part) if case.n_rows else torch.tensor(1.0)
    assert_same_choice(
        kernels.above_threshold(pre_acts, threshold), above_threshold(pre_acts, threshold)
    )
    each = threshold * torch.linspace(0.9, 1.1, case.d_sae)
    assert_same_choice(kernels.above_threshold(pre_acts, each), above_threshold(pre_acts, each))


def between(scores: Tensor, part: float) -> Tensor:
    """A threshold in the middle of the widest gap near that quantile: rounding passes no score."""
    ordered = scores.sort().values
    first = int(part * (len(ordered) - 1))
    gaps = ordered[first : first + 10].diff()
    if not len(gaps):
        return ordered[first].float()
    widest = first + int(gaps.argmax())
    return ((ordered[widest] + ordered[widest + 1]) / 2).float()


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_thresholds_that_are_not_positive_find_negative_acts_too(
    kernels: CompiledKernels, threshold: float
) -> None:
    pre_acts = make(Case(d_sae=33))
    found = kernels.above_threshold(pre_acts, torch.tensor(threshold))
    assert_same_choice(found, above_threshold(pre_acts, torch.tensor(threshold)))
    assert (found.acts.min() < 0) == (threshold < 0)


def test_of_equal_scores_the_first_features_are_chosen(kernels: CompiledKernels) -> None:
    few = make(Case(d_sae=40))
    pre_acts = PreActs(few.x, few.W.repeat(7, 1), few.b.repeat(7))
    for k in (3, 10, 100):
        assert_same_choice(kernels.top_k_of_rows(pre_acts, k), top_k_of_rows(pre_acts, k))
    all_equal = PreActs(few.x, few.W[:1].expand(5000, -1).contiguous(), torch.zeros(5000))
    assert_same_choice(kernels.top_k_of_rows(all_equal, 9), top_k_of_rows(all_equal, 9))


def test_the_choice_is_made_here_and_not_handed_on(
    kernels: CompiledKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests before would pass with plain torch as well."""

    def refuse(*args: object) -> Codes:
        raise AssertionError("plain torch was asked")

    monkeypatch.setattr(Kernels, "top_k_of_rows", refuse)
    monkeypatch.setattr(Kernels, "above_threshold", refuse)
    for name in ("plain", "widths that nothing divides", "close", "huge", "tiny", "many features"):
        pre_acts = make(CASES[name])
        kernels.top_k_of_rows(pre_acts, 5)
        kernels.above_threshold(pre_acts, top_k_of_rows(pre_acts, 5).acts.mean())
    with pytest.raises(AssertionError, match="plain torch was asked"):
        kernels.top_k_of_rows(make(CASES["beyond the kernels"]), 5)


def test_a_sample_that_misleads_is_found_out(kernels: CompiledKernels) -> None:
    """Features that the first cut is guessed from are strong, and all others weak."""
    pre_acts = make(Case(n_rows=64, d_sae=6000))
    n_panels = 6000 // 48
    is_sampled = torch.arange(6000) % n_panels < 3
    W = torch.where(is_sampled.unsqueeze(1), pre_acts.W, 0.01 * pre_acts.W)
    for misleading in (W, torch.where(is_sampled.unsqueeze(1), 0.01 * pre_acts.W, pre_acts.W)):
        hard = pre_acts._replace(W=misleading)
        for k in (32, 400):
            assert_same_choice(kernels.top_k_of_rows(hard, k), top_k_of_rows(hard, k))


def test_rows_that_are_zero_or_very_wide_are_chosen_from_too(kernels: CompiledKernels) -> None:
    pre_acts = make(Case(d_sae=3000))
    pre_acts.x[3] = 0
    pre_acts.x[5] *= 1e6  # everything positive is far above any threshold
    pre_acts.x[:, 7] *= 1e3  # one channel sets the scale of every row
    assert_same_choice(kernels.top_k_of_rows(pre_acts, 9), top_k_of_rows(pre_acts, 9))
    acts = top_k_of_rows(pre_acts, 9).acts
    threshold = between(acts.double(), 0.5)
    expected = above_threshold(pre_acts, threshold)
    assert_same_choice(kernels.above_threshold(pre_acts, threshold), expected)


def test_not_a_number_is_left_to_plain_torch(kernels: CompiledKernels) -> None:
    pre_acts = make(Case())
    pre_acts.x[2, 3] = torch.nan
    found = kernels.above_threshold(pre_acts, torch.tensor(2.0))
    assert_same_choice(found, above_threshold(pre_acts, torch.tensor(2.0)))


class Sparse(NamedTuple):
    codes: Codes
    table: Tensor
    target: Tensor
    dense: Tensor  # the codes in float64


@pytest.fixture(params=[(90, 24, 50), (300, 577, 40), (64, 4100, 9)], ids=str)
def sparse(request: pytest.FixtureRequest) -> Sparse:
    n_rows, d, d_sae = request.param
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(n_rows, d_sae, generator=generator) * 2
    acts *= torch.rand(n_rows, d_sae, generator=generator) < 0.2
    acts[3], acts[:, 4] = 0, 0  # a row and a feature without entries
    table = torch.randn(d_sae, d, generator=generator)
    target = torch.randn(n_rows, d, generator=generator)
    return Sparse(Codes.from_dense(acts), table, target, acts.double())


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-6 * scale)


def test_rows_are_decoded_and_compared_with_their_target(
    kernels: CompiledKernels, sparse: Sparse
) -> None:
    codes, table, target, dense = sparse
    decoded = dense @ table.double()
    error = target.double() - decoded
    found = kernels.reconstruct(codes, target, table)
    assert_close(found.error, error)
    assert float(found.squared_error) == pytest.approx(float(error.square().sum()), rel=1e-6)
    dots = (error @ table.double().T)[codes.rows(), codes.feature_ids]
    assert_close(found.dots, dots)
    assert_close(kernels.sum_by_row(codes, table), decoded)
    assert_close(kernels.dot_by_entry(codes, found.error, table), dots)


def test_sums_by_feature_are_those_of_dense_products(
    kernels: CompiledKernels, sparse: Sparse
) -> None:
    codes, _, target, dense = sparse
    errors, weights = target.flip(0).contiguous(), torch.randn(codes.nnz)
    found = kernels.feature_sums(codes, weights, target, codes.acts, errors, dense.shape[1])
    of_weights = Codes(weights.double(), codes.feature_ids, codes.offsets).to_dense(dense.shape[1])
    assert_close(found.of_inputs, of_weights.T @ target.double())
    assert_close(found.of_errors, dense.T @ errors.double())
    assert_close(found.of_weights, of_weights.sum(0))
    assert torch.equal(found.n_active, (dense > 0).sum(0))
    alone = kernels.sum_by_feature(codes, weights, target, dense.shape[1])
    assert torch.equal(alone, found.of_inputs)


def test_gradients_along_rows_are_removed(kernels: CompiledKernels) -> None:
    gradient, rows = torch.randn(50, 77), torch.nn.functional.normalize(torch.randn(50, 77))
    along = (gradient.double() * rows.double()).sum(1, keepdim=True)
    expected = gradient.double() - along * rows.double()
    kernels.remove_along_(gradient, rows)
    assert_close(gradient, expected)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("shape", [(50, 77), (1001,)], ids=str)
def test_adam_is_its_formula(
    kernels: CompiledKernels, shape: tuple[int, ...], unit_rows: bool
) -> None:
    unit_rows = unit_rows and len(shape) == 2
    weight, mean, square = torch.randn(shape), torch.zeros(shape), torch.zeros(shape)
    expected, m, v = (each.double() for each in (weight, mean, square))
    for t in range(1, 4):
        gradient = torch.randn(shape)
        g = gradient.double() * 0.3
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        size = (v / (1 - 0.999**t)).sqrt() + 1e-8
        expected = expected - 0.01 * (m / (1 - 0.9**t)) / size
        if unit_rows:
            expected = expected / expected.norm(dim=1, keepdim=True)
        step = AdamStep(0.01, 0.9, 0.999, t, 0.3)
        kernels.adam_(weight, gradient, mean, square, step, unit_rows=unit_rows)
        for ours, theirs in ((weight, expected), (mean, m), (square, v)):
            assert_close(ours, theirs)


def test_results_do_not_depend_on_the_number_of_threads(
    kernels: CompiledKernels, sparse: Sparse, two_threads: None
) -> None:
    pre_acts, (codes, table, target, _) = make(CASES["several blocks of rows"]), sparse
    results = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        weights = torch.linspace(-1, 1, codes.nnz)
        sums = kernels.feature_sums(codes, weights, target, codes.acts, target, len(table))
        chosen = kernels.top_k_of_rows(pre_acts, 5)
        above = kernels.above_threshold(pre_acts, torch.tensor(8.0))
        results.append((*chosen, *above, *kernels.reconstruct(codes, target, table), *sums))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_other_dtypes_are_left_to_plain_torch(kernels: CompiledKernels, sparse: Sparse) -> None:
    codes, table, target, dense = sparse
    in_double = Codes(codes.acts.double(), codes.feature_ids, codes.offsets)
    found = kernels.reconstruct(in_double, target.double(), table.double())
    assert found.error.dtype == torch.float64
    torch.testing.assert_close(found.error, target.double() - dense @ table.double())


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setattr(library, "_cache_folder", lambda: tmp_path / "cache")
    library.load.cache_clear()
    library.missing.cache_clear()
    yield tmp_path
    library.load.cache_clear()
    library.missing.cache_clear()


def test_without_a_compiler_plain_torch_is_used(
    no_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "COMPILERS", ("no-such-compiler",))
    assert kernels_of("auto", "auto", CPU).name == "torch"
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler|this CPU has no"):
        kernels_of("compiled", "auto", CPU)


def test_processors_without_bfloat16_choose_alike(
    no_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-mno-avx512bf16"))
    if (missing := CompiledKernels.missing(CPU)) is not None:
        pytest.skip(missing)
    for case in (CASES["close"], CASES["widths that nothing divides"]):
        pre_acts = make(case)
        found = CompiledKernels("int8").top_k_of_rows(pre_acts, 5)
        assert_same_choice(found, top_k_of_rows(pre_acts, 5))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "failed with status 3"),
        ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "error: no such thing"),
        ("exit 0", "wrote no library"),
    ],
)
def test_with_a_broken_compiler_plain_torch_is_used(
    no_library: Path, script: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not set(library.NEEDED) <= library._cpu_flags():
        pytest.skip("this CPU lacks what the kernels need")
    compiler = no_library / "broken"
    compiler.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit 0; fi\n{script}\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(library, "COMPILERS", (str(compiler),))
    missing = CompiledKernels.missing(CPU)
    assert missing is not None
    assert said in missing
    assert "\n" not in missing
    assert kernels_of("auto", "auto", CPU).name == "torch"
    assert not list((no_library / "cache").iterdir())


def _build_in(folder: str) -> str | None:
    library._cache_folder = lambda: Path(folder)  # type: ignore[assignment]
    library.load.cache_clear()
    library.missing.cache_clear()
    return library.missing()


def test_two_processes_may_build_at_once(kernels: CompiledKernels, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        told = pool.map(_build_in, [str(tmp_path)] * 2, chunksize=1)
    assert told == [None, None]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    assert _build_again(tmp_path) is None


def _build_again(folder: Path) -> str | None:
    """Loading what is there needs no compiler run beyond its version."""
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        told: str | None = pool.apply(_build_in, (str(folder),))
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    return told


def test_a_gpu_is_told_that_these_are_for_the_cpu() -> None:
    assert CompiledKernels.missing(torch.device("cuda")) == "they are for the CPU"


@pytest.mark.parametrize("k", [7, 150])
@pytest.mark.parametrize("tier", [Kernels, CompiledKernels])
def test_auxk_on_codes_is_auxk_on_dense_acts(
    tier: type[Kernels], k: int, kernels: CompiledKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W_enc, b_enc = make(Case(n_rows=600, d=24, d_sae=300))
    error, dead = torch.randn(600, 24), torch.arange(50, 250)
    weights = Weights(W_enc, torch.randn(300, 24), b_enc, torch.zeros(24))
    found = []
    for part in (0.0, 2.0):  # densely, and on codes
        monkeypatch.setattr(tier, "sparse_below", part)
        gradients = Weights(*(torch.ones_like(each) for each in weights))
        ours = tier("int8" if tier is CompiledKernels else "float32")
        loss = add_auxk_(gradients, x, error, weights, AuxK(dead, k, 1 / 32), 0.1, ours)
        found.append((loss, *gradients))
    for dense, on_codes in zip(*found, strict=True):
        assert_close(on_codes, dense.double())
    assert float(found[0][1][60].abs().max()) > 1


def test_memory_is_used_again_only_when_nobody_holds_it() -> None:
    recycler = Recycler()
    first = recycler.empty(1024, 1024)
    part, address = first[3:].fill_(7), first.data_ptr()
    del first
    second = recycler.empty(1024, 1024)
    assert second.data_ptr() != address  # a part of the first is held
    assert (part == 7).all()
    as_numpy = part.numpy()
    del part
    assert recycler.empty(1024, 1024).data_ptr() != address
    assert as_numpy[0, 0] == 7
    del as_numpy
    assert recycler.empty(1024, 1024).data_ptr() == address
    held = [recycler.empty(1024, 1024) for _ in range(9)]
    assert len({each.data_ptr() for each in held}) == 9
    assert recycler.empty(5, 3).shape == (5, 3)
