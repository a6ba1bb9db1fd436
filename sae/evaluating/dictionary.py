"""Decoder directions and how often features are active -> densities, duplicates, norms."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.config import EvalConfig
from sae.evaluating.reconstruction import Measured, quantiles
from sae.evaluating.report import Dictionary, Histogram

# log10 of the densities that the histogram's bins begin and end at.
LOG_DENSITIES = torch.arange(-6, 0.5, 0.5, dtype=torch.float64)
# Entries of a tile of cosines: 64 MiB in float32.
TILE_ENTRIES = 1 << 24


def describe_dictionary(sae: SAE, own: Measured, config: EvalConfig) -> Dictionary:
    """What the decoder and the densities say, by the definitions of `Dictionary`."""
    alive = (own.n_active > 0).nonzero().squeeze(1)
    compared = _sample(alive, config.n_compared_features, config.seed)
    norms = sae.W_dec.norm(dim=1)[alive]
    cosines = None
    if len(alive) > 1:
        cosines = largest_cosines(sae.W_dec[alive], torch.searchsorted(alive, compared))
    return Dictionary(
        density_histogram=density_histogram(own.n_active[alive].double() / own.n_rows),
        n_compared=len(compared) if cosines is not None else 0,
        duplicate_cosine=config.duplicate_cosine,
        n_duplicates=0 if cosines is None else int((cosines > config.duplicate_cosine).sum()),
        max_cosine_mean=None if cosines is None else float(cosines.double().mean()),
        max_cosine_quantiles=None if cosines is None else quantiles(cosines),
        decoder_norm_quantiles=quantiles(norms) if len(alive) else None,
    )


def largest_cosines(directions: Tensor, which: Tensor) -> Tensor:
    """Each direction's largest cosine with another one: [len(which)].

    directions: [n, width], n >= 2. which: int64, the rows of it that are asked about.
    """
    units = torch.nn.functional.normalize(directions, dim=1)
    step = max(1, TILE_ENTRIES // len(units))
    found = []
    for part in which.split(step):
        cosines = units[part] @ units.T  # [part, n]
        cosines[torch.arange(len(part), device=part.device), part] = -2  # not with itself
        found.append(cosines.amax(1))
    return torch.cat(found)


def density_histogram(densities: Tensor) -> Histogram:
    """Features by log10 of their density [n], each above 0. The first bin has all below it too."""
    logs = densities.double().log10().clamp(min=float(LOG_DENSITIES[0])).cpu()
    bins = torch.bucketize(logs, LOG_DENSITIES[1:-1], right=True)
    counts = torch.bincount(bins, minlength=len(LOG_DENSITIES) - 1)
    return Histogram(edges=tuple(LOG_DENSITIES.tolist()), counts=tuple(counts.tolist()))


def _sample(ids: Tensor, n: int | None, seed: int) -> Tensor:
    """n of ids, ascending, evenly drawn; all where n is None or no smaller."""
    if n is None or len(ids) <= n:
        return ids
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order[:n].sort().values.to(ids.device)]
