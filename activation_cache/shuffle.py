"""Shuffled batches in bounded memory, from blocks of rows that lie on disk or come as a stream.

In: epochs of blocks (how many rows each holds, and a function that loads some of them) and a seed.
Out: batches. An epoch's blocks are put in a seeded order and taken a window at a time; a window's
rows are yielded in a seeded permutation. The order depends on the seed, the counts and the window
alone, so any batch of any epoch is found without reading what lies before its window, and it is the
same for any number of ranks.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .read_ahead import read_ahead


class Window(Protocol):
    """Rows in memory, at one or several hookpoints."""

    def take(self, places: Tensor) -> dict[str, Tensor]:
        """Rows by number among those that were asked for, hookpoint -> [n, width]."""

    def release(self) -> None:
        """It is used no more: its memory may be."""


class Blocks(NamedTuple):
    """Where the rows of an epoch come from. counts: int64 [n_blocks], rows of each block. load:
    block numbers -> their rows, one block after another. per_window: blocks shuffled together."""

    counts: NDArray[np.int64]
    load: Callable[[NDArray[np.int64]], Window]
    per_window: int


class Epoch(NamedTuple):
    """One pass over some blocks. n_rows: rows in it. blocks: opens it, when its rows are wanted."""

    number: int
    n_rows: int
    blocks: Callable[[], Blocks]


class Shuffled(NamedTuple):
    """A window and the order in which its rows are yielded."""

    window: Window
    order: Tensor


def shuffled_batches(
    epochs: Iterator[Epoch],
    batch_size: int,
    *,
    seed: int,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Batches from number `start_batch` on, running on across epochs; the last may be shorter.

    Of each batch, the rows rank::world_size. The next window is loaded while one is used.
    """
    windows = read_ahead(shuffled_windows(epochs, seed, start_batch * batch_size))
    parts: list[dict[str, Tensor]] = []
    n_in_batch = 0
    for window, order in windows:
        at = 0
        while at < len(order):
            n = min(batch_size - n_in_batch, len(order) - at)
            first = (rank - n_in_batch) % world_size  # this rank's first row among these
            parts.append(window.take(order[at : at + n][first::world_size]))
            at, n_in_batch = at + n, n_in_batch + n
            if n_in_batch == batch_size:
                yield _joined(parts)
                parts, n_in_batch = [], 0
        window.release()
        del window, order  # so that there are never three of them in memory
    if n_in_batch:
        yield _joined(parts)


def shuffled_windows(epochs: Iterator[Epoch], seed: int, skip: int) -> Iterator[Shuffled]:
    """Shuffled windows from row `skip` of the stream of epochs on."""
    for epoch in epochs:
        if skip >= epoch.n_rows:
            skip -= epoch.n_rows
            continue
        blocks = epoch.blocks()
        order = np.random.default_rng([seed, epoch.number]).permutation(len(blocks.counts))
        for number, first in enumerate(range(0, len(order), blocks.per_window)):
            chosen = order[first : first + blocks.per_window]
            n_inside = int(blocks.counts[chosen].sum())
            if skip < n_inside:
                rng = np.random.default_rng([seed, epoch.number, number])
                at = torch.from_numpy(_inverse(rng.permutation(n_inside))[skip:])
                yield Shuffled(blocks.load(chosen), at)
            skip = max(skip - n_inside, 0)


def _inverse(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row i goes to places[i]: which row comes to each place."""
    order = np.empty_like(places)
    order[places] = np.arange(len(places))
    return order


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
