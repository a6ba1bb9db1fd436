"""The architectures by name. One file each: its settings, its equations, and how it selects."""

from __future__ import annotations

from typing import Any

from sae.architectures.base import Architecture
from sae.architectures.batch_topk import BatchTopK, BatchTopKConfig
from sae.architectures.gated import Gated, GatedConfig
from sae.architectures.hierarchical_topk import HierarchicalTopK, HierarchicalTopKConfig
from sae.architectures.jumprelu import JumpReLU, JumpReLUConfig
from sae.architectures.matryoshka import Matryoshka, MatryoshkaConfig
from sae.architectures.relu import ReLU, ReLUConfig
from sae.architectures.topk import TopK, TopKConfig
from sae.config import SAEConfig
from sae.errors import ConfigError

ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        BatchTopK(),
        TopK(),
        Matryoshka(),
        HierarchicalTopK(),
        JumpReLU(),
        Gated(),
        ReLU(),
    )
}


def architecture_of(config: SAEConfig) -> Architecture:
    """The architecture that a config belongs to.

    Raises: ConfigError if it is no architecture's.
    """
    for architecture in ARCHITECTURES.values():
        if type(config) is architecture.config_class:
            return architecture
    known = ", ".join(each.config_class.__name__ for each in ARCHITECTURES.values())
    raise ConfigError(f"{type(config).__name__} is no architecture's config; pass one of {known}")


def config_of(name: str, settings: dict[str, Any]) -> SAEConfig:
    """The config of the architecture called name.

    Raises: ConfigError if there is no such architecture, or a setting is unknown or impossible.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"unknown architecture {name!r}; this version knows {known}")
    return ARCHITECTURES[name].config_class(**settings)


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BatchTopK",
    "BatchTopKConfig",
    "Gated",
    "GatedConfig",
    "HierarchicalTopK",
    "HierarchicalTopKConfig",
    "JumpReLU",
    "JumpReLUConfig",
    "Matryoshka",
    "MatryoshkaConfig",
    "ReLU",
    "ReLUConfig",
    "TopK",
    "TopKConfig",
    "architecture_of",
    "config_of",
]
