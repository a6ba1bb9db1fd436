"""Which of several processes this is, as torchrun or Slurm say."""

import os
from collections.abc import Mapping
from typing import NamedTuple

from .errors import PipelineError

_NAMES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""Of Slurm the step's number of tasks: srun sets it, and a batch script by itself does not."""


class Ranks(NamedTuple):
    """rank: of world_size processes, counted from 0."""

    rank: int
    world_size: int


def place_among_ranks(
    rank: int | None, world_size: int | None, environment: Mapping[str, str] = os.environ
) -> Ranks:
    """What is given, or else what the launcher says; 0 of 1 where nothing does.

    Raises: PipelineError if only one of them is known, or they don't fit.
    """
    if rank is None and world_size is None:
        for names in _NAMES:
            found = [environment.get(name) for name in names]
            if all(value is not None and value.isdigit() for value in found):
                rank, world_size = (int(value or 0) for value in found)
                break
        else:
            rank, world_size = 0, 1
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise PipelineError(
            f"--rank {rank} of --world-size {world_size}: give both, with 0 <= rank < world size"
        )
    return Ranks(rank, world_size)
