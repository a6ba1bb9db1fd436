"""Which rows an SAE is evaluated on: those of a source that it was never trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.config import EvalConfig
from sae.errors import SourceError
from sae.sources import EvaluationSource


class Pair(NamedTuple):
    """x: [batch, d_model], what is encoded. y: what its reconstruction is compared with; for an
    autoencoder x itself."""

    x: Tensor
    y: Tensor


class HeldOutRows:
    """The rows of a split, as often as wanted, float32 on the SAE's device; and the mean of y.

    Raises: SourceError if there is none.
    """

    def __init__(
        self, sae: SAE, source: EvaluationSource, hookpoint: str, config: EvalConfig
    ) -> None:
        self._source, self._hookpoint, self._config = source, hookpoint, config
        self._device = sae.b_dec.device
        total: Tensor | None = None
        n_rows = 0
        for _, y in self:
            part = y.sum(0, dtype=torch.float64)
            total = part if total is None else total + part
            n_rows += len(y)
        if total is None or n_rows == 0:
            raise SourceError(
                f"{hookpoint} has no {config.split} rows to evaluate on; harvest with held-out "
                "documents, or name another split"
            )
        self.mean = total / n_rows

    def __iter__(self) -> Iterator[Pair]:
        config, n_read = self._config, 0
        batches = self._source.batches(
            self._hookpoint, config.batch_size, seed=config.seed, split=config.split
        )
        for x in batches:
            x = x if config.n_rows is None else x[: config.n_rows - n_read]
            n_read += len(x)
            x = x.to(self._device)
            yield Pair(x, x)
            if n_read == config.n_rows:
                return


def fitting_hookpoint(sae: SAE, source: EvaluationSource, hookpoint: str | None) -> str:
    """The hookpoint to evaluate at, if the source's activations there are of the SAE's kind.

    Raises: SourceError if they aren't, or may have been trained on.
    """
    if hookpoint and sae.hookpoint and hookpoint != sae.hookpoint:
        raise SourceError(
            f"this SAE was trained at {sae.hookpoint}, not {hookpoint}; leave hookpoint out, or "
            "load the SAE of that hookpoint"
        )
    hookpoint = hookpoint or sae.hookpoint
    if hookpoint is None:
        raise SourceError("this SAE doesn't say where it was trained; give hookpoint")
    provenance, d_model = source.provenance(hookpoint), source.d_model(hookpoint)
    _require_same_split(provenance, sae.origin.provenance)
    found, expected = provenance.get("model"), sae.origin.provenance.get("model")
    if d_model != sae.d_model:
        raise SourceError(
            f"the source holds d_model={d_model} ({found or 'unknown model'}, {hookpoint}); this "
            f"SAE expects {sae.d_model}. Give the matching cache, or harvest again"
        )
    if found and expected and found != expected:
        raise SourceError(
            f"the source was harvested from {found}; this SAE was trained on {expected}. Give the "
            "matching cache, or harvest again"
        )
    return hookpoint


def _require_same_split(found: dict[str, Any], trained: dict[str, Any]) -> None:
    """Raises: SourceError if rows that count as held out here may have been trained on."""
    if any(found.get(name) != trained.get(name) for name in ("data", "data_revision")):
        return  # another text: none of it was trained on
    here, then = found.get("heldout_fraction"), trained.get("heldout_fraction")
    if here != then:
        raise SourceError(
            f"the source has heldout_fraction={here}, this SAE was trained with {then}: rows that "
            "count as held out here may have been trained on. Open the cache with the same value"
        )
