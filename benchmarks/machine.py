"""What every benchmark shares: the machine it ran on, timing in turn, and how results are printed.

A result is a flat dict; `--json` prints one JSON object a line, otherwise a table is drawn.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table

_PAGE_WIDTH = 170  # of a table that goes to a file


def machine() -> dict[str, Any]:
    """This machine and the versions that matter."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--repeat", type=int, default=3, help="measure so many times, in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def in_turn(candidates: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each candidate; they run one after the other, `repeat` rounds, after one
    round to warm up, so that a machine that slows down slows all of them."""
    rounds = in_rounds(candidates, repeat, n_warmup=1)
    return {name: statistics.median(values) for name, values in rounds.items()}


def in_rounds(
    candidates: dict[str, Callable[[], Any]],
    repeat: int,
    *,
    n_warmup: int = 0,
    before: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; they run one after the other, `repeat` rounds, and
    each round begins with the next one: what a disk does depends on what came before.

    n_warmup: rounds ahead of those that are counted. before: run ahead of each call, not timed.
    clock: `time.process_time` counts the seconds of all threads together, whatever else runs.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeat + n_warmup):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            before()
            started = clock()
            candidates[name]()
            if round_number >= n_warmup:
                seconds[name].append(clock() - started)
    return seconds


class Paired(NamedTuple):
    """Ratios of two speeds, round by round: their median, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def over(cls, ours: list[float], theirs: list[float]) -> "Paired":
        """Our speed over theirs, from the seconds that each took for the same work."""
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print results and the machine."""
    if as_json:
        for row in rows:
            print(json.dumps({"benchmark": title, **row, "machine": machine()}))
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("part", "what") else "right")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console = Console(width=None if sys.stdout.isatty() else _PAGE_WIDTH)
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in machine().items()), style="dim")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
