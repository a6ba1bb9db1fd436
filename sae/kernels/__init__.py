"""Where a step's time goes: choosing features, sums over codes, and Adam, in tiers of speed."""

from __future__ import annotations

import torch

from sae.errors import ConfigError
from sae.kernels.base import AdamStep, FeatureSums, Kernels, Reconstructed
from sae.kernels.compiled import CompiledKernels
from sae.kernels.selection import PreActs
from sae.kernels.triton_kernels import TritonKernels

TIERS: dict[str, type[Kernels]] = {
    each.name: each for each in (Kernels, CompiledKernels, TritonKernels)
}


def kernels_of(tier: str, nominates_in: str, device: torch.device | str) -> Kernels:
    """The kernels called tier, or the fastest that work on the device ("auto").

    nominates_in: precision that candidates are found in; "auto" is the fastest that the tier has.
    Raises: ConfigError if there are no such kernels, or they don't work here.
    """
    if tier != "auto" and tier not in TIERS:
        raise ConfigError(f"unknown kernels {tier!r}; this version knows {', '.join(TIERS)}")
    on = torch.device(device)
    if tier == "auto":
        chosen = next(each for each in reversed(TIERS.values()) if each.missing(on) is None)
    else:
        chosen = TIERS[tier]
    if (missing := chosen.missing(on)) is not None:
        raise ConfigError(f"kernels {tier!r} don't work on {on}: {missing}; choose others, or auto")
    precisions = chosen.precisions(on)
    if nominates_in != "auto" and nominates_in not in precisions:
        raise ConfigError(
            f"nominate_in={nominates_in!r} is not for kernels {chosen.name!r} on {on}; choose from "
            f"{', '.join(precisions)}, or auto"
        )
    return chosen(precisions[0] if nominates_in == "auto" else nominates_in)


__all__ = [
    "TIERS",
    "AdamStep",
    "CompiledKernels",
    "FeatureSums",
    "Kernels",
    "PreActs",
    "Reconstructed",
    "kernels_of",
]
