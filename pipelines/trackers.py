"""Where training metrics go besides `metrics.jsonl`: Weights & Biases, when asked.

`WANDB_API_KEY` and `WANDB_MODE` are read by wandb itself; offline mode needs no account.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from sae import Metrics, Report

from .errors import PipelineError


class Tracker(Protocol):
    """Takes what training tells."""

    def metrics(self, metrics: Metrics) -> None: ...
    def report(self, report: Report) -> None: ...
    def close(self) -> None: ...


@contextmanager
def trackers_of(
    wandb_project: str | None, name: str, config: dict[str, Any]
) -> Iterator[list[Tracker]]:
    """The trackers that were asked for, closed however the work ends."""
    trackers: list[Tracker] = [WandbTracker(wandb_project, name, config)] if wandb_project else []
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


class WandbTracker:
    """One run in a Weights & Biases project.

    Raises: PipelineError if wandb is not installed or refuses to start.
    """

    def __init__(self, project: str, name: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise PipelineError(
                "--wandb-project needs wandb, which is not installed: pip install 'saebase[wandb]'"
            ) from error
        try:
            self._run = wandb.init(project=project, name=name, config=config)
        except (wandb.Error, OSError) as error:
            raise PipelineError(
                f"wandb did not start: {str(error).rstrip('.')}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def metrics(self, metrics: Metrics) -> None:
        values = {f"train/{name}": value for name, value in vars(metrics).items()}
        self._run.log(values, step=metrics.step)

    def report(self, report: Report) -> None:
        self._run.summary.update({f"eval/{k}": v for k, v in _flat(report.model_dump()).items()})

    def close(self) -> None:
        self._run.finish()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested numbers and texts with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            flat[prefix + name] = value
    return flat
