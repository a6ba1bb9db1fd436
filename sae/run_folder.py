"""The folder of a run: its settings, checkpoints, metrics, and at the end the SAE itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from sae.architectures import architecture_of
from sae.autoencoder import SAE, Origin
from sae.checkpoints import load_newest_checkpoint, remove_checkpoints, save_checkpoint
from sae.config import SAEConfig, TrainConfig
from sae.errors import ResumeMismatchError
from sae.metrics import MetricsLog
from sae.sources import ActivationSource
from sae.storage import CONFIG_FILE, WEIGHTS_FILE, read_description
from sae.training_state import TrainingState

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
# Settings that may differ when a run goes on: they don't change what it computes.
FREE_SETTINGS = ("checkpoint_every_steps", "keep_checkpoints")


class RunPlan(NamedTuple):
    """What a run will compute, resolved: with the same data, equal plans make equal SAEs."""

    hookpoint: str
    d_model: int
    sae_config: SAEConfig
    train_config: TrainConfig
    max_norm: float
    provenance: dict[str, Any]

    @classmethod
    def of(
        cls, source: ActivationSource, hookpoint: str, sae_config: SAEConfig, config: TrainConfig
    ) -> RunPlan:
        """The plan of a run on a source; config is resolved already."""
        return cls(
            hookpoint,
            source.d_model(hookpoint),
            sae_config,
            config,
            source.max_norm(hookpoint),
            source.provenance(hookpoint),
        )

    def origin(self, n_tokens: int) -> Origin:
        """What is saved with the SAE."""
        return Origin(
            hookpoint=self.hookpoint,
            max_norm=self.max_norm,
            n_tokens_trained=n_tokens,
            train_config=self.train_config.model_dump(mode="json"),
            provenance=self.provenance,
        )

    def settings(self) -> dict[str, Any]:
        """As JSON: what a run must share with the one it continues."""
        settings = {
            "architecture": architecture_of(self.sae_config).name,
            "hookpoint": self.hookpoint,
            "d_model": self.d_model,
            "max_norm": repr(self.max_norm),
            "sae": self.sae_config.model_dump(mode="json"),
            "train": self.train_config.model_dump(mode="json", exclude=set(FREE_SETTINGS)),
            "provenance": self.provenance,
        }
        return dict(json.loads(json.dumps(settings)))


class RunFolder:
    """runs/NAME/: config.json, sae.safetensors, metrics.jsonl, checkpoints/."""

    def __init__(self, path: Path, plan: RunPlan) -> None:
        self.path, self.plan = path, plan
        self._saved_step = -1

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl."""
        return self.path / METRICS_FILE

    def finished(self) -> SAE | None:
        """The run's SAE if it is finished; None if it isn't.

        Raises: ResumeMismatchError if it was another run's.
        """
        if not (self.path / CONFIG_FILE).is_file():
            return None
        description = read_description(self.path)
        if description.get("train") is not None:
            self._check_same(
                {
                    "architecture": description["architecture"],
                    "hookpoint": description["hookpoint"],
                    "d_model": description["d_model"],
                    "sae": description["sae"],
                    "train": {
                        name: value
                        for name, value in description["train"].items()
                        if name not in FREE_SETTINGS
                    },
                    "provenance": description["provenance"],
                }
            )
        return SAE.load(self.path)

    def resume(self) -> TrainingState | None:
        """The state of the newest whole checkpoint; None if there is none.

        Raises: ResumeMismatchError, CheckpointError.
        """
        checkpoint = load_newest_checkpoint(self.path / CHECKPOINTS_FOLDER)
        if checkpoint is None:
            return None
        self._check_same(checkpoint.values["settings"])
        state = TrainingState.from_checkpoint(
            checkpoint, self.plan.sae_config, self.plan.train_config, self.plan.d_model
        )
        self._saved_step = state.counters.step
        logger.info("%s: going on from step %d", self.path, state.counters.step)
        return state

    def clear(self) -> None:
        """Remove what an earlier run left, for a fresh start."""
        (self.path / CONFIG_FILE).unlink(missing_ok=True)
        (self.path / WEIGHTS_FILE).unlink(missing_ok=True)
        remove_checkpoints(self.path / CHECKPOINTS_FOLDER)
        self.metrics_path.unlink(missing_ok=True)

    def checkpoint(self, state: TrainingState, log: MetricsLog) -> None:
        """Save the state, after the metrics that lead up to it. Once a step is enough."""
        step = state.counters.step
        if step == self._saved_step:
            return
        log.sync()
        checkpoint = state.to_checkpoint()
        checkpoint.values["settings"] = self.plan.settings()
        keep = self.plan.train_config.keep_checkpoints
        save_checkpoint(self.path / CHECKPOINTS_FOLDER, step, checkpoint, keep=keep)
        self._saved_step = step

    def _check_same(self, settings: dict[str, Any]) -> None:
        """Compare another run's settings, as far as they are given, with the plan's."""
        planned = _flat(self.plan.settings())
        for name, value in _flat(settings).items():
            if planned.get(name) != value:
                raise ResumeMismatchError(
                    f"the run in {self.path} has {name}={value!r}, but now {planned.get(name)!r} "
                    "is asked for; use the same settings, another folder, or resume=False to "
                    "start over"
                )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
