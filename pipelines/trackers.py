"""Where training metrics go besides `metrics.jsonl`: Weights & Biases, when asked.

One wandb run for each SAE: the figures of every logged step, and at the end histograms of what was
learnt (see `feature_statistics`). `WANDB_API_KEY` and `WANDB_MODE` are read by wandb itself;
offline mode needs no account.
"""

import importlib.util
import netrc
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from sae import SAE, Metrics, Report

from .errors import PipelineError
from .feature_statistics import feature_statistics
from .flattening import flat
from .ranks import is_first_rank

_N_BINS = 64
_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")


class Tracker(Protocol):
    """Takes what training tells of one SAE."""

    def metrics(self, metrics: Metrics) -> None: ...
    def sae(self, sae: SAE) -> None: ...
    def report(self, report: Report) -> None: ...
    def close(self) -> None: ...


@contextmanager
def trackers_of(
    wandb_project: str | None, runs: Mapping[Path, dict[str, Any]]
) -> Iterator[dict[Path, Tracker]]:
    """The trackers that were asked for, closed however the work ends. runs: settings by folder.

    Raises: PipelineError if wandb can't be used: said before anything begins.
    """
    with ExitStack() as stack:
        trackers: dict[Path, Tracker] = {}
        if wandb_project and is_first_rank():
            require_wandb()
            group = next(iter(runs)).parent.name if len(runs) > 1 else None
            for folder, settings in runs.items():
                tracker = WandbTracker(wandb_project, folder.name, settings, group=group)
                stack.callback(tracker.close)
                trackers[folder] = tracker
        yield trackers


def require_wandb(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: PipelineError if wandb is not installed, or has no key where it needs one."""
    if importlib.util.find_spec("wandb") is None:
        raise PipelineError(
            "--wandb-project needs wandb, which is not installed: pip install 'saebase[wandb]'"
        )
    if environment.get("WANDB_MODE", "online").lower() in _WITHOUT_ACCOUNT:
        return
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlparse(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if not _has_login(Path(environment.get("NETRC", "~/.netrc")).expanduser(), host):
        raise PipelineError(
            f"--wandb-project: wandb has no key for {host}. Set WANDB_API_KEY, log in with `wandb "
            "login`, or set WANDB_MODE=offline, which needs no account"
        )


def _has_login(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker:
    """One run in a Weights & Biases project.

    group: under which runs of a sweep are shown together.
    Raises: PipelineError if wandb refuses to start.
    """

    def __init__(
        self, project: str, name: str, config: dict[str, Any], *, group: str | None = None
    ) -> None:
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project, name=name, config=config, group=group, reinit="create_new"
            )
        except (wandb.Error, OSError) as error:
            raise PipelineError(
                f"wandb did not start: {str(error).rstrip('.')}. Log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error

    def metrics(self, metrics: Metrics) -> None:
        """A logged step, counted in steps of training."""
        values = {f"train/{name}": value for name, value in vars(metrics).items()}
        self._run.log(values, step=metrics.step)

    def sae(self, sae: SAE) -> None:
        """Histograms of densities, maxima, decoder norms and cosines, once it is trained."""
        found = feature_statistics(sae)
        histograms = {
            f"features/{name}": self._wandb.Histogram(values.tolist(), num_bins=_N_BINS)
            for name, values in found.histograms().items()
            if len(values)
        }
        self._run.log({**histograms, "features/n_never_active": found.n_never_active})

    def report(self, report: Report) -> None:
        """The evaluation's figures, as the run's summary."""
        self._run.summary.update({f"eval/{k}": v for k, v in flat(report.model_dump()).items()})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
