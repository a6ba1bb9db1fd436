"""One run on its way: its state, its folder, its metrics, and the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.autoencoder import SAE
from sae.calibration import THRESHOLD_ROWS, calibrate_
from sae.config import TrainConfig
from sae.initialisation import input_statistics
from sae.metrics import Clock, Metrics, MetricsLog
from sae.reading import batch_of, sample_batches, sample_rows, widths
from sae.run_folder import RunFolder, RunPlan
from sae.sources import ActivationSource
from sae.training_state import StepReport, TrainingState

OnMetrics = Callable[[Path, Metrics], None]


class Run:
    """A run that is being trained: `take` batches until `is_done`, then `finish`."""

    def __init__(
        self,
        folder: RunFolder,
        source: ActivationSource,
        state: TrainingState,
        log: MetricsLog | None,
        on_metrics: OnMetrics | None,
    ) -> None:
        """log: None where another process writes it."""
        self.folder = folder
        self._source, self._state, self._log = source, state, log
        self._on_metrics = on_metrics
        self._clock = Clock(state.counters)

    @classmethod
    @contextmanager
    def begin(
        cls, folder: RunFolder, source: ActivationSource, on_metrics: OnMetrics | None
    ) -> Iterator[Run]:
        """The run in a folder, from its newest checkpoint or from the start."""
        state = folder.resume() or started(source, folder.plan)
        if not state.team.is_first:
            yield cls(folder, source, state, None, on_metrics)
            return
        with closing(MetricsLog(folder.metrics_path, after_step=state.counters.step)) as log:
            yield cls(folder, source, state, log, on_metrics)

    @property
    def config(self) -> TrainConfig:
        """Resolved."""
        return self._state.config

    @property
    def step(self) -> int:
        """Batches read."""
        return self._state.counters.step

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.folder.plan.n_steps

    def take(self, step: int, acts: dict[str, Tensor]) -> None:
        """The step of that number, if it is this run's next: on rows at each hookpoint."""
        if self.is_done or step != self.step:
            return
        report = self._state.advance(batch_of(acts, self.folder.plan.wiring))
        if report is not None and (self.is_done or self.step % self.config.log_every_steps == 0):
            metrics = metrics_of(self._state, report, self._clock.tokens_per_s())
            if self._log is not None:
                self._log.append(metrics)
                if self._on_metrics is not None:
                    self._on_metrics(self.folder.path, metrics)
        if self.is_done or self.step % self.config.checkpoint_every_steps == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save where the run stands."""
        self._clock.tick()
        self.folder.checkpoint(self._state, self._log)

    def checkpoint_if_between_steps(self) -> None:
        """Save where the run stands, unless a step was cut short or none is taken."""
        if self._state.is_between_steps and self.step > 0:
            self.checkpoint()

    def finish(self) -> SAE:
        """Fold the units in, calibrate on train rows, save."""
        config, plan, state = self.config, self.folder.plan, self._state
        sae = state.finished_sae(plan.origin(state.counters.n_tokens)).to(config.device)
        n_rows = config.calibration_rows
        where: dict[str, Any] = {
            "seed": config.data_seed,
            "near_row": self.step * config.batch_size - 1,
        }
        n_threshold = min(n_rows, THRESHOLD_ROWS)
        threshold_rows = sample_rows(self._source, plan.wiring, n_threshold, **where).x
        sampled = sample_batches(self._source, plan.wiring, n_rows, **where)
        calibrate_(sae, threshold_rows, (batch.x for batch in sampled))
        if state.team.is_first:
            self.folder.sweep()
            sae.save(self.folder.path)
        state.team.wait()
        return sae.to("cpu")


def started(source: ActivationSource, plan: RunPlan) -> TrainingState:
    """A fresh state, from statistics of the first rows."""
    config, wiring = plan.train_config, plan.wiring
    assert config.data_seed is not None
    rows = sample_rows(source, wiring, config.init_rows, seed=config.data_seed)
    widths_out = widths(source, wiring.writes)
    statistics = input_statistics(
        rows,
        widths(source, wiring.reads),
        widths_out,
        b_dec_init=config.b_dec_init,
        center=config.center,
    )
    origin = plan.origin(0)
    return TrainingState.start(
        plan.sae_config, config, statistics, origin=origin, widths=widths_out
    )


def metrics_of(state: TrainingState, report: StepReport, tokens_per_s: float) -> Metrics:
    """Metrics of the step just taken. Under torch.distributed, of all processes together."""
    counters, step, team = state.counters, report.step, state.team
    total, n_rows = report.y.sum(0), team.sum(len(report.y))
    team.sum_(total)
    deviation = team.sum(float((report.y - total / n_rows).square().sum()))
    return Metrics(
        step=counters.step,
        n_tokens=counters.n_tokens,
        loss=float(step.loss),
        penalty=float(step.penalty),
        aux_loss=float(step.aux_loss),
        fvu=float(step.squared_error) / deviation,
        l0=report.l0,
        dead_fraction=float(state.is_dead.double().mean()),
        lr=report.lr,
        coefficient=report.coefficient,
        grad_norm=report.grad_norm,
        n_skipped=counters.n_skipped,
        tokens_per_s=tokens_per_s,
        elapsed_s=counters.elapsed_s,
    )
