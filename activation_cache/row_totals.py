"""Sums over the ordinary and over the massive rows of a cache, channel by channel.

In: rows, chunk by chunk. Out: moments of the channels, and what makes massive rows massive. Memory
is a few vectors of the rows' width, and a count for each token that a massive row stands on.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_N_CHANNELS = 8
_N_TOKENS = 8
_LEAST_SHARE = 0.01


@dataclass(frozen=True)
class MassiveChannel:
    """A channel in which massive rows are massive.

    share: of the summed squared norms of the massive rows, 0 to 1. mean: value in these rows,
    signed. same_sign: share of these rows in which the value has the sign of the mean.
    """

    channel: int
    share: float
    mean: float
    same_sign: float


@dataclass(frozen=True)
class TokenCount:
    """A token, and the number of massive rows that stand on it."""

    token_id: int
    n_rows: int


@dataclass(frozen=True)
class MassiveRows:
    """The rows that read as massive: finite, and left out for their norm.

    limit: the norm above which a row is massive (inf: none is). share: of the rows read.
    at_first_place: share of the massive rows that stand at place 0 of their block.
    channels: those with over 1% of the squared norm, the largest share first, at most 8.
    tokens: those on which most of these rows stand, at most 8; n_distinct_tokens: of all of them.
    Shares are no number where no row is massive.
    """

    limit: float
    n_rows: int
    share: float
    at_first_place: float
    channels: tuple[MassiveChannel, ...]
    tokens: tuple[TokenCount, ...]
    n_distinct_tokens: int


@dataclass(frozen=True)
class ChannelValue:
    """A channel's figure, and how many times that of the median channel it is."""

    channel: int
    value: float
    over_median: float


class OrdinaryTotals:
    """Moments of the channels, taken around the mean of the first rows: sums in float32 within a
    chunk, in float64 across chunks."""

    def __init__(self, width: int):
        self.n_rows = 0
        self._centre = torch.zeros(width)
        self._sum, self._squares, self._abs = (np.zeros(width) for _ in range(3))

    def add_(self, rows: Tensor) -> None:
        if not len(rows):
            return
        if not self.n_rows:
            self._centre = rows.mean(0)
        self.n_rows += len(rows)
        self._abs += rows.abs().sum(0).double().numpy()
        deviations = rows - self._centre
        self._sum += deviations.sum(0).double().numpy()
        self._squares += deviations.square_().sum(0).double().numpy()

    @property
    def mean(self) -> NDArray[np.float64]:
        return np.asarray(self._over_rows(self._sum) + self._centre.double().numpy())

    @property
    def mean_abs(self) -> NDArray[np.float64]:
        return self._over_rows(self._abs)

    @property
    def variance(self) -> NDArray[np.float64]:
        mean = self._over_rows(self._sum)
        return (self._over_rows(self._squares) - mean**2).clip(min=0)

    @property
    def mean_squared_norm(self) -> float:
        return float((self.variance + self.mean**2).sum())

    @property
    def mean_row(self) -> float:
        """Norm of the mean row over the root of the mean squared norm; 0 where all rows are 0."""
        squares = self.mean_squared_norm
        return float(np.sqrt((self.mean**2).sum() / squares)) if squares else 0.0

    def _over_rows(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        return total / self.n_rows if self.n_rows else np.full_like(total, np.nan)


class MassiveTotals:
    """Totals over massive rows."""

    def __init__(self, width: int, limit: float):
        self.limit = limit
        self._n_rows = self._n_first = 0
        self._sum, self._squares, self._n_positive = (np.zeros(width) for _ in range(3))
        self._tokens: Counter[int] = Counter()

    def add_(self, rows: Tensor, token_ids: Tensor, places: Tensor) -> None:
        values = rows.double().numpy()
        self._n_rows += len(values)
        self._n_first += int((places == 0).sum())
        self._sum += values.sum(0)
        self._squares += (values**2).sum(0)
        self._n_positive += (values > 0).sum(0)
        self._tokens.update(token_ids.tolist())

    def result(self, n_read: int) -> MassiveRows:
        n = self._n_rows
        return MassiveRows(
            limit=self.limit,
            n_rows=n,
            share=n / n_read if n_read else float("nan"),
            at_first_place=self._n_first / n if n else float("nan"),
            channels=self._channels() if n else (),
            tokens=tuple(TokenCount(t, c) for t, c in self._tokens.most_common(_N_TOKENS)),
            n_distinct_tokens=len(self._tokens),
        )

    def _channels(self) -> tuple[MassiveChannel, ...]:
        shares, means = self._squares / self._squares.sum(), self._sum / self._n_rows
        positive = self._n_positive / self._n_rows
        order = np.argsort(-shares, kind="stable")[:_N_CHANNELS]
        return tuple(
            MassiveChannel(
                channel=int(c),
                share=float(shares[c]),
                mean=float(means[c]),
                same_sign=float(positive[c] if means[c] > 0 else 1 - positive[c]),
            )
            for c in order
            if shares[c] > _LEAST_SHARE
        )


def largest(values: NDArray[np.float64]) -> tuple[ChannelValue, ...]:
    """The channels with the largest `values` [width], at most 8; none where there was no row."""
    if np.isnan(values).any():
        return ()
    median = float(np.median(values))
    order = np.argsort(-values, kind="stable")[:_N_CHANNELS]
    return tuple(
        ChannelValue(int(c), float(values[c]), float(values[c] / median) if median else np.inf)
        for c in order
    )
