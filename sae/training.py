"""Activations -> trained SAEs in folders, with metrics on the way and exact resumption."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sae.autoencoder import SAE
from sae.config import SAEConfig, TrainConfig
from sae.errors import ConfigError, StorageError, TrainingStoppedError
from sae.metrics import Metrics
from sae.reading import batches, shared_hookpoints
from sae.run import Run
from sae.run_folder import RunFolder, RunPlan
from sae.schedule import resolve
from sae.sources import ActivationSource
from sae.team import Team
from sae.wiring import Wiring, wiring_of

logger = logging.getLogger(__name__)

DEFAULTS = TrainConfig()


class RunSpec(NamedTuple):
    """One SAE of several that are trained side by side: where, what, how, and into which folder."""

    hookpoint: str | Wiring
    sae_config: SAEConfig
    train_config: TrainConfig
    out: Path


class RunResult(NamedTuple):
    """What training leaves: the SAE (on raw activations), its folder, steps, the last metrics."""

    sae: SAE
    path: Path
    steps: int
    metrics: Metrics | None


def train(
    source: ActivationSource,
    hookpoint: str | Wiring,
    sae_config: SAEConfig,
    train_config: TrainConfig = DEFAULTS,
    *,
    out: str | Path,
    on_metrics: Callable[[Metrics], None] | None = None,
    resume: bool = True,
    should_stop: Callable[[], bool] | None = None,
) -> RunResult:
    """Train an SAE on a source's activations, into the folder out.

    hookpoint: a place; or a transcoder's or crosscoder's wiring (see sae.wiring). A run that was
    interrupted goes on from its last checkpoint, to the same weights bit for bit (same machine,
    same numbers of threads and processes); one that is finished returns at once; resume=False
    removes what is there and starts over. on_metrics gets each logged line. should_stop is asked
    after each step: when it says so, a checkpoint is left and TrainingStoppedError raised. Any
    other exception between steps leaves a checkpoint too.

    Under torch.distributed every process calls this alike and reads its part of each batch; the
    first one writes.
    Raises: SourceError, ResumeMismatchError, CheckpointError, RunInUseError, NonFiniteError,
    DivergedError, TrainingStoppedError, StorageError, and FormatError if out holds a damaged SAE.
    """
    spec = RunSpec(hookpoint, sae_config, train_config, Path(out))

    def show(_: Path, metrics: Metrics) -> None:
        if on_metrics is not None:
            on_metrics(metrics)

    return train_many(source, [spec], on_metrics=show, resume=resume, should_stop=should_stop)[0]


def train_many(
    source: ActivationSource,
    specs: Sequence[RunSpec],
    *,
    on_metrics: Callable[[Path, Metrics], None] | None = None,
    resume: bool = True,
    should_stop: Callable[[], bool] | None = None,
) -> list[RunResult]:
    """Train several SAEs side by side from one read of a source, as train would each of them.

    They may differ in everything but batch_size and data_seed; each hookpoint is read once.
    on_metrics also gets the folder of the run.
    Raises: as train; ConfigError if two share a folder, or their batches differ.
    """
    plans = [
        RunPlan.of(source, wiring_of(spec.hookpoint), spec.sae_config, _resolved(source, spec))
        for spec in specs
    ]
    folders = [RunFolder(spec.out, plan) for spec, plan in zip(specs, plans, strict=True)]
    _require_one_read(folders)
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(folder.locked())
        Team().wait()  # the first process may still have been writing what all read now
        if not resume:
            for folder in folders:
                folder.clear()
        finished = {folder: sae for folder in folders if (sae := folder.finished()) is not None}
        if waiting := [folder for folder in folders if folder not in finished]:
            runs = [
                stack.enter_context(Run.begin(folder, source, on_metrics)) for folder in waiting
            ]
            _loop(runs, source, should_stop)
            finished |= {run.folder: run.finish() for run in runs}
    return [
        RunResult(finished[folder], folder.path, folder.plan.n_steps, folder.last_metrics())
        for folder in folders
    ]


def _loop(
    runs: list[Run], source: ActivationSource, should_stop: Callable[[], bool] | None
) -> None:
    """Read, step, track, save."""
    team, hookpoints = Team(), shared_hookpoints([run.folder.plan.wiring for run in runs])
    n_rows_saved = 0
    with _checkpoints_on_error(runs):
        for step, acts in _read(source, runs, hookpoints, team):
            for run in runs:
                run.take(step, acts)
            n_rows_read = (step + 1) * runs[0].config.batch_size
            if source.wants_checkpoint(n_rows_read, hookpoints):
                for run in runs:
                    run.checkpoint()
            # A run that is done needs nothing any more, however early that was.
            saved = [run.folder.saved_step for run in runs if not run.is_done] or [step + 1]
            if (n_rows := min(saved) * runs[0].config.batch_size) > n_rows_saved:
                source.release(n_rows, hookpoints)
                n_rows_saved = n_rows
            if all(run.is_done for run in runs):
                return
            if should_stop is not None and team.any(should_stop()):
                raise TrainingStoppedError(
                    f"training in {', '.join(str(run.folder.path) for run in runs)} was stopped "
                    f"after step {step + 1} of {max(run.folder.plan.n_steps for run in runs)}; "
                    "the same call goes on from there"
                )


def _read(
    source: ActivationSource, runs: list[Run], hookpoints: tuple[str, ...], team: Team
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """This process's part of each batch with its number, from the first that a run still needs."""
    if all(run.is_done for run in runs):
        return
    config, first = runs[0].config, min(run.step for run in runs if not run.is_done)
    assert config.data_seed is not None
    read = batches(
        source,
        hookpoints,
        config.batch_size,
        seed=config.data_seed,
        start_batch=first,
        rank=team.rank,
        world_size=team.world_size,
    )
    yield from enumerate(read, start=first)


def _resolved(source: ActivationSource, spec: RunSpec) -> TrainConfig:
    return resolve(spec.train_config, spec.sae_config, source, spec.hookpoint)


def _require_one_read(folders: list[RunFolder]) -> None:
    """Raises: ConfigError if the runs can't be trained from the same batches."""
    if not folders:
        raise ConfigError("no run to train: give at least one")
    configs = [folder.plan.train_config for folder in folders]
    for what in ("batch_size", "data_seed"):
        values = sorted({getattr(config, what) for config in configs})
        if len(values) > 1:
            raise ConfigError(
                f"runs that are trained side by side share their batches, but {what} is "
                f"{' and '.join(map(str, values))}; give all the same"
            )
    places = [folder.path.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"two runs are to be trained into {place}; give each its own folder")


@contextmanager
def _checkpoints_on_error(runs: list[Run]) -> Iterator[None]:
    """Leave checkpoints behind whatever ends the loop early, but of no run that was in a step."""
    try:
        yield
    except BaseException:
        for run in runs:
            try:
                run.checkpoint_if_between_steps()
            except StorageError as error:
                logger.warning("no checkpoint was left: %s", error)
        raise
