"""Activations -> a trained SAE in a folder, with metrics on the way and exact resumption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae.autoencoder import SAE
from sae.calibration import THRESHOLD_ROWS, calibrate_
from sae.config import SAEConfig, TrainConfig
from sae.errors import TrainingStoppedError
from sae.initialisation import input_statistics, sample_batches, sample_rows
from sae.metrics import Metrics, MetricsLog, last_metrics
from sae.run_folder import RunFolder, RunPlan
from sae.schedule import resolve
from sae.sources import ActivationSource
from sae.training_state import StepReport, TrainingState

DEFAULTS = TrainConfig()


class RunResult(NamedTuple):
    """What training leaves: the SAE (on raw activations), its folder, steps, the last metrics."""

    sae: SAE
    path: Path
    steps: int
    metrics: Metrics | None


def train(
    source: ActivationSource,
    hookpoint: str,
    sae_config: SAEConfig,
    train_config: TrainConfig = DEFAULTS,
    *,
    out: str | Path,
    on_metrics: Callable[[Metrics], None] | None = None,
    resume: bool = True,
    should_stop: Callable[[], bool] | None = None,
) -> RunResult:
    """Train an SAE on a source's activations, into the folder out.

    A run that was interrupted goes on from its last checkpoint, to the same weights bit for bit
    (same machine, same number of threads); one that is finished returns at once; resume=False
    removes what is there and starts over. on_metrics gets each logged line. should_stop is asked
    after each step: when it says so, a checkpoint is left and TrainingStoppedError raised. Any
    other exception between steps leaves a checkpoint too.
    Raises: SourceError, ResumeMismatchError, CheckpointError, NonFiniteError,
    TrainingStoppedError, and FormatError if out holds a damaged SAE.
    """
    config = resolve(train_config, sae_config, source, hookpoint)
    folder = RunFolder(Path(out), RunPlan.of(source, hookpoint, sae_config, config))
    if not resume:
        folder.clear()
    sae = folder.finished()
    if sae is None:
        state = folder.resume() or _start(source, folder.plan)
        with closing(MetricsLog(folder.metrics_path, after_step=state.counters.step)) as log:
            _loop(state, source, folder, log, on_metrics, should_stop)
        sae = _finish(state, source, folder)
    assert config.n_steps is not None
    return RunResult(sae, folder.path, config.n_steps, last_metrics(folder.metrics_path))


def _loop(
    state: TrainingState,
    source: ActivationSource,
    folder: RunFolder,
    log: MetricsLog,
    on_metrics: Callable[[Metrics], None] | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    """Read, step, track, save."""
    config, counters, hookpoint = state.config, state.counters, folder.plan.hookpoint
    assert config.n_steps is not None
    meter = _Meter(state)
    with _checkpoint_on_error(state, folder, log):
        for x in _read(source, folder.plan, start_batch=counters.step):
            if counters.step >= config.n_steps:
                break
            report = state.advance(x)
            is_last = counters.step == config.n_steps
            if report is not None and (is_last or counters.step % config.log_every_steps == 0):
                metrics = meter.measure(report)
                log.append(metrics)
                if on_metrics is not None:
                    on_metrics(metrics)
            n_rows_read = counters.step * config.batch_size
            is_due = is_last or counters.step % config.checkpoint_every_steps == 0
            if is_due or source.wants_checkpoint(n_rows_read, hookpoint):
                meter.track_time()
                folder.checkpoint(state, log)
                source.release(n_rows_read, hookpoint)
            if not is_last and should_stop is not None and should_stop():
                raise TrainingStoppedError(
                    f"training in {folder.path} was stopped after step {counters.step} of "
                    f"{config.n_steps}; the same call goes on from there"
                )


def _read(
    source: ActivationSource,
    plan: RunPlan,
    *,
    start_batch: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Tensor]:
    """This rank's part of each batch, from start_batch on, without end."""
    return source.batches(
        plan.hookpoint,
        plan.train_config.batch_size,
        seed=plan.train_config.seed,
        start_batch=start_batch,
        epochs=None,
        rank=rank,
        world_size=world_size,
    )


def _start(source: ActivationSource, plan: RunPlan) -> TrainingState:
    """A fresh state, from statistics of the first rows."""
    config = plan.train_config
    rows = sample_rows(source, plan.hookpoint, config.init_rows, seed=config.seed)
    return TrainingState.start(plan.sae_config, config, input_statistics(rows, config.b_dec_init))


def _finish(state: TrainingState, source: ActivationSource, folder: RunFolder) -> SAE:
    """Fold the scale in, calibrate on train rows, save."""
    config, hookpoint = state.config, folder.plan.hookpoint
    sae = state.finished_sae(folder.plan.origin(state.counters.n_tokens)).to(config.device)
    n_rows = config.calibration_rows
    where: dict[str, Any] = {
        "seed": config.seed,
        "near_row": state.counters.step * config.batch_size - 1,
    }
    threshold_rows = sample_rows(source, hookpoint, min(n_rows, THRESHOLD_ROWS), **where)
    calibrate_(sae, threshold_rows, sample_batches(source, hookpoint, n_rows, **where))
    sae.save(folder.path)
    return sae.to("cpu")


@contextmanager
def _checkpoint_on_error(
    state: TrainingState, folder: RunFolder, log: MetricsLog
) -> Iterator[None]:
    """Leave a checkpoint behind whatever ends the loop early, unless it struck inside a step."""
    try:
        yield
    except BaseException:
        if state.is_between_steps and state.counters.step > 0:
            folder.checkpoint(state, log)
        raise


class _Meter:
    """Turns step reports into metrics, and keeps the clock."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._clock_s = self._logged_s = time.monotonic()
        self._logged_tokens = state.counters.n_tokens

    def measure(self, report: StepReport) -> Metrics:
        """Metrics of the step just taken."""
        now_s = self.track_time()
        state, counters, step = self._state, self._state.counters, report.step
        n_tokens, seconds = counters.n_tokens - self._logged_tokens, now_s - self._logged_s
        self._logged_s, self._logged_tokens = now_s, counters.n_tokens
        deviation = (report.x - report.x.mean(0)).square().sum()
        return Metrics(
            step=counters.step,
            n_tokens=counters.n_tokens,
            loss=float(step.loss),
            aux_loss=float(step.aux_loss),
            fvu=float(step.squared_error / deviation),
            l0=report.l0,
            dead_fraction=float(state.is_dead.double().mean()),
            lr=report.lr,
            grad_norm=report.grad_norm,
            n_skipped=counters.n_skipped,
            tokens_per_s=n_tokens / max(seconds, 1e-9),
            elapsed_s=counters.elapsed_s,
        )

    def track_time(self) -> float:
        """Bring elapsed_s up to date. Returns: the clock."""
        now_s = time.monotonic()
        self._state.counters.elapsed_s += now_s - self._clock_s
        self._clock_s = now_s
        return now_s
