"""Which of several processes this is, as torchrun or Slurm say, and how they find each other.

    torchrun --nproc-per-node 2 -m pipelines train ...      srun --ntasks 2 saebase train ...

Every process runs the same command. The first one speaks and writes; an error that another one has
alone is told by that one.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from .errors import PipelineError

_NAMES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""Of Slurm the step's number of tasks: srun sets it, and a batch script by itself does not."""
_START_TIMEOUT = timedelta(minutes=10)
_TOLD_WITHIN_S = 3.0
"""How long an error waits for the first process to tell it, before another one does."""


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


def is_first_rank() -> bool:
    """Whether this process is the one that speaks and writes."""
    return place_among_ranks(None, None).rank == 0


def require_one_process(verb: str) -> None:
    """Raises: PipelineError where a launcher has started several."""
    world_size = place_among_ranks(None, None).world_size
    if world_size > 1:
        raise PipelineError(
            f"saebase {verb} is for one process, and {world_size} were started: launch the stages "
            "that work together, harvest and train, by themselves"
        )


@contextmanager
def joined_ranks(console: Console) -> Iterator[Ranks]:
    """This process among those that were started together, joined into torch.distributed's group:
    gloo, or nccl where each has a GPU. All but the first are silent.

    Raises: PipelineError if they don't find each other.
    """
    ranks = place_among_ranks(None, None)
    if ranks.world_size == 1:
        yield ranks
        return
    quiet, console.quiet = console.quiet, ranks.rank > 0
    store = _join(ranks)
    try:
        yield ranks
    except Exception as error:
        if _is_told_by_first(store, ranks, error):
            raise SilentExit from error
        raise
    finally:
        console.quiet = quiet
        dist.destroy_process_group()


class SilentExit(Exception):
    """A mistake that the first process has told already."""


def _join(ranks: Ranks) -> Store:
    """Meet at MASTER_ADDR:MASTER_PORT, which torchrun sets; of Slurm, on the first node."""
    environment = os.environ
    local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or "0"
    if "MASTER_ADDR" not in environment and "SLURM_STEP_NODELIST" in environment:
        environment["MASTER_ADDR"] = first_node(environment["SLURM_STEP_NODELIST"])
        job = int(environment.get("SLURM_JOB_ID", "0"))
        environment.setdefault("MASTER_PORT", str(20_000 + job % 20_000))
    has_gpus = torch.cuda.is_available() and torch.cuda.device_count() > int(local)
    if has_gpus:
        torch.cuda.set_device(int(local))
    try:
        met = rendezvous("env://", ranks.rank, ranks.world_size, timeout=_START_TIMEOUT)
        store: Store = next(iter(met))[0]
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise PipelineError(
            f"process {ranks.rank} of {ranks.world_size} did not find the others: "
            f"{str(error).splitlines()[0]}. Start them with torchrun or srun, or unset RANK and "
            "WORLD_SIZE to train in one process"
        ) from error
    return store


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes: `gpu[003-007,12],login` -> `gpu003`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if not found:
        raise PipelineError(f"SLURM_STEP_NODELIST={nodes}: expected names of nodes")
    return found[1] + (found[2] or "")


def _is_told_by_first(store: Store, ranks: Ranks, error: Exception) -> bool:
    """Whether the first process has, or within seconds, the same error. It says so itself, and
    stays until the others have heard it: the store may be its own."""
    n_others, deadline = ranks.world_size - 1, time.monotonic() + _TOLD_WITHIN_S
    if ranks.rank == 0:
        store.set("saebase/error", str(error))
    while time.monotonic() < deadline:
        try:
            if ranks.rank == 0 and int(store.add("saebase/heard", 0)) == n_others:
                return False
            if ranks.rank > 0 and store.check(["saebase/error"]):
                is_same = bool(store.get("saebase/error").decode() == str(error))
                store.add("saebase/heard", 1)
                return is_same
        except RuntimeError:  # the store went with the first process, which then had something
            return True
        time.sleep(0.05)
    return False
