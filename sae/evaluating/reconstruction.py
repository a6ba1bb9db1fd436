"""Rows and what reconstructs them -> L0, FVU, cosine, and how often each feature is active."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.errors import SourceError
from sae.evaluating.fitted import PCA, LinearMap
from sae.evaluating.held_out import HeldOutRows
from sae.evaluating.report import Reconstruction
from sae.reading import Batch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Reconstructed(NamedTuple):
    """y_hat: [batch, d_model]. n_active: [d_sae] int64, rows each feature was active in."""

    y_hat: Tensor
    n_active: Tensor


class Measured(NamedTuple):
    """A reconstruction over all rows, how many there were, and how often features were active."""

    reconstruction: Reconstruction
    n_rows: int
    n_active: Tensor


Reconstruct = Callable[[Batch], Reconstructed]


def measure(reconstruct: Reconstruct, rows: HeldOutRows) -> Measured:
    """All sums in float64, over all rows, divided once.

    Raises: SourceError if the rows don't vary.
    """
    errors, deviations, cosines, n_active = [], [], [], []
    for batch in rows:
        y_hat, active = reconstruct(batch)
        errors.append((batch.y - y_hat).double().square().sum(1))
        deviations.append((batch.y.double() - rows.mean).square().sum(1))
        cosines.append(torch.cosine_similarity(batch.y, y_hat, dim=1).double())
        n_active.append(active)
    error, deviation = torch.cat(errors), torch.cat(deviations)
    if not deviation.sum() > 0:
        raise SourceError(f"the {len(error)} rows evaluated don't vary, so FVU is undefined")
    counts = torch.stack(n_active).sum(0)
    spread = quantiles(error / deviation.clamp(min=1e-30))
    found = Reconstruction(
        l0=float(counts.sum()) / len(error),
        fvu=float(error.sum() / deviation.sum()),
        fvu_token_median=spread["50%"],
        fvu_token_quantiles=spread,
        cosine=float(torch.cat(cosines).mean()),
    )
    return Measured(found, len(error), counts)


def quantiles(values: Tensor, at: Sequence[float] = QUANTILES) -> dict[str, float]:
    """Quantiles of values [n], linear between neighbours; keyed by percentage, such as "5%"."""
    ordered = values.double().sort().values
    places = torch.tensor(at, dtype=torch.float64) * (len(ordered) - 1)
    low = places.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    found = torch.lerp(ordered.cpu()[low], ordered.cpu()[high], places - low)
    return {f"{100 * q:g}%": float(value) for q, value in zip(at, found, strict=True)}


def sae_reconstructs(sae: SAE) -> Reconstruct:
    """An SAE's reconstruction, through its codes."""

    def reconstruct(batch: Batch) -> Reconstructed:
        codes = sae.encode_sparse(batch.x)
        n_active = torch.bincount(codes.feature_ids, minlength=sae.d_sae)
        return Reconstructed(sae.decode_sparse(codes) + sae.skip(batch.x), n_active)

    return reconstruct


def dense_reconstructs(fitted: PCA | LinearMap) -> Reconstruct:
    """What a dense map makes of what is read."""

    def reconstruct(batch: Batch) -> Reconstructed:
        # Every direction is active in every row, so L0 is the rank.
        n_active = torch.full((fitted.rank,), len(batch.x), device=batch.x.device)
        return Reconstructed(fitted(batch.x), n_active)

    return reconstruct
