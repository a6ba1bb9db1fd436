"""Which features there are, how often each fires, and which fire together.

Features 0 to n_roots - 1 are roots, the most frequent first; the first n_parents of them are
parents. Child j of parent p is feature n_roots + p * n_children + j.

Roots fire by a Gaussian copula of low rank: with u normal [rank] in each row and f_i a root's
loadings,

    root i fires  <=>  sqrt(1 - v) * eps + clamp(f_i . u, -2 sqrt(v), 2 sqrt(v)) > t_i

where v = |f_i|^2 is the share of variance that roots have in common and t_i is such that i fires
with its own frequency exactly. Frequencies follow Zipf-Mandelbrot's law, 1 / (rank + 16). With a
parent, a row has one of its children or none: siblings exclude each other, and a child never fires
without its parent.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from sae.codes import Codes, offsets_of_sorted
from sae.config import Config

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

# Zipf-Mandelbrot's offset: without it the first features would fire in most rows.
RANK_OFFSET = 16
# What roots have in common is clamped at so many of its standard deviations: it bounds how
# probable a root can become, and so what must be drawn to find out which ones fire.
CLAMP = 2.0
LEAST_MAGNITUDE = 0.1


class SyntheticConfig(Config):
    """A world of features."""

    n_features: int = Field(default=16_384, gt=0, description="True features, children included.")
    d_model: int = Field(default=768, gt=0, description="Width of rows.")
    n_parents: int = Field(default=1024, ge=0, description="Features that have children.")
    n_children: int = Field(default=7, ge=0, description="Children of each parent.")
    child_probability: float = Field(
        default=0.5, ge=0, le=1, description="Chance that a parent fires with one of its children."
    )
    l0: float = Field(default=16.0, gt=0, description="Mean active roots a row.")
    copula_rank: int = Field(default=8, gt=0, description="Causes that roots have in common.")
    copula_variance: float = Field(
        default=0.15, ge=0, lt=1, description="Share of a root's variance that these causes have."
    )
    magnitude_std: float = Field(
        default=0.25, ge=0, description="Standard deviation of magnitudes, whose mean is 1."
    )
    noise_std: float = Field(default=0.02, ge=0, description="Of noise in each coordinate.")
    bias_norm: float = Field(default=2.0, ge=0, description="Norm of what every row has in common.")
    n_rows: int = Field(default=2_097_152, gt=0, description="Rows of the train split.")
    n_heldout_rows: int = Field(default=65_536, gt=0, description="Rows of the heldout split.")
    seed: int = Field(default=0, ge=0, description="Seed of the features and of every row.")

    @model_validator(mode="after")
    def _there_are_roots(self) -> SyntheticConfig:
        if self.n_roots < self.n_parents or self.n_roots < 1:
            raise ValueError(
                f"n_features={self.n_features} leaves {self.n_roots} features that aren't children "
                f"of n_parents={self.n_parents} with n_children={self.n_children}; expected at "
                "least n_parents. Raise n_features, or lower one of them"
            )
        if self.frequencies_of_roots().max() >= 0.5:
            raise ValueError(
                f"l0={self.l0} over {self.n_roots} roots makes the first fire in half of the rows "
                "or more; lower l0, or raise n_features"
            )
        return self

    @property
    def n_roots(self) -> int:
        """Features that aren't children."""
        return self.n_features - self.n_parents * self.n_children

    def frequencies_of_roots(self) -> Float64:
        """Chance that each root fires in a row: [n_roots], most frequent first."""
        weights = 1.0 / (np.arange(self.n_roots) + RANK_OFFSET)
        return np.asarray(self.l0 * weights / weights.sum())

    def shares_of_children(self) -> Float64:
        """Chance of each child, given that its parent fires: [n_children], Zipf's law."""
        weights = 1.0 / np.arange(1, self.n_children + 1)
        return np.asarray(self.child_probability * weights / max(weights.sum(), 1e-300))


class SyntheticTruth:
    """The features of a config: directions, frequencies, and which of them fire in a block of rows.

    directions: [n_features, d_model], unit rows. bias: [d_model].
    frequencies: [n_features] float64, chance to fire in a row.
    parents: [n_features] int64, each feature's parent; -1 for a root.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        # Not torch's generator: an SAE that starts from the same seed would start at the truth.
        rng = np.random.default_rng([config.seed, 0])
        normals = rng.standard_normal((config.n_features + 1, config.d_model), dtype=np.float32)
        units = functional.normalize(torch.from_numpy(normals), dim=1)
        self.directions, self.bias = units[:-1].contiguous(), config.bias_norm * units[-1]
        roots, shares = config.frequencies_of_roots(), config.shares_of_children()
        children = np.outer(roots[: config.n_parents], shares).ravel()
        self.frequencies = torch.from_numpy(np.concatenate([roots, children]))
        self.parents = torch.full((config.n_features,), -1)
        parents = torch.arange(config.n_parents).repeat_interleave(config.n_children)
        self.parents[config.n_roots :] = parents
        loadings = np.random.default_rng([config.seed, 1]).normal(
            size=(config.n_roots, config.copula_rank)
        )
        loadings /= np.linalg.norm(loadings, axis=1, keepdims=True)
        self._loadings = math.sqrt(config.copula_variance) * loadings
        self._thresholds = _thresholds(roots, config.copula_variance)
        top = CLAMP * math.sqrt(config.copula_variance)
        self._most = self._probability(np.full(config.n_roots, top), np.arange(config.n_roots))
        self._rates = np.cumsum(-np.log1p(-self._most))

    def firing(self, n_rows: int, rng: np.random.Generator) -> Codes:
        """Which features fire in n_rows rows, and with what magnitude."""
        rows, features = self._roots_that_fire(n_rows, rng)
        with_child, children = self._children_that_fire(features, rng)
        rows = np.concatenate([rows, rows[with_child]])
        features = np.concatenate([features, children])
        order = np.lexsort((features, rows))
        magnitudes = 1 + self.config.magnitude_std * rng.normal(size=len(order))
        return Codes(
            torch.from_numpy(np.maximum(magnitudes, LEAST_MAGNITUDE).astype(np.float32)),
            torch.from_numpy(features[order]),
            offsets_of_sorted(torch.from_numpy(rows[order]), n_bags=n_rows),
        )

    def _roots_that_fire(self, n_rows: int, rng: np.random.Generator) -> tuple[Int64, Int64]:
        """(row, root) of every firing.

        Each cell is a candidate with the largest chance that it can have, which is drawn as the
        points of a Poisson process (so it costs what fires and not n_rows * n_roots), and is kept
        with its own chance over that one.
        """
        causes = rng.normal(size=(n_rows, self.config.copula_rank))
        n_points = rng.poisson(n_rows * self._rates[-1])
        roots = np.searchsorted(self._rates, rng.random(n_points) * self._rates[-1], side="right")
        cells = np.sort(rng.integers(n_rows, size=n_points) * self.config.n_roots + roots)
        cells = cells[np.diff(cells, prepend=-1) > 0]  # np.unique, at a third of its time
        rows, roots = np.divmod(cells, self.config.n_roots)
        top = CLAMP * math.sqrt(self.config.copula_variance)
        common = np.einsum("ij,ij->i", causes[rows], self._loadings[roots]).clip(-top, top)
        is_kept = rng.random(len(cells)) * self._most[roots] < self._probability(common, roots)
        return rows[is_kept], roots[is_kept]

    def _children_that_fire(self, features: Int64, rng: np.random.Generator) -> tuple[Int64, Int64]:
        """(place among the features that fire, child) of each child."""
        config = self.config
        if config.n_parents * config.n_children == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        at = np.flatnonzero(features < config.n_parents)
        limits = np.cumsum(config.shares_of_children())
        which = np.searchsorted(limits, rng.random(len(at)), side="right")
        at, which = at[which < config.n_children], which[which < config.n_children]
        return at, config.n_roots + features[at] * config.n_children + which

    def _probability(self, common: Float64, roots: Int64) -> Float64:
        """Chance that a root fires, given what it has in common with others."""
        own = math.sqrt(1 - self.config.copula_variance)
        return _normal_cdf((common - self._thresholds[roots]) / own)


def _thresholds(frequencies: Float64, variance: float) -> Float64:
    """t_i such that a root fires with its frequency: bisection over a quadrature of the causes."""
    places = (np.arange(400) + 0.5) / 400
    normal = torch.special.ndtri(torch.from_numpy(places)).numpy().clip(-CLAMP, CLAMP)
    common = math.sqrt(variance) * normal
    low, high = np.full(len(frequencies), -10.0), np.full(len(frequencies), 10.0)
    for _ in range(50):
        middle = (low + high) / 2
        chance = _normal_cdf((common[:, None] - middle) / math.sqrt(1 - variance)).mean(0)
        low = np.where(chance > frequencies, middle, low)
        high = np.where(chance > frequencies, high, middle)
    return np.asarray((low + high) / 2)


def _normal_cdf(x: Float64) -> Float64:
    return np.asarray(torch.special.ndtr(torch.from_numpy(x)).numpy())


def rows_of(codes: Codes, directions: Tensor) -> Tensor:
    """Each row's sum of magnitude * direction: [n_rows, d_model]."""
    return functional.embedding_bag(
        codes.feature_ids,
        directions,
        codes.offsets[:-1],
        mode="sum",
        per_sample_weights=codes.acts,
    )
