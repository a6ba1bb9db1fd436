"""What steps took, what they are compared to, and the goals that this is held against."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from gradient_checks import Verdicts
from machine import Paired
from steppers import Mode


@dataclass
class Timing:
    """Seconds of one mode's steps, round by round, and of what ran in the same rounds.

    seconds: without dead features. auxk: with a tenth of them dead; may be empty. product: the
    encoder product. ours: our fastest mode's. peak_mib, imports_mib: of the mode's process.
    """

    mode: Mode
    verdicts: Verdicts
    seconds: list[float] = field(default_factory=list)
    auxk: list[float] = field(default_factory=list)
    product: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    imports_mib: float = 0.0
    version: str = ""

    @property
    def compared(self) -> list[float]:
        """The steps with dead features where there are any, else those without."""
        return self.auxk or self.seconds

    @property
    def over_product(self) -> Paired:
        """This step's seconds over the product's."""
        return Paired.over(self.product, self.compared)

    @property
    def auxk_adds(self) -> Paired:
        """What dead features add, in products."""
        added = [a - s for a, s in zip(self.auxk, self.seconds, strict=True)]
        return Paired.over(self.product, added)

    @property
    def ours_over_this(self) -> Paired:
        """How many times as fast ours is."""
        return Paired.over(self.ours, self.compared)

    @property
    def is_correct(self) -> bool:
        """Whether it trains correctly, with dead features where it had any."""
        return (self.verdicts.auxk if self.auxk else self.verdicts.plain).is_correct


def fastest_correct(timings: Sequence[Timing]) -> Timing | None:
    """The one that ours is least ahead of, of those that train correctly."""
    correct = [t for t in timings if t.is_correct]
    return min(correct, key=lambda t: t.ours_over_this.median) if correct else None


class Goal(NamedTuple):
    """at: what is wanted by d_sae. is_least: whether more is better. of: the measured figure."""

    part: str
    what: str
    at: Mapping[int, float]
    is_least: bool
    of: Callable[[Sequence[Timing]], Paired | None]


def _ours(timings: Sequence[Timing], *, compiled: bool | None = None) -> Timing | None:
    found = [t for t in timings if t.mode.is_ours]
    if compiled is not None:
        found = [t for t in found if t.mode.name.startswith("compiled") == compiled]
    return min(found, key=lambda t: median(t.compared)) if found else None


def _step(compiled: bool) -> Callable[[Sequence[Timing]], Paired | None]:
    def over_product(timings: Sequence[Timing]) -> Paired | None:
        ours = _ours(timings, compiled=compiled)
        return ours.over_product if ours else None

    return over_product


def _lead(trainer: str = "") -> Callable[[Sequence[Timing]], Paired | None]:
    def over_fastest(timings: Sequence[Timing]) -> Paired | None:
        peers = [t for t in timings if not t.mode.is_ours and trainer in t.mode.trainer]
        fastest = fastest_correct(peers)
        return fastest.ours_over_this if fastest else None

    return over_fastest


def _auxk_adds(timings: Sequence[Timing]) -> Paired | None:
    ours = _ours(timings)
    return ours.auxk_adds if ours else None


def _memory(timings: Sequence[Timing]) -> Paired | None:
    """Our peak over SAELens', imports included, each in its fastest mode."""
    ours = _ours(timings)
    theirs = fastest_correct([t for t in timings if t.mode.trainer == "sae-lens"])
    if ours is None or theirs is None:
        return None
    return Paired(*[ours.peak_mib / theirs.peak_mib] * 3)


def _both(at_4608: float, at_18432: float) -> dict[int, float]:
    return {4608: at_4608, 18432: at_18432}


GOALS = (
    Goal("topk", "step over product, pure torch", _both(1.0, 0.85), False, _step(False)),
    Goal("topk", "step over product, compiled", _both(0.60, 0.40), False, _step(True)),
    Goal("topk", "times the fastest correct peer", _both(3.5, 3.0), True, _lead()),
    Goal("topk", "times SAELens", _both(9.0, 13.0), True, _lead("sae-lens")),
    Goal("topk", "peak memory over SAELens'", _both(0.5, 0.5), False, _memory),
    Goal("auxk", "a tenth dead adds, products", _both(0.5, 0.5), False, _auxk_adds),
    Goal("auxk", "times the fastest correct peer", {}, True, _lead()),
    Goal("batch_topk", "step over product, pure torch", {}, False, _step(False)),
    Goal("batch_topk", "times the fastest correct peer", _both(6.0, 6.0), True, _lead()),
)


def goals(d_sae: int, timings: Mapping[str, Sequence[Timing]]) -> list[dict[str, Any]]:
    """Each goal, what was measured, and whether it is met (by the median)."""
    rows = []
    for goal in GOALS:
        found = goal.of(timings.get(goal.part, ()))
        if found is None:
            continue
        wanted = goal.at.get(d_sae)
        row = {"part": goal.part, "what": goal.what, "d_sae": d_sae, "goal": wanted}
        row |= found._asdict()
        is_met = wanted is not None and (found.median >= wanted) == goal.is_least
        rows.append({**row, "met": None if wanted is None else "yes" if is_met else "no"})
    return rows
