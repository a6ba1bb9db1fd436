"""The processes that train one SAE together: what they must add up or agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """This process among those of torch.distributed's default group, or by itself.

    Every process calls the same methods in the same order, and each gets the same results.
    """

    def __init__(self) -> None:
        is_one_of_many = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_one_of_many else 0
        self.world_size = dist.get_world_size() if is_one_of_many else 1

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over processes."""
        if not self.is_alone:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum(self, value: float) -> float:
        """The sum of a number over processes."""
        if self.is_alone:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total)

    def any(self, is_so: bool) -> bool:
        """Whether it is so for one of the processes."""
        return self.sum(float(is_so)) > 0

    def gather(self, values: Tensor) -> list[Tensor]:
        """values [n] of each process, by rank; n may differ."""
        if self.is_alone:
            return [values]
        lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in self._ranks()]
        dist.all_gather(lengths, torch.tensor([len(values)], device=values.device))
        n_max = max(int(each) for each in lengths)
        padded = torch.cat([values, values.new_zeros(n_max - len(values))])
        parts = [torch.empty_like(padded) for _ in self._ranks()]
        dist.all_gather(parts, padded)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]

    def wait(self) -> None:
        """Until all processes are here."""
        if not self.is_alone:
            dist.barrier()

    def _ranks(self) -> range:
        return range(self.world_size)


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
