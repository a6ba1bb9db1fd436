"""Verbs about a finished activation cache: cache stats."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from activation_cache import (
    ActivationCache,
    CacheStatistics,
    StatisticsProgress,
    cache_statistics,
)
from activation_cache.statistics import N_ROWS_READ

from .. import figures
from ..cache_tables import statistics_lines, statistics_tables
from ..cli import app, console, error_console
from ..errors import PipelineError
from ..progress import StageProgress
from .arguments import DEFAULT_ACTS, Acts

cache_app = App(name="cache", help="Look into a finished activation cache.")
app.command(cache_app)


@cache_app.command
def stats(
    acts: Acts = DEFAULT_ACTS,
    *,
    hookpoint: Annotated[
        str | None, Parameter(help="This place alone; left out: all that the cache holds.")
    ] = None,
    plot: Annotated[
        Path | None, Parameter(help="Also draw them, into this .png or .svg file.")
    ] = None,
    n_rows: Annotated[
        int, Parameter(help="Rows to read of each place, the first of the cache; 0: all.")
    ] = N_ROWS_READ,
    output: Annotated[
        Literal["table", "json"], Parameter(name=["--format"], help="How to print it.")
    ] = "table",
) -> None:
    """Tell tokens, norms by place and layer, massive rows and their channels, rounding, disk use.

    Norms are L2 norms of rows. Rows of massive norm are those that training leaves out.
    """
    if n_rows < 0:
        raise PipelineError(f"--n-rows {n_rows}: expected 1 or more, or 0 for all")
    if plot is not None:
        figures.require_plot(plot)
    cache = ActivationCache.open(acts)
    found = _read(cache, hookpoint, n_rows or None)
    if output == "json":
        line = json.dumps({"acts": acts, **_plain(dataclasses.asdict(found))})
        console.file.write(f"{line}\n")
    else:
        _print(found, acts)
    if plot is not None:
        figures.write_figure(figures.statistics_figure(found, cache.manifest.fingerprint), plot)
        error_console.print(f"drawn: {plot}", highlight=False, markup=False, soft_wrap=True)


def _read(cache: ActivationCache, hookpoint: str | None, n_rows: int | None) -> CacheStatistics:
    """The statistics, with progress on stderr: stdout holds the result alone."""
    with StageProgress(error_console, "read", "rows") as progress:

        def show(p: StatisticsProgress) -> None:
            progress.update(p.n_rows, p.n_rows_wanted, p.hookpoint)

        return cache_statistics(
            cache,
            hookpoints=None if hookpoint is None else [hookpoint],
            n_rows=n_rows,
            on_progress=show,
        )


def _print(found: CacheStatistics, acts: str) -> None:
    for line in statistics_lines(found, acts):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in statistics_tables(found, console.width):
        console.print()
        console.print(table, highlight=False)


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks (infinite, not a number) as null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
