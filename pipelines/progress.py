"""What a person sees while a stage runs: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 15.0


class StageProgress:
    """Progress of one stage. Use as a context; call `update` as often as you like.

    With a terminal it draws a bar. Without one (a log file, Slurm) it prints a line when it starts,
    at most every 15 seconds, and when it ends.
    """

    def __init__(self, console: Console, title: str, unit: str):
        self._console, self._title, self._unit = console, title, unit
        self._start = self._last_line = time.perf_counter()
        self._done, self._total, self._note = 0, 0, ""
        self._first: tuple[int, float] | None = None  # of what is made now, where and when it began
        self._bar = _bar(console) if console.is_terminal else None
        self._task = self._bar.add_task(title, total=None, note="") if self._bar else None

    def __enter__(self) -> "StageProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._done and kind is None:
            self._print_line()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def update(self, done: int, total: int, note: str = "", *, unit: str = "") -> None:
        """done, total: in the stage's unit, or in `unit`. note: figures of the moment."""
        self._unit = unit or self._unit
        self._done, self._total, self._note = min(done, total), total, note
        if self._first is None or self._done < self._first[0]:
            self._first = self._done, time.perf_counter()
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done, total=total, note=note)
        elif time.perf_counter() - self._last_line > LINE_EVERY_S:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.perf_counter()
        share = 100 * self._done / max(self._total, 1)
        parts = [
            f"{self._title}: {self._done:,} of {self._total:,} {self._unit} ({share:.0f}%)",
            self._note,
            f"{self.elapsed_s:.0f} s",
            self._left(),
        ]
        line = "  ".join(part for part in parts if part)
        self._console.print(f"  {line}", highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """How long the rest will take at the speed so far: `2:05 left`."""
        if self._first is None or not 0 < self._done - self._first[0] < self._total:
            return ""
        seconds = time.perf_counter() - self._first[1]
        left = seconds * (self._total - self._done) / (self._done - self._first[0])
        hours, minutes = divmod(round(left / 60), 60)
        if self._done == self._total:
            return ""
        return f"{hours} h {minutes:02} min left" if left >= 3600 else f"{_clock(left)} left"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("  [bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        refresh_per_second=4,
    )


def print_heading(console: Console, stage: str, what: str) -> None:
    """A stage's name, and from what it makes what."""
    console.print(f"[bold cyan]{stage}[/]  {what}", highlight=False, soft_wrap=True)


def print_made(console: Console, lines: Sequence[str]) -> None:
    """What a stage made, and an empty line."""
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print()
