"""The CUDA tier against plain torch and against formulas in float64.

On a GPU its kernels are compiled and run; elsewhere they run under Triton's interpreter, in a
process of their own (Triton has to be told before it is imported), and are compiled for an H100
without being run. Without Triton all of it is skipped: `make test-triton` makes an environment.
No fixture of a conftest is used, so that a lent GPU needs no more than sae does.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import BatchTopKConfig, TensorSource, TopKConfig
from sae.architectures import architecture_of
from sae.architectures.base import Moment
from sae.architectures.jumprelu import JumpReLUConfig
from sae.architectures.matryoshka import MatryoshkaConfig
from sae.codes import Codes
from sae.config import SAEConfig, TrainConfig
from sae.gradients import Weights
from sae.initialisation import input_statistics
from sae.kernels import AdamStep, Kernels, PreActs, kernels_of
from sae.kernels.triton_kernels import TritonKernels
from sae.reading import Batch
from sae.schedule import resolve
from sae.step import step_of
from sae.team import Team
from sae.training_state import TrainingState

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TORCH = Kernels()

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton isn't installed; make test-triton"
)
runs_kernels = pytest.mark.skipif(
    find_spec("triton") is None or not (ON_GPU or IS_INTERPRETED),
    reason="neither a GPU nor Triton's interpreter; the test of the interpreter runs this",
)


@needs_triton
@pytest.mark.skipif(ON_GPU or IS_INTERPRETED, reason="the kernels run in this process")
@pytest.mark.timeout(600)
def test_kernels_give_the_same_results_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-x", "-rA", __file__]
    made = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]
    assert "PASSED" in made.stdout


def triton_selection() -> Any:
    return importlib.import_module("sae.kernels.triton_selection")


def tier() -> TritonKernels:
    return TritonKernels()


def random_pre_acts(
    n_rows: int = 150, d: int = 72, d_sae: int = 600, seed: int = 0, dtype: Any = torch.float32
) -> PreActs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, d, generator=generator, dtype=torch.float64)
    W = torch.randn(d_sae, d, generator=generator, dtype=torch.float64) / d**0.5
    b = 0.1 * torch.randn(d_sae, generator=generator, dtype=torch.float64)
    return PreActs(*(each.to(dtype).to(DEVICE) for each in (x, W, b)))


def scores_as_pre_acts(scores: Tensor) -> PreActs:
    """Pre-activations that are exactly these scores: an identity encoder."""
    eye = torch.eye(scores.shape[1], device=DEVICE)
    return PreActs(scores.to(DEVICE), eye, torch.zeros(scores.shape[1], device=DEVICE))


def exact_scores(pre_acts: PreActs) -> Tensor:
    x, W, b = (each.double() for each in pre_acts)
    return x @ W.T + b


def assert_chosen(codes: Codes, pre_acts: PreActs, expected: Codes) -> None:
    """The expected features, with acts as float64 has them."""
    assert torch.equal(codes.offsets, expected.offsets)
    assert torch.equal(codes.feature_ids, expected.feature_ids)
    scores = exact_scores(pre_acts)[codes.rows(), codes.feature_ids]
    torch.testing.assert_close(codes.acts.double(), scores, rtol=1e-5, atol=1e-5)


def never(pre_acts: PreActs) -> Codes:
    raise AssertionError(f"{len(pre_acts.x)} rows were chosen densely")


def random_codes(n_rows: int, d_sae: int, most: int, seed: int = 0) -> Codes:
    """Rows of 0 to most entries; features at random, the first one in nearly every row."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n_rows, d_sae, generator=generator)
    share = torch.rand(n_rows, 1, generator=generator) * most / d_sae
    dense = torch.where(dense < share, dense + 0.1, 0.0)
    dense[1:, 0] = 1.5
    dense[n_rows // 2] = 0
    return Codes.from_dense(dense).to(DEVICE)


@runs_kernels
@pytest.mark.parametrize(
    ("n_rows", "d", "d_sae", "k"), [(150, 72, 600, 6), (129, 64, 257, 1), (5, 200, 1030, 17)]
)
def test_top_k_is_float32s_without_dense_scores(n_rows: int, d: int, d_sae: int, k: int) -> None:
    pre_acts = random_pre_acts(n_rows, d, d_sae)
    found = triton_selection().top_k_of_rows(pre_acts, k, never)
    assert_chosen(found, pre_acts, TORCH.top_k_of_rows(pre_acts, k))


@runs_kernels
def test_top_k_is_float32s_where_float16_cannot_tell() -> None:
    """Features in pairs that differ by less than float16 resolves, rows of any magnitude."""
    pre_acts = random_pre_acts(40, 72, 600)
    W = pre_acts.W.clone()
    W[1::2] = W[::2] * (1 + 2e-6 * torch.randn(300, 1, device=DEVICE))
    x = pre_acts.x * torch.logspace(-6, 6, 40, device=DEVICE).unsqueeze(1)
    pre_acts = PreActs(x, W * 1e-3, torch.zeros_like(pre_acts.b))
    found, expected = tier().top_k_of_rows(pre_acts, 7), TORCH.top_k_of_rows(pre_acts, 7)
    scores = exact_scores(pre_acts)
    for row in range(40):  # float32s may differ in their last bit: compare what was chosen by value
        ids = found.feature_ids[found.offsets[row] : found.offsets[row + 1]]
        wanted = expected.feature_ids[expected.offsets[row] : expected.offsets[row + 1]]
        a, b = scores[row, ids].sort().values, scores[row, wanted].sort().values
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@runs_kernels
@pytest.mark.parametrize("k", [1, 3, 5])
def test_of_equal_scores_the_first_features_are_chosen(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(-3, 9, (40, 256), generator=generator).float()
    scores[3], scores[4] = -1.0, 0.0
    scores[5] = 7.0
    found = tier().top_k_of_rows(scores_as_pre_acts(scores), k)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(scores).scatter(1, order, scores.gather(1, order)).relu()
    assert torch.equal(found.to_dense(256).cpu(), expected)
    assert_in_order(found)


def assert_in_order(codes: Codes) -> None:
    keys = codes.rows() * 100_000 + codes.feature_ids
    assert bool((keys.diff() > 0).all())


@runs_kernels
@pytest.mark.parametrize("limit", [1.5, 2.0, 0.0, -1.0])
@pytest.mark.parametrize("by_feature", [False, True])
def test_what_lies_above_a_threshold_is_float32s(limit: float, by_feature: bool) -> None:
    pre_acts = random_pre_acts(150, 72, 600)
    threshold = torch.tensor(limit, device=DEVICE)
    if by_feature:
        threshold = limit + torch.rand(600, device=DEVICE) - 0.5
    found = tier().above_threshold(pre_acts, threshold)
    assert_chosen(found, pre_acts, TORCH.above_threshold(pre_acts, threshold))


@runs_kernels
def test_thresholds_need_no_dense_scores_where_codes_are_sparse() -> None:
    pre_acts, threshold = random_pre_acts(), torch.tensor(2.0, device=DEVICE)
    found = triton_selection().above_threshold(pre_acts, threshold, never)
    assert_chosen(found, pre_acts, TORCH.above_threshold(pre_acts, threshold))


@runs_kernels
def test_rows_whose_lists_overflow_are_chosen_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_selection(), "CAPACITY", 32)
    pre_acts, threshold = random_pre_acts(40), torch.tensor(2.0, device=DEVICE)
    pre_acts.x[7] *= 10  # hundreds of features above
    n_dense = []

    def exactly(some: PreActs) -> Codes:
        n_dense.append(len(some.x))
        return TORCH.above_threshold(some, threshold)

    found = triton_selection().above_threshold(pre_acts, threshold, exactly)
    assert_chosen(found, pre_acts, TORCH.above_threshold(pre_acts, threshold))
    assert 1 <= sum(n_dense) < 40


@runs_kernels
def test_no_score_is_further_from_its_estimate_than_the_bound() -> None:
    """On a GPU this also measures the sums of its tensor cores."""
    s = triton_selection()
    for d, spread in ((72, 0.0), (512, 4.0)):
        pre_acts = random_pre_acts(64, d, 300, seed=d)
        x = pre_acts.x * torch.exp2(spread * torch.randn_like(pre_acts.x))
        pre_acts = pre_acts._replace(x=x)
        product = s.Product.of(pre_acts)
        lowest = torch.full((64,), -1e30, device=DEVICE)
        lists = s.append_above(product, lowest, torch.zeros_like(pre_acts.b), 512)
        assert bool((lists.counts == 300).all())
        ids, uppers = lists.ids[:, :300].long(), lists.uppers[:, :300].double()
        exact = exact_scores(pre_acts).gather(1, ids)
        x_, W = product.x, product.W
        errors = (x_.rest + product.depth_error * x_.norm).unsqueeze(1) * W.norm[ids]
        errors += (x_.norm + x_.rest).unsqueeze(1) * W.rest[ids]
        assert bool((exact <= uppers).all())
        assert bool((exact >= uppers - 2.01 * errors - uppers.abs() * 2.0**-20).all())
        assert float((uppers - exact).max()) > 0


@runs_kernels
def test_empty_batches_and_other_dtypes_go_to_plain_torch() -> None:
    empty = random_pre_acts(0)
    assert tier().top_k_of_rows(empty, 3).nnz == 0
    assert tier().above_threshold(empty, torch.tensor(0.5, device=DEVICE)).n_rows == 0
    codes = tier().top_k_of_rows(empty, 3)
    assert tier().reconstruct(codes, empty.x, empty.W).error.shape == (0, 72)
    sums = tier().feature_sums(codes, codes.acts, empty.x, codes.acts, empty.x, 600)
    assert float(sums.of_inputs.abs().max()) == 0
    double = random_pre_acts(30, dtype=torch.float64)
    assert tier().top_k_of_rows(double, 3).acts.dtype == torch.float64


@runs_kernels
@pytest.mark.parametrize(("n_rows", "d", "d_sae"), [(70, 72, 200), (33, 130, 97)])
def test_sums_over_codes_equal_float64s(n_rows: int, d: int, d_sae: int) -> None:
    codes = random_codes(n_rows, d_sae, most=60)
    generator = torch.Generator().manual_seed(1)
    target, x, table = (
        torch.randn(n, d, generator=generator).to(DEVICE) for n in (n_rows, n_rows, d_sae)
    )
    weights = [torch.randn(codes.nnz, generator=generator).to(DEVICE) for _ in range(2)]
    dense, rows, ids = codes.to_dense(d_sae).double(), codes.rows(), codes.feature_ids
    error = target.double() - dense @ table.double()
    found = tier().reconstruct(codes, target, table)
    assert_close(found.error, error)
    assert_close(found.squared_error, error.square().sum())
    assert_close(found.dots, (error[rows] * table.double()[ids]).sum(1))
    assert_close(tier().sum_by_row(codes, table), dense @ table.double())
    dots = (x.double()[rows] * table.double()[ids]).sum(1)
    assert_close(tier().dot_by_entry(codes, x, table), dots)
    sums = tier().feature_sums(codes, weights[0], x, weights[1], target, d_sae)
    of_inputs, of_errors = (
        torch.zeros(d_sae, n_rows, dtype=torch.float64, device=DEVICE).index_put(
            (ids, rows), each.double()
        )
        for each in weights
    )
    assert_close(sums.of_inputs, of_inputs @ x.double())
    assert_close(sums.of_errors, of_errors @ target.double())
    assert_close(sums.of_weights, of_inputs.sum(1))
    assert torch.equal(sums.n_active, torch.bincount(ids, minlength=d_sae))
    assert_close(tier().sum_by_feature(codes, weights[0], x, d_sae), of_inputs @ x.double())
    again = tier().feature_sums(codes, weights[0], x, weights[1], target, d_sae)
    assert all(torch.equal(a, b) for a, b in zip(sums, again, strict=True))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert float((found.double() - expected).abs().max()) <= 3e-6 * float(expected.abs().max())


@runs_kernels
def test_one_row_a_program_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; the interpreter's programs have many rows, or it would take minutes."""
    pre_acts = random_pre_acts(4, 24, 200)
    before = tier().top_k_of_rows(pre_acts, 3)
    sums = tier().feature_sums(before, before.acts, pre_acts.x, before.acts, pre_acts.x, 200)
    error = tier().reconstruct(before, pre_acts.x, pre_acts.W)
    for module in (triton_selection(), importlib.import_module("sae.kernels.triton_launch")):
        monkeypatch.setattr(module, "ROWS", 1)
    after = tier().top_k_of_rows(pre_acts, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = tier().feature_sums(before, before.acts, pre_acts.x, before.acts, pre_acts.x, 200)
    for a, b in zip(
        (*sums, *error), (*again, *tier().reconstruct(before, *pre_acts[:2])), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@runs_kernels
def test_the_projection_equals_plain_torchs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(70, 130, device=DEVICE), dim=1)
    gradient = torch.randn(70, 130, device=DEVICE)
    expected, lean = gradient.clone(), gradient.bfloat16()
    TORCH.remove_along_(expected, rows)
    tier().remove_along_(gradient, rows)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    expected_lean = lean.clone()
    TORCH.remove_along_(expected_lean, rows)
    tier().remove_along_(lean, rows)
    torch.testing.assert_close(lean, expected_lean, rtol=1e-2, atol=1e-3)


@runs_kernels
@pytest.mark.parametrize("shape", [(70, 130), (1500,), (3, 5)])
@pytest.mark.parametrize("is_lean", [False, True])
def test_adam_equals_plain_torchs(shape: tuple[int, ...], is_lean: bool) -> None:
    if is_lean and len(shape) == 1:
        pytest.skip("vectors have no lean Adam")
    for unit_rows in {False, len(shape) == 2}:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator).to(DEVICE)
        square = weight.new_zeros(shape[0] if is_lean else shape)
        mean = torch.zeros_like(weight, dtype=torch.bfloat16 if is_lean else torch.float32)
        ours, theirs = ([each.clone() for each in (weight, mean, square)] for _ in range(2))
        for t in range(1, 4):
            gradient = torch.randn(shape, generator=generator).to(DEVICE)
            gradient = gradient.bfloat16() if is_lean else gradient
            step = AdamStep(1e-3, 0.9, 0.999, t, grad_scale=0.3 if t == 2 else 1.0)
            for kernels, (w, m, v) in ((tier(), ours), (TORCH, theirs)):
                update = kernels.adam_lean_ if is_lean else kernels.adam_
                update(w, gradient, m, v, step, unit_rows=unit_rows)
        # The interpreter cuts to bfloat16 where a GPU rounds.
        atol = 5e-5 if is_lean and not ON_GPU else 3e-6
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=atol)
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-8)


@runs_kernels
def test_a_steps_gradients_equal_dense_autograd_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    d, d_sae, k, n_rows, variance = 40, 256, 4, 60, 3.7
    x = torch.randn(n_rows, d, generator=generator).to(DEVICE)
    made = [
        torch.randn(shape, generator=generator).to(DEVICE) / d**0.5
        for shape in ((d_sae, d), (d_sae, d), (d_sae,), (d,))
    ]
    weights, config = Weights(*made), TopKConfig(d_sae=d_sae, k=k)
    at = Moment(
        x=x - weights.b_dec, target=x - weights.b_dec, weights=weights, learnt={},
        threshold=x.new_zeros(()), coefficient=0.0, progress=0.0, scale=1 / (n_rows * variance),
        widths=(d,), kernels=tier(), team=Team(),
    )  # fmt: skip
    found = step_of(architecture_of(config), config, at, is_tied=True)
    leaves = Weights(*(each.double().requires_grad_() for each in weights))
    pre_acts = (x.double() - leaves.b_dec) @ leaves.W_enc.T + leaves.b_enc
    top = pre_acts.relu().topk(k, dim=1)
    acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values)
    error = x.double() - acts @ leaves.W_dec - leaves.b_dec
    loss = error.square().sum() / (n_rows * variance)
    loss.backward()
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, leaf in leaves._asdict().items():
        assert leaf.grad is not None
        difference = (found.gradients[name].double() - leaf.grad).norm() / leaf.grad.norm()
        assert float(difference) < 1e-5, name


CONFIGS: list[SAEConfig] = [
    TopKConfig(d_sae=256, k=3),
    BatchTopKConfig(d_sae=256, k=3),
    JumpReLUConfig(d_sae=256, coefficient=1e-3),
    MatryoshkaConfig(d_sae=256, k=3),
]


def states(config: SAEConfig, x: Tensor, **settings: Any) -> list[TrainingState]:
    """The same start, with plain torch and with Triton."""
    made = []
    for name in ("torch", "triton"):
        chosen = TrainConfig(
            n_steps=100, batch_size=32, lr=1e-3, warmup_steps=0, kernels=name, device=DEVICE,
            dead_after_tokens=200, **settings,
        )  # fmt: skip
        resolved = resolve(chosen, config, TensorSource(x), "x")
        statistics = input_statistics(Batch(x, x), (x.shape[1],), (x.shape[1],))
        made.append(TrainingState.start(config, resolved, statistics))
    return made


@runs_kernels
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_training_is_the_same_with_either_tier(config: SAEConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    plain, fast = states(config, x)
    assert (plain.sae.kernels.name, fast.sae.kernels.name) == ("torch", "triton")
    for part in x.split(32):
        reports = [state.advance(Batch(part, part)) for state in (plain, fast)]
        assert reports[0] is not None
        assert reports[1] is not None
        assert torch.equal(reports[0].step.n_active, reports[1].step.n_active)
    for name, each in plain.sae.weights._asdict().items():
        difference = getattr(fast.sae.weights, name) - each
        # Adam's first step has the size of lr whatever the gradient's: where that is a sum that
        # cancels to a rounding error, a feature's weights differ by a fraction of lr = 1e-3. Found
        # with BatchTopK: 98 of the encoder's 6,144 weights by more than 1e-6, at most by 1e-4.
        assert float(difference.abs().max()) < 5e-4
        assert float((difference.abs() > 1e-6).float().mean()) < 0.03


@runs_kernels
def test_lean_training_keeps_gradients_and_means_in_bfloat16() -> None:
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    _, state = states(TopKConfig(d_sae=256, k=3), x, optimizer="adam_lean")
    for part in x.split(32):
        assert state.advance(Batch(part, part)) is not None
    tensors = state.to_checkpoint().tensors
    assert tensors["adam.mean.W_dec"].dtype == torch.bfloat16
    assert tensors["adam.square.W_enc"].shape == (256,)
    norms = state.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


H100 = ("cuda", 90, 32)
# Of each kernel that a step spends time in: types of its arguments, its shape at d_model 2304.
FOR_H100: dict[str, tuple[str, dict[str, int], int]] = {
    "triton_product.append_above": (
        "*fp16 *fp16" + 9 * " *fp32" + " *i32 *i32 *fp32 i32 i32 i32 i32 fp32",
        {"BM": 128, "BN": 256, "BK": 64, "GROUP": 16, "EVEN": 1}, 8,
    ),
    "triton_product.group_maxima": (
        "*fp16 *fp16" + 4 * " *fp32" + 4 * " i32",
        {"STRIDE": 16, "SIZE": 32, "BM": 128, "BN": 256, "BK": 64, "GROUP": 16, "EVEN": 1}, 8,
    ),
    "triton_product.round_rows": (
        "*fp32 *fp16 *fp32 *fp32 *fp32 i32 i32", {"ROWS": 1, "BLOCK": 4096}, 8,
    ),
    "triton_choice.narrow_lists": (
        "*i32 *i32" + 5 * " *fp32" + " *i32 *i32 i32 i32 i32 i32 fp32",
        {"ROWS": 1, "WIDTH": 512}, 2,
    ),
    "triton_choice.pack_lists": ("*i32 *i64 *i64 i32", {"ROWS": 1, "WIDTH": 512}, 1),
    "triton_choice.choose_largest": (
        "*fp32 *i64 *fp32 *i8 *i8 i32 i32", {"ROWS": 1, "WIDTH": 128}, 1,
    ),
    "triton_sums.dot_entries": (
        "*fp32 *fp32 *i64 *i64 *fp32 i32 i32 i32", {"ROWS": 1, "ENTRIES": 16, "COLUMNS": 64}, 1,
    ),
    "triton_sums.decode_rows": (
        "*fp32 *i64 *i64" + 5 * " *fp32" + " i32 i32 i32",
        {"ROWS": 1, "ENTRIES": 16, "COLUMNS": 64, "COMPARE": 1}, 1,
    ),
    "triton_sums.sum_features": (
        "*i64 *i64 *i64 *fp32 *fp32 *bf16 *fp32 i32 i32",
        {"ROWS": 1, "ENTRIES": 16, "COLUMNS": 256}, 1,
    ),
    "triton_adam.remove_along": ("*bf16 *fp32 i32 i32", {"ROWS": 1, "BLOCK": 4096}, 16),
    "triton_adam.adam": (
        "*fp32 *fp32 *fp32 *fp32 i32 i32 i64" + 6 * " fp32",
        {"ROWS": 1, "BLOCK": 4096, "UNIT_ROWS": 1}, 16,
    ),
    "triton_adam.adam_lean": (
        "*fp32 *bf16 *bf16 *fp32 i32 i32" + 6 * " fp32",
        {"ROWS": 1, "BLOCK": 4096, "UNIT_ROWS": 1}, 16,
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled under the interpreter")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FOR_H100)
def test_kernels_compile_for_an_h100(name: str) -> None:
    """Without a GPU: types, shapes and shared memory are right, and products use tensor cores."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget(*H100)
    module, _, kernel = name.partition(".")
    function = getattr(importlib.import_module(f"sae.kernels.{module}"), kernel)
    types, shape, num_warps = FOR_H100[name]
    of_arguments = iter(types.split())
    signature = {
        each: "constexpr" if each in shape else next(of_arguments) for each in function.arg_names
    }
    values = {(function.arg_names.index(each),): value for each, value in shape.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, each in enumerate(function.arg_names)
        if signature[each].startswith("*") or each == "d"
    }
    source = compiler.ASTSource(function, signature, values, aligned)
    options = {"num_warps": num_warps, "num_stages": 3}
    made = importlib.import_module("triton").compile(source, target=target, options=options)
    assert made.metadata.shared <= 227 * 1024
    if module == "triton_product" and kernel != "round_rows":
        assert "wgmma.mma_async" in made.asm["ptx"]
        assert "cp.async" in made.asm["ptx"]


@needs_triton
def test_the_tier_says_what_it_lacks() -> None:
    if not (ON_GPU or IS_INTERPRETED):
        assert "CUDA" in str(TritonKernels.missing(torch.device("cpu")))
        assert kernels_of("auto", "auto", "cpu").name != "triton"
    if ON_GPU:
        assert kernels_of("auto", "auto", "cuda").name == "triton"
        assert kernels_of("auto", "auto", "cuda").nominates_in == "float16"
