"""Our training step against the peers', each in a process of its own, in turn, in one run.

    benchmarks/peers/make_env.sh all
    python benchmarks/train.py --peers [--d-sae 4608 18432] [--acts demo/acts] [--threads 1]

Each round times one float32 encoder product `x @ W_enc` and one step of every trainer on the same
rows; each begins with another. A ratio is the median of the rounds' ratios, with the lowest and the
highest. A peer's mode counts only if its step gives the gradients of the loss that it documents
(see gradient_checks). Memory: the peak of a trainer's process, its imports included, and beyond
them.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gradient_checks import Verdicts, check
from machine import Paired, show
from step_timings import Timing, fastest_correct, goals
from steppers import Mode, Problem, Stepper, StepperError, our_modes, peer_modes
from train_rows import batches_of

PARTS = ("topk", "auxk", "batch_topk")
N_BATCHES = 4


class Bench:
    """One width: the rows on disk, and what is timed together on them."""

    def __init__(self, problem: Problem, args: argparse.Namespace) -> None:
        self._problem, self._args = problem, args
        self._x = torch.from_numpy(np.load(problem.rows)[0])
        self._W_enc = torch.randn(self._x.shape[1], problem.d_sae)
        self._verdicts: dict[Mode, Verdicts] = {}

    def plain(self, architecture: str) -> list[Timing]:
        """Steps without dead features. Peers run in groups by mode, ours in each: processes of all
        modes at once would not fit into memory."""
        peers = peer_modes(architecture, self._args.only_peers)
        timings: dict[Mode, Timing] = {}
        for name in dict.fromkeys([mode.name for mode in peers] or ["none"]):
            self._add_rounds(architecture, [m for m in peers if m.name == name], timings)
        return [timing for timing in timings.values() if timing.seconds]

    def auxk(self, plain: Sequence[Timing]) -> list[Timing]:
        """Steps with a tenth of the features dead, beside steps without: each peer's fastest mode
        that trains correctly without."""
        peers = dict.fromkeys(t.mode.trainer for t in plain if not t.mode.is_ours)
        chosen = [fastest_correct([t for t in plain if t.mode.trainer == peer]) for peer in peers]
        timings: dict[Mode, Timing] = {}
        modes = [timing.mode for timing in chosen if timing is not None]
        self._add_rounds("topk", modes, timings, with_auxk=True)
        return [timing for timing in timings.values() if timing.seconds]

    def _add_rounds(
        self,
        architecture: str,
        peers: Sequence[Mode],
        timings: dict[Mode, Timing],
        with_auxk: bool = False,
    ) -> None:
        """Run rounds of our modes and these peers', and add them to what was timed so far."""
        modes = [*our_modes(architecture), *peers]
        for mode in modes:
            timings.setdefault(mode, Timing(mode, self._verdict(mode)))
        with ExitStack() as stack:
            steppers = list(self._started(stack, modes, with_auxk))
            seconds = rounds_of(self._candidates(steppers, with_auxk), self._args.repeat)
            ours = [seconds[s.mode, with_auxk] for s in steppers if s.mode.is_ours]
            for stepper in steppers:
                timing = timings[stepper.mode]
                timing.seconds += seconds[stepper.mode, False]
                timing.auxk += seconds.get((stepper.mode, True), [])
                timing.product += seconds["product"]
                timing.ours += min(ours, key=median)
                timing.peak_mib, timing.imports_mib = stepper.memory_mib()
                timing.version = stepper.version

    def _candidates(
        self, steppers: Sequence[Stepper], with_auxk: bool
    ) -> dict[Any, Callable[[], float]]:
        """The product, and each mode's step: (mode, whether a tenth is dead)."""
        candidates: dict[Any, Callable[[], float]] = {"product": self._product_seconds}
        for stepper in steppers:
            candidates[stepper.mode, False] = stepper.step
            if with_auxk:
                candidates[stepper.mode, True] = partial(stepper.step, dead=True)
        return candidates

    def _started(
        self, stack: ExitStack, modes: Sequence[Mode], with_auxk: bool
    ) -> Iterator[Stepper]:
        """Warm steppers of the modes that run; the others are named on stderr."""
        for mode in modes:
            print(f"d_sae {self._problem.d_sae}, {mode.architecture}: {mode}", file=sys.stderr)
            try:
                stepper = stack.enter_context(Stepper(mode, self._problem))
                for _ in range(self._args.warm_up):
                    stepper.step()
                if with_auxk:
                    stepper.step(dead=True)
            except StepperError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            yield stepper

    def _verdict(self, mode: Mode) -> Verdicts:
        if mode not in self._verdicts:
            self._verdicts[mode] = check(mode)
        return self._verdicts[mode]

    def _product_seconds(self) -> float:
        started = perf_counter()
        self._x @ self._W_enc
        return perf_counter() - started


def rounds_of(candidates: dict[Any, Callable[[], float]], repeat: int) -> dict[Any, list[float]]:
    """What each candidate returns, its seconds, in each round; each round begins with the next."""
    names, seconds = list(candidates), {name: list[float]() for name in candidates}
    candidates[names[0]]()
    for start in range(repeat):
        at = start % len(names)
        for name in names[at:] + names[:at]:
            seconds[name].append(candidates[name]())
    return seconds


def table(part: str, d_sae: int, timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One row a mode; in the part "auxk" the step is the one with dead features."""
    rows = []
    for t in timings:
        verdict = t.verdicts.auxk if part == "auxk" else t.verdicts.plain
        row = {
            "part": part,
            "what": f"{t.mode.trainer} {t.version}, {t.mode.name}",
            "d_sae": d_sae,
            "ms": 1000 * median(t.compared),
            **spread("over_product", t.over_product),
            **spread("ours_over_this", t.ours_over_this),
        }
        if part == "auxk":
            row |= spread("adds_products", t.auxk_adds)
        peaks = {"peak_mib": t.peak_mib, "beyond_imports": t.peak_mib - t.imports_mib}
        rows.append({**row, **peaks, "trains correctly": str(verdict)})
    return rows


def spread(name: str, paired: Paired) -> dict[str, Any]:
    """A column: the median, and the lowest and highest."""
    low, high = f"{paired.lowest:.3g}", f"{paired.highest:.3g}"
    return {name: f"{paired.median:.3g} ({low} to {high})"}


def measure(args: argparse.Namespace) -> None:
    """All parts at all widths, each printed as it is done; the goals come last."""
    torch.set_num_threads(args.threads)
    held: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npy"
        np.save(rows, batches_of(args.acts, N_BATCHES, args.batch, args.d_model).numpy())
        for d_sae in args.d_sae or (4608, 18432):
            bench = Bench(Problem(rows, d_sae, args.k, args.threads), args)
            timings: dict[str, list[Timing]] = {}
            for part, of_part in measured_parts(bench, args.parts):
                timings[part] = of_part
                show(f"train --peers: {part}", table(part, d_sae, of_part), args.json)
            held += goals(d_sae, timings)
    show("train --peers: goals", held, args.json)


def measured_parts(bench: Bench, parts: Sequence[str]) -> Iterator[tuple[str, list[Timing]]]:
    """The parts that are asked for, with their timings; "auxk" needs "topk"."""
    if {"topk", "auxk"} & set(parts):
        plain = bench.plain("topk")
        yield "topk", plain
        if "auxk" in parts:
            yield "auxk", bench.auxk(plain)
    if "batch_topk" in parts:
        yield "batch_topk", bench.plain("batch_topk")
