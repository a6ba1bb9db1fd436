"""Activations, stored or streamed -> trained SAEs: one, or several side by side from one read.

The work is `sae.train_many`'s; here it is named, shown, stopped politely, and told to trackers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from activation_cache import ActivationCache, ActivationStream
from sae import SAE, Metrics, TrainingStoppedError
from sae.architectures import architecture_of
from sae.schedule import resolve
from sae.training import RunSpec, train_many
from sae.wiring import Wiring, crosscoder, transcoder, wiring_of

from .errors import PipelineError
from .interruption import stop_asked
from .progress import StageProgress
from .ranks import is_first_rank
from .run_record import read_metrics
from .sweep import Axes
from .sweep_file import outcome_of, sweep_table, write_sweep
from .trackers import Tracker

Source = ActivationCache | ActivationStream


class Places(NamedTuple):
    """Where an SAE reads and writes, as the command line says it; see `wiring`."""

    hookpoint: str | None = None
    reads: str | None = None
    writes: str | None = None
    skip: bool = False
    hookpoints: Sequence[str] = ()

    @property
    def wiring(self) -> str | Wiring | None:
        """A place, a transcoder's or a crosscoder's wiring; None if nothing is said.

        Raises: PipelineError for flags that don't go together; ConfigError for an impossible one.
        """
        given = [
            flag
            for flag, value in (
                ("--hookpoint", self.hookpoint),
                ("--reads", self.reads or self.writes),
                ("--hookpoints", self.hookpoints),
            )
            if value
        ]
        if len(given) > 1:
            raise PipelineError(
                f"{' and '.join(given)} name different things: --hookpoint an SAE's place, --reads "
                "and --writes a transcoder's, --hookpoints a crosscoder's. Give one of them"
            )
        if self.hookpoints:
            wiring: str | Wiring | None = crosscoder(*self.hookpoints)
        elif self.reads and self.writes:
            return transcoder(self.reads, self.writes, skip=self.skip)
        elif self.reads or self.writes:
            missing = "--writes" if self.reads else "--reads"
            raise PipelineError(f"a transcoder needs --reads and --writes; {missing} is missing")
        else:
            wiring = self.hookpoint
        if self.skip:
            raise PipelineError("--skip is for transcoders: give --reads and --writes with it")
        return wiring


def train_stage(
    console: Console,
    acts: Source,
    specs: Sequence[RunSpec],
    trackers: Mapping[Path, Tracker],
    *,
    out: Path,
    axes: Axes,
) -> list[SAE]:
    """Train the SAEs that are not finished, with progress. trackers: by folder of the run.

    axes: of a sweep, whose runs lie in `out` and whose table is printed at the end; empty for one
    run, which lies in `out` itself.
    """
    hookpoints = ", ".join(dict.fromkeys(wiring_of(spec.hookpoint).name for spec in specs))
    what = hookpoints if not axes else f"{len(specs)} SAEs side by side at {hookpoints}"
    console.print(
        f"[bold cyan]train[/]  {what} of {acts.path} -> {out}", highlight=False, soft_wrap=True
    )
    if axes and is_first_rank():
        write_sweep(out, axes, specs, [])
    shown = _Shown(console, acts, specs, trackers)
    with shown.progress, stop_asked() as should_stop:
        try:
            saes = [
                result.sae
                for result in train_many(
                    acts, specs, on_metrics=shown.take, should_stop=should_stop
                )
            ]
        except TrainingStoppedError as error:
            raise KeyboardInterrupt from error
    _tell_trackers(trackers, specs, saes)
    if axes:
        _finish_sweep(console, out, axes, specs)
    else:
        for sae in saes:
            console.print(f"  {sae_line(sae)}", highlight=False, markup=False, soft_wrap=True)
    console.print()
    return saes


def described(spec: RunSpec) -> dict[str, Any]:
    """A run's settings, for a tracker."""
    return {
        "architecture": architecture_of(spec.sae_config).name,
        "place": wiring_of(spec.hookpoint).name,
        **spec.sae_config.model_dump(mode="json"),
        **spec.train_config.model_dump(mode="json"),
    }


def sae_line(sae: SAE) -> str:
    """What an SAE is, in a sentence."""
    l0 = f", k {sae.expected_l0:g}" if sae.expected_l0 else ""
    wiring = sae.wiring
    kind = "SAE" if sae.is_tied and sae.has_one_output else "transcoder"
    kind = "crosscoder" if sae.is_tied and not sae.has_one_output else kind
    return (
        f"{sae.architecture} {kind} at {wiring.name if wiring else 'no place'}: {sae.d_sae:,} "
        f"features of width {sae.d_out}{l0}, trained on {sae.origin.n_tokens_trained:,} rows"
    )


class _Shown:
    """The progress of one run, or of several at once, from their metrics."""

    def __init__(
        self,
        console: Console,
        acts: Source,
        specs: Sequence[RunSpec],
        trackers: Mapping[Path, Tracker],
    ) -> None:
        self.progress = StageProgress(console, "train", "tokens")
        self._trackers, self._latest = trackers, dict[Path, Metrics]()
        steps = [
            resolve(spec.train_config, spec.sae_config, acts, spec.hookpoint).n_steps or 0
            for spec in specs
        ]
        self._n_tokens = max(steps) * specs[0].train_config.batch_size

    def take(self, folder: Path, m: Metrics) -> None:
        """A logged line of one of the runs."""
        self._latest[folder] = m
        if folder in self._trackers:
            self._trackers[folder].metrics(m)
        every = list(self._latest.values())
        note = (
            f"FVU {_span([e.fvu for e in every], '.3f')}  L0 {_span([e.l0 for e in every], '.1f')}"
        )
        note += f"  dead {_span([100 * e.dead_fraction for e in every], '.1f')}%"
        self.progress.update(
            max(e.n_tokens for e in every),
            self._n_tokens,
            f"{note}  {m.tokens_per_s:,.0f} tokens/s",
        )


def _span(values: list[float], form: str) -> str:
    """`0.213`, or `0.213 to 0.418` of several."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _tell_trackers(
    trackers: Mapping[Path, Tracker], specs: Sequence[RunSpec], saes: Sequence[SAE]
) -> None:
    for spec, sae in zip(specs, saes, strict=True):
        if spec.out in trackers:
            trackers[spec.out].sae(sae)


def _finish_sweep(console: Console, out: Path, axes: Axes, specs: Sequence[RunSpec]) -> None:
    """sweep.json with figures, and the table."""
    if not is_first_rank():
        return
    found = [outcome_of(spec, axes, read_metrics(spec.out)) for spec in specs]
    write_sweep(out, axes, specs, found)
    console.print(sweep_table(axes, found))
    console.print("  FVU and L0 are means over the last 5% of training", highlight=False)
