"""How an SAE starts: what the first rows say about the data, and the untrained weights.

Training scales its input so that rows have a mean squared norm of d_model. Everything is
homogeneous in that scale: with x_scaled = s x, the saved SAE has b_enc / s, b_dec / s and
threshold / s, the same W_enc and the same unit-norm W_dec. Its acts are those of training
divided by s, so that on raw activations act * W_dec row is a feature's contribution as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae.autoencoder import SAE, Origin
from sae.config import SAEConfig
from sae.errors import SourceError
from sae.sources import ActivationSource

# The Weiszfeld iteration converges linearly; the mean is already close.
MEDIAN_STEPS = 32
SAMPLE_BATCH = 4096


class InputStatistics(NamedTuple):
    """What a sample of rows says about raw activations.

    center: [d_model], their mean or geometric median. scale: what multiplies rows so that their
    mean squared norm is d_model. variance: mean squared deviation from the mean, raw.
    """

    center: Tensor
    scale: float
    variance: float


def input_statistics(rows: Tensor, center: str = "mean") -> InputStatistics:
    """Statistics of rows [n_rows, d_model], computed in float64.

    center: "mean" or "geometric_median".
    Raises: SourceError if the rows don't vary.
    """
    rows = rows.double()
    mean = rows.mean(0)
    variance = float((rows - mean).square().sum(1).mean())
    if not variance > 0:
        raise SourceError(
            f"{len(rows)} rows of activations have variance {variance}; there is nothing to learn"
        )
    scale = math.sqrt(rows.shape[1] / float(rows.square().sum(1).mean()))
    middle = geometric_median(rows) if center == "geometric_median" else mean
    return InputStatistics(middle.float(), scale, variance)


def geometric_median(rows: Tensor) -> Tensor:
    """The point of least summed distance to rows [n_rows, d_model]: [d_model].

    Source: Weiszfeld's iteration, from the mean; as in Gao et al. 2024, arXiv 2406.04093.
    """
    median = rows.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights = 1 / (rows - median).norm(dim=1).clamp(min=1e-12)
        median = (weights @ rows) / weights.sum()
    return median


def initial_sae(config: SAEConfig, center: Tensor, seed: int, origin: Origin | None = None) -> SAE:
    """An untrained SAE: random unit directions, the encoder their transpose, b_dec at center.

    center: [d_model]. Source: Gao et al. 2024, arXiv 2406.04093, appendix A.1.
    """
    sae = SAE(config, len(center), origin)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(config.d_sae, len(center), generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    sae.W_dec.copy_(directions)
    sae.W_enc_rows.copy_(directions)
    sae.b_dec.copy_(center)
    return sae


def rescale_(sae: SAE, factor: float) -> SAE:
    """Make an SAE of x into one of factor * x, in place: acts and biases grow by factor."""
    for tensor in (sae.b_enc, sae.b_dec, sae.threshold, sae.max_act):
        tensor.mul_(factor)
    return sae


def sample_batches(
    source: ActivationSource, hookpoint: str, n_rows: int, *, seed: int, near_row: int = 0
) -> Iterator[Tensor]:
    """The first n_rows finite train rows of the shuffled order (all, if fewer), in batches.

    near_row: a source that keeps no past takes them near this row of its stream.
    Raises: SourceError if there is none.
    """
    n_available, n_read = source.n_rows(hookpoint), 0
    batch_size = SAMPLE_BATCH if n_available is None else max(1, min(SAMPLE_BATCH, n_available))
    for batch in source.sample(hookpoint, batch_size, seed=seed, near_row=near_row):
        is_finite = batch.isfinite().all(1)
        rows = (batch if is_finite.all() else batch[is_finite])[: n_rows - n_read]
        n_read += len(rows)
        yield rows
        if n_read >= n_rows:
            return
    if n_read == 0:
        raise SourceError(
            f"{hookpoint} has no finite train row among the {n_available or 'sampled'} of the "
            "source; harvest more tokens, or look at the model's precision"
        )


def sample_rows(
    source: ActivationSource, hookpoint: str, n_rows: int, *, seed: int, near_row: int = 0
) -> Tensor:
    """The rows of sample_batches as one tensor: [n, d_model]."""
    return torch.cat(list(sample_batches(source, hookpoint, n_rows, seed=seed, near_row=near_row)))
