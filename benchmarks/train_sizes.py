"""Cost of our training step against size: time and peak memory over d_sae and k.

    python benchmarks/train.py --sizes [--figure docs/step_sizes.png] [--threads 2] [--json]

TopK in the fastest mode that a first step shows, each size in a process of its own; beside each
step, in turn, one float32 encoder product of its size.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from machine import show
from steppers import Mode, Problem, Stepper, our_modes
from torch import Tensor
from train_rows import batches_of

D_SAE = tuple(2**n for n in range(12, 18))
K = (16, 32, 64, 128, 256)


def measure(args: argparse.Namespace) -> None:
    """The table, and the figure where one is wanted."""
    if args.figure is not None:
        import_matplotlib()
    x = batches_of(args.acts, 2, args.batch, args.d_model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, x.numpy())
        mode = fastest_mode(file, args)
        sizes = [(d_sae, k) for d_sae in args.d_sae or D_SAE for k in K]
        results = [size(file, x[0], d_sae, k, mode, args) for d_sae, k in sizes]
    show(f"train --sizes: {mode.name}", results, args.json)
    if args.figure is not None:
        draw(results, args.figure, f"TopK, {mode.name}, threads: {args.threads}")


def fastest_mode(file: Path, args: argparse.Namespace) -> Mode:
    """Of ours, at 2^14 features."""
    seconds = {}
    for mode in our_modes("topk"):
        with Stepper(mode, Problem(file, 2**14, args.k, args.threads)) as stepper:
            seconds[mode] = min(stepper.step() for _ in range(args.warm_up + 3))
    return min(seconds, key=lambda mode: seconds[mode])


def size(
    file: Path, x: Tensor, d_sae: int, k: int, mode: Mode, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: milliseconds of the step and the product, their ratio, and the peak memory."""
    print(f"d_sae {d_sae}, k {k}", file=sys.stderr)
    W_enc, steps, products = torch.randn(x.shape[1], d_sae), [], []
    with Stepper(mode, Problem(file, d_sae, k, args.threads)) as stepper:
        for _ in range(args.warm_up):
            stepper.step()
        for _ in range(args.repeat):
            steps.append(stepper.step())
            started = perf_counter()
            x @ W_enc
            products.append(perf_counter() - started)
        peak, imports = stepper.memory_mib()
    return {
        "d_sae": d_sae,
        "k": k,
        "ms": 1000 * median(steps),
        "product_ms": 1000 * median(products),
        "over_product": median(s / p for s, p in zip(steps, products, strict=True)),
        "peak_mib": peak,
        "beyond_imports": peak - imports,
    }


def import_matplotlib() -> Any:
    """Ends the program ahead of the work where it isn't there."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("a figure needs matplotlib: pip install 'saebase[plots]'") from None
    matplotlib.use("Agg")
    return matplotlib


def draw(results: list[dict[str, Any]], file: Path, title: str) -> None:
    """Time, time over the product, and memory against d_sae, a line for each k."""
    import_matplotlib()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    draw_lines(axes[0], results, "ms", 1000, "seconds a step")
    draw_lines(axes[1], results, "over_product", 1, "step over one float32 encoder product")
    draw_lines(axes[2], results, "beyond_imports", 1024, "peak memory beyond imports, GiB")
    dashed = {"ls": "--", "color": "0.35", "lw": 1.3, "label": "encoder product"}
    products = {r["d_sae"]: r["product_ms"] / 1000 for r in results}
    axes[0].plot(list(products), list(products.values()), **dashed)
    axes[1].axhline(1, **dashed)
    axes[1].set_yscale("linear")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_lines(
    axis: Any, results: list[dict[str, Any]], column: str, unit: float, name: str
) -> None:
    """One column against d_sae, both in powers of two and ten, a line for each k."""
    from matplotlib import pyplot, ticker

    widths = sorted({r["d_sae"] for r in results})
    for k, shade in zip(K, np.linspace(0.05, 0.85, len(K)), strict=True):
        values = [r[column] / unit for r in results if r["k"] == k]
        color = pyplot.get_cmap("viridis")(shade)
        axis.plot(widths, values, "o-", color=color, lw=1.8, ms=4, label=f"k = {k}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    finish(axis, widths, name)


def finish(axis: Any, widths: list[int], name: str) -> None:
    """What all axes have: a tick a width, a light grid, no box."""
    axis.set_xticks(widths)
    axis.set_xlabel("d_sae")
    axis.set_title(name, fontsize=10)
    axis.grid(True, which="major", color="0.9", lw=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
