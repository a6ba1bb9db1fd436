"""How an SAE starts: what the first rows say about the data, and the untrained weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.autoencoder import SAE, Origin
from sae.config import SAEConfig
from sae.errors import SourceError
from sae.normalisation import Normalisation, scale_of
from sae.reading import Batch

# The Weiszfeld iteration converges linearly; the mean is already close.
MEDIAN_STEPS = 32


class InputStatistics(NamedTuple):
    """What a sample of rows says.

    normalisation: from raw activations to training's units. b_dec: [d_out], where it starts, in
    those units. variance: mean squared deviation of targets from their mean, in those units.
    """

    normalisation: Normalisation
    b_dec: Tensor
    variance: float


def input_statistics(
    rows: Batch,
    widths_in: tuple[int, ...],
    widths_out: tuple[int, ...],
    *,
    b_dec_init: str = "mean",
    center: bool = False,
) -> InputStatistics:
    """Statistics of a sample of rows, computed in float64.

    widths_in, widths_out: of the hookpoints that lie side by side in x and y. b_dec_init: "mean"
    or "geometric_median". center: whether the mean is taken away before rows are scaled; of what a
    transcoder reads it always is, since it has no b_dec on that side.
    Raises: SourceError if the targets don't vary.
    """
    is_tied = rows.y is rows.x
    out = _part(rows.y, widths_out, center=center)
    into = out if is_tied else _part(rows.x, widths_in, center=True)
    normalisation = Normalisation(*into, *out)
    middle = geometric_median(rows.y) if b_dec_init == "geometric_median" else rows.y.mean(0)
    targets = normalisation.outputs(rows.y).double()
    variance = float((targets - targets.mean(0)).square().sum(1).mean())
    return InputStatistics(normalisation, normalisation.outputs(middle.float()), variance)


def _part(rows: Tensor, widths: tuple[int, ...], *, center: bool) -> tuple[Tensor, Tensor]:
    """Center and scale of each channel of rows [n_rows, sum of widths]."""
    mean = rows.double().mean(0).float()
    if not (rows.double() - mean).square().sum() > 0:
        raise SourceError(
            f"{len(rows)} rows of activations have variance 0; there is nothing to learn"
        )
    middle = mean if center else torch.zeros_like(mean)
    scales = [
        torch.full((part.shape[1],), scale_of(part, its_middle))
        for part, its_middle in zip(rows.split(widths, dim=1), middle.split(widths), strict=True)
    ]
    return middle, torch.cat(scales)


def geometric_median(rows: Tensor) -> Tensor:
    """The point of least summed distance to rows [n_rows, d_model]: [d_model] float64.

    Source: Weiszfeld's iteration, from the mean; as in Gao et al. 2024, arXiv 2406.04093.
    """
    rows = rows.double()
    median = rows.mean(0)
    for _ in range(MEDIAN_STEPS):
        weights = 1 / (rows - median).norm(dim=1).clamp(min=1e-12)
        median = (weights @ rows) / weights.sum()
    return median


def initial_sae(
    config: SAEConfig,
    b_dec: Tensor,
    seed: int,
    origin: Origin | None = None,
    *,
    d_in: int | None = None,
) -> SAE:
    """An untrained SAE: random unit directions, the encoder their transpose.

    b_dec: [d_out], where it starts. d_in: width of what is read; None if it is d_out. Where both
    widths are equal the encoder starts as the decoder's transpose, and else at random too.
    Source: Gao et al. 2024, arXiv 2406.04093, appendix A.1.
    """
    sae = SAE(config, d_in or len(b_dec), origin, d_out=len(b_dec))
    generator = torch.Generator().manual_seed(seed)
    directions = _directions(config.d_sae, len(b_dec), generator)
    sae.W_dec.copy_(directions)
    if sae.d_model != len(b_dec):
        directions = _directions(config.d_sae, sae.d_model, generator)
    sae.W_enc_rows.copy_(directions)
    sae.b_dec.copy_(b_dec)
    return sae


def _directions(n: int, width: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(n, width, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    return rows
