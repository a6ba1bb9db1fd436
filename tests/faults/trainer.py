"""What a trainer does, in a child of the host: train the SAEs of a job into a folder.

A job's runs lie in folders of their own below the given one, called after their architecture: one
run, or several that are trained side by side, from a cache or from a stream.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from activation_cache import ActivationCache, ActivationStream, LanguageModel
from sae import SAEConfig, TrainConfig
from sae.architectures import config_of
from sae.sources import ActivationSource
from sae.training import RunSpec, train_many

from . import failing_calls, writer

HOOKPOINT = "layers.1.resid_post"
D_SAE = 64
_SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4},
    "matryoshka": {"k": 4},
    "jumprelu": {"target_l0": 8.0},
    "gated": {},
}
ARCHITECTURES = tuple(_SETTINGS)


class TrainJob(NamedTuple):
    """Runs that are trained side by side. n_steps: of each. checkpoint_every: steps. keep:
    checkpoints kept. is_streamed: from text, without a cache, inside a budget of disk."""

    architectures: tuple[str, ...]
    n_steps: int = 60
    checkpoint_every: int = 7
    keep: int = 2
    is_streamed: bool = False

    def config(self, *, seed: int = 0) -> TrainConfig:
        """Small enough for a run to take a fraction of a second, with dead features on the way."""
        return TrainConfig(
            n_steps=self.n_steps,
            batch_size=64,
            lr=3e-3,
            init_rows=256,
            calibration_rows=512,
            dead_after_tokens=1_000,
            checkpoint_every_steps=self.checkpoint_every,
            keep_checkpoints=self.keep,
            log_every_steps=4,
            kernels="torch",
            device="cpu",
            seed=seed,
            data_seed=0,
        )

    def specs(self, out: Path) -> list[RunSpec]:
        """What is trained, and where below `out`."""
        return [
            RunSpec(HOOKPOINT, sae_config(name), self.config(seed=i), out / name)
            for i, name in enumerate(self.architectures)
        ]

    @property
    def label(self) -> str:
        side_by_side = " and ".join(self.architectures)
        return f"{side_by_side} from a stream" if self.is_streamed else side_by_side


def sae_config(architecture: str) -> SAEConfig:
    return config_of(architecture, {"d_sae": D_SAE, **_SETTINGS[architecture]})


def train_job(
    lm: LanguageModel,
    *,
    out: str,
    job: list[Any],
    cache: str,
    fail: tuple[list[Any], str] | None = None,
) -> int:
    """Train, or go on. fail: the fields of a `FailingCall`, and how it is made to fail.

    Returns: how many lines of metrics were told; 0 if there was nothing left to do.
    """
    chosen, n_told = TrainJob(*job), 0
    chosen = chosen._replace(architectures=tuple(chosen.architectures))

    def tell(*_: object) -> None:
        nonlocal n_told
        n_told += 1

    logging.getLogger("sae").setLevel(logging.ERROR)  # a run so short misses the L0 it aims at
    if fail:
        failing_calls.arm(failing_calls.FailingCall(*fail[0]), fail[1])
    with _source(lm, chosen, Path(out), cache) as source:
        train_many(source, chosen.specs(Path(out)), on_metrics=tell)
    return n_told


@contextmanager
def _source(lm: LanguageModel, job: TrainJob, out: Path, cache: str) -> Iterator[ActivationSource]:
    if not job.is_streamed:
        yield ActivationCache.open(cache)
        return
    options: dict[str, Any] = {
        "folder": out.with_name("stream"),
        "max_disk_bytes": 400_000,
        "ctx_len": 16,
        "batch_blocks": 4,
        "storage_dtype": "float32",
        "shard_bytes": 64_000,
    }
    with ActivationStream.open(lm, writer.texts(), hookpoints=HOOKPOINT, **options) as stream:
        yield stream
