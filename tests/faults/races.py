"""Two processes that begin at the same moment: one is to go on, the other to be turned away."""

import random
import time
from collections.abc import Callable
from typing import NamedTuple

from .outcome import Broken
from .processes import Process, Result

HEAD_START_S = 0.15
"""Until both processes are there, and wait for the moment."""


class Ended(NamedTuple):
    """How a race ended."""

    winner: Result
    winner_pid: int
    loser: Result


def race(rng: random.Random, start: Callable[[float], Process]) -> Ended | None:
    """start: begins a process that works from a time of `time.monotonic` on; its result counts
    what it did. Returns: None if one came when the other had ended. Raises: Broken if both went
    on, or neither."""
    start_at = time.monotonic() + HEAD_START_S
    rivals = [start(start_at + rng.choice([0, 0, rng.random() / 500])) for _ in range(2)]
    results = [rival.wait() for rival in rivals]
    won = [result.is_done and result.value > 0 for result in results]
    if sum(won) != 1:
        told = "; ".join(result.message for result in results if not result.is_done)
        raise Broken(f"{sum(won)} of two processes went on: {told}")
    if all(result.is_done for result in results):
        return None
    winner = won.index(True)
    return Ended(results[winner], rivals[winner].pid, results[1 - winner])
