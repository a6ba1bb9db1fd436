"""A truth as an ActivationSource: rows are made block by block as they are asked for.

A block of 1,024 rows depends on the seed, the split and its number alone, so any batch of any
stream is reached without making what lies before it, and nothing is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.codes import Codes
from sae.config import Split
from sae.errors import SourceError
from sae.sources import KeptRows, TokenBlock
from sae.synthetic.truth import SyntheticTruth, rows_of

BLOCK_ROWS = 1024
_SPLITS: dict[str, int] = {"train": 0, "heldout": 1}


class TrueRows(NamedTuple):
    """x: [n, d_model]. codes: the features that fired, and their magnitudes. clean: x without its
    noise."""

    x: Tensor
    codes: Codes
    clean: Tensor


class SyntheticSource(KeptRows):
    """Rows of a truth; every hookpoint names the same ones. Splits are whole blocks of 1,024 rows.

    The order of a stream is that of its blocks, a permutation for each seed and epoch; rows within
    a block are independent of each other, so they stay as they are.
    """

    def __init__(self, truth: SyntheticTruth) -> None:
        self.truth = truth
        config = truth.config
        self._n_blocks = {
            "train": -(-config.n_rows // BLOCK_ROWS),
            "heldout": -(-config.n_heldout_rows // BLOCK_ROWS),
        }

    def d_model(self, hookpoint: str) -> int:
        """Width of rows."""
        del hookpoint
        return self.truth.config.d_model

    def n_rows(self, hookpoint: str, *, split: Split = "train") -> int:
        """Rows of a split."""
        del hookpoint
        return self._blocks(split) * BLOCK_ROWS

    def n_massive(self, hookpoint: str, *, split: Split = "train") -> int:
        """0: no row is left out."""
        del hookpoint
        self._blocks(split)
        return 0

    def max_norm(self, hookpoint: str) -> float:
        """inf: no row is left out."""
        del hookpoint
        return math.inf

    def block(self, split: Split, number: int) -> TrueRows:
        """Block `number` of a split, with its truth. Raises: SourceError if there is none."""
        if not 0 <= number < self._blocks(split):
            raise SourceError(
                f"no block {number} in {split}: it has {self._blocks(split)} of {BLOCK_ROWS} rows"
            )
        config = self.truth.config
        rng = np.random.default_rng([config.seed, 2 + _SPLITS[split], number])
        codes = self.truth.firing(BLOCK_ROWS, rng)
        clean = rows_of(codes, self.truth.directions) + self.truth.bias
        noise = rng.standard_normal((BLOCK_ROWS, config.d_model), dtype=np.float32)
        return TrueRows(clean + config.noise_std * torch.from_numpy(noise), codes, clean)

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
        """As ActivationSource says; only the very last batch may be short."""
        n_rows = self.n_rows(hookpoint, split=split)
        n_total = math.inf if epochs is None else epochs * n_rows
        order, held = _BlockOrder(self._blocks(split), seed), (-1, torch.zeros(0))
        for batch in itertools.count(start_batch):
            start, stop = batch * batch_size, min((batch + 1) * batch_size, n_total)
            if start >= n_total:
                return
            parts = []
            while start < stop:
                place = start // BLOCK_ROWS
                if held[0] != place:
                    held = (place, self.block(split, order[place]).x)
                end = min(int(stop), (place + 1) * BLOCK_ROWS)
                parts.append(held[1][start - place * BLOCK_ROWS : end - place * BLOCK_ROWS])
                start = end
            yield torch.cat(parts)[rank::world_size]

    def token_blocks(self, *, split: Split = "heldout") -> Iterator[TokenBlock]:
        """None: there are no tokens."""
        self._blocks(split)
        return iter(())

    def provenance(self, hookpoint: str) -> dict[str, Any]:
        """The config."""
        config = self.truth.config.model_dump(mode="json")
        return {"source": "synthetic", "hookpoint": hookpoint, "synthetic": config}

    def _blocks(self, split: str) -> int:
        if split not in self._n_blocks:
            raise SourceError(f"no split {split!r}; a synthetic source has train and heldout")
        return self._n_blocks[split]


class _BlockOrder:
    """Which block stands at a place of the endless stream of epochs."""

    def __init__(self, n_blocks: int, seed: int) -> None:
        self._n_blocks, self._seed = n_blocks, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, self._n_blocks)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, 7, epoch])
            self._epoch, self._order = epoch, rng.permutation(self._n_blocks)
        return int(self._order[within])
