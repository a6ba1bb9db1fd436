"""What a kind of fault came to: how often it was tried, and how often the promise held."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

LANES = 2


class Broken(Exception):
    """A promise that did not hold: a traceback, an unnamed file, a stray file, a hang."""


class Lost(Broken):
    """Worse: what was committed is missing or altered, damage was not found, a result is wrong."""


class Outcome(NamedTuple):
    """One row of the table.

    tried: faults that really happened. survived: those after which every promise held. lost: those
    that cost data, or told something untrue. note: what else there is to know. complaints: one line
    for each that did not survive.
    """

    fault: str
    tried: int
    survived: int
    lost: int
    note: str = ""
    complaints: tuple[str, ...] = ()


class Trial(NamedTuple):
    """One fault. make: brings it about and checks what comes after; it returns whether the fault
    happened at all, and raises Broken or Lost. label: says which fault it is."""

    label: str
    make: Callable[[], bool]


def tally(fault: str, trials: Iterable[Trial], *, lanes: int = LANES) -> Outcome:
    """Make every trial, `lanes` at a time."""
    with ThreadPoolExecutor(lanes) as pool:
        verdicts = [v for v in pool.map(_verdict, trials) if v is not None]
    complaints = tuple(f"{v.label}: {v.error}" for v in verdicts if v.error)
    n_lost = sum(isinstance(v.error, Lost) for v in verdicts)
    return Outcome(fault, len(verdicts), len(verdicts) - len(complaints), n_lost, "", complaints)


class _Verdict(NamedTuple):
    label: str
    error: Broken | None


def _verdict(trial: Trial) -> _Verdict | None:
    try:
        return _Verdict(trial.label, None) if trial.make() else None
    except Broken as error:
        return _Verdict(trial.label, error)
