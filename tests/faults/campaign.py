"""The rows of the table: every kind of fault, and how often it is tried.

To add one: write a module with `run(place, n, seed) -> Outcome` and give it a row here.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import (
    disk_budget,
    flipped_bits,
    full_disk,
    index_kills,
    kills,
    label_kills,
    reader_while_writing,
    system_calls,
    training_calls,
    training_damage,
    training_kills,
    truncations,
    two_trainers,
    two_writers,
)
from .outcome import Outcome
from .workplace import Workplace


class Kind(NamedTuple):
    """A kind of fault. n: how much of it there is in a whole campaign; n_quick: beside the tests.
    What is counted, `run` says."""

    run: Callable[[Workplace, int, int], Outcome]
    n: int
    n_quick: int


KINDS = {
    "kills": Kind(kills.run, 60, 2),
    "system_calls": Kind(system_calls.run, 1_000, 3),
    "flipped_bits": Kind(flipped_bits.run, 200, 20),
    "truncations": Kind(truncations.run, 50, 10),
    "full_disk": Kind(full_disk.run, 16, 2),
    "two_writers": Kind(two_writers.run, 30, 2),
    "reader_while_writing": Kind(reader_while_writing.run, 12, 1),
    "disk_budget": Kind(disk_budget.run, 12, 1),
    "training_kills": Kind(training_kills.run, 200, 3),
    "training_calls": Kind(training_calls.run, 40, 3),
    "training_damage": Kind(training_damage.run, 240, 12),
    "index_kills": Kind(index_kills.run, 30, 1),
    "label_kills": Kind(label_kills.run, 20, 1),
    "two_trainers": Kind(two_trainers.run, 16, 2),
}


class Row(NamedTuple):
    """What a kind of fault came to, and how long it took."""

    name: str
    outcome: Outcome
    seconds: float


def rows(folder: Path, names: list[str], *, is_quick: bool, seed: int) -> Iterator[Row]:
    """Run the named kinds one after the other in an empty `folder`."""
    with Workplace(folder) as place:
        for name in names:
            kind, start = KINDS[name], time.perf_counter()
            outcome = kind.run(place, kind.n_quick if is_quick else kind.n, seed)
            yield Row(name, outcome, time.perf_counter() - start)
