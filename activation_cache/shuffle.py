"""Shuffled batches in bounded memory, from blocks of rows that lie on disk.

In: how many rows each block holds, a function that loads one block, and a seed. Out: batches. The
blocks are put in a seeded order and taken a window at a time; a window's rows are scattered into
one tensor by a seeded permutation as they are loaded. The order depends on the seed, the counts and
the window alone, so any batch of any epoch is found without reading what lies before its window.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Blocks(NamedTuple):
    """Where rows come from. counts: int64 [n_blocks], rows of each block. load: block number ->
    its rows [counts[block], width]. per_window: blocks that are shuffled together."""

    counts: NDArray[np.int64]
    load: Callable[[int], Tensor]
    per_window: int


def shuffled_batches(
    blocks: Blocks, batch_size: int, *, seed: int, start_batch: int, epochs: int | None
) -> Iterator[Tensor]:
    """Batches from number `start_batch` on, running on across epochs; the last may be shorter.

    A batch may share the window's memory: copy what is kept.
    """
    tail: Tensor | None = None
    for window in _windows(blocks, seed, start_batch * batch_size, epochs):
        at = 0
        if tail is not None and len(tail):
            at = min(batch_size - len(tail), len(window))
            tail = torch.cat([tail, window[:at]])
            if len(tail) < batch_size:
                continue
            yield tail
        stop = at + (len(window) - at) // batch_size * batch_size
        for first in range(at, stop, batch_size):
            yield window[first : first + batch_size]
        tail = window[stop:].clone()
        del window  # so that there is never a second one in memory
    if tail is not None and len(tail):
        yield tail


def _windows(blocks: Blocks, seed: int, position: int, epochs: int | None) -> Iterator[Tensor]:
    """Shuffled windows from row `position` of the endless stream on, to the end of the epochs."""
    n_rows = int(blocks.counts.sum())
    epoch, skip = divmod(position, n_rows)
    while epochs is None or epoch < epochs:
        order = np.random.default_rng([seed, epoch]).permutation(len(blocks.counts))
        for number, first in enumerate(range(0, len(order), blocks.per_window)):
            chosen = order[first : first + blocks.per_window]
            n_inside = int(blocks.counts[chosen].sum())
            if skip < n_inside:
                rng = np.random.default_rng([seed, epoch, number])
                yield _load_window(blocks, chosen, rng.permutation(n_inside))[skip:]
            skip = max(skip - n_inside, 0)
        epoch += 1


def _load_window(blocks: Blocks, chosen: NDArray[np.int64], places: NDArray[np.int64]) -> Tensor:
    """The rows of the chosen blocks; row i goes to `places[i]`."""
    targets = torch.from_numpy(places)
    window, at = torch.empty(0), 0
    for block in chosen:
        rows = blocks.load(int(block))
        if at == 0:
            window = rows.new_empty(len(targets), *rows.shape[1:])
        window[targets[at : at + len(rows)]] = rows
        at += len(rows)
    return window
