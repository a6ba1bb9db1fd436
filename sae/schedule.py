"""Settings that depend on the data or on each other, resolved once; and the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from sae.config import LearningConfig, SAEConfig, TrainConfig
from sae.errors import ConfigError, SourceError
from sae.kernels import kernels_of
from sae.reading import widths
from sae.sources import ActivationSource
from sae.wiring import Wiring, wiring_of

# Gao et al. 2024, arXiv 2406.04093, section 3: lr falls as 1 / sqrt(d_sae); the constant is that
# of EleutherAI/sparsify.
LR_AT_16384 = 2e-4


def resolve(
    config: TrainConfig,
    sae_config: SAEConfig,
    source: ActivationSource,
    hookpoint: str | Wiring,
) -> TrainConfig:
    """The same settings with nothing left to compute.

    Raises: SourceError if the source holds less than one batch; ConfigError if settings clash.
    """
    wiring = wiring_of(hookpoint)
    n_rows = _n_rows(source, wiring, config.batch_size)
    if n_rows is None and not (config.n_steps or config.n_tokens):
        raise ConfigError(
            "a stream of activations has no length: say how long to train, with n_tokens or n_steps"
        )
    _require_alignable(config, wiring)
    n_tokens = config.n_tokens or (n_rows or 0) // config.batch_size * config.batch_size
    n_steps = config.n_steps or math.ceil(n_tokens / config.batch_size)
    warmup_steps = min(1000, n_steps // 20) if config.warmup_steps is None else config.warmup_steps
    resolved: dict[str, Any] = {
        "n_steps": n_steps,
        "n_tokens": None,
        "lr": config.lr or default_lr(sae_config.d_sae),
        "warmup_steps": warmup_steps,
        "k_aux": config.k_aux or max(1, sum(widths(source, wiring.writes)) // 2),
        "data_seed": config.seed if config.data_seed is None else config.data_seed,
        **means_here(config),
    }
    return config.model_copy(update=resolved)


def default_lr(d_sae: int) -> float:
    """The learning rate of an SAE whose user named none."""
    return LR_AT_16384 / math.sqrt(d_sae / 16384)


def means_here(config: LearningConfig) -> dict[str, str]:
    """What device, kernels and nominate_in come to on this machine.

    Raises: ConfigError if it hasn't what is asked for.
    """
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kernels = kernels_of(config.kernels, config.nominate_in, torch.device(device))
    return {"device": device, "kernels": kernels.name, "nominate_in": kernels.nominates_in}


def _n_rows(source: ActivationSource, wiring: Wiring, batch_size: int) -> int | None:
    """Train rows of the place that has fewest; None for a stream."""
    counts = [source.n_rows(each) for each in wiring.hookpoints]
    known = [count for count in counts if count is not None]
    n_rows = min(known) if known else None
    if n_rows is not None and n_rows < batch_size:
        raise SourceError(
            f"{wiring.name} has {n_rows} train rows, fewer than batch_size={batch_size}; harvest "
            "more tokens, or lower batch_size"
        )
    return n_rows


def _require_alignable(config: TrainConfig, wiring: Wiring) -> None:
    """Raises: ConfigError if encoder and decoder are to be aligned but see different places."""
    if config.aligned and not wiring.is_tied:
        raise ConfigError(
            f"aligned=True holds a feature's encoder to its decoder, but {wiring.name} has them at "
            "different places; leave it out"
        )


def progress(config: TrainConfig, step: int) -> float:
    """The fraction of a resolved config's steps that are done."""
    assert config.n_steps is not None
    return step / config.n_steps


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, constant, linear decay to zero at the end.

    config: resolved.
    """
    assert config.lr is not None
    assert config.n_steps is not None
    assert config.warmup_steps is not None
    warmup = (step + 1) / (config.warmup_steps + 1)
    decay_steps = config.decay_fraction * config.n_steps
    decay = (config.n_steps - step) / decay_steps if decay_steps else 1.0
    return config.lr * min(1.0, warmup, decay)
