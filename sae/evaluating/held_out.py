"""Which rows an SAE is evaluated on: those of a source that it was never trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.config import EvalConfig
from sae.errors import SourceError
from sae.reading import Batch, batch_of, widths
from sae.sources import EvaluationSource
from sae.wiring import Wiring, wiring_of


class HeldOutRows:
    """The rows of a split, as often as wanted, float32 on the SAE's device; and the mean of y.

    Raises: SourceError if there is none.
    """

    def __init__(
        self, sae: SAE, source: EvaluationSource, wiring: Wiring, config: EvalConfig
    ) -> None:
        self._source, self._wiring, self._config = source, wiring, config
        self._device = sae.b_dec.device
        total: Tensor | None = None
        n_rows = 0
        for _, y in self:
            part = y.sum(0, dtype=torch.float64)
            total = part if total is None else total + part
            n_rows += len(y)
        if total is None or n_rows == 0:
            raise SourceError(
                f"{wiring.name} has no {config.split} rows to evaluate on; harvest with held-out "
                "documents, or name another split"
            )
        self.mean = total / n_rows

    def __iter__(self) -> Iterator[Batch]:
        config, wiring, n_read = self._config, self._wiring, 0
        batches = self._source.aligned_batches(
            wiring.hookpoints, config.batch_size, seed=config.seed, split=config.split, epochs=1
        )
        for acts in batches:
            batch = batch_of(acts, wiring)
            if config.n_rows is not None:
                batch = batch.first(config.n_rows - n_read)
            n_read += len(batch.x)
            yield batch.to(self._device)
            if n_read == config.n_rows:
                return


def fitting_wiring(sae: SAE, source: EvaluationSource, hookpoint: str | None) -> Wiring:
    """What to evaluate an SAE on, if the source's activations there are of the SAE's kind.

    hookpoint: where, if the SAE doesn't say.
    Raises: SourceError if they aren't, or may have been trained on.
    """
    if hookpoint and sae.wiring and wiring_of(hookpoint) != sae.wiring:
        raise SourceError(
            f"this SAE was trained at {sae.wiring.name}, not {hookpoint}; leave hookpoint out, or "
            "load the SAE of that hookpoint"
        )
    wiring = wiring_of(hookpoint) if hookpoint else sae.wiring
    if wiring is None:
        raise SourceError("this SAE doesn't say where it was trained; give hookpoint")
    _require_same_split(source.provenance(wiring.hookpoints[0]), sae.origin.provenance)
    require_fitting(sae, source, wiring)
    return wiring


def require_fitting(sae: SAE, source: EvaluationSource, wiring: Wiring) -> None:
    """Raises: SourceError if rows of the source can't be what an SAE takes, by width or model."""
    found_widths = [sum(widths(source, each)) for each in (wiring.reads, wiring.writes)]
    provenance = source.provenance(wiring.hookpoints[0])
    found, expected = provenance.get("model"), sae.origin.provenance.get("model")
    if found_widths != [sae.d_model, sae.d_out]:
        raise SourceError(
            f"the source holds d_model={found_widths[0]} at {wiring.name} "
            f"({found or 'unknown model'}); this SAE expects {sae.d_model}. Give the matching "
            "cache, or harvest again"
        )
    if found and expected and found != expected:
        raise SourceError(
            f"the source was harvested from {found}; this SAE was trained on {expected}. Give the "
            "matching cache, or harvest again"
        )


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
