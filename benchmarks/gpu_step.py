"""A training step on a GPU over one bfloat16 encoder product of its size, and where its time goes.

    python benchmarks/gpu_step.py [--minutes 6] [--k 64] > gpu-step.jsonl

A line a measurement, in JSON: whole steps (both optimizers; TopK, BatchTopK; plain torch where it
is not hopeless), peak memory a parameter, each kernel's part, and other tile shapes of the product.
Sizes go on until the minutes are over. A product's output never exists whole: it is made in blocks,
as the kernels' tiles are. Needs torch with Triton and what sae imports, nothing else.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae import SAE, BatchTopKConfig, TopKConfig, TrainConfig
from sae.config import SAEConfig
from sae.kernels import AdamStep, Kernels, PreActs
from sae.normalisation import Normalisation
from sae.reading import Batch
from sae.training_state import TrainingState


class Size(NamedTuple):
    """What a step costs depends on. optimizers: those whose state fits 80 GB."""

    d_model: int
    d_sae: int
    batch: int
    optimizers: tuple[str, ...] = ("adam", "adam_lean")


SIZES = (
    Size(2304, 65_536, 8_192),
    Size(2304, 131_072, 16_384),
    Size(4096, 65_536, 32_768),
    Size(4096, 131_072, 65_536),
    Size(2304, 1_048_576, 16_384, ("adam_lean",)),
    Size(4096, 1_048_576, 16_384, ("adam_lean",)),
)


def milliseconds(run: Callable[[], Any], repeat: int = 7) -> float:
    """Median time of a call on the GPU, after two that don't count."""
    times = []
    for _ in range(repeat + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def rows(n: int, d_model: int) -> Tensor:
    """Random rows with a spectrum that falls off as a residual stream's does."""
    scale = torch.arange(1, d_model + 1, device="cuda").float().pow(-0.5)
    basis = torch.linalg.qr(torch.randn(d_model, d_model, device="cuda")).Q
    x = (torch.randn(n, d_model, device="cuda") * scale) @ basis
    return x * (d_model**0.5 / x.norm(dim=1).mean())


def product_ms(size: Size) -> float:
    """One bfloat16 encoder product, in blocks of at most 2 GB of output."""
    x = torch.randn(size.batch, size.d_model, device="cuda", dtype=torch.bfloat16)
    height = min(size.d_sae, 2**30 // size.batch)
    W = torch.randn(height, size.d_model, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(size.batch, height, device="cuda", dtype=torch.bfloat16)
    return milliseconds(lambda: torch.mm(x, W.T, out=out)) * size.d_sae / height


def state(config: SAEConfig, size: Size, kernels: str, optimizer: str) -> TrainingState:
    """A training state made on the GPU at once: a host would need minutes for a million rows."""
    with torch.device("cuda"):
        sae = SAE(config, size.d_model)
        for row in range(0, size.d_sae, 65_536):
            part = sae.W_dec.data[row : row + 65_536]
            torch.nn.functional.normalize(torch.randn_like(part), dim=1, out=part)
        sae.weights.W_enc.copy_(sae.W_dec)
        ones, zeros = torch.ones(size.d_model), torch.zeros(size.d_model)
    settings = TrainConfig(
        n_steps=10_000, batch_size=size.batch, lr=1e-4, warmup_steps=0, k_aux=size.d_model // 2,
        kernels=kernels, optimizer=optimizer, device="cuda", dead_after_tokens=10**12, data_seed=0,
    )  # fmt: skip
    fields = {"in_scale": ones, "out_scale": ones.clone()}
    shifts = {name: zeros.clone() for name in Normalisation._fields if name not in fields}
    widths = (size.d_model,)
    return TrainingState(sae, settings, Normalisation(**fields, **shifts), size.d_model, widths)


def steps(size: Size, k: int, product: float) -> Iterator[dict[str, Any]]:
    """Whole steps, and their memory."""
    batches = [rows(size.batch, size.d_model) for _ in range(2)]
    kinds = [(TopKConfig, each, "triton") for each in size.optimizers]
    kinds.append((BatchTopKConfig, size.optimizers[-1], "triton"))
    if size.d_sae <= 65_536 and size.batch <= 8_192:
        kinds.append((TopKConfig, "adam", "torch"))
    for kind, optimizer, kernels in kinds:
        torch.cuda.empty_cache()
        trained = state(kind(d_sae=size.d_sae, k=k), size, kernels, optimizer)
        for i in range(5):  # past the first steps' dense codes
            trained.advance(Batch(batches[i % 2], batches[i % 2]))
        torch.cuda.reset_peak_memory_stats()
        held = sum(each.numel() * 4 for each in batches)
        ms = milliseconds(lambda t=trained: t.advance(Batch(batches[0], batches[0])))
        peak = torch.cuda.max_memory_allocated() - held
        yield {
            "what": f"{kind.__name__.removesuffix('Config')} step, {kernels}, {optimizer}",
            "ms": ms,
            "over_product": ms / product,
            "peak_bytes_a_parameter": peak / (2 * size.d_model * size.d_sae),
            "state_bytes_a_parameter": state_bytes(trained) / (2 * size.d_model * size.d_sae),
        }
        if kernels == "triton" and kind is TopKConfig and optimizer == size.optimizers[-1]:
            yield from parts(trained, batches[0], k, product)
        del trained


def state_bytes(trained: TrainingState) -> int:
    """Weights and what the optimizer keeps."""
    tensors = trained.to_checkpoint().tensors.values()
    return sum(each.numel() * each.element_size() for each in tensors)


def parts(trained: TrainingState, x: Tensor, k: int, product: float) -> Iterator[dict[str, Any]]:
    """Each kernel by itself, on a state in training."""
    from sae.kernels import triton_selection as s

    weights, kernels = trained.sae.weights, trained.sae.kernels
    x = x - weights.b_dec
    pre_acts = PreActs(x, weights.W_enc, weights.b_enc)
    codes = kernels.top_k_of_rows(pre_acts, k)
    rounded = s.Product.of(pre_acts)
    rank = s.sampled_rank(k)
    limits, no_limits = s._row_limits(rounded, rank), torch.zeros_like(weights.b_enc)
    capacity = 1 << (s.SAMPLED * (rank + 4 * round(rank**0.5)) - 1).bit_length()
    lists = s.append_above(rounded, limits, no_limits, capacity)
    dense_rows = []

    def exactly(some: PreActs) -> Any:
        dense_rows.append(len(some.x))
        return Kernels.top_k_of_rows(kernels, some, k)

    s.top_k_of_rows(pre_acts, k, exactly)
    narrowed, _ = s._narrowed(rounded, lists, k)
    gradient = torch.zeros_like(weights.W_dec, dtype=kernels.gradients_in or torch.float32)
    candidates: dict[str, Callable[[], Any]] = {
        "round both operands": lambda: s.Product.of(pre_acts),
        "guess thresholds": lambda: s._row_limits(rounded, rank),
        "product with lists": lambda: s.append_above(rounded, limits, no_limits, capacity),
        "narrow and sort": lambda: s._narrowed(rounded, lists, k),
        "float32 scores": lambda: kernels.dot_by_entry(narrowed, x, weights.W_enc),
        "top k, all of it": lambda: kernels.top_k_of_rows(pre_acts, k),
        "reconstruct": lambda: kernels.reconstruct(codes, x, weights.W_dec),
        "sums by feature": lambda: kernels.feature_sums(
            codes, codes.acts, x, codes.acts, x, len(weights.W_enc)
        ),
        "projection": lambda: kernels.remove_along_(gradient, weights.W_dec),
    }
    for name, run in candidates.items():
        ms = milliseconds(run)
        yield {"what": f"part: {name}", "ms": ms, "over_product": ms / product}
    yield {
        "what": "candidates a row",
        "appended": float(lists.counts.float().mean()),
        "rescored": narrowed.nnz / len(x),
        "dense_rows": sum(dense_rows),
    }
    for tiles in (s.Tiles(128, 128, 64, 16, 4, 4), s.Tiles(128, 128, 64, 16, 8, 4),
                  s.Tiles(128, 256, 64, 8, 8, 4), s.Tiles(256, 128, 64, 8, 8, 3)):  # fmt: skip
        before, s.TILES = s.TILES, tiles
        try:
            ms = milliseconds(candidates["product with lists"], 3)
            yield {"what": f"{tiles}", "ms": ms, "over_product": ms / product}
        except Exception as error:  # noqa: BLE001 — a shape that doesn't fit is a result too
            yield {"what": f"{tiles}", "failed": repr(error)[:200]}
        s.TILES = before
    yield from adams(size_of=weights.W_dec, product=product)


def adams(size_of: Tensor, product: float) -> Iterator[dict[str, Any]]:
    """Both updates of one matrix, where there is room for its state."""
    free, _ = torch.cuda.mem_get_info()
    weight = size_of[: min(len(size_of), free // (size_of.shape[1] * 24))].clone()
    kernels, share = state_kernels(), len(size_of) / len(weight)
    step = AdamStep(1e-6, 0.9, 0.999, 1)
    for name, dtype, square in (
        ("adam_", torch.float32, torch.ones_like(weight)),
        ("adam_lean_", torch.bfloat16, torch.ones_like(weight[:, 0])),
    ):
        mean = torch.zeros_like(weight, dtype=dtype)
        gradient = torch.randn_like(weight).to(dtype)
        update = getattr(kernels, name)
        ms = share * milliseconds(
            lambda u=update, g=gradient, m=mean, v=square: u(weight, g, m, v, step, unit_rows=True)
        )
        yield {"what": f"part: {name} of one matrix", "ms": ms, "over_product": ms / product}


def state_kernels() -> Kernels:
    """The CUDA tier."""
    from sae.kernels.triton_kernels import TritonKernels

    return TritonKernels()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--k", type=int, default=64)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here: benchmarks/gpu.sh runs on one")
    end = time.monotonic() + 60 * args.minutes
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for size in SIZES:
        if time.monotonic() > end:
            print(json.dumps({"not_measured": size._asdict()}), flush=True)
            continue
        product = product_ms(size)
        shown = {"d_model": size.d_model, "d_sae": size.d_sae, "batch": size.batch, "k": args.k}
        print(json.dumps({**shown, "what": "bfloat16 product", "ms": product, **machine}))
        try:
            for each in steps(size, args.k, product):
                print(json.dumps({**shown, **each}), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            print(json.dumps({**shown, "failed": str(error)[:200]}), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
