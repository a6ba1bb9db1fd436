"""Where activations come from: what sae asks of an activation cache and a language model.

activation_cache's ActivationCache, ActivationStream and LanguageModel satisfy the protocols;
TensorSource makes any tensor a source.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.config import Split
from sae.errors import SourceError


class TokenBlock(Protocol):
    """One packed block of tokens: what a language model is run on."""

    @property
    def token_ids(self) -> Tensor:
        """[seq] int64."""

    @property
    def in_split(self) -> Tensor:
        """[seq] bool: whether each position belongs to the split asked for."""


class ActivationSource(Protocol):
    """Activations at hookpoints, split into train and heldout."""

    def d_model(self, hookpoint: str) -> int:
        """Width of the activations."""

    def n_rows(self, hookpoint: str, *, split: Split = "train") -> int | None:
        """Rows of a split, those of massive norm left out; None for a stream without end."""

    def max_norm(self, hookpoint: str) -> float:
        """Rows of a larger L2 norm are massive; math.inf if none are."""

    def batches(
        self,
        hookpoint: str,
        batch_size: int,
        *,
        seed: int,
        split: Split = "train",
        start_batch: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Tensor]:
        """Shuffled rows, float32 [batch, d_model], one stream across epochs; None is endless.

        The order depends on seed alone; start_batch begins there without reading what lies before.
        """

    def aligned_batches(
        self,
        hookpoints: Sequence[str],
        batch_size: int,
        *,
        seed: int,
        split: Split = "train",
        start_batch: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[dict[str, Tensor]]:
        """Like batches, at several hookpoints: row i is the same token at each."""

    def aligned_sample(
        self, hookpoints: Sequence[str], batch_size: int, *, seed: int, near_row: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Train rows to measure on, once each, in batches: from the beginning of the shuffled order
        where the source keeps it, else from what it holds when row near_row is read."""

    def wants_checkpoint(self, n_rows_read: int, hookpoints: Sequence[str]) -> bool:
        """Whether the source could drop rows if a checkpoint stood after so many rows."""

    def release(self, n_rows_read: int, hookpoints: Sequence[str]) -> None:
        """A durable checkpoint stands after so many rows."""

    def provenance(self, hookpoint: str) -> dict[str, Any]:
        """What the activations were made from, as JSON: model, revision, tokenizer, hashes."""


class EvaluationSource(ActivationSource, Protocol):
    """A source that holds its rows, and the tokens they come from."""

    def n_massive(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows of a split that are left out because their norm is massive."""

    def token_blocks(self, *, split: Split = "heldout") -> Iterator[TokenBlock]:
        """The tokens that the activations of a split come from."""


class SplicedModel(Protocol):
    """A language model whose stream can be edited."""

    def logits(self, token_ids: Tensor, *, grad: bool = False) -> Tensor:
        """[batch, seq] int64 -> [batch, seq, vocab], in the model's dtype.

        grad: whether gradients flow back from them, to what edits put in.
        """

    def edit(self, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> AbstractContextManager[None]:
        """Within the context, x [batch, seq, d_model] at each hookpoint becomes edits[...](x)."""


class KeptRows(ABC):
    """A source whose rows are all there, or can be made again, at one place or another."""

    @abstractmethod
    def batches(
        self,
        hookpoint: str,
        batch_size: int,
        *,
        seed: int,
        split: Split = "train",
        start_batch: int = 0,
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Tensor]:
        """As ActivationSource has it."""

    def aligned_batches(
        self, hookpoints: Sequence[str], batch_size: int, **how: Any
    ) -> Iterator[dict[str, Tensor]]:
        """The same rows for each hookpoint."""
        for x in self.batches(hookpoints[0], batch_size, **how):
            yield dict.fromkeys(hookpoints, x)

    def aligned_sample(
        self, hookpoints: Sequence[str], batch_size: int, *, seed: int, near_row: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """The first epoch."""
        del near_row
        return self.aligned_batches(hookpoints, batch_size, seed=seed, epochs=1)

    def wants_checkpoint(self, n_rows_read: int, hookpoints: Sequence[str]) -> bool:
        """False: all rows stay."""
        del n_rows_read, hookpoints
        return False

    def release(self, n_rows_read: int, hookpoints: Sequence[str]) -> None:  # noqa: B027
        """Nothing: all rows stay."""


class TensorSource(KeptRows):
    """A tensor as a source: every hookpoint names the same rows.

    x: [n_rows, d_model], the train split. heldout: the same for the split of that name (none if
    not given). Rows of an L2 norm above max_norm are left out of both. For several hookpoints see
    PairedTensors.
    Raises: SourceError if a tensor isn't two-dimensional, or widths differ.
    """

    def __init__(
        self, x: Tensor, heldout: Tensor | None = None, *, max_norm: float = math.inf
    ) -> None:
        splits = {"train": x, "heldout": x[:0] if heldout is None else heldout}
        for split, rows in splits.items():
            if rows.dim() != 2 or rows.shape[1] != x.shape[-1]:
                raise SourceError(
                    f"the {split} tensor has shape {list(rows.shape)}; "
                    f"expected [n_rows, {x.shape[-1]}]"
                )
        self._max_norm = max_norm
        self._n_massive: dict[str, int] = {}
        self._rows: dict[str, Tensor] = {}
        for split, rows in splits.items():
            # NaN isn't massive: training has its own rule for it.
            is_massive = rows.float().norm(dim=1) > max_norm
            self._n_massive[split] = int(is_massive.sum())
            self._rows[split] = rows.float()[~is_massive] if is_massive.any() else rows.float()

    def d_model(self, hookpoint: str) -> int:
        """Width of the tensor."""
        del hookpoint
        return self._rows["train"].shape[1]

    def n_rows(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows of a split, those of massive norm left out."""
        del hookpoint
        return len(self._split(split))

    def n_massive(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows of a split that were left out."""
        del hookpoint
        self._split(split)
        return self._n_massive[split]

    def max_norm(self, hookpoint: str) -> float:
        """The norm above which rows are left out."""
        del hookpoint
        return self._max_norm

    def batches(
        self,
        hookpoint: str,
        batch_size: int,
        *,
        seed: int,
        split: Split = "train",
        start_batch: int = 0,
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Tensor]:
        """Rows in a fresh permutation each epoch; only the very last batch may be short."""
        del hookpoint
        rows = self._split(split)
        n_total = math.inf if epochs is None else epochs * len(rows)
        for batch in itertools.count(start_batch):
            start, stop = batch * batch_size, min((batch + 1) * batch_size, n_total)
            if start >= n_total or len(rows) == 0:
                return
            places = torch.arange(start, int(stop))[rank::world_size]
            yield rows[_shuffled(places, len(rows), seed)]

    def token_blocks(self, *, split: Split = "heldout") -> Iterator[TokenBlock]:
        """None: a plain tensor has no tokens."""
        self._split(split)
        return iter(())

    def provenance(self, hookpoint: str) -> dict[str, Any]:
        """The train tensor's shape and hash."""
        rows = self._rows["train"].contiguous()
        digest = hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
        return {
            "source": "tensor",
            "hookpoint": hookpoint,
            "shape": list(rows.shape),
            "sha256": digest,
        }

    def _split(self, split: str) -> Tensor:
        if split not in self._rows:
            raise SourceError(f"no split {split!r}; a tensor source has train and heldout")
        return self._rows[split]


class PairedTensors(TensorSource):
    """Several tensors as a source, one for each hookpoint; row i of all is the same token.

    acts: [n_rows, width] by hookpoint, the train split. heldout: the same, of that split.
    Raises: SourceError as TensorSource, or if they differ in their number of rows.
    """

    def __init__(
        self, acts: Mapping[str, Tensor], heldout: Mapping[str, Tensor] | None = None
    ) -> None:
        counts = {name: len(each) for name, each in acts.items()}
        if len(set(counts.values())) != 1:
            raise SourceError(f"tensors of one source have the same rows; got {counts} of them")
        self._widths = {name: each.shape[1] for name, each in acts.items()}
        side_by_side = [torch.cat(list(each.values()), 1) for each in (acts, heldout or {}) if each]
        super().__init__(*side_by_side)

    def d_model(self, hookpoint: str) -> int:
        """Width of a hookpoint's tensor."""
        if hookpoint not in self._widths:
            raise SourceError(f"no hookpoint {hookpoint!r}; there are {', '.join(self._widths)}")
        return self._widths[hookpoint]

    def batches(self, hookpoint: str, batch_size: int, **how: Any) -> Iterator[Tensor]:
        """Rows of a hookpoint."""
        return (each[hookpoint] for each in self.aligned_batches([hookpoint], batch_size, **how))

    def aligned_batches(
        self, hookpoints: Sequence[str], batch_size: int, **how: Any
    ) -> Iterator[dict[str, Tensor]]:
        """Rows of several."""
        for hookpoint in hookpoints:
            self.d_model(hookpoint)
        for rows in super().batches("", batch_size, **how):
            parts = dict(zip(self._widths, rows.split(list(self._widths.values()), 1), strict=True))
            yield {hookpoint: parts[hookpoint] for hookpoint in hookpoints}


def _shuffled(places: Tensor, n_rows: int, seed: int) -> Tensor:
    """Rows at places of the endless stream in which each epoch is a permutation of its own."""
    if len(places) == 0:
        return places
    ids = torch.empty_like(places)
    for epoch in range(int(places[0]) // n_rows, int(places[-1]) // n_rows + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n_rows, generator=generator)
        is_here = places // n_rows == epoch
        ids[is_here] = order[places[is_here] - epoch * n_rows]
    return ids
