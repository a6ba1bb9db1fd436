"""What an SAE must beat: itself before training, and PCA of equal L0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.architectures import architecture_of
from sae.autoencoder import SAE
from sae.initialisation import initial_sae
from sae.kernels.selection import top_of_batch
from sae.reading import Batch

# Rows that the untrained twin's threshold is made from.
TWIN_ROWS = 16_384
# Of the mean variance, added to each in least squares.
RIDGE = 1e-8


class PCA(NamedTuple):
    """Principal components: x_hat = mean + (x - mean) @ components.T @ components.

    mean: [d_model]. components: [rank, d_model], orthonormal.
    """

    mean: Tensor
    components: Tensor

    @property
    def name(self) -> str:
        """Of its row in a report."""
        return "pca"

    @property
    def what(self) -> str:
        """What it is, in a few words."""
        return f"the mean and the first {self.rank} principal components of train rows"

    @property
    def rank(self) -> int:
        """Directions that it keeps."""
        return len(self.components)

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


class LinearMap(NamedTuple):
    """A transcoder's dense rival: y_hat = x @ matrix + bias.

    matrix: [d_in, d_out]. bias: [d_out].
    """

    matrix: Tensor
    bias: Tensor

    @property
    def name(self) -> str:
        """Of its row in a report."""
        return "linear"

    @property
    def what(self) -> str:
        """What it is, in a few words."""
        return "the best linear map of what is read, by least squares over train rows"

    @property
    def rank(self) -> int:
        """Directions that it may use."""
        return min(self.matrix.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """y_hat of x [..., d_in]."""
        return x.to(self.bias.dtype) @ self.matrix + self.bias


def fit_linear_map(rows: Batch) -> LinearMap:
    """Least squares of y on x and a constant, in float64; a trace of ridge keeps it solvable."""
    x_mean, y_mean = rows.x.double().mean(0), rows.y.double().mean(0)
    d_in, d_out = rows.x.shape[1], rows.y.shape[1]
    squares = torch.zeros(d_in, d_in, dtype=torch.float64, device=rows.x.device)
    products = torch.zeros(d_in, d_out, dtype=torch.float64, device=rows.x.device)
    for x, y in zip(rows.x.split(8192), rows.y.split(8192), strict=True):
        centred = x.double() - x_mean
        squares.addmm_(centred.T, centred)
        products.addmm_(centred.T, y.double() - y_mean)
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    matrix = torch.linalg.solve(squares, products)
    return LinearMap(matrix.float(), (y_mean - x_mean @ matrix).float())


def untrained_twin(sae: SAE, rows: Batch, l0: float, seed: int) -> SAE:
    """The same SAE before training: same config and recipe, from train rows, at the same L0.

    b_dec is the targets' mean, a transcoder's b_enc takes that of what is read away; where features
    are chosen by a threshold, it is one for all, which gives an L0 of l0.
    """
    b_dec = rows.y.mean(0, dtype=torch.float64).float()
    twin = initial_sae(sae.config, b_dec, seed, sae.origin, d_in=sae.d_model)
    twin = twin.to(sae.b_dec.device)
    if not twin.is_tied:
        twin.b_enc.copy_(-(twin.W_enc_rows @ rows.x.mean(0, dtype=torch.float64).float()))
    if architecture_of(sae.config).selects_by_threshold:
        some = rows.x[:TWIN_ROWS]
        found = top_of_batch(twin.pre_acts(some), max(1, round(l0 * len(some))), expected=0.0)
        twin.threshold.fill_(float(found.smallest))
    return twin
