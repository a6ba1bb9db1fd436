"""What an SAE must beat: itself before training, and PCA of equal L0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.calibration import calibrate_threshold_
from sae.initialisation import initial_sae

# Rows that the untrained twin's threshold is made from.
TWIN_ROWS = 16_384


class PCA(NamedTuple):
    """Principal components: x_hat = mean + (x - mean) @ components.T @ components.

    mean: [d_model]. components: [rank, d_model], orthonormal.
    """

    mean: Tensor
    components: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruction of x [..., d_model]."""
        centred = x.to(self.mean.dtype) - self.mean
        return self.mean + centred @ self.components.T @ self.components


def fit_pca(rows: Tensor, rank: int) -> PCA:
    """PCA of rows [n_rows, d_model], centred at their mean; the covariance is taken in float64.

    rank is cut to d_model.
    """
    mean = rows.mean(0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=rows.device)
    for part in rows.split(8192):
        centred = part.double() - mean
        covariance.addmm_(centred.T, centred)
    vectors = torch.linalg.eigh(covariance).eigenvectors  # ascending, one a column
    components = vectors[:, len(mean) - min(rank, len(mean)) :].T.contiguous()
    return PCA(mean.float(), components.float())


def untrained_twin(sae: SAE, rows: Tensor, seed: int) -> SAE:
    """The same SAE before training: same config and recipe, from train rows [n_rows, d_model].

    b_dec is their mean; the threshold, if the architecture has one, gives the same L0.
    """
    twin = initial_sae(sae.config, rows.mean(0, dtype=torch.float64).float(), seed, sae.origin)
    twin = twin.to(sae.b_dec.device)
    calibrate_threshold_(twin, rows[:TWIN_ROWS])
    return twin
