"""What became of a sweep: `sweep.json` beside its runs, and the table that ends it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from activation_cache.durable import written
from sae.architectures import architecture_of
from sae.metrics import Metrics
from sae.training import RunSpec
from sae.wiring import wiring_of

from .errors import PipelineError
from .sweep import Axes, value_text

SWEEP_FILE = "sweep.json"
LAST_FRACTION = 0.05
"""Part of the steps, the last ones, that a table's figures are means over."""


class Outcome(NamedTuple):
    """What became of a run of a sweep; the figures are means over its last 5% of steps.

    values: of its point. tokens_per_s: over the whole run, the others training beside it.
    """

    name: str
    values: dict[str, Any]
    fvu: float
    l0: float
    dead_fraction: float
    tokens_per_s: float


def outcome_of(spec: RunSpec, axes: Axes, lines: Sequence[Metrics]) -> Outcome:
    """From a finished run's metrics."""
    last = [line for line in lines if line.step > (1 - LAST_FRACTION) * lines[-1].step]
    where = {
        "architecture": architecture_of(spec.sae_config).name,
        "hookpoint": wiring_of(spec.hookpoint).name,
    }
    every = {**spec.train_config.model_dump(mode="json"), **where}
    every |= spec.sae_config.model_dump(mode="json")
    return Outcome(
        name=spec.out.name,
        values={name: every[name] for name in axes if name in every},
        fvu=sum(line.fvu for line in last) / len(last),
        l0=sum(line.l0 for line in last) / len(last),
        dead_fraction=lines[-1].dead_fraction,
        tokens_per_s=lines[-1].n_tokens / max(lines[-1].elapsed_s, 1e-9),
    )


def write_sweep(out: Path, axes: Axes, specs: Sequence[RunSpec], found: Sequence[Outcome]) -> None:
    """`sweep.json`: the axes, and the folder and figures of each run (none until it is done).

    Runs that an earlier sweep left beside these stay in the list.
    """
    by_name = {each.name: each for each in found}
    ours = [spec.out.name for spec in specs]
    others = [run for run in _runs_listed(out) if run["folder"] not in ours]
    runs = [
        {"folder": name, **({} if name not in by_name else _json(by_name[name]))} for name in ours
    ]
    content = {"axes": axes, "runs": [*others, *runs]}
    out.mkdir(parents=True, exist_ok=True)
    with written(out / SWEEP_FILE) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def runs_in(folder: Path) -> list[Path]:
    """The folders of a sweep's runs; none if the folder holds no sweep."""
    return [folder / run["folder"] for run in _runs_listed(folder)]


def _runs_listed(out: Path) -> list[dict[str, Any]]:
    file = out / SWEEP_FILE
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["runs"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(
            f"{file} can't be read ({type(error).__name__}): remove it, the runs beside it stay"
        ) from error


def _json(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in outcome._asdict().items() if name != "name"}


def sweep_table(axes: Axes, found: Sequence[Outcome]) -> Table:
    """A row for each run, the lowest FVU first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in axes:
        table.add_column(name, justify="right")
    for title in ("FVU", "L0", "dead", "tokens/s"):
        table.add_column(title, justify="right")
    for each in sorted(found, key=lambda one: one.fvu):
        cells = [value_text(each.values[name]) if name in each.values else "" for name in axes]
        table.add_row(
            *cells,
            f"{each.fvu:.4f}",
            f"{each.l0:.1f}",
            f"{each.dead_fraction:.1%}",
            f"{each.tokens_per_s:,.0f}",
        )
    return table
