"""The rows that training steps are timed on: of a cache, or random ones of a like spectrum."""

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor


def random_rows(n: int, d_model: int) -> Tensor:
    """Random rows with a spectrum that falls off as a residual stream's does."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d_model + 1).float().pow(-0.5)
    basis = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator)).Q
    return (torch.randn(n, d_model, generator=generator) * scale) @ basis * 10


def cached_rows(folder: Path, n: int) -> Tensor:
    """Shuffled rows of a cache's first hookpoint; those of massive norm (sinks) are left out.

    Ends the program where the cache has fewer.
    """
    from activation_cache import ActivationCache  # a lent GPU machine has torch and no more

    cache = ActivationCache.open(folder)
    hookpoint = cache.hookpoints[0]
    batches = cache.batches(hookpoint, n, seed=0, split="all", epochs=1)
    rows = next(islice(batches, 1), torch.empty(0))
    if len(rows) < n:
        raise SystemExit(f"{folder} has {len(rows)} rows at {hookpoint}, this needs {n}")
    return rows


def centred_and_scaled(rows: Tensor) -> Tensor:
    """Rows without their mean, of a mean squared norm of d_model."""
    rows = rows - rows.mean(0)
    scaled: Tensor = rows * (rows.shape[1] / rows.square().sum(1).mean()).sqrt()
    return scaled


def batches_of(folder: Path | None, n_batches: int, batch: int, d_model: int) -> Tensor:
    """[n_batches, batch, d_model], of the cache where one is given."""
    n = n_batches * batch
    rows = random_rows(n, d_model) if folder is None else cached_rows(folder, n)
    return centred_and_scaled(rows).view(n_batches, batch, -1)
