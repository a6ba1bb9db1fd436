"""Codes: which features are active in which rows and how strongly, in CSR form.

Selection makes them, and decoding, gradients and evaluation work on them alone, so that
everything after the encoder costs L0 a row and not d_sae.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """Active features of a batch of rows, row after row, ascending feature_id within a row.

    acts: [nnz] floating, all > 0 unless said.
    feature_ids: [nnz] int64.
    offsets: [batch + 1] int64; row b holds entries offsets[b] to offsets[b + 1].
    """

    acts: Tensor
    feature_ids: Tensor
    offsets: Tensor

    @property
    def n_rows(self) -> int:
        """Number of rows, those without an active feature included."""
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of active features, over all rows."""
        return self.acts.numel()

    def n_active(self) -> Tensor:
        """Active features of each row: [batch] int64. Its mean is L0."""
        return self.offsets.diff()

    def rows(self) -> Tensor:
        """Row of each entry: [nnz] int64."""
        ids = torch.arange(self.n_rows, device=self.offsets.device)
        return ids.repeat_interleave(self.n_active(), output_size=self.nnz)

    def where(self, is_kept: Tensor) -> Codes:
        """The entries for which is_kept [nnz] bool holds; the same rows."""
        kept = offsets_of_counts(is_kept)[self.offsets]
        return Codes(self.acts[is_kept], self.feature_ids[is_kept], kept)

    def to_dense(self, d_sae: int) -> Tensor:
        """The same acts with every zero written out: [batch, d_sae]."""
        dense = self.acts.new_zeros(self.n_rows, d_sae)
        dense[self.rows(), self.feature_ids] = self.acts
        return dense

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        return Codes(*(part.to(device) for part in self))

    @staticmethod
    def from_dense(acts: Tensor) -> Codes:
        """Codes of dense acts [batch, d_sae]: the entries above zero."""
        rows, feature_ids = (acts > 0).nonzero(as_tuple=True)
        return Codes(
            acts[rows, feature_ids], feature_ids, offsets_of_sorted(rows, n_bags=len(acts))
        )

    @staticmethod
    def concatenate(parts: Iterable[Codes]) -> Codes:
        """Codes of the parts' rows, one part after the other."""
        parts = list(parts)
        n_active = torch.cat([part.n_active() for part in parts])
        return Codes(
            torch.cat([part.acts for part in parts]),
            torch.cat([part.feature_ids for part in parts]),
            offsets_of_counts(n_active),
        )


def offsets_of_counts(counts: Tensor) -> Tensor:
    """Where each bag starts, and the end: counts [n_bags] -> [n_bags + 1] int64."""
    offsets = counts.new_zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def offsets_of_sorted(bag_ids: Tensor, n_bags: int) -> Tensor:
    """Where each bag starts, and the end: sorted bag_ids [nnz] int64 -> [n_bags + 1] int64."""
    return offsets_of_counts(torch.bincount(bag_ids, minlength=n_bags))
