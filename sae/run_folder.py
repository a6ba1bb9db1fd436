"""The folder of a run: its settings, checkpoints, metrics, and at the end the SAE itself."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sae.architectures import architecture_of
from sae.atomic_files import held, told
from sae.autoencoder import SAE, Origin
from sae.checkpoints import (
    load_newest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    sweep_checkpoints,
)
from sae.config import FREE_SETTINGS, SAEConfig, TrainConfig
from sae.errors import ResumeMismatchError, RunInUseError
from sae.metrics import Metrics, MetricsLog, last_metrics
from sae.sources import ActivationSource
from sae.storage import CONFIG_FILE, WEIGHTS_FILE, read_description
from sae.team import Team
from sae.training_state import TrainingState
from sae.wiring import Wiring, wiring_from, wiring_of

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
LOCK_FILE = ".lock"


class RunPlan(NamedTuple):
    """What a run will compute, resolved: with the same data, equal plans make equal SAEs."""

    wiring: Wiring
    sae_config: SAEConfig
    train_config: TrainConfig
    max_norm: float
    provenance: dict[str, Any]

    @classmethod
    def of(
        cls, source: ActivationSource, wiring: Wiring, sae_config: SAEConfig, config: TrainConfig
    ) -> RunPlan:
        """The plan of a run on a source; config is resolved already."""
        provenance = dict(source.provenance(wiring.hookpoints[0]))
        if len(wiring.hookpoints) > 1:
            provenance["hookpoints"] = list(wiring.hookpoints)
        # Rows are left out for the norm that they have at one place; of several, none says it all.
        is_one_place = len(wiring.reads) == 1
        max_norm = source.max_norm(wiring.reads[0]) if is_one_place else math.inf
        return cls(wiring, sae_config, config, max_norm, provenance)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        assert self.train_config.n_steps is not None
        return self.train_config.n_steps

    def origin(self, n_tokens: int) -> Origin:
        """What is saved with the SAE."""
        is_plain = self.wiring == wiring_of(self.wiring.reads[0])
        return Origin(
            hookpoint=self.wiring.reads[0] if len(self.wiring.reads) == 1 else None,
            wiring=None if is_plain else self.wiring,
            max_norm=self.max_norm,
            n_tokens_trained=n_tokens,
            train_config=self.train_config.model_dump(mode="json"),
            provenance=self.provenance,
        )

    def settings(self) -> dict[str, Any]:
        """As JSON: what a run must share with the one it continues."""
        settings = {
            "architecture": architecture_of(self.sae_config).name,
            "wiring": self.wiring.model_dump(mode="json"),
            "max_norm": repr(self.max_norm),
            "sae": self.sae_config.model_dump(mode="json"),
            "train": self.train_config.model_dump(mode="json", exclude=set(FREE_SETTINGS)),
            "provenance": self.provenance,
        }
        return dict(json.loads(json.dumps(settings)))


class LockedFolder:
    """A folder that one process works in: config.json, sae.safetensors, metrics.jsonl,
    checkpoints/."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl."""
        return self.path / METRICS_FILE

    @property
    def checkpoints_path(self) -> Path:
        """checkpoints/."""
        return self.path / CHECKPOINTS_FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from training here meanwhile.

        Raises: RunInUseError if one is.
        """
        if not Team().is_first:
            yield
            return
        with held(self.path / LOCK_FILE) as is_free:
            if not is_free:
                raise RunInUseError(
                    f"another process is training in {self.path}; wait for it, or give another "
                    "folder"
                )
            yield

    def clear(self) -> None:
        """Remove what an earlier run left, for a fresh start."""
        if Team().is_first:
            with told(self.path):
                (self.path / CONFIG_FILE).unlink(missing_ok=True)
                (self.path / WEIGHTS_FILE).unlink(missing_ok=True)
                remove_checkpoints(self.checkpoints_path)
                self.metrics_path.unlink(missing_ok=True)
        Team().wait()

    def require_same(self, planned: dict[str, Any], found: dict[str, Any]) -> None:
        """Compare another run's settings, as far as they are given, with those planned.

        Raises: ResumeMismatchError, which names what differs.
        """
        flat = _flat(planned)
        differing = [
            f"{name}={value!r} (now {flat.get(name)!r})"
            for name, value in _flat(found).items()
            if flat.get(name) != value
        ]
        if differing:
            raise ResumeMismatchError(
                f"the run in {self.path} was started with {', '.join(differing)}; use the same "
                "settings, another folder, or resume=False to start over"
            )


class RunFolder(LockedFolder):
    """runs/NAME/ of a run of training."""

    def __init__(self, path: Path, plan: RunPlan) -> None:
        super().__init__(path)
        self.plan = plan
        self.saved_step = 0

    def last_metrics(self) -> Metrics | None:
        """The last line of metrics.jsonl."""
        return last_metrics(self.metrics_path)

    def finished(self) -> SAE | None:
        """The run's SAE if it is finished; None if it isn't.

        Raises: ResumeMismatchError if it was another run's.
        """
        if not (self.path / CONFIG_FILE).is_file():
            return None
        description = read_description(self.path)
        if description.get("train") is not None:
            self.require_same(
                self.plan.settings(),
                {
                    "architecture": description["architecture"],
                    "wiring": _wiring_settings(description),
                    "sae": description["sae"],
                    "train": {
                        name: value
                        for name, value in description["train"].items()
                        if name not in FREE_SETTINGS
                    },
                    "provenance": description["provenance"],
                },
            )
        return SAE.load(self.path)

    def resume(self) -> TrainingState | None:
        """The state of the newest whole checkpoint; None if there is none.

        Raises: ResumeMismatchError, CheckpointError.
        """
        checkpoint = load_newest_checkpoint(self.checkpoints_path)
        if checkpoint is None:
            return None
        self.require_same(self.plan.settings(), checkpoint.values["settings"])
        state = TrainingState.from_checkpoint(
            checkpoint, self.plan.sae_config, self.plan.train_config, self.plan.origin(0)
        )
        self.saved_step = state.counters.step
        logger.info("%s: going on from step %d", self.path, state.counters.step)
        return state

    def sweep(self) -> None:
        """Remove what a process left that was killed while it wrote or removed checkpoints."""
        keep = self.plan.train_config.keep_checkpoints
        sweep_checkpoints(self.checkpoints_path, self.plan.n_steps, keep=keep)

    def checkpoint(self, state: TrainingState, log: MetricsLog | None) -> None:
        """Save the state, after the metrics that lead up to it. Once a step is enough.

        log: None where another process writes, which then saves the state too.
        """
        step = state.counters.step
        if step == self.saved_step:
            return
        if log is not None:
            log.sync()
            checkpoint = state.to_checkpoint()
            checkpoint.values["settings"] = self.plan.settings()
            keep = self.plan.train_config.keep_checkpoints
            save_checkpoint(self.checkpoints_path, step, checkpoint, keep=keep)
        self.saved_step = step


def _wiring_settings(description: dict[str, Any]) -> dict[str, Any] | None:
    wiring = wiring_from(description)
    return None if wiring is None else wiring.model_dump(mode="json")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
