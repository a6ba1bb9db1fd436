"""Settings that depend on the data or on each other, resolved once; and the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from sae.config import SAEConfig, TrainConfig
from sae.errors import ConfigError, SourceError
from sae.sources import ActivationSource

# Gao et al. 2024, arXiv 2406.04093, section 3: lr falls as 1 / sqrt(d_sae); the constant is that
# of EleutherAI/sparsify.
LR_AT_16384 = 2e-4


def resolve(
    config: TrainConfig, sae_config: SAEConfig, source: ActivationSource, hookpoint: str
) -> TrainConfig:
    """The same settings with nothing left to compute.

    Raises: SourceError if the source holds less than one batch; ConfigError if settings clash.
    """
    n_rows, batch_size = source.n_rows(hookpoint), config.batch_size
    if n_rows is None and not (config.n_steps or config.n_tokens):
        raise ConfigError(
            "a stream of activations has no length: say how long to train, with n_tokens or n_steps"
        )
    if n_rows is not None and n_rows < batch_size:
        raise SourceError(
            f"{hookpoint} has {n_rows} train rows, fewer than batch_size={batch_size}; harvest "
            "more tokens, or lower batch_size"
        )
    n_tokens = config.n_tokens or (n_rows or 0) // batch_size * batch_size
    n_steps = config.n_steps or math.ceil(n_tokens / batch_size)
    resolved: dict[str, Any] = {
        "n_steps": n_steps,
        "n_tokens": None,
        "lr": config.lr or LR_AT_16384 / math.sqrt(sae_config.d_sae / 16384),
        "warmup_steps": min(1000, n_steps // 20)
        if config.warmup_steps is None
        else config.warmup_steps,
        "k_aux": config.k_aux or max(1, source.d_model(hookpoint) // 2),
        "device": config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    }
    if config.nominate_in == "bfloat16" and torch.device(resolved["device"]).type != "cpu":
        raise ConfigError(
            f"nominate_in='bfloat16' is for the CPU, but device is {resolved['device']!r}: its "
            "error bound isn't proven there; set nominate_in to float32"
        )
    return config.model_copy(update=resolved)


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
