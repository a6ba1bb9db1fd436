"""The operations in C++, for float32 on CPUs with AVX-512 VNNI; anything else is plain torch's.

Candidates are found with the encoder product in 8 bits and decided in float32 (csrc/select.cpp);
all sums are made by one thread each, in a fixed order, so results don't depend on their number.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae.codes import Codes
from sae.kernels import library
from sae.kernels.base import AdamStep, FeatureSums, Kernels, Reconstructed
from sae.kernels.embedding_bags import DENSE_SUMS
from sae.kernels.recycling import Recycler
from sae.kernels.selection import PreActs

# Integers of that many products of 8 bits still fit 32.
LARGEST_D = 60_000


class CompiledKernels(Kernels):
    """nominates_in: "int8", or what plain torch has."""

    name: ClassVar[str] = "compiled"
    sparse_below: ClassVar[float] = 0.2

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """A CPU with the instructions, and a C++ compiler. The first call builds the library."""
        return library.missing() if device.type == "cpu" else "they are for the CPU"

    @classmethod
    def precisions(cls, device: torch.device) -> tuple[str, ...]:
        """int8 first."""
        return "int8", *super().precisions(device)

    def top_k_of_rows(self, pre_acts: PreActs, k: int) -> Codes:
        """See Kernels."""
        codes = self._selected(pre_acts, k=k) if k < len(pre_acts.b) else None
        return super().top_k_of_rows(pre_acts, k) if codes is None else codes

    def above_threshold(self, pre_acts: PreActs, threshold: Tensor) -> Codes:
        """See Kernels. Where a threshold isn't positive codes are dense, and so is the product."""
        is_sparse = self.nominates_in == "int8" and bool((threshold > 0).all())
        codes = self._selected(pre_acts, threshold) if is_sparse else None
        return super().above_threshold(pre_acts, threshold) if codes is None else codes

    def sum_by_row(self, codes: Codes, table: Tensor) -> Tensor:
        """See Kernels."""
        if _is_dense(codes, len(table)) or not _are_plain(codes.acts, table):
            return super().sum_by_row(codes, table)
        out = table.new_empty(codes.n_rows, table.shape[1])
        _call("sae_sum_by_row", *_in_rows(codes), table, table.shape[1], out)
        return out

    def dot_by_entry(self, codes: Codes, rows: Tensor, table: Tensor) -> Tensor:
        """See Kernels."""
        if _is_dense(codes, len(table)) or not _are_plain(rows, table):
            return super().dot_by_entry(codes, rows, table)
        dots = rows.new_empty(codes.nnz)
        _call("sae_dot_by_entry", *_in_rows(codes)[1:], rows, table, table.shape[1], dots)
        return dots

    def reconstruct(self, codes: Codes, target: Tensor, table: Tensor) -> Reconstructed:
        """See Kernels."""
        if _is_dense(codes, len(table)) or not _are_plain(codes.acts, target, table):
            return super().reconstruct(codes, target, table)
        error, dots = _recycler.empty(*target.shape), torch.empty_like(codes.acts)
        squares = target.new_empty(codes.n_rows, dtype=torch.float64)
        entries = _in_rows(codes)
        _call("sae_reconstruct", *entries, target, table, *table.shape, error, squares, dots)
        return Reconstructed(error, squares.sum().float(), dots)

    def sum_by_feature(self, codes: Codes, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
        """See Kernels."""
        if _is_dense(codes, d_sae) or not _are_plain(weights, rows):
            return super().sum_by_feature(codes, weights, rows, d_sae)
        return _sum_by_feature(_sorted(codes, d_sae), weights, rows)

    def feature_sums(
        self,
        codes: Codes,
        input_weights: Tensor,
        inputs: Tensor,
        error_weights: Tensor,
        errors: Tensor,
        d_sae: int,
    ) -> FeatureSums:
        """See Kernels."""
        tensors = input_weights, inputs, error_weights, errors
        if _is_dense(codes, d_sae) or not _are_plain(*tensors):
            return super().feature_sums(codes, input_weights, inputs, error_weights, errors, d_sae)
        places = _sorted(codes, d_sae)
        totals = inputs.new_empty(d_sae)
        of_inputs = _sum_by_feature(places, input_weights, inputs, totals)
        of_errors = _sum_by_feature(places, error_weights, errors)
        return FeatureSums(of_inputs, of_errors, totals, places[0].diff())

    def remove_along_(self, gradient: Tensor, rows: Tensor) -> None:
        """See Kernels."""
        if not _are_plain(gradient, rows):
            return super().remove_along_(gradient, rows)
        _call("sae_remove_along", gradient, rows, *rows.shape)
        return None

    def adam_(
        self,
        weight: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        step: AdamStep,
        *,
        unit_rows: bool = False,
    ) -> None:
        """See Kernels."""
        if not _are_plain(weight, gradient, mean, square):
            return super().adam_(weight, gradient, mean, square, step, unit_rows=unit_rows)
        shape = weight.shape if weight.dim() == 2 else (1, weight.numel())
        betas = float(step.beta1), float(step.beta2)
        settings = float(step.lr), *betas, step.eps, step.t, float(step.grad_scale), int(unit_rows)
        _call("sae_adam", weight, gradient, mean, square, *shape, *settings)
        return None

    def _selected(
        self, pre_acts: PreActs, threshold: Tensor | None = None, k: int = 0
    ) -> Codes | None:
        """Codes of a selection; None if it isn't for these kernels, or too dense for them."""
        x, W, b = pre_acts
        is_fit = self.nominates_in == "int8" and _are_plain(x, W, b) and 0 < x.shape[1] < LARGEST_D
        if not is_fit or (threshold is not None and not _are_plain(threshold)):
            return None
        stride = 1 if threshold is not None and threshold.dim() else 0
        made = ctypes.c_void_p()
        sizes = len(x), len(W), x.shape[1], k
        nnz = _call("sae_select", x, W, b, threshold, stride, *sizes, into=made)
        if nnz < 0:
            return None
        acts, ids = x.new_empty(nnz), torch.empty(nnz, dtype=torch.int64)
        offsets = torch.empty(len(x) + 1, dtype=torch.int64)
        library.load().sae_take(made, *(_argument(each) for each in (acts, ids, offsets)))
        return Codes(acts, ids, offsets)


_recycler = Recycler()

Places = tuple[Tensor, Tensor, Tensor]
"""Entries by feature: starts [d_sae + 1], order [nnz], rows [nnz], as in sae_sort_by_feature."""


def _sorted(codes: Codes, d_sae: int) -> Places:
    order, rows = torch.empty_like(codes.feature_ids), torch.empty_like(codes.feature_ids)
    starts = codes.offsets.new_empty(d_sae + 1)
    arguments = codes.feature_ids, codes.offsets, codes.n_rows, d_sae, starts, order, rows
    library.load().sae_sort_by_feature(*(_argument(each) for each in arguments))
    return starts, order, rows


def _sum_by_feature(
    places: Places, weights: Tensor, table: Tensor, totals: Tensor | None = None
) -> Tensor:
    n_features, d = len(places[0]) - 1, table.shape[1]
    sums = _recycler.empty(n_features, d)
    _call("sae_sum_by_feature", *places, n_features, weights, table, d, sums, totals)
    return sums


def _in_rows(codes: Codes) -> tuple[Tensor, Tensor, Tensor, int]:
    return codes.acts, codes.feature_ids, codes.offsets, codes.n_rows


def _is_dense(codes: Codes, n_features: int) -> bool:
    """Whether plain torch's matrix products are faster."""
    return codes.nnz > DENSE_SUMS * codes.n_rows * n_features


def _are_plain(*tensors: Tensor) -> bool:
    """Whether the kernels can read these: float32, dense, on the CPU, without autograd."""
    return all(
        each.dtype == torch.float32
        and each.device.type == "cpu"
        and each.is_contiguous()
        and not (each.requires_grad and torch.is_grad_enabled())
        for each in tensors
    )


def _call(name: str, *arguments: Tensor | float | None, into: ctypes.c_void_p | None = None) -> int:
    """Run a kernel on torch's number of threads. into: what it writes a pointer to."""
    given = [_argument(each) for each in arguments]
    pointers = [] if into is None else [ctypes.byref(into)]
    done: int = library.load()[name](*given, ctypes.c_int64(torch.get_num_threads()), *pointers)
    return done


def _argument(value: Tensor | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    return None if value is None else ctypes.c_int64(value)
