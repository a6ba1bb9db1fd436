"""Memory that is used again once nobody holds what lay in it.

A step's gradients are large, and always of the same sizes: fresh pages for them, which the system
has to find and clear, can cost more than the sums that are written there.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# Smaller memory is kept by the allocator itself.
SMALLEST = 2**20
# Of a size, as many are kept as a step and the report of the one before it hold.
MOST = 4

_use_count = getattr(torch._C, "_storage_Use_Count", None)


class Recycler:
    """Hands out uninitialised float32 tensors on the CPU."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int) -> Tensor:
        """A contiguous tensor whose values are open, and which nobody else holds."""
        n = torch.Size(shape).numel()
        if n < SMALLEST or _use_count is None:
            return torch.empty(shape)
        with self._lock:
            same = [each for each in self._kept if each.numel() == n]
            found = next((each for each in same if _is_free(each)), None)
            if found is None:
                found = torch.empty(n)
                # Those of other sizes, which nobody holds, belong to another SAE or to none.
                self._kept = [
                    each for each in self._kept if each.numel() == n or not _is_free(each)
                ]
                if len(same) < MOST:
                    self._kept.append(found)
            return found.view(shape)


def _is_free(tensor: Tensor) -> bool:
    """Whether nobody else holds its memory: only the tensor here, and the look at its storage."""
    assert _use_count is not None
    storage = tensor.untyped_storage()
    return bool(_use_count(storage._cdata) == 2)
