"""Rows as they are stored, in memory, and how they become the numbers that users see."""

from typing import NamedTuple

import torch
from torch import Tensor

from .quantization import Calibration, dequantize


class Exact(NamedTuple):
    """Rows that int8 keeps as they are. at: int64 [n], their places, ascending. acts: float32
    [n, width]."""

    at: Tensor
    acts: Tensor

    def between(self, first: int, last: int) -> "Exact":
        """Those in rows first..last-1, counted from `first`."""
        inside = slice(*torch.searchsorted(self.at, torch.tensor([first, last])).tolist())
        return Exact(self.at[inside] - first, self.acts[inside])


class StoredRows:
    """raw: [n, width] in the storage dtype. For int8 also row_scales: float32 [n], the calibrations
    that occur, which of them each row takes (int16 [n], None where there is one), and exact rows.
    """

    def __init__(
        self,
        raw: Tensor,
        row_scales: Tensor | None = None,
        calibrations: list[Calibration] | None = None,
        calibration_of: Tensor | None = None,
        exact: Exact | None = None,
    ):
        self.raw, self.row_scales = raw, row_scales
        self._calibrations, self._calibration_of = calibrations or [], calibration_of
        self._exact = exact

    def take(self, index: Tensor | slice, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rows at `index` (int64 [m] on the CPU), decoded: [m, width] of `dtype` on `device`.

        To a GPU they travel as they are stored, from pinned memory, and without waiting.
        """
        raw = _moved(_at(self.raw, index), device)
        if self.row_scales is None:
            return raw.to(dtype, copy=True) if isinstance(index, slice) else raw.to(dtype)
        scales = _moved(_at(self.row_scales, index), device)
        center, channel_scales = self._coding(index, device)
        rows = dequantize(raw, scales, center, channel_scales)
        return self._with_exact(rows, index).to(dtype)

    def _coding(self, index: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        centers = torch.stack([c.center for c in self._calibrations]).to(device)
        scales = torch.stack([c.channel_scales for c in self._calibrations]).to(device)
        if len(self._calibrations) == 1 or self._calibration_of is None:
            return centers[0], scales[0]
        which = _at(self._calibration_of, index).long().to(device)
        return centers[which], scales[which]

    def _with_exact(self, rows: Tensor, index: Tensor | slice) -> Tensor:
        """Put the rows that are kept exactly in the place of their codes."""
        assert self.row_scales is not None
        if self._exact is None or not len(self._exact.at):
            return rows
        marked = (_at(self.row_scales, index) == 0).nonzero()[:, 0]
        if len(marked):
            places = _at(torch.arange(len(self.raw)), index)[marked]
            found = torch.searchsorted(self._exact.at, places)
            rows[marked.to(rows.device)] = self._exact.acts[found].to(rows.device)
        return rows


def _at(tensor: Tensor, index: Tensor | slice) -> Tensor:
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
