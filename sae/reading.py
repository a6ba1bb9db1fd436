"""A source's batches as a wiring wants them: what is encoded, and what is reconstructed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.errors import SourceError
from sae.sources import ActivationSource
from sae.wiring import Wiring

SAMPLE_BATCH = 4096


class Batch(NamedTuple):
    """Rows of the same tokens: x [batch, d_in] is encoded, y [batch, d_out] reconstructed."""

    x: Tensor
    y: Tensor

    def is_finite(self) -> Tensor:
        """Rows without NaN and Inf: [batch] bool."""
        finite = self.x.isfinite().all(1)
        return finite if self.y is self.x else finite & self.y.isfinite().all(1)

    def where(self, rows: Tensor) -> Batch:
        """Some of the rows."""
        x = self.x[rows]
        return Batch(x, x if self.y is self.x else self.y[rows])

    def first(self, n: int) -> Batch:
        """The first n rows (all, if fewer)."""
        x = self.x[:n]
        return Batch(x, x if self.y is self.x else self.y[:n])

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        x = self.x.to(device)
        return Batch(x, x if self.y is self.x else self.y.to(device))


def batch_of(acts: Mapping[str, Tensor], wiring: Wiring) -> Batch:
    """A wiring's batch of rows [batch, width] at each hookpoint."""
    x = _side_by_side([acts[each] for each in wiring.reads])
    y = x if wiring.is_tied else _side_by_side([acts[each] for each in wiring.writes])
    return Batch(x, y)


def widths(source: ActivationSource, hookpoints: tuple[str, ...]) -> tuple[int, ...]:
    """Width of the activations at each hookpoint."""
    return tuple(source.d_model(each) for each in hookpoints)


def shared_hookpoints(wirings: Sequence[Wiring]) -> tuple[str, ...]:
    """The hookpoints of several wirings, each once."""
    return tuple(dict.fromkeys(each for wiring in wirings for each in wiring.hookpoints))


def batches(
    source: ActivationSource,
    hookpoints: tuple[str, ...],
    batch_size: int,
    *,
    seed: int,
    start_batch: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """This process's part of each shuffled batch, without end: row i is the same token at each."""
    how: dict[str, Any] = {"start_batch": start_batch, "rank": rank, "world_size": world_size}
    if len(hookpoints) > 1:
        yield from source.aligned_batches(hookpoints, batch_size, seed=seed, epochs=None, **how)
        return
    for x in source.batches(hookpoints[0], batch_size, seed=seed, epochs=None, **how):
        yield {hookpoints[0]: x}


def sample_batches(
    source: ActivationSource, wiring: Wiring, n_rows: int, *, seed: int, near_row: int = 0
) -> Iterator[Batch]:
    """The first n_rows finite train rows of the shuffled order (all, if fewer), in batches.

    near_row: a source that keeps no past takes them near this row of its stream.
    Raises: SourceError if there is none.
    """
    first, n_read = wiring.hookpoints[0], 0
    n_available = source.n_rows(first)
    batch_size = SAMPLE_BATCH if n_available is None else max(1, min(SAMPLE_BATCH, n_available))
    sampled = source.aligned_sample(wiring.hookpoints, batch_size, seed=seed, near_row=near_row)
    for acts in sampled:
        batch = batch_of(acts, wiring)
        is_finite = batch.is_finite()
        batch = batch if is_finite.all() else batch.where(is_finite)
        batch = batch.first(n_rows - n_read)
        n_read += len(batch.x)
        yield batch
        if n_read >= n_rows:
            return
    if n_read == 0:
        raise SourceError(
            f"{wiring.name} has no finite train row among the {n_available or 'sampled'} of the "
            "source; harvest more tokens, or look at the model's precision"
        )


def sample_rows(
    source: ActivationSource, wiring: Wiring, n_rows: int, *, seed: int, near_row: int = 0
) -> Batch:
    """The rows of sample_batches as one batch."""
    parts = list(sample_batches(source, wiring, n_rows, seed=seed, near_row=near_row))
    x = torch.cat([part.x for part in parts])
    return Batch(x, x if wiring.is_tied else torch.cat([part.y for part in parts]))


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
